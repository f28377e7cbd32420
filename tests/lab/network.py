"""A network of hosts on this machine: one namespace each, joined by the forwarder. Linux, root.

Owns the namespaces, the forwarder's process and a folder for the nodes' files, from construction to `close`. What a
lab left that was killed is removed when the next one starts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab import namespaces
from tests.lab.forwarder import DEVICE
from tests.lab.links import PROFILES, LinkProfile

ROOT = Path(__file__).resolve().parents[2]
SUBNET, OUTSIDE = "10.77.0", "10.77.1"
"""Of hosts, and of what NATs show of those that are behind them."""
MAX_HOSTS = 250
PORT = 4001
FORWARDER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Host:
    name: str
    namespace: str
    address: str
    """IPv4."""
    outside: str
    """What others see instead once it is behind a NAT."""

    @property
    def listen(self) -> str:
        """The multiaddr a node on this host listens on."""
        return f"/ip4/{self.address}/tcp/{PORT}"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run the body of this thread, and all threads and processes that it starts, on this host."""
        with namespaces.entered(self.namespace):
            yield


class Network:
    """Hosts that reach each other through links; from any thread.

    with Network(["a", "b"], seed=1, profile=PROFILES["wifi"]) as network, network["a"].entered():
        …
    """

    def __init__(self, names: Iterable[str], *, seed: int, profile: LinkProfile = PROFILES["loopback"]) -> None:
        """Every link starts with `profile`; `seed` draws losses and jitter. Raises OSError, CalledProcessError."""
        names = list(names)
        assert len(names) <= MAX_HOSTS
        self._lock = threading.Lock()
        self._forwarder: subprocess.Popen[str] | None = None
        prefix = namespaces.own_prefix()
        self.hosts: dict[str, Host] = {}
        self.folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir="/tmp"))
        try:
            namespaces.remove_leftovers()
            for number, name in enumerate(names, 1):
                namespace = f"{prefix}-{self.folder.name.rpartition('-')[2]}-{name}"
                host = Host(name, namespace, f"{SUBNET}.{number}", f"{OUTSIDE}.{number}")
                self.hosts[name] = host
                namespaces.create(host.namespace)
            self._start_forwarder(profile, seed)
            for host in self.hosts.values():
                inside = ("-n", host.namespace)
                namespaces.ip(*inside, "link", "set", "lo", "up")
                namespaces.ip(*inside, "address", "add", f"{host.address}/23", "dev", DEVICE)
                namespaces.ip(*inside, "link", "set", DEVICE, "txqueuelen", "10000", "up")
        except BaseException:  # an interrupt, too, must leave nothing behind
            self.close()
            raise

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def shape(self, profile: LinkProfile, *, source: str | None = None, target: str | None = None) -> None:
        """Give the links from `source` to `target` a profile; None means any."""
        self._order("shape", profile=asdict(profile), source=source, target=target)

    def cut(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Drop in silence what the first of each pair sends to the second."""
        self._order("cut", pairs=pairs)

    def heal(self, pairs: Sequence[tuple[str, str]] | None = None) -> None:
        """Undo `cut`; None: everywhere."""
        self._order("heal", pairs=pairs)

    def around(self, host: str) -> list[tuple[str, str]]:
        """The pairs to cut so that nothing enters or leaves a host."""
        return [pair for other in self.hosts if other != host for pair in ((host, other), (other, host))]

    def between(self, group: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
        """The pairs to cut so that two groups do not reach each other."""
        others = list(others)
        return [pair for one in group for other in others for pair in ((one, other), (other, one))]

    def put_behind_nat(self, host: str) -> None:
        """From now on others see this host at its address `outside`, and only answers to what it sent reach it."""
        self._order("nat", host=host, outside=self.hosts[host].outside)

    def refuse(self, host: str, *, on: bool) -> None:
        """Whether the host's TCP connections are reset, old and new ones."""
        self._order("refuse", host=host, on=on)

    def counts(self) -> dict[str, Any]:
        """What every link carried and dropped so far, and how late the forwarder was; `Fabric.counts`."""
        return self._order("counts")

    def close(self) -> None:
        """End everything on every host and remove it. Idempotent. Raises CalledProcessError when something stays."""
        with ExitStack() as ends:  # each is done whatever becomes of the others
            ends.callback(shutil.rmtree, self.folder, ignore_errors=True)
            ends.callback(self._stop_forwarder)
            for host in self.hosts.values():
                ends.callback(namespaces.remove, host.namespace)
        self.hosts = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start_forwarder(self, profile: LinkProfile, seed: int) -> None:
        hosts = {host.name: (host.namespace, host.address) for host in self.hosts.values()}
        settings = json.dumps({"hosts": hosts, "profile": asdict(profile), "seed": seed})
        self._forwarder = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.forwarder", settings],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for the lab, which then stops it in order
        )
        self._answer()

    def _stop_forwarder(self) -> None:
        if self._forwarder is not None:
            try:
                self._forwarder.communicate(timeout=FORWARDER_TIMEOUT_S)  # the end of its input is its end
            except subprocess.TimeoutExpired:
                self._forwarder.kill()
                self._forwarder.communicate()
            self._forwarder = None

    def _order(self, do: str, **what: object) -> dict[str, Any]:
        with self._lock:
            assert self._forwarder is not None
            assert self._forwarder.stdin is not None
            self._forwarder.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self._forwarder.stdin.flush()
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._forwarder is not None
        assert self._forwarder.stdout is not None
        watchdog = threading.Timer(FORWARDER_TIMEOUT_S, self._forwarder.kill)
        watchdog.start()
        try:
            line = self._forwarder.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise OSError("the lab's forwarder ended or hung; what it said stands above")
        return dict(json.loads(line))

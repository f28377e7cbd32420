"""A whole swarm on this machine: a bootstrap and peers as processes of their own, for tests, demos and notebooks.

Owns the processes and their files; talks to them as anybody could, through `python -m swarm … --json`, signals and
files. Nothing outlives the process that made it: nodes end when their standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeAlias, TypeVar, cast

import psutil

from peers.model.catalog import BUILT_IN, built_in_folder
from peers.model.progress import Progress
from routing.errors import Unavailable
from routing.ids import BlockSpan, BlockSpans
from swarm import nursery

START_TIMEOUT_S = 300.0
"""Seconds on an idle machine; test machines are not."""
STOP_TIMEOUT_S = 30.0
"""Longer than a peer drains."""
TAIL_LINES = 15
LISTEN = "/ip4/127.0.0.1/tcp/0"

N = TypeVar("N", bound="LocalNode")
Blocks: TypeAlias = tuple[int, int] | Sequence[tuple[int, int]]
"""What one peer is to serve: a span, or several."""


class NodeFailed(Unavailable):
    """A node's process did not start, or ended; its notes hold the end of what it wrote to stderr."""

    default_hint = "the notes of this error are the end of its log"


def model_folder(name: str, *, progress: Progress | None = None) -> Path:
    """The local checkpoint folder of a built-in model, fetched first where needed. Raises UnknownModel and others."""
    return built_in_folder(name, progress=progress)


class LocalNode:
    """One `python -m swarm` process, with the libp2p daemon that it starts."""

    def __init__(self, label: str, command: Sequence[str], *, folder: Path, environment: Mapping[str, str]) -> None:
        """`command` is what follows `python -m swarm`. Identity and log lie in `folder`."""
        self.label = label
        self.log = folder / f"{label}.log"
        self.events: list[dict[str, Any]] = []
        """What it said on stdout since it was started last."""
        self._command = (*command, "--identity", str(folder / f"{label}.key"), "--json", "--exit-with-parent")
        self._environment = dict(environment)
        self._listen = LISTEN
        self._process: nursery.Process
        self._stdin: IO[bytes]
        """Open while the process is wanted: it ends when this does."""
        self._news = threading.Condition()
        self._silent = False
        self._start()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}, pid {self.pid}, {'running' if self.running else 'ended'}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def peer_id(self) -> str:
        return str(self._ready["peer_id"])

    @property
    def addresses(self) -> list[str]:
        """Dialable multiaddrs."""
        return list(self._ready["addresses"])

    @property
    def invite(self) -> str:
        """A link into the network, through this node."""
        return str(self._ready["invite"])

    def wait_for(self, event: str, *, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """The first event of this kind since the start. Raises NodeFailed when it does not come."""
        deadline_s = time.monotonic() + timeout_s
        with self._news:
            while True:
                for said in self.events:
                    if said["event"] == event:
                        return said
                left_s = deadline_s - time.monotonic()
                if self._silent or left_s <= 0:
                    break
                self._news.wait(left_s)
        raise self._failure(f"did not say {event!r}" + ("" if self._silent else f" within {timeout_s:.0f} s"))

    def kill(self) -> None:
        """End it the hard way, with its libp2p daemon, as a power cut would."""
        family: list[psutil.Process] = []
        process, stdin = self._process, self._stdin  # of this life: somebody may start it again meanwhile
        if self.running:  # else its process id may be somebody else's by now
            with contextlib.suppress(psutil.NoSuchProcess):
                family = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        psutil.wait_procs(family[1:], timeout=STOP_TIMEOUT_S)
        stdin.close()

    def terminate(self, *, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Ask it to leave, and return its exit code when it has. Raises NodeFailed when it does not."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self._failure(f"did not leave within {timeout_s:.0f} s") from None

    def pause(self) -> None:
        """Stop it where it stands: its daemon keeps connections open, and nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def restart(self, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it again under the same identity and addresses; a running one is killed first."""
        address = self.addresses[0]
        self.kill()
        self._listen = address.partition("/p2p/")[0]
        self._start()
        self.wait_for("ready", timeout_s=timeout_s)

    def close(self) -> None:
        """Ask it to leave, then make sure that nothing of it is left. Idempotent."""
        if self.running:
            self.resume()
            with contextlib.suppress(NodeFailed):
                self.terminate()
        self.kill()

    @property
    def _ready(self) -> dict[str, Any]:
        return self.wait_for("ready", timeout_s=0)

    def _start(self) -> None:
        events: list[dict[str, Any]] = []
        self.events = events
        self._silent = False
        stdin, held = os.pipe()
        said, stdout = os.pipe()
        self._stdin, lines = open(held, "wb"), open(said)  # noqa: SIM115  # they live as long as the process
        try:
            with self.log.open("a") as log:
                self._process = self._launch(
                    [*self._command, "--listen", self._listen], stdin=stdin, stdout=stdout, stderr=log.fileno()
                )
        except BaseException:  # nobody else would close them
            self._stdin.close()
            lines.close()
            raise
        finally:
            os.close(stdin)
            os.close(stdout)
        threading.Thread(target=self._read, args=(self._process, lines, events), name=self.label, daemon=True).start()

    def _launch(self, arguments: Sequence[str], *, stdin: int, stdout: int, stderr: int) -> nursery.Process:
        return nursery.fork(arguments, self._environment, stdin=stdin, stdout=stdout, stderr=stderr)

    def _read(self, process: nursery.Process, lines: IO[str], events: list[dict[str, Any]]) -> None:
        with lines:
            for line in lines:
                with self._news:
                    events.append(json.loads(line))
                    self._news.notify_all()
        with self._news:
            self._silent = self._silent or process is self._process
            self._news.notify_all()

    def _failure(self, what: str) -> NodeFailed:
        if self._silent:  # it is about to end: its last words and its exit code are worth a moment
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        tail = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        said = next((f"{e['message']} ({e['type']})" for e in self.events if e["event"] == "error"), "")
        code = self._process.poll()
        ended = "" if code is None else f"; it ended with exit code {code}"
        error = NodeFailed(f"{self.label} {what}{ended}{': ' if said else ''}{said}", hint=f"its log is {self.log}")
        error.add_note("\n".join((f"--- end of {self.log}", *tail)))
        return error


class LocalPeer(LocalNode):
    """A peer that serves blocks."""

    @property
    def spans(self) -> BlockSpans:
        return BlockSpans.of(*(BlockSpan(*ends) for ends in self._ready["spans"]))

    @property
    def span(self) -> BlockSpan:
        """Of a peer that has one only."""
        (span,) = self.spans
        return span


class LocalSwarm:
    """A bootstrap node and one peer per span or list of spans, on 127.0.0.1, ready to use when constructed.

        with LocalSwarm("smollm2-135m-instruct", spans=[(0, 10), (10, 20), (20, 30)]) as swarm:
            model = SwarmModelForCausalLM.from_pretrained(…, initial_peers=swarm.initial_peers)

    Raises NodeFailed when a node does not start; then nothing of the others is left either.
    """

    bootstrap: LocalNode
    peers: list[LocalPeer]

    def __init__(
        self,
        model: str | Path,
        spans: Sequence[Blocks] = (),
        *,
        dtype: str = "float32",
        quantize: str = "none",
        device: str = "cpu",
        threads: int = 1,
        cache_tokens: int | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`threads`: of each peer. `environment` is added to this process's own. `progress`: of a first download."""
        self.model = str(model)
        self.peers = []
        self._folder = Path(tempfile.mkdtemp(prefix="local-swarm-"))
        self._start_timeout_s = start_timeout_s
        self._options = ["--dtype", dtype, "--quantize", quantize, "--device", device, "--threads", str(threads)]
        if cache_tokens is not None:
            self._options += ["--cache-tokens", str(cache_tokens)]
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(environment or {})
        self._started = 0
        self._nodes: list[LocalNode] = []
        try:
            if self.model in BUILT_IN:
                model_folder(self.model, progress=progress)
            self.bootstrap = self._node(LocalNode, "bootstrap", ["bootstrap"])
            self.bootstrap.wait_for("ready", timeout_s=start_timeout_s)
            for span in spans:
                self._spawn(span)
            for peer in self.peers:
                peer.wait_for("ready", timeout_s=start_timeout_s)
        except BaseException:  # an interrupt, too, must leave nothing behind
            self.close()
            raise

    @property
    def initial_peers(self) -> list[str]:
        return self.bootstrap.addresses

    @property
    def invite(self) -> str:
        return self.bootstrap.invite

    def add_peer(
        self, span: Blocks | None, *arguments: str, model: str | Path | None = None, wait: bool = True
    ) -> LocalPeer:
        """One more peer; `span` None lets it choose. `arguments` are added to `swarm join`. Raises NodeFailed."""
        peer = self._spawn(span, *arguments, model=model)
        if wait:
            try:
                peer.wait_for("ready", timeout_s=self._start_timeout_s)
            except NodeFailed:
                self.peers.remove(peer)
                peer.close()
                raise
        return peer

    def close(self) -> None:
        """Stop everything, peers first, and remove their files. Idempotent."""
        if self.peers:
            with ThreadPoolExecutor(len(self.peers)) as pool:
                list(pool.map(LocalNode.close, self.peers))
        for node in self._nodes:
            node.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _spawn(self, span: Blocks | None, *arguments: str, model: str | Path | None = None) -> LocalPeer:
        blocks = [] if span is None else ["--blocks", _text(span)]
        entry = [part for address in self.initial_peers for part in ("--initial-peers", address)]
        command = ["join", str(model or self.model), *entry, *blocks, *self._options, *arguments]
        peer = self._node(LocalPeer, f"peer-{self._started}", command)
        self._started += 1
        self.peers.append(peer)
        return peer

    def _node(self, kind: type[N], label: str, command: Sequence[str]) -> N:
        node = kind(label, command, folder=self._folder, environment=self._environment)
        self._nodes.append(node)
        return node


def _text(blocks: Blocks) -> str:
    spans = [blocks] if isinstance(blocks[0], int) else blocks
    return ",".join(f"{start}:{end}" for start, end in cast(Sequence[tuple[int, int]], spans))

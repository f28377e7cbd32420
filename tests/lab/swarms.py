"""A swarm on a lab's hosts: real nodes, each on a host of its own, users, and what happens to nodes.

Owns the processes and the users' models until `close`. Nodes are what `swarm bootstrap` and `swarm join` start.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from routing.ids import BlockSpan, BlockSpans
from swarm import SwarmModelForCausalLM, nursery
from swarm.session.driver import SwarmRemote
from swarm.session.remote import Resilience
from swarm.testing import LocalNode, LocalPeer, model_folder
from tests.lab import namespaces, pacer
from tests.lab.network import ROOT, Host, Network

HOOKS: Final = Path(__file__).parent / "hooks"
PACE_S: Final = 0.02
"""One turn of running and standing still: short, or a fast machine computes a whole step while it runs, and what the
peer says it took is what it takes otherwise."""
METRICS_PORT: Final = 9100
METRICS: Final = ("--metrics-port", str(METRICS_PORT))
"""What a peer is started with that is to be asked what it computed."""
METRICS_TIMEOUT_S: Final = 20.0


class LabNode(LocalNode):
    """A node on a host of the lab, at the host's address."""

    def __init__(
        self, host: Host, command: Sequence[str], *, folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.host = host
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {})
        super().__init__(host.name, command, folder=folder, environment=environment)

    def kill(self) -> None:
        for process in self._family():
            namespaces.kill(process)
        super().kill()

    def freeze(self) -> None:
        """Stop the whole node where it stands, its libp2p daemon too."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    @contextmanager
    def slowed(self, share: float) -> Iterator[None]:
        """Let the node (not its daemon) run for this share of the time only."""
        command = [sys.executable, "-m", pacer.__name__, str(self.pid), str(share), str(PACE_S)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe) as pacing:
            assert pacing.stdout is not None
            pacing.stdout.readline()
            yield  # leaving it ends the pacer's input, and waits for its end

    def _family(self) -> list[psutil.Process]:
        if self.running:  # else its process id may be somebody else's by now
            with contextlib.suppress(psutil.NoSuchProcess):
                return [me := psutil.Process(self.pid), *me.children(recursive=True)]
        return []

    def _signal(self, number: signal.Signals) -> None:
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _start(self) -> None:
        self._listen = self.host.listen
        with self.host.entered():
            super()._start()

    def _launch(self, arguments: Sequence[str], *, stdin: int, stdout: int, stderr: int) -> nursery.Process:
        """From this very thread, which has entered the host: a nursery is where it was made."""
        return nursery.execute(arguments, self._environment, stdin=stdin, stdout=stdout, stderr=stderr)


class LabPeer(LabNode, LocalPeer):
    """A peer that serves blocks."""

    @property
    def is_ready(self) -> bool:
        """Whether it has said so since it was started last."""
        return any(event["event"] == "ready" for event in self.events)

    @property
    def computed_positions(self) -> int:
        """Since it was started last, by its own account: for all sessions, and none of them left out. See METRICS."""
        with self.host.entered():
            asked = http.client.HTTPConnection("127.0.0.1", METRICS_PORT, timeout=METRICS_TIMEOUT_S)
            with contextlib.closing(asked):
                asked.request("GET", "/metrics")
                families = text_string_to_metric_families(asked.getresponse().read().decode())
        (tokens,) = (family for family in families if family.name == "hiveswarm_peer_tokens")
        return round(sum(sample.value for sample in tokens.samples))

    @property
    def serves(self) -> BlockSpans:
        """The blocks that it said last it serves: of its own accord it may have moved. Once it is ready."""
        said = [event["spans"] for event in self.events if event["event"] in ("ready", "moved")]
        return BlockSpans.of(*(BlockSpan(*ends) for ends in said[-1]))


@dataclass(slots=True)
class Answer:
    """What a user got, and when (on the monotonic clock)."""

    started_s: float
    ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    """One per token."""

    @property
    def gaps_s(self) -> list[float]:
        """What each token but the first took."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times_s)]

    @property
    def tokens_per_s(self) -> float:
        """From the first token on."""
        return (len(self.times_s) - 1) / (self.times_s[-1] - self.times_s[0])

    def longest_gap_s(self, since_s: float) -> float:
        """The longest wait for a token, counted from `since_s` where it began before; the first one's is a wait too."""
        from_s, until_s = self.longest_gap(since_s)
        return until_s - from_s

    def longest_gap(self, since_s: float) -> tuple[float, float]:
        """From when to when that was."""
        waits = itertools.pairwise([self.started_s, *self.times_s])
        gaps = ((max(earlier, since_s), later) for earlier, later in waits if later > since_s)
        return max(gaps, key=lambda gap: gap[1] - gap[0], default=(since_s, since_s))


class User:
    """A client on a host of its own."""

    def __init__(self, host: Host, model: str, initial_peers: Sequence[str], resilience: Resilience) -> None:
        self.host = host
        with host.entered():
            self.model: Any = SwarmModelForCausalLM.from_pretrained(
                model, initial_peers=initial_peers, dtype=torch.float32, resilience=resilience
            )

    @property
    def remote(self) -> SwarmRemote:
        """What carries the model's steps, and counts them."""
        remote = self.model._remote_layers.remote
        assert isinstance(remote, SwarmRemote)
        return remote

    @property
    def frames_sent(self) -> int:
        """Bytes of whole frames to peers, whatever they are about; the directory's come on top."""
        return self.remote._client.links.volume.sent_bytes

    @property
    def route(self) -> list[str]:
        """The peer ids of the present route."""
        return [] if self.model.route is None else [hop.peer_id for hop in self.model.route.hops]

    def generate(self, prompt: Sequence[int], count: int, *, on_token: Callable[[int], None] | None = None) -> Answer:
        """`count` greedy tokens; `on_token` is told how many there are, in this thread, before the next is asked for.

        Raises SwarmError.
        """
        answer = Answer(time.monotonic())
        streamer = _Streamer(answer, on_token)
        answer.ids = generate(self.model, prompt, count, streamer=streamer)
        return answer

    def close(self) -> None:
        self.model.close()


class _Streamer:
    def __init__(self, answer: Answer, on_token: Callable[[int], None] | None) -> None:
        self._answer = answer
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, _: torch.Tensor) -> None:
        if self._prompt_seen:
            self._answer.times_s.append(time.monotonic())
            if self._on_token is not None:
                self._on_token(len(self._answer.times_s))
        self._prompt_seen = True

    def end(self) -> None:
        pass


def generate(model: Any, prompt: Sequence[int], count: int, **options: Any) -> list[int]:
    """`count` greedy ids of any Hugging Face model."""
    prompt_1T = torch.tensor([list(prompt)])
    limits = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    output_1T = model.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), **limits, **options)
    return list(output_1T[0, len(prompt) :].tolist())


def hooked(**settings: str) -> dict[str, str]:
    """The environment of a node to which something is done from within: see `hooks/sitecustomize`."""
    return settings | {"PYTHONPATH": os.pathsep.join((str(HOOKS), str(ROOT)))}


class LabSwarm:
    """Bootstraps, peers and users on the hosts of a network that has one for each; ready when constructed.

    Raises NodeFailed when a node does not start; then nothing of the others is left either.
    """

    def __init__(
        self,
        network: Network,
        model: str,
        peers: Mapping[str, tuple[int, int] | None],
        *,
        entries: Sequence[str] = ("entry",),
        options: Sequence[str] = (),
        environment: Callable[[str], Mapping[str, str]] | None = None,
    ) -> None:
        """`peers`: span by host; None lets it choose. `entries`: the hosts of the bootstraps. Peers get `options` and,
        by host, `environment` besides."""
        model_folder(model)  # fetched by now: hosts here reach nobody but each other
        self.network = network
        self._options = options
        self._environment = environment
        self.model = model
        self.entries: list[LabNode] = []
        self.peers: dict[str, LabPeer] = {}
        self.users: list[User] = []
        try:
            for name in entries:
                entry = LabNode(network[name], ["bootstrap", *self._dial()], folder=network.folder)
                self.entries.append(entry)
                entry.wait_for("ready")
            for name, span in peers.items():
                self.add_peer(name, span, wait=False)
            for peer in self.peers.values():
                peer.wait_for("ready")
        except BaseException:  # an interrupt, too, must leave nothing behind
            self.close()
            raise

    @property
    def initial_peers(self) -> list[str]:
        return [address for entry in self.entries for address in entry.addresses]

    def add_peer(self, host: str, span: tuple[int, int] | None, *arguments: str, wait: bool = True) -> LabPeer:
        """Start a peer on a host that has none; `span` None lets it choose. Raises NodeFailed."""
        blocks = [] if span is None else ["--blocks", f"{span[0]}:{span[1]}"]
        options = ["--dtype", "float32", "--device", "cpu", "--threads", "1", "--name", host]
        command = ["join", self.model, *self._dial(), *blocks, *options, *arguments]
        command += self._options
        environment = None if self._environment is None else self._environment(host)
        peer = LabPeer(self.network[host], command, folder=self.network.folder, environment=environment)
        self.peers[host] = peer
        if wait:
            peer.wait_for("ready")
        return peer

    def add_user(self, host: str, *, resilience: Resilience = "replay") -> User:
        user = User(self.network[host], self.model, self.initial_peers, resilience)
        self.users.append(user)
        namespaces.note_sockets(user.host.namespace, self.network.folder)
        return user

    def of(self, peer_id: str) -> LabPeer:
        """The peer with this id."""
        return next(peer for peer in self.peers.values() if peer.is_ready and peer.peer_id == peer_id)

    def serving(self, user: User) -> list[LabPeer]:
        """The peers of a user's present route, in order."""
        return [self.of(peer_id) for peer_id in user.route]

    def revive(self) -> None:
        """Start every peer again that was killed, and let it be ready."""
        dead = [peer for peer in self.peers.values() if not peer.running]
        if dead:
            with ThreadPoolExecutor(len(dead)) as pool:
                list(pool.map(LabPeer.restart, dead))

    def close(self) -> None:
        """Idempotent."""
        for user in self.users:
            user.close()
        nodes = [*self.peers.values(), *self.entries]
        if nodes:
            with ThreadPoolExecutor(len(nodes)) as pool:
                list(pool.map(LabNode.kill, nodes))  # nobody is left to whom leaving in order would matter
        self.users, self.peers, self.entries = [], {}, []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _dial(self) -> list[str]:
        return [part for address in self.initial_peers for part in ("--initial-peers", address)]

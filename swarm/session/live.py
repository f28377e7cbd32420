"""What the driver, its inbox and its watch share: the live sessions of one model, and what was measured of them.

Everything here is touched by the network's loop only, save for a session's `length`.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import torch
from msgspec.structs import replace

from peers.model.adapters import Adapter
from peers.tally import StepTimes
from peers.wire import tensors
from peers.wire.messages import MAX_POSITIONS, Failed, Opened, Result, Step
from routing.errors import SwarmError
from routing.ids import BlockSpan, ModelId, PeerId, SessionId, StepId
from routing.records import HostedAdapter
from routing.routes import Hop, Route
from swarm.network import ClientNode
from swarm.session.actions import Action, SendStep
from swarm.session.calls import Piece
from swarm.session.core import SessionCore
from swarm.session.history import History
from swarm.session.kept import KeptPrompts
from swarm.session.pace import Pace
from swarm.session.remote import RemoteSession
from swarm.session.steps import PendingStep
from swarm.session.uploads import Uploads

SILENCE_S_MAX = 30.0
MAX_CLAIM_S = 60.0
"""More than this no hops are believed to have taken for a step."""


class HopTiming(msgspec.Struct, frozen=True, kw_only=True):
    """What one hop reported of one step."""

    peer: PeerId
    span: BlockSpan
    queue_s: float
    compute_s: float


@dataclass(slots=True)
class Traffic:
    """What this client sent and heard; read by `generate --json`, benchmarks and tests."""

    steps: int = 0
    results: int = 0
    relays: int = 0
    rebuilds: int = 0
    replays: int = 0
    """Steps that went back further than layers with a window hold, and so were sent with all that came before."""
    prefix_positions: int = 0
    """Positions not sent, because every hop of a route held them already when it was opened."""
    replayed_positions: int = 0
    """Positions that a hop sent again from its journal, so that this client did not."""
    standby_positions: int = 0
    """Sent to standbys, most of them by hops."""
    switches: int = 0
    """Hops whose place a standby took."""
    bytes_sent: int = 0
    bytes_received: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """What hops declined by code, `other` for codes that are not known here, and `lost` for hops that failed."""
    step_s: StepTimes = field(default_factory=lambda: StepTimes(("queue", "compute", "network")))
    """Of all hops together, as they say, and what else passed between two answers."""

    def answered(self, positions: int, hops: Sequence[tuple[float, float]], elapsed_s: float) -> None:
        """`hops`: seconds of queue and compute that each hop claims."""
        queue_s = min(MAX_CLAIM_S, sum(queue_s for queue_s, _ in hops))
        compute_s = min(MAX_CLAIM_S, sum(compute_s for _, compute_s in hops))
        self.step_s.add(positions, queue_s, compute_s, max(0.0, elapsed_s - queue_s - compute_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    """What the driver has to know of a model."""

    model: ModelId
    num_blocks: int
    hidden_size: int
    regime_key: Callable[[int], object]
    """Lengths with equal keys may share one forward (`peers.model` RotaryRegime)."""
    min_precision: str | None = None
    """Of the peers that are asked (`routing.precision`); None for any."""
    adapter: str | None = None
    """That they host, as of `routing.hosting`; None for the model as it is."""


class LiveSession(RemoteSession):
    """One sequence."""

    __slots__ = (
        "adapter",
        "asked_at_s",
        "began_s",
        "believed_until_s",
        "busy_since_s",
        "core",
        "deadline_s",
        "dtype",
        "expects",
        "heard_at_s",
        "history",
        "idle_looks",
        "looks",
        "offered",
        "outbox",
        "pace",
        "parent",
        "pieces",
        "prefix_secret",
        "prompt_keys",
        "pumping",
        "reconsider_at_s",
        "relayed_to",
        "relaying",
        "relays",
        "review_at_s",
        "room",
        "route",
        "rows",
        "silence_s",
        "standby",
        "timed_step",
        "timings",
        "told",
        "trips_s",
        "waiting",
    )

    def __init__(
        self,
        parent: tuple[LiveSession, int] | None,
        prefix_secret: bytes,
        *,
        standby: bool,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__(0 if parent is None else parent[1])
        self.adapter: Adapter | None = adapter if parent is None else parent[0].adapter
        """Of this client's own, which every hop is sent its part of."""
        self.standby = standby
        """Whether a second peer is kept filled for every hop."""
        self.parent = parent
        self.prefix_secret = prefix_secret
        """Only sessions with the same one begin with what peers hold of each other's prompts."""
        self.core: SessionCore | None = None
        self.history = History()
        self.pieces: dict[StepId, Piece] = {}
        """Steps that somebody waits for."""
        self.rows: dict[StepId, tuple[torch.Tensor, int]] = {}
        self.room: tensors.Room | None = None
        """For the answer of the call that was begun last, where that is one row."""
        self.expects = 0
        """Positions that it may come to hold, as its last step says; 0: nobody knows."""
        self.told: int = 0 if parent is None else parent[0].told
        """And as the hops of the present route were told, MAX_POSITIONS where nobody knew."""
        self.outbox: deque[SendStep] = deque()
        self.pumping = False
        self.relays: deque[tuple[Hop, Step, memoryview]] = deque()
        """To be carried from one hop to the next."""
        self.relaying = False
        self.relayed_to: set[PeerId] = set()
        """To whom that was begun on the present route."""
        self.route: Route | None = None
        """The last one that was planned for this session."""
        self.dtype = ""
        """In which its rows travel."""
        self.prompt_keys: tuple[bytes, ...] = ()
        """Of the prompt that its first route was planned for, until something is answered."""
        self.offered = 0
        """Positions that the hops of the present route were asked for."""
        self.timings: dict[tuple[PeerId, BlockSpan], HopTiming] = {}
        """What hops reported of the present call's steps, each its sum."""
        self.timed_step: tuple[StepId, float] | None = None
        """A step of one position that is under way by itself, and when it left."""
        self.trips_s: list[float] = []
        """Of the present route, not told yet."""
        self.pace = Pace()
        self.heard_at_s = 0.0
        self.deadline_s = 0.0
        """When somebody should have been heard: half of `silence_s` before it is given up."""
        self.silence_s = 0.0
        self.idle_looks = 0
        self.busy_since_s: dict[PeerId, float] = {}
        """Of hops that said at every look since then that they compute."""
        self.believed_until_s = math.inf
        """By then one of them is to be asked again."""
        self.asked_at_s: dict[PeerId, float] = {}
        """When each standby was asked for something last."""
        self.reconsider_at_s = self.review_at_s = 0.0
        """Until then nobody asks whether another route is better: where steps have become slow, and where not."""
        self.looks = 0
        """How often that was asked of the present route, as it had become slow."""
        self.began_s = 0.0
        """When that was opened."""
        self.waiting = False
        """Somebody should be heard."""

    @property
    def longest(self) -> int:
        """How long it may become; MAX_POSITIONS where nobody knows, as where it is longer by now than was said."""
        pending = () if self.core is None else self.core.pending
        length = max((step.first + step.count for step in pending), default=self.length)
        return min(self.expects, MAX_POSITIONS) if self.expects >= length > 0 else MAX_POSITIONS

    def begin(self, route: Route, *, review_in_s: float) -> None:
        """Another route: how fast it is, its answers will tell."""
        self.route, self.pace, self.looks = route, Pace(), 0
        self.trips_s.clear()
        self.relayed_to.clear()
        self.renew_deadline()
        self.began_s = self.reconsider_at_s = self.heard_at_s
        self.review_at_s = self.began_s + review_in_s

    def answered(self, positions: int, timings: Sequence[HopTiming]) -> float:
        """A step over so many positions was, and hops reported so of it; returns the seconds since the last sign of
        life."""
        elapsed_s = asyncio.get_running_loop().time() - self.heard_at_s
        self.pace.answered(positions, elapsed_s, ((hop.peer, hop.queue_s + hop.compute_s) for hop in timings))
        self.renew_deadline()
        for hop in timings:
            before = self.timings.get((hop.peer, hop.span))
            if before is not None:
                hop = replace(hop, queue_s=before.queue_s + hop.queue_s, compute_s=before.compute_s + hop.compute_s)
            self.timings[hop.peer, hop.span] = hop
        return elapsed_s

    def note_waiting(self) -> None:
        """Somebody should be heard from now on, or nobody."""
        assert self.core is not None
        if self.core.outstanding and not self.waiting:
            self.renew_deadline()
        self.waiting = self.core.outstanding

    def renew_deadline(self) -> None:
        """Something was heard of it, or is asked for from now on."""
        assert self.core is not None
        self.silence_s = self.pace.silence_s(max((step.count for step in self.core.pending), default=1))
        self.idle_looks = 0
        self.busy_since_s.clear()
        self.believed_until_s = math.inf
        self.heard_at_s = asyncio.get_running_loop().time()
        self.deadline_s = self.heard_at_s + self.silence_s / 2

    def look_again(self, *, soon: bool) -> None:
        """All hops live: ask again within the silence that is tolerated, or after a longer one."""
        if soon:
            self.deadline_s = asyncio.get_running_loop().time() + self.silence_s / 8
        else:
            self.silence_s = min(SILENCE_S_MAX, self.silence_s * 2)
            now_s = asyncio.get_running_loop().time()
            believed_until_s = self.believed_until_s if self.believed_until_s > now_s else math.inf
            self.deadline_s = min(now_s + self.silence_s, believed_until_s)


@dataclass(slots=True, kw_only=True)
class Sessions:
    """All of one model's, at one client."""

    model: RemoteModel
    client: ClientNode
    uploads: Uploads
    by_id: dict[SessionId, LiveSession] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    kept: KeptPrompts = field(default_factory=KeptPrompts)
    hosted: HostedAdapter | None = None
    """The adapter of the model that peers host, once it is known which that is."""
    last_route: Route | None = None
    """The one that was installed last."""
    last_hops: tuple[HopTiming, ...] = ()
    """Of the step that was answered last."""
    observer: Observer | None = None
    trials: dict[SessionId, tuple[PeerId, asyncio.Queue[Opened | Result | Failed]]] = field(default_factory=dict)
    """Of no user: who is tried, and where its answers go."""

    def crowd(self, session: LiveSession) -> int:
        """Those that send much now, with this one."""
        cores = (other.core for other in self.by_id.values() if other is not session)
        return 1 + sum(core is not None and core.sends_much for core in cores)

    def adapter_of(self, session: LiveSession) -> bytes | None:
        """The name of that which is added to the model in this session, wherever it stands."""
        if self.hosted is not None:
            return self.hosted.digest
        return None if session.adapter is None else session.adapter.name


class Observer(Protocol):
    """Is told what happens to sessions, in the network's loop, and returns at once."""

    def acted(self, session: SessionId, action: Action) -> None:
        """A session's core decided this, and it is about to be done."""
        ...

    def answered(
        self, session: SessionId, step: PendingStep, hops: Sequence[Hop], timings: Sequence[tuple[float, float]]
    ) -> None:
        """`hops` ran the step; `timings`: the seconds of queue and compute that they claim, perhaps not all of them."""
        ...

    def lost(self, peer: PeerId) -> None:
        """A hop failed."""
        ...


class Driver(Protocol):
    """Who carries out what a session's core decides."""

    def perform(self, session: LiveSession, actions: Sequence[Action], *, rows: torch.Tensor | None = None) -> None:
        """`rows`: the result that the actions follow from."""
        ...

    def lose(self, session: LiveSession, peer: PeerId, error: SwarmError) -> None:
        """A hop of this session failed it."""
        ...

    def reconsider(self, session: LiveSession) -> None:
        """A step was answered: is its route still a good one?"""
        ...

    def blame(self, peer: PeerId, error: SwarmError) -> None:
        """A peer failed somebody."""
        ...

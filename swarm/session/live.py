"""What the driver, its inbox and its watch share: the live sessions of one model, and what was measured of them.

Everything here is touched by the network's loop only, save for a session's `length`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from peers.wire.messages import Step
from routing.errors import SwarmError
from routing.ids import ModelId, PeerId, SessionId, StepId
from routing.router import Route
from swarm.network import ClientNode
from swarm.session.core import Action, SendStep, SessionCore
from swarm.session.history import History
from swarm.session.remote import RemoteSession

SILENCE_S = 3.0
"""Nothing heard for this long: ask every hop whether it is alive. Doubles while all of them are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopTiming:
    """What one hop reported of one step."""

    peer: PeerId
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
    bytes_sent: int = 0
    bytes_received: int = 0


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


class LiveSession(RemoteSession):
    """One sequence."""

    __slots__ = (
        "core",
        "deadline_s",
        "futures",
        "history",
        "idle_looks",
        "offered",
        "outbox",
        "parent",
        "prefix_secret",
        "pumping",
        "route",
        "rows",
        "silence_s",
    )

    def __init__(self, parent: tuple[LiveSession, int] | None, prefix_secret: bytes) -> None:
        super().__init__(0 if parent is None else parent[1])
        self.parent = parent
        self.prefix_secret = prefix_secret
        """Only sessions with the same one begin with what peers hold of each other's prompts."""
        self.core: SessionCore | None = None
        self.history = History()
        self.futures: dict[StepId, asyncio.Future[torch.Tensor]] = {}
        self.rows: dict[StepId, tuple[torch.Tensor, int]] = {}
        self.outbox: deque[SendStep] = deque()
        self.pumping = False
        self.route: Route | None = None
        """The last one that was planned for this session."""
        self.offered = 0
        """Positions that the hops of the present route were asked for."""
        self.deadline_s = 0.0
        self.silence_s = SILENCE_S
        self.idle_looks = 0

    def renew_deadline(self) -> None:
        """Something was heard of it."""
        self.silence_s = SILENCE_S
        self.idle_looks = 0
        self.deadline_s = asyncio.get_running_loop().time() + self.silence_s


@dataclass(slots=True, kw_only=True)
class Sessions:
    """All of one model's, at one client."""

    model: RemoteModel
    client: ClientNode
    by_id: dict[SessionId, LiveSession] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    last_route: Route | None = None
    """The one that was installed last."""
    last_hops: tuple[HopTiming, ...] = ()
    """Of the step that was answered last."""


class Driver(Protocol):
    """Who carries out what a session's core decides."""

    def perform(self, session: LiveSession, actions: Sequence[Action], *, rows: torch.Tensor | None = None) -> None:
        """`rows`: the result that the actions follow from."""
        ...

    def lose(self, session: LiveSession, peer: PeerId, error: SwarmError) -> None:
        """A hop of this session failed it."""
        ...

    def blame(self, peer: PeerId, reason: str) -> None:
        """A peer failed somebody."""
        ...

    async def send_to(
        self, session: LiveSession, peer: PeerId, addresses: Sequence[str], message: Step, payload: memoryview
    ) -> None:
        """Send a step to one hop of the session's route."""
        ...

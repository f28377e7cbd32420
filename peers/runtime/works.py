"""What an engine is given, and what comes of it: its configuration, works and their results, errors, and its numbers.

Knows no thread, no queue and no device.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from peers.model.adapters import Adapter
from peers.runtime.graphs import GRAPH_BYTES
from peers.runtime.scheduler import MIN_TOKEN_BUDGET
from peers.runtime.sizing import WORK_TOKENS
from peers.tally import Tally
from peers.wire.messages import MAX_POSITIONS, Urgency
from routing.errors import CallerError, PeerError
from routing.ids import BlockSpan, PeerId, Place, SessionId

SessionKey: TypeAlias = SessionId | Place
"""What names a session here; it is only compared."""
Sharing = Literal["owner", "network"]


class PositionGap(CallerError):
    """The work starts behind what its session (or parent) holds here; send the positions from `held` on first."""

    def __init__(self, start: int, held: int) -> None:
        super().__init__(f"position gap: the step starts at {start}, this peer holds {held}")
        self.held = held


class BehindWindow(CallerError):
    """Layers of a session (or parent) that slide do not hold what this position sees any more; send everything from
    position 0 on. Never raised where the session goes back by no more than `EngineConfig.slack`."""

    def __init__(self, start: int) -> None:
        super().__init__(f"the step goes back to {start}, behind what layers with a window keep: replay from 0")


class SessionReleased(CallerError):
    """The session was released while this work was queued or running."""


class CacheTooSmall(PeerError):
    """The whole cache of this peer does not hold a session of that length; another peer's may."""


class ComputeFailed(PeerError):
    """The forward raised; the sessions in it keep the positions that they held before."""


class NonFiniteOutput(ComputeFailed):
    """The model made NaN or infinity of this session's input; other sessions are unharmed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    cache_tokens: int
    """Positions that all sessions together may hold, rounded down to whole pages."""
    page_size: int = 16
    """Positions per page. Small pages waste little per session; contiguous runs make their number cheap."""
    token_budget: int = WORK_TOKENS
    """Positions per forward, at most, until the peer has measured how many it should be (`Engine.set_token_budget`).
    Fewer where somebody's next token would be late (see `scheduler.Tempo`)."""
    threads: int = 1
    """CPU threads of torch in a forward, and of the library's products unless they are given."""
    slack: int = 64
    """Positions that a session can go back at any time; layers that see no further than a window keep so many more, so
    that speculation never meets their end."""
    max_queued_tokens: int = 16384
    """Of one owner's steps, or of its longer works, while nothing else is queued; fewer beside others, and twice
    so many at most (`scheduler.Scheduler.has_room`). Beyond it callers are told to come back, before their tensors pile
    up in memory."""
    graph_bytes: int = GRAPH_BYTES
    """Of a GPU's memory, for CUDA graphs of steps."""
    share_prefixes: Sharing = "owner"
    """Whose sessions may begin with positions that another one computed. With "network" anybody's, given the same keys:
    for swarms whose members trust each other, as answers then come sooner for what somebody asked before, and whoever
    sends other positions than its keys stand for misleads everybody."""

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.cache_tokens < self.page_size:
            raise ValueError(f"{self.cache_tokens} cache tokens do not make one page of {self.page_size}")
        if self.token_budget < MIN_TOKEN_BUDGET:
            raise ValueError(f"token_budget is at least {MIN_TOKEN_BUDGET}, not {self.token_budget}")
        if self.threads < 1 or self.max_queued_tokens < 1 or self.slack < 0:
            raise ValueError("threads and max_queued_tokens are at least 1, slack at least 0")

    @property
    def work_tokens(self) -> int:
        """Of the largest work that memory is reckoned with, however many of them a forward may hold."""
        return min(self.token_budget, WORK_TOKENS)

    def scope(self, owner: PeerId, span: BlockSpan, adapter: bytes | None) -> Hashable:
        """Within which the keys of a prefix stand for the same positions, and may be used."""
        return span, adapter, owner if self.share_prefixes == "owner" else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """Run `hidden` (positions `start`, `start + 1`, …) of one session through `span`."""

    session: SessionKey
    owner: PeerId
    start: int
    hidden: Tensor
    """[n, hidden_size], on the CPU, any floating dtype."""
    span: BlockSpan
    """Blocks to run; within the span of the model."""
    regime_length: int = 0
    """Total length of the user's forward that this work is a part of; 0 when it is the whole."""
    adapter: Adapter | None = None
    """Of these blocks; the same in all works of a session and its forks. Positions count from behind its prefix."""
    told: int = MAX_POSITIONS
    """So long may the session become by its client's word; with more it gives way before all others."""
    parent: tuple[SessionKey, int] | None = None
    """Begin the (new) session with that many positions of another one, as it is when this work is submitted."""
    urgency: Urgency = Urgency.INTERACTIVE

    @property
    def end(self) -> int:
        return self.start + len(self.hidden)

    @property
    def longest(self) -> int:
        """Length of the user's forward."""
        return max(self.regime_length, self.end)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Done:
    hidden: Tensor
    """[n, hidden_size], on the CPU, in the model's dtype; nobody else's memory."""
    queue_s: float
    """From submission to completion, less `compute_s`."""
    compute_s: float
    """Length of the forwards that this work took part in, whoever else was in them, less what ran in their pauses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    total_tokens: int
    free_tokens: int
    """No session holds these, though prefixes may be kept there until somebody needs the room."""
    longest_tokens: int
    """What one session alone may hold: more than `total_tokens` where layers slide."""
    room_tokens: int
    """What one session more may hold: more than `free_tokens` where layers slide."""
    queued_tokens: int
    sessions: int
    kept_tokens: int = 0
    """In the pages that are free but for a prefix."""
    prefix_hits: int = 0
    """Sessions that began with positions of another one."""
    prefix_tokens: int = 0
    """With how many, all of them together."""
    pages: int = 0
    free_pages: int = 0
    """As `free_tokens`."""
    kept_pages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounts:
    """What an engine does and did since its start."""

    works: int
    """Queued or running."""
    preemptions: int
    batch_works: Tally
    """Works in each forward."""
    batch_tokens: Tally
    """Positions in each forward."""

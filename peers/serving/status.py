"""What this peer says of itself to who asks by a ping with `detail`: made at most once a second, and bounded.

Owns the collecting; the host says what only it knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch

from peers.serving.handler import Handler
from peers.wire.messages import MAX_STATUS_ENTRIES, Opinion, RoundTrip, Status
from routing.ids import BlockSpans
from routing.router import Router

FRESH_S = 1.0
"""Who asks more often gets the same answer again."""
MAX_REASON_CHARS = 128


@dataclass(slots=True)
class StatusReport:
    """Gives the present `Status`. `clock` as the handler's; `discovery_s` is the clock that the router is told."""

    handler: Handler
    router: Router
    memory_offered_bytes: int
    device: str
    discovery_s: Callable[[], float]
    clock: Callable[[], float] = time.monotonic
    moved: tuple[BlockSpans, float] | None = None
    """What was served before, and when that ended."""
    _started_s: float = field(init=False)
    _made: tuple[float, Status] | None = None

    def __post_init__(self) -> None:
        self._started_s = self.clock()

    def __call__(self) -> Status:
        now_s = self.clock()
        if self._made is None or now_s - self._made[0] >= FRESH_S:
            self._made = (now_s, self._make(now_s))
        return self._made[1]

    def _make(self, now_s: float) -> Status:
        handler, router_s = self.handler, self.discovery_s()
        stats, accounts = handler.stats(), handler.admission.accounts.values()
        spans, moved_at_s = self.moved or (None, now_s)
        return Status(
            uptime_s=now_s - self._started_s,
            queue_s=handler.queue_s,
            decode_s_per_block=handler.speeds.decode_s_per_block.lately(now_s),
            prefill_s_per_token_block=handler.speeds.prefill_s_per_token_block.lately(now_s),
            pages=stats.pages if stats else 0,
            free_pages=stats.free_pages if stats else 0,
            kept_pages=stats.kept_pages if stats else 0,
            memory_offered_bytes=self.memory_offered_bytes,
            memory_used_bytes=used_bytes(),
            steps=sum(account.steps for account in accounts),
            tokens=sum(account.positions for account in accounts),
            refused=sum(account.refused for account in accounts),
            device=self.device[:64],
            moved_from=() if spans is None else tuple((span.start, span.end) for span in spans),
            moved_ago_s=now_s - moved_at_s,
            round_trips=tuple(
                RoundTrip(trip.peer_id, trip.rtt_s, trip.age_s)
                for trip in self.router.round_trips(router_s, MAX_STATUS_ENTRIES)
            ),
            opinions=tuple(
                Opinion(each.peer_id, each.strikes, each.backoff_s, each.age_s, each.reason[:MAX_REASON_CHARS])
                for each in self.router.opinions(router_s, MAX_STATUS_ENTRIES)
            ),
        )


def used_bytes() -> int:
    """Of this process, on the machine and on its devices."""
    used = int(psutil.Process().memory_info().rss)
    if torch.cuda.is_available():
        used += sum(torch.cuda.memory_reserved(device) for device in range(torch.cuda.device_count()))
    return used

"""How long sessions become, by what was seen, and so how much room is promised to one that is opened. Pure.

A promise is an expectation, not a reservation: of what a client says its session may come to hold, most sessions use a
part. So a session is expected to become as long as those of its owner usually do, and no longer than it may by its
client's word; of an owner of whom nothing was seen yet, as long as those of the median owner.

Nothing is won by a short word. An owner whose last session became longer than it was told to be is expected to do so
again, and a session beyond its word gives way before all others (`peers.runtime.pressure`).
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from dataclasses import dataclass

from routing.ids import PeerId

REMEMBERED = 10
"""Sessions of one owner; later ones count for one in so many."""
OWNERS_MAX = 1024


@dataclass(slots=True)
class _Seen:
    sessions: int = 0
    length: float = 0.0
    """Of its sessions, on average."""
    outgrew: bool = False
    """Whether the last one became longer than its client had said."""


class Expectations:
    """By owner; those of whom nothing was heard for longest are forgotten first."""

    def __init__(self, first: int) -> None:
        """`first`: what is expected as long as no session has ended."""
        self._first = first
        self._seen: OrderedDict[PeerId, _Seen] = OrderedDict()

    def of(self, owner: PeerId, told: int) -> int:
        """How many positions a session of `owner` that may have `told` is expected to have; at least one."""
        seen = self._seen.get(owner)
        if seen is None:
            lengths = [other.length for other in self._seen.values()]
            return max(1, min(told, round(statistics.median(lengths) if lengths else self._first)))
        return max(1, round(seen.length) if seen.outgrew else min(told, round(seen.length)))

    def ended(self, owner: PeerId, told: int, positions: int) -> None:
        """A session that might have had `told` positions ended with so many."""
        seen = self._seen.setdefault(owner, _Seen())
        self._seen.move_to_end(owner)
        seen.sessions = min(seen.sessions + 1, REMEMBERED)
        seen.length += (positions - seen.length) / seen.sessions
        seen.outgrew = positions > told
        if len(self._seen) > OWNERS_MAX:
            self._seen.popitem(last=False)

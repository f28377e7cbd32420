"""What ways between nodes take beyond half a round trip, as far as whole routes tell.

What can be known: a message leaves by one clock and arrives by another. Whatever is added to every way out of a node,
and taken off every way into it, changes no sum around a closed way; and a step's way is closed, from this node over the
hops and back. So a single way cannot be measured, only such sums: from a step's leaving until its answer, less what
hops say they queued and computed. And only such sums decide between routes.

What a sum has beyond half the round trips of its ways is shared out equally among them, again and again: Kaczmarz's
method (1937), which comes to the smallest corrections that explain the sums. The mean of all ways is taken off first:
programs take a time at both ends whatever the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Final

from routing.ids import PeerId

HERE: Final = PeerId("")
"""This node, at both ends of every route."""
GAIN: Final = 1 / 8
"""Of what steps say beyond what was known."""
HALF_LIFE_S: Final = 300.0
MAX_WAYS: Final = 4096
NO_MATTER_S: Final = 0.005
"""So little is noise, and counts for nothing; of more, what goes beyond it."""
_BEYOND_S_MAX: Final = 60.0
"""No honest sum lies further out."""


class Detours:
    """Guards the corrections of at most MAX_WAYS ways; the one heard of longest ago is forgotten first."""

    def __init__(self, max_ways: int = MAX_WAYS) -> None:
        self._max_ways = max_ways
        self._ways: dict[tuple[PeerId, PeerId], tuple[float, float]] = {}
        """Seconds, and when they were learnt."""
        self._common_s: float | None = None

    def __len__(self) -> int:
        return len(self._ways)

    def of(self, source: PeerId, target: PeerId, now_s: float) -> float:
        """Seconds more (or fewer) than half a round trip, beside what every way takes; 0 where nothing is known."""
        if not self._ways:
            return 0.0
        beyond_s = self.learnt_s(source, target, now_s)
        return math.copysign(max(0.0, abs(beyond_s) - NO_MATTER_S), beyond_s)

    def learnt_s(self, source: PeerId, target: PeerId, now_s: float) -> float:
        """The same with its noise."""
        beyond_s, at_s = self._ways.get((source, target), (0.0, now_s))
        return float(beyond_s * 0.5 ** (max(0.0, now_s - at_s) / HALF_LIFE_S))

    def latest(self, count: int) -> set[PeerId]:
        """Peers of the `count` ways heard of last."""
        return {peer for way in islice(reversed(self._ways), count) for peer in way} - {HERE}

    def on_route(self, peers: Sequence[PeerId], beyond_s: float, now_s: float) -> None:
        """Steps went from here over `peers` and back, the quickest of some in `beyond_s` more (or less) than half the
        round trips."""
        ways = list(pairwise((HERE, *peers, HERE)))
        if not peers or not -_BEYOND_S_MAX <= beyond_s <= _BEYOND_S_MAX:
            return
        known = [self.learnt_s(*way, now_s) for way in ways]
        each_s = (beyond_s - sum(known)) / len(ways)
        self._common_s = each_s if self._common_s is None else self._common_s + GAIN * (each_s - self._common_s)
        for way, known_s in zip(ways, known, strict=True):
            self._ways.pop(way, None)
            if len(self._ways) >= self._max_ways:
                del self._ways[next(iter(self._ways))]
            self._ways[way] = known_s + GAIN * (each_s - self._common_s), now_s

"""How often one peer may call: a token bucket for each, as a plain table.

Knows no clock and no peers' business: the caller asks before it works and says what time it is.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

_MAX_PEERS: Final = 4096
"""Buckets remembered; the one unused for longest is forgotten, which at worst forgives it a debt."""


class Allowance:
    """`burst` calls at once, `per_second` in the long run, for each peer alone."""

    def __init__(self, *, burst: float, per_second: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens left, at this time

    def take(self, peer: str, *, now_s: float) -> bool:
        """True, and one call spent, when the peer may call now."""
        tokens, since_s = self._buckets.pop(peer, (self._burst, now_s))
        tokens = min(self._burst, tokens + max(0.0, now_s - since_s) * self._per_second)
        allowed = tokens >= 1
        self._buckets[peer] = (tokens - allowed, now_s)
        if len(self._buckets) > _MAX_PEERS:
            self._buckets.popitem(last=False)
        return allowed

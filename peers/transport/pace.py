"""A bound on bytes per second in one direction: when may the next frame pass?

Decides; `pacer` waits. A token bucket (Turner 1986) that lets whole frames pass while it is not in debt, however large
they are, and pays for them afterwards. Small frames pass also while a bulk one is being paid for; while another bulk
one waits they take no more than SMALL_SHARE of the rate. So a token of one session does not wait for another one's
prompt, and prompts go on.

Over any time t no more than `rate · t + 2 · burst + two frames` pass.
"""

from __future__ import annotations

import math
from typing import Final

BURST_S: Final = 0.25
"""What was left unused for this long may be used later at once."""
SMALL_SHARE: Final = 0.75


class TokenBucket:
    """Guards a level of bytes that fills at a rate up to a burst, and falls below zero when more is taken."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._burst = self._level = bytes_per_s * BURST_S
        self._at_s = -math.inf

    def wait_s(self, now_s: float) -> float:
        """Until the debt is paid; 0 when there is none."""
        self._fill(now_s)
        return max(0.0, -self._level / self.bytes_per_s)

    def take(self, size: int, now_s: float) -> None:
        self._fill(now_s)
        self._level -= size

    def _fill(self, now_s: float) -> None:
        if now_s > self._at_s:
            self._level = min(self._burst, self._level + (now_s - self._at_s) * self.bytes_per_s)
            self._at_s = now_s


class Pace:
    """The rule above, for one direction."""

    def __init__(self, bytes_per_s: float) -> None:
        self._all = TokenBucket(bytes_per_s)
        self._small = TokenBucket(bytes_per_s * SMALL_SHARE)

    def wait_s(self, now_s: float, *, bulk: bool, bulk_waits: bool = False) -> float:
        """How long a frame has to wait from now on, should no other pass meanwhile; 0: it may pass."""
        if bulk:
            return self._all.wait_s(now_s)
        own_s = self._small.wait_s(now_s)
        return own_s if bulk_waits else min(own_s, self._all.wait_s(now_s))

    def take(self, size: int, now_s: float, *, bulk: bool) -> None:
        """A frame passes."""
        self._all.take(size, now_s)
        if not bulk:
            self._small.take(size, now_s)

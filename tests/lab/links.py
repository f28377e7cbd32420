"""One direction of a network link: what it does to packets, decided on the caller's clock.

Owns delay, jitter, loss, rate and the bound of the queue in front of the rate. Knows no sockets and holds no packets:
it says when each would arrive.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

MBIT: Final = 1e6 / 8
"""Bytes per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """One direction of a link."""

    delay_s: float = 0.0
    """One way, behind the queue."""
    jitter_s: float = 0.0
    """Each packet's delay is uniform in `delay_s` ± this; packets never overtake one another."""
    loss: float = 0.0
    """Probability that a packet is lost behind the queue, each by itself."""
    bytes_per_s: float = math.inf
    queue_s: float = 0.25
    """How long a packet may have to wait for the rate; what would wait longer is dropped (tail drop)."""

    def __post_init__(self) -> None:
        if not (0 <= self.jitter_s <= self.delay_s < math.inf):
            raise ValueError(f"need 0 <= jitter_s <= delay_s < inf, got {self.jitter_s} and {self.delay_s}")
        if not (0 <= self.loss <= 1 and self.bytes_per_s > 0 and 0 <= self.queue_s < math.inf):
            raise ValueError(f"loss, rate or queue out of range: {self}")


PROFILES: Final = {
    "loopback": LinkProfile(),
    "wan": LinkProfile(delay_s=0.050, bytes_per_s=100 * MBIT),
    "wifi": LinkProfile(delay_s=0.005, jitter_s=0.002, loss=0.001),
    "wifi-bad": LinkProfile(delay_s=0.040, jitter_s=0.015, loss=0.02, bytes_per_s=20 * MBIT),
    "4g": LinkProfile(delay_s=0.025, jitter_s=0.008, loss=0.005),
    "3g": LinkProfile(delay_s=0.100, jitter_s=0.030, loss=0.02, bytes_per_s=2 * MBIT),
    "leo": LinkProfile(delay_s=0.040, jitter_s=0.007, loss=0.01),
    "geo": LinkProfile(delay_s=0.300, jitter_s=0.020, loss=0.005, bytes_per_s=25 * MBIT),
}


@dataclass(slots=True)
class LinkCounts:
    """Every packet offered is in exactly one of `carried`, `lost` and `overflowed`; sizes are of IP packets."""

    carried: int = 0
    carried_bytes: int = 0
    lost: int = 0
    overflowed: int = 0


class Link:
    """`profile` may be replaced at any time; it holds for the packets that come after."""

    def __init__(self, profile: LinkProfile, rng: random.Random) -> None:
        self.profile = profile
        self.counts = LinkCounts()
        self._rng = rng
        self._sent_s = -math.inf
        """When the last accepted packet has left the queue."""
        self._due_s = -math.inf

    def offer(self, now_s: float, size: int) -> float | None:
        """When a packet of `size` bytes, sent now, arrives; None if never. `now_s` must not decrease."""
        profile, counts = self.profile, self.counts
        start_s = max(now_s, self._sent_s)
        if start_s - now_s > profile.queue_s:
            counts.overflowed += 1
            return None
        self._sent_s = start_s + size / profile.bytes_per_s
        if profile.loss and self._rng.random() < profile.loss:
            counts.lost += 1
            return None
        delay_s = profile.delay_s
        if profile.jitter_s:
            delay_s += self._rng.uniform(-profile.jitter_s, profile.jitter_s)
        self._due_s = max(self._due_s, self._sent_s + delay_s)
        counts.carried += 1
        counts.carried_bytes += size
        return self._due_s

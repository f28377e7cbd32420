"""What goes out of this node, by its own large sends of the last minutes.

A send is as slow as its slower end, and a slow receiver must not make a fast sender look slow: so the best of all sends
counts, to whomever they went, and it takes several before it counts at all. What was sent long ago is forgotten: who
gets no prompts any more because it was slow is tried again.
"""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW_S: Final = 300.0
SENDS_MIN: Final = 3
"""So many in the window, or nothing is known."""
LATENCY_SHARE_MAX: Final = 0.25
"""Of the time until a send had arrived. Of a shorter one, congestion control that begins with ten segments (RFC 6928)
takes the rest, on the widest of ways."""
_KEPT_MAX: Final = 32


class Uplink:
    """Guards the sends that were faster than all later ones, the fastest first: the maximum over a sliding window."""

    def __init__(self) -> None:
        self._fastest: deque[tuple[float, float]] = deque()
        """Bytes per second, and when; at most _KEPT_MAX."""
        self._sent_at_s: deque[float] = deque(maxlen=SENDS_MIN)

    def add(self, size: int, seconds: float, rtt_s: float, now_s: float) -> None:
        """`size` bytes were sent, and so many seconds later they had been read and this node knew; both above 0."""
        if rtt_s > LATENCY_SHARE_MAX * seconds:
            return
        bytes_per_s = size / (seconds - rtt_s)
        while self._fastest and (self._fastest[-1][0] <= bytes_per_s or len(self._fastest) >= _KEPT_MAX):
            self._fastest.pop()
        self._fastest.append((bytes_per_s, now_s))
        self._sent_at_s.append(now_s)

    def bytes_per_s(self, now_s: float) -> float:
        """Of the fastest send in the window; 0 where there were fewer than SENDS_MIN."""
        while self._fastest and now_s - self._fastest[0][1] > WINDOW_S:
            self._fastest.popleft()
        several = len(self._sent_at_s) == SENDS_MIN and now_s - self._sent_at_s[0] <= WINDOW_S
        return self._fastest[0][0] if several and self._fastest else 0.0

"""Do torch's helper threads make a forward of so many positions faster? Pure: told what forwards took, no clock.

They wake for every operation, and where others use the cores, too (a peer beside this one, the owner's programs), each
of these waits for them: three peers that share two cores took a prompt of 512 tokens 1.2 times as fast without. What
pays differs by machine, model and hour, so it is tried, and tried again.
"""

from __future__ import annotations

import statistics
from collections import deque

PAYS = 0.9
"""Of the time without them: for less they would be in others' way for nothing."""
REMEMBERED = 5
"""Forwards of each kind and size whose median counts."""
FIRST = (True, False, False, True, True, False, False, True)
"""Alone or not, to begin with: pieces of a prompt take longer one after the other, which this evens out."""
AGAIN = 48
"""So many forwards later the other way is tried once more."""


class Cores:
    """For forwards of more than `program.TOKENS_MAX` positions: in shorter ones they never do."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def alone(self, tokens: int) -> bool:
        """Whether torch is to compute the next forward of `tokens` positions in one thread."""
        return self._sizes.setdefault(tokens.bit_length(), _Size()).alone()

    def measured(self, tokens: int, *, alone: bool, seconds: float) -> None:
        """Such a forward took `seconds`."""
        self._sizes.setdefault(tokens.bit_length(), _Size()).measured(alone, seconds / tokens)


class _Size:
    """Forwards of up to twice as many positions as others."""

    def __init__(self) -> None:
        self._turns = 0
        self._took_s = {way: deque[float](maxlen=REMEMBERED) for way in (True, False)}

    def alone(self) -> bool:
        if self._turns < len(FIRST):
            return FIRST[self._turns]
        return self._better() != (self._turns % AGAIN == 0)

    def measured(self, alone: bool, seconds: float) -> None:
        self._turns += 1
        self._took_s[alone].append(seconds)

    def _better(self) -> bool:
        alone_s, shared_s = (statistics.median(self._took_s[way] or [0.0]) for way in (True, False))
        return shared_s >= PAYS * alone_s

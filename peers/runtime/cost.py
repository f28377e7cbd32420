"""How long a forward takes: a plane through what was measured. Pure arithmetic.

Owns the shape (a part that every forward pays, a part for each token, a part for each position that a token looks back
at), its fit, and how far forwards are from it later. The parts are never negative, so more work never seems to take
less time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np

LATELY: Final = 32
"""Forwards, of which"""
SPACING_S: Final = 1.0
"""passes between one and the next: together they are of half a minute, which no burst fills."""
PASTS_MAX: Final = 1024
"""Positions behind a token, on average: of more, what a probe saw says little."""
CLEARLY: Final = 2.0
"""Times the cost, from which on it is not what a fit may be wrong by, and neighbours on the same cores take."""
SLOWER_MAX: Final = 100.0
_STEP: Final = 1.25
"""Of what is said of it, so that it is said anew only when it is something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One forward: what was in it, and what it took."""

    tokens: int
    token_pasts: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardCost:
    base_s: float
    per_token_s: float
    per_token_past_s: float

    def seconds(self, tokens: int, token_pasts: int = 0) -> float:
        """Of one forward; `token_pasts` is the sum of `token_pasts()` over its chunks."""
        return self.base_s + self.per_token_s * tokens + self.per_token_past_s * token_pasts

    def part(self, part: float) -> ForwardCost:
        """Of such a part of the blocks."""
        return ForwardCost(
            base_s=part * self.base_s,
            per_token_s=part * self.per_token_s,
            per_token_past_s=part * self.per_token_past_s,
        )

    def tokens_within(self, seconds: float, *, start: int = 0, most: int) -> int:
        """How many positions of one session, from `start` on, a forward takes in that time; 0 to `most`."""
        return bisect_right(
            range(1, most + 1), seconds, key=lambda tokens: self.seconds(tokens, token_pasts(start, tokens))
        )


class Lately:
    """Some of the last forwards, held against a cost. Whatever else a machine does only adds: what the quickest of them
    still takes longer is how fast the machine is now."""

    def __init__(self) -> None:
        self._forwards: deque[Sample] = deque(maxlen=LATELY)
        self._next_s = -math.inf

    def add(self, forward: Sample, now_s: float) -> None:
        """It ended now."""
        if now_s >= self._next_s and forward.token_pasts <= PASTS_MAX * forward.tokens:
            self._forwards.append(forward)
            self._next_s = now_s + SPACING_S

    def times(self, cost: ForwardCost) -> float | None:
        """How many times as long the quickest of them took; None while there are too few."""
        if len(self._forwards) < LATELY:
            return None
        return min(one.seconds / (cost.seconds(one.tokens, one.token_pasts) or math.inf) for one in self._forwards)

    def forget(self) -> None:
        """The machine is another one now."""
        self._forwards.clear()


def slower(times: float | None) -> float:
    """What of `Lately.times` is worth telling others: 1 while it is not clear, and never less."""
    if times is None or times < CLEARLY:
        return 1.0
    return min(SLOWER_MAX, float(_STEP ** round(math.log(times, _STEP))))


def token_pasts(start: int, tokens: int) -> int:
    """For each of `tokens` positions from `start` on, how many lie before it in its session; summed."""
    return tokens * start + tokens * (tokens - 1) // 2


def fit(samples: Sequence[Sample]) -> ForwardCost:
    """The cost with the least sum of squared *relative* errors, so that short forwards count as much as long ones.

    Non-negative least squares in three unknowns: the best of all fits that leave some of them at zero (the optimum is
    one of these, see Lawson and Hanson, Solving Least Squares Problems, chapter 23). At least one sample.
    """
    seconds = np.array([sample.seconds for sample in samples])
    rows = np.array([(1.0, sample.tokens, sample.token_pasts) for sample in samples]) / seconds[:, None]
    best, least = np.zeros(3), float("inf")
    for count in (1, 2, 3):
        for columns in ([1], [0], [2]) if count == 1 else map(list, combinations(range(3), count)):
            scale = np.linalg.norm(rows[:, columns], axis=0)
            if not scale.all():
                continue
            found, _, rank, _ = np.linalg.lstsq(rows[:, columns] / scale, np.ones(len(rows)), rcond=None)
            error = float(np.sum((rows[:, columns] / scale @ found - 1) ** 2))
            if rank == count and (found >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(3), error
                best[columns] = found / scale
    base_s, per_token_s, per_token_past_s = map(float, best)
    return ForwardCost(base_s=base_s, per_token_s=per_token_s, per_token_past_s=per_token_past_s)

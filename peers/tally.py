"""Counts that cost a microsecond or so where they are made, and are read when somebody asks.

Owns a histogram of numbers between fixed bounds, and what is measured of steps with it. Pure; no library is needed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Self

STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""From a small model's block to a long prompt over a slow line."""
STEP_POSITIONS = 16
"""Up to so many positions a step is a decoded token, or a few drafted ones, and takes about as long as for one; more
are part of a prompt."""


class Tally:
    """How many values were at most each of `bounds` (increasing), how many were above the last, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """In Prometheus' form: each bound, and +Inf, with how many values were at most that."""
        return list(zip([*map(str, self.bounds), "+Inf"], accumulate(self.counts), strict=True))

    @classmethod
    def of(cls, tallies: Iterable[Self]) -> Self:
        """All values of one or more tallies with the same bounds."""
        first, *others = tallies
        whole = cls(first.bounds)
        for tally in (first, *others):
            assert tally.bounds == whole.bounds
            whole.counts = [mine + more for mine, more in zip(whole.counts, tally.counts, strict=True)]
            whole.sum += tally.sum
        return whole


@dataclass(slots=True)
class StepTimes:
    """Where the time of steps went, in seconds by kind and phase."""

    phases: tuple[str, ...]
    by_kind: Mapping[str, tuple[Tally, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.by_kind = {kind: tuple(Tally(STEP_SECONDS) for _ in self.phases) for kind in ("decode", "prefill")}

    def add(self, positions: int, *seconds: float) -> None:
        """A step over so many positions took so long, in each of the phases in their order."""
        for tally, value in zip(self.by_kind[kind_of(positions)], seconds, strict=True):
            tally.add(value)


def kind_of(positions: int) -> str:
    """`decode` or `prefill`."""
    return "decode" if positions <= STEP_POSITIONS else "prefill"

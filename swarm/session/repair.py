"""Which hops must hear which positions again, and from whom. Pure: numbers in, legs out.

    positions      0                     300              500  501
    hop 0 holds    ████████████████████████████████████████████     computed the step under way before hop 1 died
    hop 1 is new   ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
    hop 2 holds    ███████████████████████████████████████

    legs           [0, 500) from hop 0's journal through hop 1 alone; [500, 501) from there through hops 1 and 2

A hop that lacks positions gets them from the journal of the hop before it, or from its computation where that one lacks
them too. Where a journal does not reach back far enough, its hop computes them again from what the hop before it sends:
so a lost journal cascades one hop up, in the end to the client, who feeds hop 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Leg:
    """Positions `[first, end)` enter at hop `hop`, and no hop from `until` on hears of them."""

    first: int
    end: int
    hop: int
    until: int


def begin_at(held: Sequence[int], journals: Sequence[int], steps: Sequence[tuple[int, int]]) -> list[int]:
    """From which position on each hop must hear, so that whatever it lacks can be had from the hop before it.

    `held`: positions at each hop. `journals`: the lowest position from which each hop can send again what it sent.
    `steps`: pending, as [first, end) in order; each is run whole, and answered by the last hop.
    """
    begin = list(held)
    if steps:
        begin[-1] = min(begin[-1], steps[0][0])
    for first, end in reversed(steps):
        begin = [first if first < position < end else position for position in begin]
    for hop in range(len(begin) - 1, 0, -1):
        if begin[hop] < begin[hop - 1] and journals[hop - 1] > begin[hop]:
            begin[hop - 1] = begin[hop]
    return begin


def legs(begin: Sequence[int], first: int, end: int) -> Iterator[Leg]:
    """What brings positions `[first, end)`, if any, to every hop that begins before `end`, lower positions first."""
    cuts = [first, *sorted({position for position in begin if first < position < end}), max(first, end)]
    for low, high in pairwise(cuts):
        hop = None
        for index, position in enumerate((*begin, high) if low < high else ()):
            if position <= low and hop is None:
                hop = index
            elif position > low and hop is not None:
                yield Leg(low, high, hop, index)
                hop = None

"""The cheapest chain of peers over block boundaries; a hop may use any part of a span.

Owns the search. Knows blocks and costs, not why a peer costs what it does or may not be used. Deterministic: the
result depends on the set of candidates, not on their order.

    boundary   0         1         2         3
               ├─ block 0 ┼─ block 1 ┼─ block 2 ┤
    A [0, 2)   ●─────────▶●─────────▶●              an edge is one block on one peer: staying costs `per_block_s`,
    B [1, 3)              ●─────────▶●─────────▶●   changing (or starting) at a boundary costs `enter_s` more
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from routing.cost import HopCost
from routing.ids import BlockSpan, PeerId


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A peer that may be used for any part of this span at this cost."""

    peer_id: PeerId
    span: BlockSpan
    cost: HopCost


Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Many of them as arrays, one row for each, in the order of their peers' ids and then of their spans."""

    peers: npt.NDArray[np.object_]
    starts: Ints
    ends: Ints
    enter_s: Floats
    per_block_s: Floats
    leave_s: Floats
    cells: Floats
    """A number for about where each is."""

    @classmethod
    def of(
        cls, candidates: Candidates | Iterable[Candidate], cell: Callable[[PeerId], float] = lambda peer: 0.0
    ) -> Candidates:
        if isinstance(candidates, Candidates):
            return candidates
        ordered = sorted(candidates, key=lambda c: (c.peer_id, c.span.start))
        return cls(
            peers=np.array([c.peer_id for c in ordered], dtype=np.object_),
            starts=np.array([c.span.start for c in ordered], dtype=np.int64),
            ends=np.array([c.span.end for c in ordered], dtype=np.int64),
            enter_s=np.array([c.cost.enter_s for c in ordered], dtype=np.float64),
            per_block_s=np.array([c.cost.per_block_s for c in ordered], dtype=np.float64),
            leave_s=np.array([c.cost.leave_s for c in ordered], dtype=np.float64),
            cells=np.array([cell(c.peer_id) for c in ordered], dtype=np.float64),
        )

    def __len__(self) -> int:
        return len(self.peers)

    def __getitem__(self, row: int) -> Candidate:
        cost = HopCost(float(self.enter_s[row]), float(self.per_block_s[row]), float(self.leave_s[row]))
        return Candidate(self.peers[row], BlockSpan(int(self.starts[row]), int(self.ends[row])), cost)

    def take(self, rows: Ints | Mask) -> Candidates:
        return Candidates(
            peers=self.peers[rows],
            starts=self.starts[rows],
            ends=self.ends[rows],
            enter_s=self.enter_s[rows],
            per_block_s=self.per_block_s[rows],
            leave_s=self.leave_s[rows],
            cells=self.cells[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """Hops `(peer, blocks)` that cover every block once and in order."""

    hops: tuple[tuple[PeerId, BlockSpan], ...]
    cost_s: float
    relaxed: int
    """Edges looked at: what the search cost, independent of the machine."""


def gaps(spans: Iterable[BlockSpan], num_blocks: int) -> tuple[BlockSpan, ...]:
    """Maximal runs of blocks in `[0, num_blocks)` that no span covers."""
    uncovered = []
    reached = 0
    for span in sorted(spans, key=_start):
        if span.start >= num_blocks:
            break
        if span.start > reached:
            uncovered.append(BlockSpan(reached, span.start))
        reached = max(reached, span.end)
    if reached < num_blocks:
        uncovered.append(BlockSpan(reached, num_blocks))
    return tuple(uncovered)


def path_cost_s(hops: Sequence[tuple[HopCost, int]]) -> float:
    """What a chain of `(cost, number of blocks)` takes from the first frame out to the last answer back."""
    return sum(cost.enter_s + blocks * cost.per_block_s for cost, blocks in hops) + hops[-1][0].leave_s


def cheapest_path(candidates: Candidates | Collection[Candidate], num_blocks: int) -> Path | None:
    """The cheapest path over blocks `[0, num_blocks)`, or None when `gaps` of the candidates' spans is not empty.

    A peer may serve several hops, with other peers' between them: a session has a place at it for each.

    Every hop pays its entry, what the last one pays more may be negative, and no block takes less than at the fastest.
    So a path through the peers with the cheapest entries alone, where there is one, bounds the entries that can be part
    of a better path, and most of a large swarm is never searched.
    """
    if not len(candidates):
        return None
    candidates = Candidates.of(candidates)
    least_s = candidates.enter_s + np.minimum(candidates.leave_s, 0.0)
    at = len(candidates) // 8
    near = least_s <= np.partition(least_s, at)[at]
    first = _search(_undominated(candidates.take(near)), num_blocks)
    worth_a_look = ~near
    if first is not None:
        bound_s = first.cost_s * (1 + _ROUNDING) - num_blocks * candidates.per_block_s.min()
        worth_a_look &= least_s <= bound_s
    if not worth_a_look.any():
        return first
    second = _search(_undominated(candidates.take(near | worth_a_look)), num_blocks)
    if first is None or second is None:
        return second
    return replace(min(second, first, key=_cost_s), relaxed=first.relaxed + second.relaxed)


def bridge(
    keep: Sequence[tuple[PeerId, BlockSpan]], candidates: Candidates | Iterable[Candidate], num_blocks: int
) -> tuple[tuple[PeerId, BlockSpan], ...] | None:
    """The hops to `keep`, in order, and between them the cheapest ones of other peers; None where there are none.

    Who pushes on to a kept hop saves nothing by an answer that is shorter.
    """
    candidates = Candidates.of(candidates)
    taken = {peer for peer, _ in keep}
    hops = list(keep)
    for gap in gaps((span for _, span in keep), num_blocks):
        within = candidates.take(
            (candidates.starts < gap.end)
            & (gap.start < candidates.ends)
            & np.array([peer not in taken for peer in candidates.peers], dtype=np.bool_)
        )
        within = replace(within, starts=np.maximum(within.starts - gap.start, 0), ends=within.ends - gap.start)
        if gap.end < num_blocks:
            within = replace(within, leave_s=np.maximum(within.leave_s, 0.0))
        path = cheapest_path(within, len(gap))
        if path is None:
            return None
        taken |= {peer for peer, _ in path.hops}
        hops += [(peer, BlockSpan(span.start + gap.start, span.end + gap.start)) for peer, span in path.hops]
    return tuple(sorted(hops, key=operator.itemgetter(1)))


def _search(candidates: Candidates, num_blocks: int) -> Path | None:
    """Dynamic programming over boundaries (Bellman 1957) with one running cost per candidate.

    In front of each block a peer either goes on, or takes over from the cheapest way to that boundary: O(blocks) per
    peer. Ties go to the span that starts first, then to the longer one, the cheaper entry and the smaller peer id.
    """
    c = candidates.take(np.lexsort((candidates.enter_s, -candidates.ends, candidates.starts)))
    begins = np.searchsorted(c.starts, np.arange(num_blocks + 1))
    running_s, began = np.full(len(c), math.inf), c.starts.copy()
    running = np.arange(0)
    last: list[tuple[int, int]] = []
    """Of the cheapest way to the end of each block: the row of its last hop, and where that begins."""
    reached_s, relaxed = 0.0, 0
    for block in range(num_blocks):
        goes_on = running[c.ends[running] > block]
        running = np.concatenate((goes_on, np.arange(begins[block], begins[block + 1])))
        if not len(running):
            return None
        relaxed += len(running)
        goes_on_s, taken_over_s = running_s[running], reached_s + c.enter_s[running]
        began[running[taken_over_s < goes_on_s]] = block
        cost_s = np.minimum(taken_over_s, goes_on_s) + c.per_block_s[running]
        if block == num_blocks - 1:
            cost_s += c.leave_s[running]
        running_s[running] = cost_s
        best = int(cost_s.argmin())
        reached_s = float(cost_s[best])
        last.append((int(running[best]), int(began[running[best]])))
    hops: list[tuple[PeerId, BlockSpan]] = []
    end = num_blocks
    while end:
        row, start = last[end - 1]
        hops.append((c.peers[row], BlockSpan(start, end)))
        end = start
    return Path(hops=tuple(reversed(hops)), cost_s=reached_s, relaxed=relaxed)


def _undominated(candidates: Candidates) -> Candidates:
    """All candidates but most of those that another one with the same span beats; of equals, the smallest peer id.

    What beats most is looked at: in each span the fastest, the nearest, and who takes the least over all of it.
    """
    c = candidates.take(np.lexsort((candidates.ends, candidates.starts)))
    whole_s = c.enter_s + (c.ends - c.starts) * c.per_block_s + c.leave_s
    for which in range(3):
        rows = np.arange(len(c))
        firsts = np.flatnonzero(np.diff(c.starts, prepend=-1) | np.diff(c.ends, prepend=-1))
        of_span = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=len(c)))
        by_s = (whole_s, c.per_block_s, c.enter_s)[which]
        is_least = by_s == np.minimum.reduceat(by_s, firsts)[of_span]
        best = np.minimum.reduceat(np.where(is_least, rows, len(c)), firsts)[of_span]
        stays = (
            (rows == best)
            | (c.enter_s < c.enter_s[best])
            | (c.per_block_s < c.per_block_s[best])
            | (c.leave_s < c.leave_s[best])
        )
        c, whole_s = c.take(stays), whole_s[stays]
    return c


_ROUNDING: Final = 1e-9
"""Of the same seconds, added up in another order."""

_cost_s = operator.attrgetter("cost_s")
_start = operator.attrgetter("start")

"""The cheapest chain of peers over block boundaries; a hop may use any part of a span.

Owns the search. Knows blocks and costs, not why a peer costs what it does or may not be used. Deterministic: the
result depends on the set of candidates, not on their order.

    boundary   0         1         2         3
               ├─ block 0 ┼─ block 1 ┼─ block 2 ┤
    A [0, 2)   ●─────────▶●─────────▶●              an edge is one block on one peer: staying costs `per_block_s`,
    B [1, 3)              ●─────────▶●─────────▶●   changing (or starting) at a boundary costs `enter_s` more
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from routing.cost import HopCost
from routing.ids import BlockSpan, PeerId


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A peer that may be used for any part of this span at this cost."""

    peer_id: PeerId
    span: BlockSpan
    cost: HopCost


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


def cheapest_path(candidates: Collection[Candidate], num_blocks: int) -> Path | None:
    """The cheapest path over blocks `[0, num_blocks)`, or None when `gaps` of the candidates' spans is not empty.

    A peer may serve several hops, with other peers' between them: a session has a place at it for each.

    Every hop pays its entry, what the last one pays more may be negative, and no block takes less than at the fastest.
    So a path through the peers with the cheapest entries alone, where there is one, bounds the entries that can be part
    of a better path, and most of a large swarm is never searched.
    """
    if not candidates:
        return None
    costs = [candidate.cost for candidate in candidates]
    least = [cost.enter_s if cost.leave_s >= 0 else cost.enter_s + cost.leave_s for cost in costs]
    cutoff_s = sorted(least)[len(candidates) // 8]
    near = _undominated(c for c, least_s in zip(candidates, least, strict=True) if least_s <= cutoff_s)
    first = _search(near, num_blocks)
    bound_s = math.inf
    if first is not None:
        bound_s = first.cost_s * (1 + _ROUNDING) - num_blocks * min([cost.per_block_s for cost in costs])
    worth_a_look = [c for c, least_s in zip(candidates, least, strict=True) if cutoff_s < least_s <= bound_s]
    if not worth_a_look:
        return first
    second = _search(_undominated([*near, *worth_a_look]), num_blocks)
    if first is None or second is None:
        return second
    return replace(min(second, first, key=_cost_s), relaxed=first.relaxed + second.relaxed)


def bridge(
    keep: Sequence[tuple[PeerId, BlockSpan]], candidates: Collection[Candidate], num_blocks: int
) -> tuple[tuple[PeerId, BlockSpan], ...] | None:
    """The hops to `keep`, in order, and between them the cheapest ones of other peers; None where there are none.

    Who pushes on to a kept hop saves nothing by an answer that is shorter.
    """
    taken = {peer for peer, _ in keep}
    hops = list(keep)
    for gap in gaps((span for _, span in keep), num_blocks):
        ends = gap.end == num_blocks
        within = [
            Candidate(
                c.peer_id,
                BlockSpan(max(c.span.start, gap.start) - gap.start, c.span.end - gap.start),
                c.cost if ends or c.cost.leave_s >= 0 else HopCost(c.cost.enter_s, c.cost.per_block_s, 0.0),
            )
            for c in candidates
            if c.peer_id not in taken and c.span.start < gap.end and gap.start < c.span.end
        ]
        path = cheapest_path(within, len(gap))
        if path is None:
            return None
        taken |= {peer for peer, _ in path.hops}
        hops += [(peer, BlockSpan(span.start + gap.start, span.end + gap.start)) for peer, span in path.hops]
    return tuple(sorted(hops, key=operator.itemgetter(1)))


def _search(candidates: Iterable[Candidate], num_blocks: int) -> Path | None:
    """Dynamic programming over boundaries (Bellman 1957) with one running cost per peer.

    In front of each block a peer either goes on, or takes over from the cheapest way to that boundary: O(blocks) per
    peer. Ties go to the span that starts first, then to the longer one, the cheaper entry and the smaller peer id.
    """
    starting: list[list[_Running]] = [[] for _ in range(num_blocks)]
    for candidate in candidates:
        if candidate.span.start < num_blocks:
            starting[candidate.span.start].append(_Running(candidate))

    running: list[_Running] = []
    reached = [_Reached(cost_s=0.0, hops=())]
    relaxed = 0
    for block in range(num_blocks):
        running = [run for run in running if run.end > block]
        running += sorted(starting[block], key=lambda run: (-run.end, run.enter_s, run.peer_id))
        if not running:
            return None
        relaxed += len(running)
        before_s = reached[block].cost_s
        for run in running:
            cost_s, taken_over_s = run.cost_s, before_s + run.enter_s
            if taken_over_s < cost_s:
                cost_s, run.began = taken_over_s, block
            run.cost_s = cost_s + run.per_block_s
        if block == num_blocks - 1:
            for run in running:
                run.cost_s += run.leave_s
        best = min(running, key=_cost_s)
        way = reached[best.began]
        reached.append(_Reached(cost_s=best.cost_s, hops=(*way.hops, (best.peer_id, BlockSpan(best.began, block + 1)))))
    return Path(hops=reached[-1].hops, cost_s=reached[-1].cost_s, relaxed=relaxed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reached:
    """The cheapest way found to a boundary."""

    cost_s: float
    hops: tuple[tuple[PeerId, BlockSpan], ...]


class _Running:
    """A candidate while the search passes its span: the cheapest way that ends on it, and where it took over."""

    __slots__ = ("began", "cost_s", "end", "enter_s", "leave_s", "peer_id", "per_block_s")

    def __init__(self, candidate: Candidate) -> None:
        cost = candidate.cost
        self.peer_id = candidate.peer_id
        self.end = candidate.span.end
        self.enter_s = cost.enter_s
        self.per_block_s = cost.per_block_s
        self.leave_s = cost.leave_s
        self.cost_s = math.inf
        self.began = candidate.span.start


_ROUNDING: Final = 1e-9
"""Of the same seconds, added up in another order."""

_cost_s = operator.attrgetter("cost_s")
_start = operator.attrgetter("start")


def _undominated(candidates: Iterable[Candidate]) -> list[Candidate]:
    """All candidates but those that another one with the same span beats; of equals, the smallest peer id stays."""
    fronts: dict[tuple[int, int], list[Candidate]] = {}
    for candidate in candidates:
        span, cost = candidate.span, candidate.cost
        enter_s, per_block_s, leave_s = cost.enter_s, cost.per_block_s, cost.leave_s
        key = (span.start, span.end)
        front = fronts.get(key)
        if front is None:
            fronts[key] = [candidate]
            continue
        for other in front:
            its = other.cost
            no_worse = its.enter_s <= enter_s and its.per_block_s <= per_block_s and its.leave_s <= leave_s
            if no_worse and (its != cost or other.peer_id < candidate.peer_id):
                break
        else:
            fronts[key] = [
                c
                for c in front
                if enter_s > c.cost.enter_s or per_block_s > c.cost.per_block_s or leave_s > c.cost.leave_s
            ]
            fronts[key].append(candidate)
    return list(itertools.chain.from_iterable(fronts.values()))

"""The cheapest chain of a few peers where the trip from one to the next has its own price.

Owns the search and the choice of whom to search among. `routing.path` searches thousands of peers as if a trip took
the same from wherever it comes; here every pair of peers has a price, so a far group of peers that are close to each
other is entered and left once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Final

import numpy as np

from routing.ids import BlockSpan, PeerId
from routing.path import Candidate, Candidates, Floats

MAX_SHORTLIST: Final = 48
Hops = tuple[tuple[PeerId, BlockSpan], ...]


def shortlist(candidates: Candidates, keep: Iterable[PeerId]) -> list[Candidate]:
    """At most MAX_SHORTLIST (and all of `keep`): in every cell the best for each block, the best of all first; as if
    nobody saved anything by being the last hop."""
    kept = set(keep)
    c = candidates.take(_s_per_block(candidates).argsort(kind="stable"))
    is_kept = np.array([peer in kept for peer in c.peers], dtype=np.bool_)
    alike = np.lexsort((c.ends, c.starts, c.cells))  # whoever holds the same in the same cell: only the best counts
    differ = [np.diff(column[alike], prepend=-1) != 0 for column in (c.ends, c.starts, c.cells)]
    counts = is_kept.copy()
    counts[alike[differ[0] | differ[1] | differ[2]]] = True
    rows = np.flatnonzero(counts)
    chosen: list[Candidate] = []
    covered = defaultdict[float, set[int]](set)
    for at, row in enumerate(rows.tolist()):
        if len(chosen) >= MAX_SHORTLIST:
            return chosen + [c[row] for row in rows[at:].tolist() if is_kept[row]]
        held, blocks = covered[float(c.cells[row])], range(c.starts[row], c.ends[row])
        if is_kept[row] or not held.issuperset(blocks):
            chosen.append(c[row])
            held.update(blocks)
    return chosen


def _s_per_block(candidates: Candidates) -> Floats:
    """Of its whole span, where another hop follows it."""
    enter_s = candidates.enter_s + np.maximum(candidates.leave_s, 0.0)
    return enter_s / (candidates.ends - candidates.starts) + candidates.per_block_s


def cheapest_chain(
    candidates: Sequence[Candidate],
    num_blocks: int,
    link_s: Callable[[PeerId, PeerId], float],
    *,
    least_s: Callable[[PeerId], float] = lambda peer: 0.0,
    at_most_s: float = math.inf,
) -> Hops:
    """The hops that cover every block once at the least seconds; empty when the candidates leave a gap.

    `link_s(a, b)` replaces the entry of b where it follows a, and is no less than `least_s(b)`. Empty, too, when it
    would take longer than `at_most_s`: what certainly does is not looked at. Dynamic programming over (boundary,
    candidate).
    """
    least = [least_s(candidate.peer_id) for candidate in candidates]
    holding: list[list[int]] = [[] for _ in range(num_blocks)]
    for index, candidate in enumerate(candidates):
        for block in range(candidate.span.start, min(candidate.span.end, num_blocks)):
            holding[block].append(index)
    rest = _rest_s(candidates, holding, least)
    at_most_s *= 1 + _ROUNDING
    links: list[dict[int, float]] = [{} for _ in candidates]  # into each, as far as they were asked for
    arrived: list[_Way] = [(0.0, -1, None)]
    running: dict[int, _Way] = {}
    for block, (holders, rest_s) in enumerate(zip(holding, rest, strict=True)):
        arrived.sort(key=_seconds)
        on: dict[int, _Way] = {}
        for index in holders:
            peer_id, cost, before = candidates[index].peer_id, candidates[index].cost, running.get(index)
            entry_s, floor_s, row, best = math.inf if before is None else before[0], least[index], links[index], before
            for way in arrived:
                cost_s, last, _ = way
                if cost_s + floor_s >= entry_s:
                    break
                if last == index:
                    continue
                if last < 0:
                    cost_s += cost.enter_s
                else:
                    if last not in row:
                        row[last] = link_s(candidates[last].peer_id, peer_id)
                    cost_s += row[last]
                if cost_s < entry_s:
                    entry_s, best = cost_s, way
            cost_s = entry_s + cost.per_block_s
            if best is not None and cost_s + rest_s[index] <= at_most_s:
                on[index] = cost_s, index, best[2] if best is before else (peer_id, block, best[2])
        running, arrived = on, list(on.values())
        if not arrived:
            return ()
    _, _, taken = min(arrived, key=lambda way: way[0] + candidates[way[1]].cost.leave_s)
    hops: list[tuple[PeerId, BlockSpan]] = []
    while taken is not None:
        peer_id, start, taken = taken
        hops.append((peer_id, BlockSpan(start, hops[-1][1].start if hops else num_blocks)))
    return tuple(reversed(hops))


def _rest_s(
    candidates: Sequence[Candidate], holding: Sequence[Sequence[int]], least: Sequence[float]
) -> list[dict[int, float]]:
    """For every block and candidate that holds it, what follows the block after it at least: as if every link were as
    short as it can be."""
    found: list[dict[int, float]] = []
    goes_on: dict[int, float] = {}
    changes_s = math.inf
    for holders in reversed(holding):
        if found:
            rest = {index: min(changes_s, goes_on.get(index, math.inf)) for index in holders}
        else:
            rest = {index: candidates[index].cost.leave_s for index in holders}
        found.append(rest)
        goes_on = {index: rest_s + candidates[index].cost.per_block_s for index, rest_s in rest.items()}
        changes_s = min((least[index] + rest_s for index, rest_s in goes_on.items()), default=math.inf)
    found.reverse()
    return found


_ROUNDING: Final = 1e-9
"""Of the same seconds, added up in another order."""

_Taken = tuple[PeerId, int, "_Taken | None"]
"""A peer, the block from which on it is taken, and what was taken before it."""

_Way = tuple[float, int, _Taken | None]
"""What it takes to come to a boundary, the candidate through which it does, and what was taken for that."""

_seconds: Final = itemgetter(0)

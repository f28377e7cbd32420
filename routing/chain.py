"""The cheapest chain of a few peers where the trip from one to the next has its own price.

Owns the search and the choice of whom to search among. `routing.path` searches thousands of peers as if a trip took
the same from wherever it comes; here every pair of peers has a price, so a far group of peers that are close to each
other is entered and left once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from routing.coordinates import Coordinate
from routing.ids import BlockSpan, PeerId
from routing.path import Candidate

MAX_SHORTLIST: Final = 48
CELL_S: Final = 0.02
"""Peers whose round trips to anywhere differ by less are about at one place."""

Cell = tuple[int, int, int] | None
Hops = tuple[tuple[PeerId, BlockSpan], ...]


def cell_of(place: Coordinate | None) -> Cell:
    """The cell of the plane that holds a place; None for a peer of which none is known."""
    if place is None or not place.usable:
        return None
    x_s, y_s, height_s, _ = place
    return int(x_s // CELL_S), int(y_s // CELL_S), int(height_s // CELL_S)


def shortlist(
    candidates: Iterable[Candidate], cells: Callable[[PeerId], Cell], keep: Iterable[PeerId]
) -> list[Candidate]:
    """At most MAX_SHORTLIST (and all of `keep`): in every cell the best for each block, the best of all first."""
    kept = set(keep)
    chosen: list[Candidate] = []
    covered = defaultdict[Cell, set[int]](set)
    for candidate in sorted(candidates, key=_per_block_s):
        held = covered[cells(candidate.peer_id)]
        if candidate.peer_id in kept or (len(chosen) < MAX_SHORTLIST and not held.issuperset(candidate.span)):
            chosen.append(candidate)
            held.update(candidate.span)
    return chosen


def cheapest_chain(candidates: Sequence[Candidate], num_blocks: int, link_s: Callable[[PeerId, PeerId], float]) -> Hops:
    """The hops that cover every block once at the least seconds; empty when the candidates leave a gap.

    `link_s(a, b)` replaces the entry of b where it follows a. Dynamic programming over (boundary, candidate).
    """
    links: list[dict[int, float]] = [{} for _ in candidates]  # into each, as far as they were asked for
    arrived = [_Way(0.0, -1, ())]
    running: dict[int, _Way] = {}
    for block in range(num_blocks):
        on: dict[int, _Way] = {}
        order = sorted(range(len(arrived)), key=lambda at: arrived[at].cost_s)
        for index, (peer_id, span, cost) in enumerate(candidates):
            if block not in span:
                continue
            entry_s, row, best = running.get(index, _NOWHERE).cost_s, links[index], None
            for at in order:
                way = arrived[at]
                if way.cost_s >= entry_s:
                    break
                if way.last == index:
                    continue
                if way.last < 0:
                    taken_s = way.cost_s + cost.enter_s
                else:
                    if way.last not in row:
                        row[way.last] = link_s(candidates[way.last].peer_id, peer_id)
                    taken_s = way.cost_s + row[way.last]
                if taken_s < entry_s:
                    entry_s, best = taken_s, way
            if best is not None:
                way = _Way(entry_s + cost.per_block_s, index, (*best.hops, _Taken(peer_id, block)))
            elif index in running:
                way = running[index]._replace(cost_s=entry_s + cost.per_block_s)
            else:
                continue
            on[index] = way
        running, arrived = on, list(on.values())
        if not arrived:
            return ()
    end = min(arrived, key=lambda way: way.cost_s + candidates[way.last].cost.leave_s)
    edges = [hop.start for hop in end.hops] + [num_blocks]
    return tuple((hop.peer_id, BlockSpan(hop.start, edges[at + 1])) for at, hop in enumerate(end.hops))


class _Taken(NamedTuple):
    peer_id: PeerId
    start: int


class _Way(NamedTuple):
    """A way to a boundary that ends at candidate `last`."""

    cost_s: float
    last: int
    hops: tuple[_Taken, ...]


_NOWHERE: Final = _Way(float("inf"), -1, ())


def _per_block_s(candidate: Candidate) -> tuple[float, PeerId]:
    cost = candidate.cost
    return (cost.enter_s + cost.leave_s) / len(candidate.span) + cost.per_block_s, candidate.peer_id

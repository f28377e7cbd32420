"""Why a route is what it is: what it would take with every other peer that holds blocks of one of its hops."""

from __future__ import annotations

from dataclasses import dataclass

from routing.chain import Hops
from routing.cost import waits_s
from routing.ids import BlockSpan, BlockSpans, PeerId
from routing.records import Announcement
from routing.routes import Route
from routing.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a route would take if this peer served a hop of it, and how much of that is the peer's."""

    peer_id: PeerId
    name: str
    spans: BlockSpans
    """Everything that it serves."""
    route_s: float
    trip_s: float
    """Into the peer from where the step comes from, and back to this node from the last hop; bytes included, also
    those that a slow uplink sends on."""
    queue_s: float
    compute_s: float
    chosen: bool
    measured: bool
    """Else all of this is what the peer says, and what places predict."""
    bytes_per_s: float
    """From this node to the peer."""
    bytes_measured: bool
    """Else that is assumed."""
    uplink_bytes_per_s: int
    """From the peer to anybody, as it says; 0 where that is not known."""
    note: str = ""
    """Why it is entered only where nobody else can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a route would take if this peer served some blocks of a hop, and whoever was chosen for it the others."""

    peer_id: PeerId
    name: str
    spans: BlockSpans
    """Everything that it serves."""
    covers: BlockSpan
    """Of the hop; all of it where it holds another hop of the route as well, which would go on with this one."""
    route_s: float
    measured: bool
    note: str = ""
    """Why it is entered only where nobody else can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Without:
    """The best route without one peer, whatever its cuts."""

    hops: tuple[tuple[PeerId, str, BlockSpan], ...]
    """With each peer's name."""
    cost_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a route is what it is."""

    route: Route
    without: tuple[Without | None, ...]
    """For each hop, the best route that its peer serves no part of; None where there is none."""
    options: tuple[tuple[Option, ...], ...]
    """For each hop, the peers that hold all of its blocks and serve no other one, the best first."""
    parts: tuple[tuple[Part, ...], ...]
    """For each hop, all others that hold any of its blocks, the best first."""
    left_out: tuple[tuple[str, BlockSpans, str], ...]
    """Peers that cannot be used now: name or id, spans, reason."""


def options(view: View, hops: Hops) -> tuple[tuple[Option, ...], ...]:
    """For each hop, the peers that hold all of its blocks and serve no other one, the best first."""
    options = []
    for at, (chosen, span) in enumerate(hops):
        others = {peer for peer, _ in hops if peer != chosen}
        able = [a for a in view.holders(span) if a.peer_id not in others]
        options.append(tuple(sorted((_option(view, hops, at, a) for a in able), key=_best_first)))
    return tuple(options)


def parts(view: View, hops: Hops) -> tuple[tuple[Part, ...], ...]:
    """For each hop, all others that hold any of its blocks, the best first."""
    able = [a for a in view.by_peer.values() if view.usable(a.peer_id)]
    found = []
    for at, (chosen, span) in enumerate(hops):
        others = {peer for peer, _ in hops if peer != chosen}
        some = [
            _part(view, hops, at, a)
            for a in able
            if a.spans.overlaps(span) and a.peer_id != chosen and (a.peer_id in others or not a.spans.covers(span))
        ]
        found.append(tuple(sorted(some, key=_best_first)))
    return tuple(found)


def _part(view: View, hops: Hops, at: int, announcement: Announcement) -> Part:
    peer, (chosen, span) = announcement.peer_id, hops[at]
    common = [(max(part.start, span.start), min(part.end, span.end)) for part in announcement.spans]
    start, end = max(common, key=lambda ends: ends[1] - ends[0])
    cut = [(chosen, span.start, start), (peer, start, end), (chosen, end, span.end)]
    instead = [(who, BlockSpan(first, last)) for who, first, last in cut if first < last]
    return Part(
        peer_id=peer,
        name=announcement.name,
        spans=announcement.spans,
        covers=BlockSpan(start, end),
        route_s=view.route_s(_joined((*hops[:at], *instead, *hops[at + 1 :]))),
        measured=peer in view.estimates.measured,
        note=view.last_resort(announcement),
    )


def _joined(hops: Hops) -> Hops:
    """Where a peer follows itself, one hop."""
    joined = [hops[0]]
    for peer, span in hops[1:]:
        before, reached = joined[-1]
        if before == peer:
            joined[-1] = peer, BlockSpan(reached.start, span.end)
        else:
            joined.append((peer, span))
    return tuple(joined)


def _option(view: View, hops: Hops, at: int, announcement: Announcement) -> Option:
    peer, (chosen, span) = announcement.peer_id, hops[at]
    cost, estimate = view.cost(peer), view.estimate(peer)
    queue_s = waits_s(estimate, view.request.tokens)
    trip_s = (view.entry_s(hops[at - 1][0], peer) if at else cost.enter_s) - queue_s
    alternative = (*hops[:at], (peer, span), *hops[at + 1 :])
    return Option(
        peer_id=peer,
        name=announcement.name,
        spans=announcement.spans,
        route_s=view.route_s(alternative),
        trip_s=trip_s + (cost.leave_s if at == len(hops) - 1 else 0.0),
        queue_s=queue_s,
        compute_s=len(span) * cost.per_block_s,
        chosen=peer == chosen,
        measured=peer in view.estimates.measured,
        bytes_per_s=estimate.bytes_per_s,
        bytes_measured=view.estimates.timed(peer),
        uplink_bytes_per_s=estimate.uplink_bytes_per_s,
        note=view.last_resort(announcement),
    )


def _best_first(option: Option | Part) -> tuple[bool, float, PeerId]:
    return bool(option.note), option.route_s, option.peer_id

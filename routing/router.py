"""Events in, routes out: what a node knows of its peers, and the way it would go now.

Owns the combination of directory, estimates, reputation, cost, path, chain and flow. Does no I/O and keeps no clock: a
driver feeds it announcements and measurements and asks it for plans. Not for several threads at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence, Set
from dataclasses import replace
from typing import Final

from routing.chain import Hops, cheapest_chain, shortlist
from routing.coordinates import Coordinate, half_trip_s
from routing.crowd import Crowds
from routing.directory import Directory, Snapshot
from routing.errors import NoRoute
from routing.estimates import Estimates, RoundTrip
from routing.explanation import Explanation, Without, options, parts
from routing.ids import BlockSpan, ModelId, PeerId
from routing.path import Candidate, Candidates, bridge, cheapest_path, gaps
from routing.precision import is_at_least, precision
from routing.records import RECORD_LIFETIME_S, Announcement, PeerState
from routing.reputation import Opinion, Reputation
from routing.routes import Hop, Route, RouteRequest
from routing.spreading import Spreading, spread
from routing.view import HYSTERESIS, View

MAX_DETOURED: Final = 16
"""Peers that are priced in pairs because steps went over them lately."""
_NAMED_MAX: Final = 3


class Router:
    """Guards what is known about peers. Bounded: see MAX_PEERS in directory, estimates and reputation."""

    def __init__(self, turn: float = 0.0) -> None:
        """`turn`: in [0, 1), another one for each node, so that what they round they do not round alike (`dealing`)."""
        self._directory = Directory()
        self._estimates = Estimates(turn=turn)
        self._reputation = Reputation()
        self._spreading = Spreading(self._estimates)
        self._crowds = Crowds()

    @property
    def here(self) -> Coordinate:
        """Where this node is among others, by the round trips that it measured."""
        return self._estimates.here

    def on_announcements(self, announcements: Iterable[Announcement], now_s: float) -> None:
        """Verified announcements arrived, in any order, repeated or not."""
        self._directory.fold(announcements, now_s)
        for peer in self._reputation.unheard:
            record = self._directory.record_of(peer)  # None: whoever has none any more comes back with a new one
            made_at_s = math.inf if record is None else record.expires_at_s - RECORD_LIFETIME_S
            self._reputation.on_record(peer, made_at_s)

    def on_rtt(self, peer: PeerId, rtt_s: float, now_s: float, *, needed: bool = False) -> None:
        """A small message went to the peer and back. `needed`: it was sent because there is no route without it."""
        self._reputation.on_answer(peer, now_s, needed=needed)
        self._estimates.on_rtt(peer, rtt_s, now_s, self._directory.place_of(peer))

    def on_step(self, peer: PeerId, blocks: int, tokens: int, compute_s: float, queue_s: float, now_s: float) -> None:
        """The peer ran a step of `tokens` positions through `blocks` blocks."""
        self._estimates.on_step(peer, blocks, tokens, compute_s, queue_s, now_s)

    def on_transfer(self, peer: PeerId, size: int, seconds: float, now_s: float) -> None:
        """`size` bytes were sent to the peer, and `seconds` later this node knew that they had been read there."""
        self._estimates.on_transfer(peer, size, seconds, now_s)

    def uplink_bytes_per_s(self, now_s: float) -> int:
        """What this node may announce of what it sends large; 0 where nothing is known, or nothing slow."""
        return self._estimates.uplink_bytes_per_s(now_s)

    def on_trips(self, hops: Sequence[Hop], trips_s: float, now_s: float) -> None:
        """Steps of one position went over `hops` and were answered here, the quickest of some in `trips_s` beside what
        hops queued and computed.

        Of each way by itself this says nothing: see `detours`.
        """
        peers = [hop.peer_id for hop in hops]
        rtts_s = [self._estimates.rtt_s(peer, now_s) for peer in peers]
        if any(rtt_s is None for rtt_s in rtts_s):
            return
        known_s = [rtt_s for rtt_s in rtts_s if rtt_s is not None]
        found = map(self._directory.place_of, peers)
        places = [place if place is not None and place.usable else None for place in found]
        halves_s = (known_s[0] + known_s[-1]) / 2
        for (from_s, here), (to_s, there) in itertools.pairwise(zip(known_s, places, strict=True)):
            halves_s += half_trip_s(from_s, here, to_s, there)
        self._estimates.detours.on_route(peers, trips_s - halves_s, now_s)

    def on_trial(self, peer: PeerId, blocks: int, compute_s: float, now_s: float) -> None:
        """The peer ran one position through `blocks` blocks, for no session: it takes so long now."""
        self._estimates.on_trial(peer, blocks, compute_s, now_s)

    def doubted(self, model: ModelId, now_s: float) -> list[Announcement]:
        """Peers that were much slower than they say when they were measured last, some time ago, the longest first:
        nobody uses them, so nobody would find out that they are fast again."""
        backed_off, busy = self._reputation.backed_off(now_s), self._reputation.busy(now_s)
        doubted = [
            (age_s, a.peer_id, a)
            for a in self._directory.snapshot(now_s).of_model(model)
            if a.state is PeerState.ONLINE and a.peer_id not in backed_off and a.peer_id not in busy
            if (age_s := self._estimates.doubted_for_s(a, now_s))
        ]
        return [a for _, _, a in sorted(doubted, key=lambda item: item[:2], reverse=True)]

    def on_failure(
        self, peer: PeerId, now_s: float, reason: str, *, unreachable: bool = False, late: bool = False
    ) -> None:
        """The peer erred, died or kept silent: leave it alone for a while, longer each time. Who was only `unreachable`
        may be used sooner once it answers (`on_rtt`), and who was `late` may be waited for (`NoRoute.late`)."""
        self._reputation.on_failure(peer, now_s, reason, unreachable=unreachable, late=late)

    def silent(self, now_s: float) -> list[Announcement]:
        """Peers that announce themselves and are left alone only because they did not answer this node."""
        silent = self._reputation.silent(now_s)
        return [a for a in self._directory.snapshot(now_s).peers if a.peer_id in silent] if silent else []

    def on_busy(self, peer: PeerId, retry_after_s: float, now_s: float) -> None:
        """The peer is healthy and has no room: prefer others for as long as it asks. Not a failure."""
        self._reputation.on_busy(peer, retry_after_s, now_s)

    def on_paused(self, peer: PeerId) -> None:
        """The peer steps back for its owner: do without it until it announces that it is back. Not a failure."""
        self._directory.says(peer, PeerState.PAUSED)

    def on_draining(self, peer: PeerId) -> None:
        """The peer says that it leaves: do without it until it announces that it is back. Not a failure."""
        self._directory.says(peer, PeerState.DRAINING)

    def on_ended(self, session: Hashable) -> None:
        """A session of this node, as it was named in its requests, is over. Idempotent."""
        self._estimates.on_ended(session)

    def on_success(self, peer: PeerId, now_s: float) -> None:
        """The peer did what was asked of it."""
        self._reputation.on_success(peer, now_s)

    def record_of(self, peer: PeerId) -> Announcement | None:
        """What the peer announced last, which may be over."""
        return self._directory.record_of(peer)

    def snapshot(self, now_s: float) -> Snapshot:
        """Everybody who is live now, of every model."""
        return self._directory.snapshot(now_s)

    def rtt_s(self, peer: PeerId, now_s: float) -> float | None:
        """The smoothed round trip to a peer, or None when it was never measured."""
        return self._estimates.rtt_s(peer, now_s)

    def round_trips(self, now_s: float, count: int) -> list[RoundTrip]:
        """What this node measured to the peers that it measured last, at most `count`."""
        return self._estimates.round_trips(now_s, count)

    def opinions(self, now_s: float, count: int) -> list[Opinion]:
        """What this node has against the peers that it heard of last, at most `count`."""
        return self._reputation.opinions(now_s, count)

    def plan(self, request: RouteRequest, now_s: float) -> Route:
        """The cheapest route, or the previous one while it is usable and not clearly worse.

        A route enters as few peers as it can that are busy or have too little room for the session's cache, and none
        that are avoided, paused, draining, joining, backed off, too imprecise or without an address. Good for this
        moment only. Raises NoRoute, which names the missing blocks and says whether nobody holds them or who does.
        """
        snapshot = self._directory.snapshot(now_s)
        if request.spread is not None:
            self._spreading.flow(snapshot, request)  # the prices of peers in demand follow from it
        view = self._view(request, now_s)
        hops = self._cheapest(view, snapshot)
        if view.short(hops):  # nobody has room for what is expected, so that says nothing
            view = self._view(replace(request, expected_tokens=0), now_s)
            hops = self._cheapest(view, snapshot)
        self._take(view, hops)
        return self._route(view, hops)

    def _cheapest(self, view: View, snapshot: Snapshot) -> Hops:
        """Raises NoRoute."""
        request, previous = view.request, view.previous
        kept = [
            (hop.peer_id, hop.span)
            for hop in request.keep
            if view.usable(hop.peer_id) and view.by_peer[hop.peer_id].spans.covers(hop.span)
        ]
        if kept:
            missing = gaps((span for _, span in kept), request.num_blocks)
            between: Candidates | Sequence[Candidate] = view.candidates(missing) if missing else ()
            if (bridged := bridge(kept, between, request.num_blocks)) is not None:
                return bridged
        candidates = view.candidates()
        path = cheapest_path(candidates, request.num_blocks)
        if path is None:
            late = self._reputation.late(view.now_s) - request.avoid
            raise _no_route(request, view.announcements, *_reasons(view), late)
        hops = self._over_links(view, candidates, path.hops)
        if view.whole:
            if view.priced_route_s(hops) > (1 - HYSTERESIS) * view.priced_route_s(previous):
                hops = previous
        elif view.kept and view.compared_route_s(view.kept) - view.saved_s() <= view.compared_route_s(hops):
            hops = view.kept
        elif request.spread is not None and not previous:
            hops = spread(view, hops, self._spreading.flow(snapshot, request), request.spread)
        return hops

    def _take(self, view: View, hops: Hops) -> None:
        """Count the route as taken, where it is planned for that and was not before: or all sessions that lost one peer
        would go to the same other one."""
        request, estimates = view.request, self._estimates
        if request.spread is not None and (hops != view.previous or estimates.is_new(request.session)):
            parts = [(view.by_peer[peer], len(span)) for peer, span in hops]
            estimates.on_planned(request.session, parts, view.idle_s(hops), view.now_s)

    def route_s(self, request: RouteRequest, now_s: float) -> float | None:
        """What a step takes over `request.previous`; None while one of its peers is not to be used."""
        view = self._view(request, now_s)
        return view.route_s(view.previous) if view.whole else None

    def replaceable(self, request: RouteRequest, peers: Set[PeerId], now_s: float) -> bool:
        """Whether `request.previous` could go on without `peers` now, over others that are not busy and have room."""
        assert request.previous is not None
        others = tuple(hop for hop in request.previous.hops if hop.peer_id not in peers)
        request = replace(request, avoid=request.avoid | peers, keep=others)
        try:
            route = self.plan(request, now_s)
        except NoRoute:
            return False
        view = self._view(request, now_s)
        return not any(view.last_resort(view.by_peer[hop.peer_id]) for hop in route.hops)

    def standby(self, request: RouteRequest, hop: Hop, avoid: Set[PeerId], now_s: float) -> Hop | None:
        """Another peer for `hop` of `request.previous`: the one with which that route costs least, of those that are on
        neither it nor in `avoid`, are not busy and have room for the session; None where there is none."""
        view, hops = self._view(request, now_s), _hops_of(request.previous)
        if not view.whole:
            return None
        at = hops.index((hop.peer_id, hop.span))
        able = [
            a.peer_id
            for a in view.holders(hop.span)
            if a.peer_id not in view.settled and a.peer_id not in avoid and not view.last_resort(a)
        ]

        def route_s(peer: PeerId) -> tuple[float, PeerId]:
            return view.route_s((*hops[:at], (peer, hop.span), *hops[at + 1 :])), peer

        return None if not able else _hop(view.by_peer[min(able, key=route_s)], hop.span)

    def explain(self, request: RouteRequest, now_s: float) -> Explanation:
        """The route of `plan`, and what every other peer would have made of it. Raises NoRoute."""
        route = self.plan(replace(request, spread=None), now_s)
        view = self._view(request, now_s)
        hops: Hops = tuple((hop.peer_id, hop.span) for hop in route.hops)
        excluded, imprecise = _reasons(view)
        reasons = imprecise | excluded
        left_out = [(a, _why_not(a, reasons)) for a in view.announcements if a.num_blocks == request.num_blocks]
        return Explanation(
            route=route,
            without=tuple(self._without(request, peer, now_s) for peer, _ in hops),
            options=options(view, hops),
            parts=parts(view, hops),
            left_out=tuple((a.name or a.peer_id, a.spans, reason) for a, reason in left_out if reason),
        )

    def _without(self, request: RouteRequest, peer: PeerId, now_s: float) -> Without | None:
        try:
            route = self.plan(replace(request, spread=None, avoid=request.avoid | {peer}), now_s)
        except NoRoute:
            return None
        named = self._view(request, now_s).by_peer
        hops = tuple((hop.peer_id, named[hop.peer_id].name, hop.span) for hop in route.hops)
        return Without(hops=hops, cost_s=route.cost_s)

    def _view(self, request: RouteRequest, now_s: float) -> View:
        snapshot, estimates = self._directory.snapshot(now_s), self._estimates
        crowd = self._crowds.of(snapshot, request)
        excluded = dict.fromkeys(request.avoid, "avoided") | self._reputation.backed_off(now_s)
        busy, previous = self._reputation.busy(now_s), _hops_of(request.previous)
        # These hold the session's cache already: how much more they have room for does not matter.
        settled = {peer for peer, _ in previous}
        kept = () if request.kept is None or previous else tuple((hop.peer_id, hop.span) for hop in request.kept.hops)

        def works(hops: Hops) -> bool:
            return bool(hops) and all(
                peer in crowd.by_peer and peer not in excluded and crowd.by_peer[peer].spans.covers(span)
                for peer, span in hops
            )

        return View(
            request=request,
            estimates=estimates,
            now_s=now_s,
            announcements=snapshot.of_model(request.model),
            crowd=crowd,
            excluded=excluded,
            busy=busy,
            settled=settled,
            previous=previous,
            whole=works(previous),
            kept=kept if works(kept) else (),
            detoured=bool(estimates.detours),
        )

    def _over_links(self, view: View, candidates: Candidates, hops: Hops) -> Hops:
        """The cheapest hops when every trip between two peers has its own price, where any is known."""
        if not self._estimates.detours and (candidates.cells == candidates.cells[0]).all():
            return hops  # all at one place, or at none that is known
        keep = {peer for peer, _ in (*hops, *view.previous)} | self._estimates.detours.latest(MAX_DETOURED)
        few = shortlist(candidates, keep)
        chain = cheapest_chain(
            few,
            view.request.num_blocks,
            view.compared_entry_s,
            least_s=view.least_entry_s,
            at_most_s=view.compared_route_s(hops),
        )
        return min((other for other in (chain, hops) if other), key=view.compared_route_s)

    @staticmethod
    def _route(view: View, hops: Hops) -> Route:
        return Route(
            hops=tuple(_hop(view.by_peer[peer], span) for peer, span in hops),
            cost_s=view.route_s(hops),
        )


def _reasons(view: View) -> tuple[dict[PeerId, str], dict[PeerId, str]]:
    """Why peers are not used that might be: whatever it is, and that they are not precise enough."""
    request = view.request
    excluded, imprecise = dict(view.excluded), {}
    for a in view.announcements:
        if request.protocol is not None and a.protocol != request.protocol:
            excluded[a.peer_id] = f"speaks protocol {a.protocol}, this node speaks {request.protocol}"
        if request.adapter is not None and not a.hosts(request.adapter.digest):
            excluded[a.peer_id] = f"does not host adapter {request.adapter}"
        if not is_at_least(a.dtype, a.quantization, request.min_precision):
            imprecise[a.peer_id] = f"computes in {precision(a.dtype, a.quantization)}"
    return excluded, imprecise


def _why_not(announcement: Announcement, reasons: dict[PeerId, str]) -> str:
    """Why a peer cannot be used now, or "" if it can."""
    if announcement.state is not PeerState.ONLINE:
        return announcement.state.value
    return "without an address" if not announcement.addresses else reasons.get(announcement.peer_id, "")


def _hop(announcement: Announcement, span: BlockSpan) -> Hop:
    return Hop(
        peer_id=announcement.peer_id,
        span=span,
        addresses=announcement.addresses,
        dtype=announcement.dtype,
        quantization=announcement.quantization,
    )


def _hops_of(route: Route | None) -> tuple[tuple[PeerId, BlockSpan], ...]:
    return tuple((hop.peer_id, hop.span) for hop in route.hops) if route is not None else ()


def _no_route(
    request: RouteRequest,
    announcements: Iterable[Announcement],
    excluded: dict[PeerId, str],
    imprecise: dict[PeerId, str],
    late: Set[PeerId],
) -> NoRoute:
    held = [a for a in announcements if a.num_blocks == request.num_blocks]
    excluded = {a.peer_id: reason for a in held if (reason := _why_not(a, excluded))}
    serving = [a for a in held if a.peer_id not in excluded]
    precise = [span for a in serving if a.peer_id not in imprecise for span in a.spans]
    missing, excluded = gaps(precise, request.num_blocks), imprecise | excluded
    by_imprecise = gaps(
        (*precise, *gaps((span for a in serving for span in a.spans), request.num_blocks)), request.num_blocks
    )
    unheld = gaps((span for a in held for span in a.spans), request.num_blocks)
    if not held:
        everything = _listed([BlockSpan(0, request.num_blocks)])
        return NoRoute(
            f"no peer serves model {request.model}: blocks {everything} are missing", missing=[(0, request.num_blocks)]
        )
    model = f"model {request.model}" + (f" with adapter {request.adapter}" if request.adapter else "")
    message = f"no route for {model}: blocks {_listed(missing)} are missing"
    if unheld:
        message += f"; nobody holds {_listed(unheld)}"
    if by_imprecise:
        one = sum(map(len, by_imprecise)) == 1
        served = f"block {by_imprecise[0].start} is" if one else f"blocks {_listed(by_imprecise)} are"
        message += f"; {served} served only below the demanded precision, {request.min_precision}"
    reasons = [
        f"{a.name or a.peer_id} ({a.spans}, {excluded[a.peer_id]})"
        for a in sorted(held, key=lambda a: (a.spans, a.peer_id))
        if a.peer_id in excluded and any(map(a.spans.overlaps, missing))
    ]
    if reasons:
        named = ", ".join(reasons[:_NAMED_MAX]) + (", …" if len(reasons) > _NAMED_MAX else "")
        message += f"; held only by peers that cannot be used now: {named}"
    hint = "ask for less with --min-precision, or start a peer that computes so precisely" if by_imprecise else ""
    answering = (span for a in held if a.peer_id in late and a.peer_id not in imprecise for span in a.spans)
    whole = not gaps((*precise, *answering), request.num_blocks)
    return NoRoute(message, missing=[(gap.start, gap.end) for gap in missing], late=whole, hint=hint)


def _listed(spans: Iterable[BlockSpan]) -> str:
    return ", ".join(map(str, spans))

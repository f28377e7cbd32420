"""Events in, routes out: what a node knows of its peers, and the way it would go now.

Owns the combination of directory, estimates, reputation, cost, path, chain and flow. Does no I/O and keeps no clock: a
driver feeds it announcements and measurements and asks it for plans. Not for several threads at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from routing.chain import Hops, cell_of, cheapest_chain, shortlist
from routing.coordinates import Coordinate, distance_s
from routing.cost import HopCost, hop_cost, longer, waits_s
from routing.crowd import Crowd
from routing.detours import HERE
from routing.directory import Directory, Snapshot
from routing.errors import NoRoute
from routing.estimates import Estimates, Load, PeerEstimate, RoundTrip
from routing.flow import Shares, by_span, capacities_of, pick, shares
from routing.ids import BlockSpan, BlockSpans, ModelId, PeerId
from routing.path import Candidate, bridge, cheapest_path, gaps
from routing.precision import is_at_least, precision
from routing.records import Announcement, HostedAdapter, PeerState
from routing.reputation import Opinion, Reputation

HYSTERESIS: Final = 0.2
"""A new route must save this share of the previous one's cost, or the previous one stays; and where one of its hops is
lost, whoever takes the place of another must save it of that one's."""

SPREAD: Final = 0.1
"""A peer may serve a hop in place of the best one where that costs no more than this share of the whole route."""
MAX_ALTERNATIVES: Final = 128
"""Looked at per hop, beginning at another one for each session."""
MAX_CROWDS: Final = 8
"""Kinds of requests for which peers are sorted beforehand."""

MAX_DETOURED: Final = 16
"""Peers that are priced in pairs because steps went over them lately."""

FLOW_SAMPLE: Final = 2000
"""Peers from which the shares of all are computed: of more, every second one, every third one, and so on."""

_LAST_RESORT_S: Final = 1e6
"""Added to the entry of a peer that should serve only where nobody else can; no honest cost comes near."""
_NAMED_MAX: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """The part of a route that one peer serves."""

    peer_id: PeerId
    span: BlockSpan
    addresses: tuple[str, ...]
    dtype: str = ""
    quantization: str = ""
    """In which the peer computes, as it says; like `addresses`, of the moment when the route was planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Hops that cover every block once and in order; a peer may serve several of them."""

    hops: tuple[Hop, ...]
    cost_s: float
    """What one step is expected to take from the first frame out to the last answer back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A route whose hops hold the first positions of what is to be sent: over all of it they need not be sent."""

    hops: tuple[Hop, ...]
    saves: float
    """Positions per step, of `RouteRequest.tokens`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """What a session wants to do."""

    model: ModelId
    num_blocks: int
    """From the client's own configuration: peers that claim another number are ignored."""
    avoid: frozenset[PeerId] = frozenset()
    tokens: int = 1
    """Positions per step."""
    bytes_per_token: int
    """Of hidden state on the wire."""
    cache_tokens: int = 0
    """KV positions that the session will need at every hop."""
    protocol: int | None = None
    """The version that the asking node speaks; peers of another one cannot be understood."""
    min_precision: str | None = None
    """Peers that compute less precisely than this, one of `routing.precision.PRECISIONS`, are not entered."""
    adapter: HostedAdapter | None = None
    """Only peers that host it are entered."""
    previous: Route | None = None
    """The route in use: kept unless another one is clearly better, and where it lost a hop, so are its other peers."""
    keep: tuple[Hop, ...] = ()
    """Hops that hold the session, in order: where peers that may be used can serve the blocks between them, these stay
    as they are, and the answer is the cheapest bridge."""
    kept: Kept | None = None
    """What an earlier session left behind; without `previous`."""
    spread: float | None = None
    """A number in [0, 1), another one for each session (see `flow.GOLDEN`): of peers that are about as good, it decides
    which, so that they are used in proportion to what the swarm's maximum flow gives them. The route is counted as
    taken. None: always the best."""
    session: Hashable | None = None
    """Whose route it is, until `Router.on_ended`: with it the sessions of this node share peers in proportion once a
    swarm is in demand, each new one going where the fewest are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a route would take if this peer served a hop of it, and how much of that is the peer's."""

    peer_id: PeerId
    name: str
    spans: BlockSpans
    """Everything that it serves."""
    route_s: float
    trip_s: float
    """Into the peer from where the step comes from, and back to this node from the last hop; bytes included."""
    queue_s: float
    compute_s: float
    chosen: bool
    measured: bool
    """Else all of this is what the peer says, and what places predict."""
    bytes_per_s: float
    """From this node to the peer."""
    bytes_measured: bool
    """Else that is assumed."""
    note: str = ""
    """Why it is entered only where nobody else can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a route is what it is."""

    route: Route
    options: tuple[tuple[Option, ...], ...]
    """For each hop, the peers that hold all of its blocks, the best first."""
    left_out: tuple[tuple[str, BlockSpans, str], ...]
    """Peers that cannot be used now: name or id, spans, reason."""


class Router:
    """Guards what is known about peers. Bounded: see MAX_PEERS in directory, estimates and reputation."""

    def __init__(self) -> None:
        self._directory = Directory()
        self._estimates = Estimates()
        self._reputation = Reputation()
        self._shares: tuple[Snapshot, ModelId, int, Shares] | None = None
        self._crowds_of: Snapshot | None = None
        self._crowds: dict[tuple[ModelId, int, int | None, str | None, bytes | None], Crowd] = {}

    @property
    def here(self) -> Coordinate:
        """Where this node is among others, by the round trips that it measured."""
        return self._estimates.here

    def on_announcements(self, announcements: Iterable[Announcement], now_s: float) -> None:
        """Verified announcements arrived, in any order, repeated or not."""
        self._directory.fold(announcements, now_s)

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
            halves_s += _half_trip_s(from_s, here, to_s, there)
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
        if request.spread is not None:
            self._flow(request, now_s)
        view = self._view(request, now_s)
        usable, previous = view.usable, view.previous
        kept = [
            (h.peer_id, h.span) for h in request.keep if h.peer_id in usable and usable[h.peer_id].spans.covers(h.span)
        ]
        if kept:
            missing = gaps((span for _, span in kept), request.num_blocks)
            between = view.candidates(missing) if missing else []
            if (bridged := bridge(kept, between, request.num_blocks)) is not None:
                self._take(view, bridged)  # or all sessions that lost one peer would go to the same other one
                return self._route(view, bridged)
        candidates = view.candidates()
        path = cheapest_path(candidates, request.num_blocks)
        if path is None:
            late = self._reputation.late(now_s) - request.avoid
            raise _no_route(request, view.announcements, *_reasons(view), late)
        hops = self._over_links(view, candidates, path.hops)
        if view.whole:
            if view.priced_route_s(hops) > (1 - HYSTERESIS) * view.priced_route_s(previous):
                hops = previous
        elif view.kept and view.compared_route_s(view.kept) - view.saved_s() <= view.compared_route_s(hops):
            hops = view.kept
        elif request.spread is not None and not previous:
            hops = self._spread(view, hops, request.spread, now_s)
        self._take(view, hops)
        return self._route(view, hops)

    def _take(self, view: _View, hops: Hops) -> None:
        """Count the route as taken, where it is planned for that and was not before."""
        request, estimates = view.request, self._estimates
        if request.spread is not None and (hops != view.previous or estimates.is_new(request.session)):
            parts = [(view.by_peer[peer], len(span)) for peer, span in hops]
            estimates.on_planned(request.session, parts, view.idle_s(hops), view.now_s)

    def route_s(self, request: RouteRequest, now_s: float) -> float | None:
        """What a step takes over `request.previous`; None while one of its peers is not to be used."""
        view = self._view(request, now_s)
        return view.route_s(view.previous) if view.whole else None

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
        options = []
        for at, (chosen, span) in enumerate(hops):
            others = {peer for peer, _ in hops if peer != chosen}
            able = [a for a in view.holders(span) if a.peer_id not in others]
            options.append(tuple(sorted((self._option(view, hops, at, a) for a in able), key=_best_first)))
        excluded, imprecise = _reasons(view)
        reasons = imprecise | excluded
        left_out = [(a, _why_not(a, reasons)) for a in view.announcements if a.num_blocks == request.num_blocks]
        return Explanation(
            route=route,
            options=tuple(options),
            left_out=tuple((a.name or a.peer_id, a.spans, reason) for a, reason in left_out if reason),
        )

    def _option(self, view: _View, hops: Hops, at: int, announcement: Announcement) -> Option:
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
            measured=peer in self._estimates.measured,
            bytes_per_s=estimate.bytes_per_s,
            bytes_measured=self._estimates.timed(peer),
            note=view.last_resort(announcement),
        )

    def _view(self, request: RouteRequest, now_s: float) -> _View:
        snapshot, estimates = self._directory.snapshot(now_s), self._estimates
        crowd = self._crowd(snapshot, request)
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

        return _View(
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

    def _crowd(self, snapshot: Snapshot, request: RouteRequest) -> Crowd:
        if self._crowds_of is not snapshot or len(self._crowds) >= MAX_CROWDS:
            self._crowds_of, self._crowds = snapshot, {}
        adapter = None if request.adapter is None else request.adapter.digest
        kind = (request.model, request.num_blocks, request.protocol, request.min_precision, adapter)
        if (crowd := self._crowds.get(kind)) is None:
            announcements = snapshot.of_model(request.model)
            crowd = Crowd(announcements, request.num_blocks, request.protocol, request.min_precision, adapter)
            self._crowds[kind] = crowd
        return crowd

    def _over_links(self, view: _View, candidates: Sequence[Candidate], hops: Hops) -> Hops:
        """The cheapest hops when every trip between two peers has its own price, where any is known."""
        cells = (cell_of(a.place) for a in view.usable.values())
        if not self._estimates.detours and all(cell == first for first in itertools.islice(cells, 1) for cell in cells):
            return hops  # all at one place, or at none that is known
        keep = {peer for peer, _ in (*hops, *view.previous)} | self._estimates.detours.latest(MAX_DETOURED)
        few = shortlist(candidates, lambda peer: cell_of(view.usable[peer].place), keep)
        chain = cheapest_chain(
            few,
            view.request.num_blocks,
            view.compared_entry_s,
            least_s=view.least_entry_s,
            at_most_s=view.compared_route_s(hops),
        )
        return min((other for other in (chain, hops) if other), key=view.compared_route_s)

    def _spread(self, view: _View, hops: Hops, at: float, now_s: float) -> Hops:
        """One hop after the other, whoever of about equals the session's number falls to."""
        flow, count = self._flow(view.request, now_s), len(view.crowd.able)
        first, turn = (int(at * count), at * count % 1) if count > MAX_ALTERNATIVES else (0, at)
        within_s = view.compared_route_s(hops) + SPREAD * view.route_s(hops)
        for index, (peer, span) in enumerate(hops):
            others = {other for other, _ in hops if other != peer}
            able = (a for a in view.holders(span, first) if a.peer_id not in others)
            part_s = view.compared_part_s(hops, index)
            most_s = part_s(peer) + within_s - view.compared_route_s(hops)
            weights = {
                a.peer_id: _share(flow, a, span)
                for a in itertools.islice(able, MAX_ALTERNATIVES)
                if part_s(a.peer_id) <= most_s
            }
            weights.setdefault(peer, _share(flow, view.by_peer[peer], span))
            hops = (*hops[:index], (pick(weights, turn), span), *hops[index + 1 :])
        return hops

    def _flow(self, request: RouteRequest, now_s: float) -> Shares:
        snapshot, known = self._directory.snapshot(now_s), self._shares
        if known is None or known[:3] != (snapshot, request.model, request.num_blocks):
            everybody = snapshot.of_model(request.model)
            every = 1 + len(everybody) // FLOW_SAMPLE
            online = [
                a for a in everybody[::every] if a.state is PeerState.ONLINE and a.num_blocks == request.num_blocks
            ]
            parts = [part for a in online for part in capacities_of(a)]
            flow = shares(by_span(parts), request.num_blocks)
            asked = sum(a.sessions * a.spans.num_blocks for a in online)
            self._estimates.load = Load(
                tokens_per_s=every * flow.tokens_per_s,
                turn_s=asked / max(1e-9, sum(amount for _, amount in parts)),
            )
            known = self._shares = (snapshot, request.model, request.num_blocks, flow)
        return known[3]

    @staticmethod
    def _route(view: _View, hops: Hops) -> Route:
        return Route(
            hops=tuple(_hop(view.by_peer[peer], span) for peer, span in hops),
            cost_s=view.route_s(hops),
        )


class _Known(NamedTuple):
    """What one plan found out about a peer."""

    estimate: PeerEstimate
    cost: HopCost
    compared: HopCost
    """What it is compared by: dearer for last resorts, cheaper for peers of the route that was."""
    price_s_per_block: float
    """The part of `compared.per_block_s` that is there for this node's other sessions."""
    beside_trip_s: float
    """`cost.enter_s` without the way from this node to the peer."""
    compared_beside_trip_s: float
    """The same of `compared.enter_s`."""
    scale: float
    """What a second of a trip counts in `compared`."""
    place: Coordinate | None
    """Where that says anything."""


@dataclass(slots=True, kw_only=True)
class _View:
    """What one plan sees, and what it costs. Prices are made when they are asked for, once."""

    request: RouteRequest
    estimates: Estimates
    now_s: float
    announcements: Sequence[Announcement]
    crowd: Crowd
    excluded: dict[PeerId, str]
    """Who of the crowd is not to be entered, and why."""
    busy: Set[PeerId]
    settled: Set[PeerId]
    previous: Hops
    whole: bool
    """Whether `previous` can still be used as it is."""
    kept: Hops
    """The hops of `request.kept`, where all of them can be used."""
    detoured: bool
    """Whether any way is known to take something else than half a round trip."""
    _known: dict[PeerId, _Known] = field(default_factory=dict)
    _usable: dict[PeerId, Announcement] | None = None

    @property
    def usable(self) -> dict[PeerId, Announcement]:
        """Without strangers that others of their kind claim to beat."""
        if self._usable is None:
            request, estimates, crowd = self.request, self.estimates, self.crowd
            kept = (hop.peer_id for hop in request.keep)
            known = {*estimates.measured, *estimates.used, *self.busy, *self.settled, *kept}
            without = known | self.excluded.keys()
            strangers = crowd.fastest(request.tokens, request.cache_tokens, estimates.turn_s, without)
            usable = {p: crowd.by_peer[p] for p in known if p in crowd.by_peer and p not in self.excluded}
            self._usable = usable | {a.peer_id: a for a in strangers}
        return self._usable

    def candidates(self, within: Sequence[BlockSpan] = ()) -> list[Candidate]:
        """Whoever may serve any of these blocks; without any, everybody."""
        return [
            Candidate(peer, span, self.compared(peer))
            for peer, a in self.usable.items()
            for span in a.spans.parts
            if not within or any(span.start < part.end and part.start < span.end for part in within)
        ]

    @property
    def by_peer(self) -> dict[PeerId, Announcement]:
        return self.crowd.by_peer

    def holders(self, span: BlockSpan, first: int = 0) -> Iterator[Announcement]:
        """All that may be entered for these blocks, from a place in the crowd on."""
        return (a for a in self.crowd.holders(span, first) if a.peer_id not in self.excluded)

    def cost(self, peer: PeerId) -> HopCost:
        return self._of(peer).cost

    def compared(self, peer: PeerId) -> HopCost:
        return self._of(peer).compared

    def estimate(self, peer: PeerId) -> PeerEstimate:
        return self._of(peer).estimate

    def entry_s(self, before: PeerId, peer: PeerId) -> float:
        """What `peer` costs to enter from `before` instead of from this node."""
        return self._of(peer).beside_trip_s + self._trip_s(before, peer)

    def compared_entry_s(self, before: PeerId, peer: PeerId) -> float:
        known = self._known.get(peer) or self._of(peer)
        return known.compared_beside_trip_s + known.scale * self._trip_s(before, peer)

    def least_entry_s(self, peer: PeerId) -> float:
        """No less is `compared_entry_s`, from wherever."""
        known, least_s = self._of(peer), 0.0
        if not self.detoured:
            height_s = math.inf if known.place is None else known.place.height_s
            least_s = min(height_s, known.estimate.rtt_s) / 2
        return known.compared_beside_trip_s + known.scale * least_s

    def route_s(self, hops: Hops) -> float:
        """What one step takes from the first frame out to the last answer back."""
        total_s = self.cost(hops[0][0]).enter_s + self.cost(hops[-1][0]).leave_s
        total_s += sum(len(span) * self.cost(peer).per_block_s for peer, span in hops)
        return total_s + sum(self.entry_s(a, b) for (a, _), (b, _) in itertools.pairwise(hops))

    def idle_s(self, hops: Hops) -> float:
        """What one step of one position takes where nobody waits."""
        total_s = self.route_s(hops)
        for peer, span in hops:
            estimate = self.estimate(peer)
            longer_s = self.cost(peer).per_block_s - estimate.decode_s_per_block
            total_s -= waits_s(estimate, self.request.tokens) + len(span) * longer_s
        return total_s

    def compared_route_s(self, hops: Hops) -> float:
        total_s = self.compared(hops[0][0]).enter_s + self.compared(hops[-1][0]).leave_s
        total_s += sum(len(span) * self.compared(peer).per_block_s for peer, span in hops)
        return total_s + sum(self.compared_entry_s(a, b) for (a, _), (b, _) in itertools.pairwise(hops))

    def compared_part_s(self, hops: Hops, index: int) -> Callable[[PeerId], float]:
        """The part of `compared_route_s` that another peer at this hop changes, with that peer there."""
        blocks = len(hops[index][1])
        before = hops[index - 1][0] if index else None
        after = hops[index + 1][0] if index + 1 < len(hops) else None

        def part_s(peer: PeerId) -> float:
            enter_s, per_block_s, leave_s = self._of(peer).compared
            part_s = blocks * per_block_s + (enter_s if before is None else self.compared_entry_s(before, peer))
            return part_s + (leave_s if after is None else self.compared_entry_s(peer, after))

        return part_s

    def saved_s(self) -> float:
        """What a step over `kept` takes less because of what is held there: its computation, its part of the wait, and
        the bytes on all ways."""
        request, saved_s = self.request, 0.0
        assert request.kept is not None
        less = max(1.0, request.tokens - request.kept.saves)
        for index, (peer, span) in enumerate(self.kept):
            estimate = self.estimate(peer)
            whole, rest = (
                hop_cost(estimate, tokens=tokens, bytes_per_token=request.bytes_per_token)
                for tokens in (request.tokens, less)
            )
            saved_s += whole.enter_s - rest.enter_s + len(span) * (whole.per_block_s - rest.per_block_s)
            saved_s += whole.leave_s - rest.leave_s if index == len(self.kept) - 1 else 0.0
        return saved_s

    def priced_route_s(self, hops: Hops) -> float:
        """`route_s`, and what its peers are made dearer by for this node's other sessions."""
        return self.route_s(hops) + sum(len(span) * self._of(peer).price_s_per_block for peer, span in hops)

    def last_resort(self, announcement: Announcement) -> str:
        """Why a peer is entered only where nobody else can be; empty for the others."""
        if announcement.peer_id in self.busy:
            return "busy"
        if announcement.free_tokens < self.request.cache_tokens and announcement.peer_id not in self.settled:
            return "no room for the session"
        return ""

    def _of(self, peer: PeerId) -> _Known:
        known = self._known.get(peer)
        if known is None:
            known = self._known[peer] = self._price(peer, self.crowd.by_peer[peer])
        return known

    def _price(self, peer: PeerId, announcement: Announcement) -> _Known:
        request, estimates = self.request, self.estimates
        estimate = estimates.of(announcement, self.now_s)
        cost = hop_cost(estimate, tokens=request.tokens, bytes_per_token=request.bytes_per_token)
        half_s = trip_s = way_s = estimate.rtt_s / 2
        if self.detoured:
            trip_s = way_s = half_s + max(-half_s, estimates.detours.of(HERE, peer, self.now_s))
            back_s = max(-half_s, estimates.detours.of(peer, HERE, self.now_s))
            cost = HopCost(cost.enter_s - half_s + way_s, cost.per_block_s, cost.leave_s + back_s)
        compared = cost
        if peer in self.settled and not self.whole:
            compared = HopCost(*(part_s * (1 - HYSTERESIS) for part_s in cost))
            trip_s *= 1 - HYSTERESIS
        price_s = estimates.price_s_per_block(announcement) if request.spread is not None else 0.0
        if price_s:
            price_s *= longer(estimate.decode_s_per_block, estimate.prefill_s_per_token_block, request.tokens)
            compared = compared._replace(per_block_s=compared.per_block_s + price_s)
        if self.last_resort(announcement):
            compared = compared._replace(enter_s=compared.enter_s + _LAST_RESORT_S)
        place = announcement.place
        return _Known(
            estimate,
            cost,
            compared,
            price_s,
            cost.enter_s - way_s,
            compared.enter_s - trip_s,
            trip_s / way_s if way_s else 1.0,
            place if place is not None and place.usable else None,
        )

    def _trip_s(self, a: PeerId, b: PeerId) -> float:
        """One way between two peers: by their places, within what this node's own round trips to both allow.

        Where a place is not known, as far as from this node to the second one.
        """
        known = self._known
        from_, to = known.get(a) or self._of(a), known.get(b) or self._of(b)
        half_s = _half_trip_s(from_.estimate[0], from_.place, to.estimate[0], to.place)
        if self.detoured:
            half_s += max(-half_s, self.estimates.detours.of(a, b, self.now_s))
        return half_s


def _half_trip_s(from_s: float, here: Coordinate | None, to_s: float, there: Coordinate | None) -> float:
    """Half a round trip between two peers, at usable places, to which this node's own take `from_s` and `to_s`."""
    if here is None or there is None:
        return to_s / 2
    return min(max(distance_s(here, there), abs(from_s - to_s)), from_s + to_s) / 2


def _share(flow: Shares, announcement: Announcement, hop: BlockSpan) -> float:
    return next(flow.of(span, amount, hop) for span, amount in capacities_of(announcement) if span.covers(hop))


def _best_first(option: Option) -> tuple[bool, float, PeerId]:
    return bool(option.note), option.route_s, option.peer_id


def _reasons(view: _View) -> tuple[dict[PeerId, str], dict[PeerId, str]]:
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

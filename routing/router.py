"""Events in, routes out: what a node knows of its peers, and the way it would go now.

Owns the combination of directory, estimates, reputation, cost and path. Does no I/O and keeps no clock: a driver feeds
it announcements and measurements and asks it for plans. Not for several threads at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Final

from routing.cost import HopCost, block_s, hop_cost
from routing.directory import Directory, Snapshot
from routing.errors import NoRoute
from routing.estimates import Estimates
from routing.ids import BlockSpan, ModelId, PeerId
from routing.path import Candidate, bridge, cheapest_path, gaps, path_cost_s
from routing.precision import is_at_least, precision
from routing.records import Announcement, PeerState
from routing.reputation import Reputation

HYSTERESIS: Final = 0.2
"""A new route must save this share of the previous one's cost, or the previous one stays; and where one of its hops is
lost, whoever takes the place of another must save it of that one's."""

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
    previous: Route | None = None
    """The route in use: kept unless another one is clearly better, and where it lost a hop, so are its other peers."""
    keep: tuple[Hop, ...] = ()
    """Hops that hold the session, in order: where peers that may be used can serve the blocks between them, these stay
    as they are, and the answer is the cheapest bridge."""


class Router:
    """Guards what is known about peers. Bounded: see MAX_PEERS in directory, estimates and reputation."""

    def __init__(self) -> None:
        self._directory = Directory()
        self._estimates = Estimates()
        self._reputation = Reputation()

    def on_announcements(self, announcements: Iterable[Announcement], now_s: float) -> None:
        """Verified announcements arrived, in any order, repeated or not."""
        self._directory.fold(announcements, now_s)

    def on_rtt(self, peer: PeerId, rtt_s: float, now_s: float) -> None:
        """A small message went to the peer and back."""
        self._estimates.on_rtt(peer, rtt_s, now_s)

    def on_step(self, peer: PeerId, blocks: int, tokens: int, compute_s: float, queue_s: float, now_s: float) -> None:
        """The peer ran a step of `tokens` positions through `blocks` blocks."""
        self._estimates.on_step(peer, blocks, tokens, compute_s, queue_s, now_s)

    def on_failure(self, peer: PeerId, now_s: float, reason: str) -> None:
        """The peer erred, died or kept silent: leave it alone for a while, longer each time."""
        self._reputation.on_failure(peer, now_s, reason)

    def on_busy(self, peer: PeerId, retry_after_s: float, now_s: float) -> None:
        """The peer is healthy and has no room: prefer others for as long as it asks. Not a failure."""
        self._reputation.on_busy(peer, retry_after_s, now_s)

    def on_paused(self, peer: PeerId) -> None:
        """The peer steps back for its owner: do without it until it announces that it is back. Not a failure."""
        self._directory.paused(peer)

    def on_success(self, peer: PeerId, now_s: float) -> None:
        """The peer did what was asked of it."""
        self._reputation.on_success(peer, now_s)

    def snapshot(self, now_s: float) -> Snapshot:
        """Everybody who is live now, of every model."""
        return self._directory.snapshot(now_s)

    def rtt_s(self, peer: PeerId, now_s: float) -> float | None:
        """The smoothed round trip to a peer, or None when it was never measured."""
        return self._estimates.rtt_s(peer, now_s)

    def plan(self, request: RouteRequest, now_s: float) -> Route:
        """The cheapest route, or the previous one while it is usable and not clearly worse.

        A route enters as few peers as it can that are busy or have too little room for the session's cache, and none
        that are avoided, paused, draining, joining, backed off, too imprecise or without an address. Hops to keep are
        not weighed against others. Good for this moment only. Raises NoRoute, which names the missing blocks and says
        whether nobody holds them or who does.
        """
        announcements = self._directory.snapshot(now_s).of_model(request.model)
        excluded = dict.fromkeys(request.avoid, "avoided") | self._reputation.backed_off(now_s)
        if request.protocol is not None:
            excluded |= {
                a.peer_id: f"speaks protocol {a.protocol}, this node speaks {request.protocol}"
                for a in announcements
                if a.protocol != request.protocol
            }
        imprecise = {
            a.peer_id: f"computes in {precision(a.dtype, a.quantization)}"
            for a in announcements
            if request.min_precision and not is_at_least(a.dtype, a.quantization, request.min_precision)
        }
        busy, previous = self._reputation.busy(now_s), _hops_of(request.previous)
        # These hold the session's cache already: how much more they have room for does not matter.
        settled = {peer for peer, _ in previous}

        online, num_blocks = PeerState.ONLINE, request.num_blocks
        allowed = (
            a
            for a in announcements
            if a.num_blocks == num_blocks
            and a.state is online
            and a.addresses
            and a.peer_id not in excluded
            and a.peer_id not in imprecise
        )
        usable = _without_slow_strangers(allowed, request, known=self._estimates.measured | busy | settled)
        whole = bool(previous) and all(peer in usable and usable[peer].spans.covers(span) for peer, span in previous)
        costs: dict[PeerId, HopCost] = {}
        for peer, announcement in usable.items():
            cost = self._cost(announcement, request, now_s)
            if peer in settled and not whole:
                cost = HopCost(*(part_s * (1 - HYSTERESIS) for part_s in cost))
            if peer in busy or (announcement.free_tokens < request.cache_tokens and peer not in settled):
                cost = cost._replace(enter_s=cost.enter_s + _LAST_RESORT_S)
            costs[peer] = cost

        candidates = [Candidate(peer, span, costs[peer]) for peer, a in usable.items() for span in a.spans.parts]
        keep = [
            (h.peer_id, h.span) for h in request.keep if h.peer_id in usable and usable[h.peer_id].spans.covers(h.span)
        ]
        if keep and (bridged := bridge(keep, candidates, num_blocks)) is not None:
            return self._route(bridged, usable, request, now_s)
        path = cheapest_path(candidates, num_blocks)
        if path is None:
            raise _no_route(request, announcements, excluded, imprecise)
        hops = path.hops
        if whole:
            staying_s = path_cost_s([(costs[peer], len(span)) for peer, span in previous])
            if path.cost_s > (1 - HYSTERESIS) * staying_s:
                hops = previous
        return self._route(hops, usable, request, now_s)

    def _route(
        self,
        hops: Sequence[tuple[PeerId, BlockSpan]],
        usable: Mapping[PeerId, Announcement],
        request: RouteRequest,
        now_s: float,
    ) -> Route:
        return Route(
            hops=tuple(_hop(usable[peer], span) for peer, span in hops),
            cost_s=path_cost_s([(self._cost(usable[peer], request, now_s), len(span)) for peer, span in hops]),
        )

    def _cost(self, announcement: Announcement, request: RouteRequest, now_s: float) -> HopCost:
        estimate = self._estimates.of(announcement, now_s)
        return hop_cost(estimate, tokens=request.tokens, bytes_per_token=request.bytes_per_token)


def _without_slow_strangers(
    announcements: Iterable[Announcement], request: RouteRequest, *, known: Set[PeerId]
) -> dict[PeerId, Announcement]:
    """By peer, all `announcements` but those of strangers that a stranger with the same spans and cap claims to beat.

    Everything that is assumed of peers of which nothing is known is the same for all of them. In a large swarm most are
    strangers, and what is dropped here need not be priced.
    """
    kept: dict[PeerId, Announcement] = {}
    fastest: dict[tuple[int, int, tuple[BlockSpan, ...], int, bool], tuple[float, Announcement]] = {}
    for a in announcements:
        if a.peer_id in known:
            kept[a.peer_id] = a
            continue
        takes_s = block_s(a.decode_s_per_block, a.prefill_s_per_token_block, request.tokens)
        parts = a.spans.parts
        key = (parts[0].start, parts[0].end, parts[1:], a.max_bytes_per_s, a.free_tokens < request.cache_tokens)
        best = fastest.get(key)
        if best is None or takes_s < best[0] or (takes_s == best[0] and a.peer_id < best[1].peer_id):
            fastest[key] = (takes_s, a)
    return kept | {a.peer_id: a for _, a in fastest.values()}


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
) -> NoRoute:
    held = [a for a in announcements if a.num_blocks == request.num_blocks]
    excluded = excluded | {a.peer_id: "without an address" for a in held if not a.addresses}
    excluded |= {a.peer_id: a.state.value for a in held if a.state is not PeerState.ONLINE}
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
    message = f"no route for model {request.model}: blocks {_listed(missing)} are missing"
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
    return NoRoute(message, missing=[(gap.start, gap.end) for gap in missing], hint=hint)


def _listed(spans: Iterable[BlockSpan]) -> str:
    return ", ".join(map(str, spans))

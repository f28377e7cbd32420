"""One peer as the dashboard knows it, and how it is shown: its line, its page, its place in the graph.

Owns what a record and an answer become for people; what happens to peers over time is the core's. Pure.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from peers.wire.messages import Pong, Status
from routing.addresses import is_public, is_relayed
from routing.ids import BlockSpan, ModelId, PeerId
from routing.records import Announcement
from swarm.dashboard.schemas import (
    AddressView,
    Event,
    LayerTimes,
    LinkView,
    Node,
    Opinion,
    PeerDetail,
    PeerRow,
    RoundTrip,
    RouteHop,
    Span,
    State,
    StatusView,
    Topology,
)

MAX_LINKS: Final = 4000
HERE: Final = PeerId("")
"""The dashboard's own place in a link."""


@dataclass(slots=True, kw_only=True)
class KnownPeer:
    """One peer, live or gone; what it answered last stays."""

    record: Announcement
    state: State
    first_seen_at_s: float
    record_at_s: float
    gone_at_s: float | None = None
    rtt_s: float | None = None
    pong: Pong | None = None
    status_at_s: float | None = None
    status: Status | None = None
    started_at_s: float | None = None
    problem: str = ""
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=20))

    @property
    def answers(self) -> bool:
        """It answered the last call."""
        return self.gone_at_s is None and self.pong is not None and not self.problem

    @property
    def free_tokens(self) -> int:
        said = self.record.free_tokens if self.pong is None else self.pong.free_tokens
        return min(said, self.record.cache_tokens)

    @property
    def sessions(self) -> int:
        return self.record.sessions if self.pong is None else self.pong.sessions


Peers: TypeAlias = Mapping[PeerId, KnownPeer]


def row_of(known: KnownPeer) -> PeerRow:
    """One line about it."""
    return PeerRow(**_row_fields(known))  # type: ignore[arg-type]


def _row_fields(known: KnownPeer) -> dict[str, object]:
    a, pong, status = known.record, known.pong, known.status
    relayed = all(map(is_relayed, a.addresses)) if a.addresses else None
    return {
        "peer_id": a.peer_id,
        "name": a.name,
        "model_id": a.model.hex,
        "model_name": a.model_name,
        "spans": pairs(a.spans),
        "state": known.state,
        "dtype": a.dtype,
        "quantization": a.quantization,
        "version": a.version,
        "relayed": relayed,
        "decode_s_per_block": a.decode_s_per_block,
        "prefill_s_per_token_block": a.prefill_s_per_token_block,
        "cache_tokens": a.cache_tokens,
        "first_seen_at_s": milliseconds(known.first_seen_at_s),
        "record_at_s": milliseconds(known.record_at_s),
        "gone_at_s": milliseconds_or_none(known.gone_at_s),
        "free_tokens": known.free_tokens,
        "queue_s": round(a.queue_s if status is None else status.queue_s, 4),
        "sessions": known.sessions,
        "queued_tokens": None if pong is None else pong.queued_tokens,
        "started_at_s": milliseconds_or_none(known.started_at_s),
        "rtt_s": None if known.rtt_s is None else round(known.rtt_s, 4),
        "status_at_s": milliseconds_or_none(known.status_at_s),
        "problem": known.problem,
    }


def detail_of(peers: Peers, known: KnownPeer, now_s: float) -> PeerDetail:
    """Everything about it, with what others say."""
    a = known.record
    mine, theirs = _dealings(peers, a.peer_id)
    return PeerDetail(
        **_row_fields(known),  # type: ignore[arg-type]
        now_s=milliseconds(now_s),
        num_blocks=a.num_blocks,
        protocol=a.protocol,
        addresses=[
            AddressView(address=address, relayed=is_relayed(address), public=is_public(address))
            for address in a.addresses
        ],
        expires_at_s=a.expires_at_s,
        max_bytes_per_s=a.max_bytes_per_s or None,
        uplink_bytes_per_s=a.uplink_bytes_per_s or None,
        max_blocks=a.max_blocks or None,
        adapters=[str(adapter) for adapter in a.adapters],
        intent=None if a.intent is None else (a.intent.start, a.intent.end),
        place=None if a.place is None else (a.place.x_s, a.place.y_s, a.place.height_s, a.place.error),
        status=_status_view(known),
        round_trips=_trips_of(peers, a.peer_id),
        reputation=theirs,
        opinions=mine,
        events=list(reversed(known.events)),
    )


def _trips_of(peers: Peers, peer: PeerId) -> list[RoundTrip]:
    trips = []
    for measurer, other, rtt_s, at_s in _trips(peers):
        if peer in (measurer, other):
            by_it = measurer == peer
            far = other if by_it else measurer
            trips.append(
                RoundTrip(peer_id=far, name=peers[far].record.name, rtt_s=rtt_s, measured_by_it=by_it, at_s=at_s)
            )
    return sorted(trips, key=lambda trip: (trip.rtt_s, trip.peer_id))


def _dealings(peers: Peers, peer: PeerId) -> tuple[list[Opinion], list[Opinion]]:
    """What `peer` has against others, and others against it."""
    mine: list[Opinion] = []
    theirs: list[Opinion] = []
    for observer, known in peers.items():
        if known.status is None or known.status_at_s is None:
            continue
        for said in known.status.opinions:
            if (observer != peer and said.peer != peer) or said.peer not in peers:
                continue
            far = PeerId(said.peer) if observer == peer else observer
            opinion = Opinion(
                peer_id=far,
                name=peers[far].record.name,
                strikes=round(said.strikes, 2),
                backed_off_until_s=milliseconds(known.status_at_s + said.backoff_s) if said.backoff_s else None,
                reason=printable(said.reason, 128),
                at_s=milliseconds(known.status_at_s - said.age_s),
            )
            (mine if observer == peer else theirs).append(opinion)
    return mine, theirs


def _trips(peers: Peers) -> Iterator[tuple[PeerId, PeerId, float, float]]:
    """(measurer, other, rtt_s, at_s) between peers that are known."""
    for measurer, known in peers.items():
        if known.status is None or known.status_at_s is None or known.gone_at_s is not None:
            continue
        for trip in known.status.round_trips:
            other = PeerId(trip.peer)
            if other in peers and other != measurer:
                yield measurer, other, round(trip.rtt_s, 4), milliseconds(known.status_at_s - trip.age_s)


def topology(peers: Peers, model: ModelId | None, route: Sequence[RouteHop], now_s: float) -> Topology:
    """The peers of one model, or of all, without those that are gone."""
    shown = {
        peer: known
        for peer, known in peers.items()
        if known.gone_at_s is None and (model is None or known.record.model == model)
    }
    latest: dict[tuple[PeerId, PeerId], LinkView] = {}
    for measurer, other, rtt_s, at_s in _trips(peers):
        if measurer in shown and other in shown:
            a, b = min(measurer, other), max(measurer, other)
            if (a, b) not in latest or latest[a, b].at_s < at_s:
                latest[a, b] = LinkView(a=a, b=b, rtt_s=rtt_s, at_s=at_s)
    links = sorted(latest.values(), key=lambda link: -link.at_s)[:MAX_LINKS]
    for peer, known in shown.items():
        if known.rtt_s is not None and known.status_at_s is not None:
            links.append(LinkView(a=HERE, b=peer, rtt_s=round(known.rtt_s, 4), at_s=milliseconds(known.status_at_s)))
    return Topology(
        now_s=milliseconds(now_s),
        model_id=None if model is None else model.hex,
        nodes=[
            Node(
                peer_id=peer,
                place=None
                if known.record.place is None
                else (round(known.record.place.x_s, 4), round(known.record.place.y_s, 4)),
            )
            for peer, known in shown.items()
        ],
        links=links,
        route=[hop.peer_id for hop in route],
    )


def _status_view(known: KnownPeer) -> StatusView | None:
    a, pong, status = known.record, known.pong, known.status
    if pong is None or status is None or known.status_at_s is None:
        return None
    decode_s, prefill_s = status.decode_s_per_block, status.prefill_s_per_token_block
    lately = None
    if decode_s is not None or prefill_s is not None:
        lately = LayerTimes(
            decode_s=a.decode_s_per_block if decode_s is None else decode_s,
            prefill_s_per_token=a.prefill_s_per_token_block if prefill_s is None else prefill_s,
        )
    return StatusView(
        at_s=milliseconds(known.status_at_s),
        uptime_s=milliseconds(status.uptime_s),
        announced=LayerTimes(decode_s=a.decode_s_per_block, prefill_s_per_token=a.prefill_s_per_token_block),
        lately=lately,
        queue_s=round(status.queue_s, 4),
        queued_tokens=pong.queued_tokens,
        sessions=pong.sessions,
        free_tokens=pong.free_tokens,
        cache_tokens=a.cache_tokens,
        pages=status.pages,
        free_pages=status.free_pages,
        kept_pages=status.kept_pages,
        memory_offered_bytes=status.memory_offered_bytes,
        memory_used_bytes=status.memory_used_bytes,
        steps=status.steps,
        tokens=status.tokens,
        refused=status.refused,
        device=printable(status.device, 64),
        moved_from=list(status.moved_from),
        moved_at_s=milliseconds(known.status_at_s - status.moved_ago_s) if status.moved_from else None,
    )


def printable(text: str, most: int) -> str:
    """Bounded, and without what moves a terminal's cursor or reverses its text."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def label(record: Announcement) -> str:
    """What to call a peer: its name is a claim, the end of its id is not."""
    short = f"…{record.peer_id[-6:]}"
    return f"{record.name} ({short})" if record.name else short


def count_of(states: Iterable[State]) -> dict[State, int]:
    counts = Counter(states)
    return {state: counts[state] for state in State}


def pairs(spans: Iterable[BlockSpan]) -> list[Span]:
    return [(span.start, span.end) for span in spans]


def milliseconds(time_s: float) -> float:
    return round(time_s, 3) if math.isfinite(time_s) else 0.0


def milliseconds_or_none(time_s: float | None) -> float | None:
    return None if time_s is None else milliseconds(time_s)

"""What the dashboard knows, and what happened: records and answers in, a view and events out.

Guards the fold. Decides who joined, left, was lost or moved, and which gaps opened and healed; routes and flows are the
router's. Knows no network, no clock and no file: the time is an argument, in Unix seconds.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

from peers.wire.messages import PROTOCOL_VERSION, Pong, Status
from routing.addresses import is_public, is_relayed
from routing.cost import BYTES_PER_TOKEN
from routing.errors import NoRoute
from routing.flow import by_span, capacities_of, max_flow
from routing.health import ModelHealth, coverage
from routing.ids import BlockSpan, ModelId, PeerId
from routing.records import Announcement, PeerState
from routing.router import Route, Router, RouteRequest
from routing.version import VERSION
from swarm.dashboard.schemas import (
    AddressView,
    Event,
    EventKind,
    HopDetail,
    LayerTimes,
    LinkView,
    ModelView,
    Node,
    Opinion,
    Overview,
    PeerDetail,
    PeerRow,
    RoundTrip,
    RouteDetail,
    RouteHop,
    Span,
    State,
    StatusView,
    Topology,
    Totals,
)

SETTLE_S: Final = 8.0
"""Whom the dashboard sees for the first time so soon after its first look was there before it: no event."""
DEAF_S: Final = 12.0
"""Without a look at the index for so long, nothing is concluded. A record that was renewed lives for longer."""
GONE_S: Final = 600.0
"""Who is gone is shown for so long."""
MAX_GONE: Final = 1000
"""The longest gone is forgotten first."""
MAX_MODELS: Final = 32
"""Shown; those with most peers, because anybody can announce any number of models."""
PLANNED_BLOCKS: Final = 4096
"""Of the models that are planned anew in one look, together, those planned longest ago first: so that large models that
somebody made up do not hold up the others."""
MAX_EVENTS: Final = 1000
MAX_LINKS: Final = 4000
MAX_LEFT_OUT: Final = 50
HERE: Final = PeerId("")
"""The dashboard's own place in a link."""


@dataclass(slots=True, kw_only=True)
class _Peer:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a model can carry, and the best way through it, when it was looked at last."""

    at_s: float = 0.0
    route: Route | None = None
    hops: list[RouteHop] | None = None
    problem: str = "not looked at yet"
    total_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    view: ModelView
    gaps: frozenset[int]
    plan: _Plan


class Core:
    """`router` is the client's own: it holds the records, and hears what the calls measured."""

    def __init__(self, router: Router, *, network: str, now_s: float, next_event_id: int = 1) -> None:
        self.router = router
        self.network = network
        self.started_at_s = now_s
        self.read_at_s: float | None = None
        self.problem = "not connected yet"
        """Why nothing new is heard, for people."""
        self.dirty: set[PeerId] = set()
        """Peers whose rows changed since somebody emptied this."""
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        """Oldest first."""
        self.total_events = 0
        """Since the start, so that a reader of `events` knows how many are new."""
        self._next_event_id = next_event_id
        self._baseline_until_s: float | None = None
        self._peers: dict[PeerId, _Peer] = {}
        self._gone: OrderedDict[PeerId, None] = OrderedDict()
        self._models: dict[ModelId, _Model] = {}
        self._left_out = 0

    # --- what happens ---

    def read(self, announcements: Iterable[Announcement], now_s: float) -> None:
        """The index was read; the records are verified."""
        self.router.on_announcements((a for a in announcements if self._is_news(a)), now_s)
        self.read_at_s = now_s
        self.problem = ""
        if self._baseline_until_s is None:
            self._baseline_until_s = now_s + SETTLE_S

    def _is_news(self, record: Announcement) -> bool:
        """Not the last record of somebody who is gone, which others may hold for a while yet."""
        known = self._peers.get(record.peer_id)
        return known is None or known.gone_at_s is None or record.sequence > known.record.sequence

    def failed(self, problem: str) -> None:
        """Nothing could be read; what is known stays, and ages."""
        self.problem = problem

    def answered(self, peer: PeerId, rtt_s: float, pong: Pong, now_s: float) -> None:
        """The peer was asked how it is, and said so."""
        known = self._peers.get(peer)
        if known is None:
            return
        if known.problem:
            self.router.on_success(peer, now_s)
        self.router.on_rtt(peer, rtt_s, now_s)
        known.rtt_s = self.router.rtt_s(peer, now_s)
        known.pong, known.status, known.status_at_s, known.problem = pong, pong.status, now_s, ""
        if pong.status is not None:
            started_at_s = now_s - pong.status.uptime_s
            if (
                known.started_at_s is None or abs(started_at_s - known.started_at_s) > 2
            ):  # else the way here took longer
                known.started_at_s = started_at_s
        self.dirty.add(peer)

    def silent(self, peer: PeerId, problem: str, now_s: float) -> None:
        """The peer was asked and did not answer; `problem` is for people, and may quote strangers."""
        known = self._peers.get(peer)
        if known is None or known.gone_at_s is not None:
            return
        self.router.on_failure(peer, now_s, "does not answer the dashboard")
        known.problem = printable(problem, 200)
        self.dirty.add(peer)
        if known.state is State.DRAINING:  # it said goodbye: its record need not expire before we believe it
            self._ended(known, State.LEFT, now_s)

    def advance(self, now_s: float) -> None:
        """Take in what was read since the last call, and what expired; nothing, where nothing was read for long.

        Whoever hears nobody cannot tell that others are gone: then the view stays as it is, and says how old it is.
        """
        if self.read_at_s is None or now_s - self.read_at_s > DEAF_S:
            return
        live = {a.peer_id: a for a in self.router.snapshot(now_s).peers}
        for peer, record in live.items():
            known = self._peers.get(peer)
            if known is None:
                self._appeared(record, now_s)
            elif record.sequence > known.record.sequence:
                self._announced(known, record, now_s)
        for known in list(self._peers.values()):
            if known.gone_at_s is None and known.record.peer_id not in live:
                said_goodbye = known.record.state is PeerState.DRAINING
                self._ended(known, State.LEFT if said_goodbye else State.LOST, now_s)
        self._forget(now_s)
        self._look_at_models(now_s)

    def _appeared(self, record: Announcement, now_s: float) -> None:
        known = self._peers[record.peer_id] = _Peer(
            record=record, state=State(record.state), first_seen_at_s=now_s, record_at_s=now_s
        )
        self.dirty.add(record.peer_id)
        if self._baseline_until_s is not None and now_s > self._baseline_until_s:
            self._tell(EventKind.JOINED, known, now_s, f"joined with blocks {record.spans}")

    def _announced(self, known: _Peer, record: Announcement, now_s: float) -> None:
        before, known.record, known.record_at_s = known.record, record, now_s
        self.dirty.add(record.peer_id)
        if known.state is State.LEFT and record.state is PeerState.DRAINING:
            return  # still on its way out
        was, known.state = known.state, State(record.state)
        if known.gone_at_s is not None:
            known.gone_at_s = None
            del self._gone[record.peer_id]
            self._tell(EventKind.RETURNED, known, now_s, f"is back with blocks {record.spans}")
        elif (before.model, before.spans) != (record.model, record.spans):
            to = f"blocks {record.spans}" + ("" if before.model == record.model else f" of {record.model_name}")
            self._tell(
                EventKind.MOVED, known, now_s, f"moved from blocks {before.spans} to {to}", before=_pairs(before.spans)
            )
        elif was is not known.state is State.PAUSED:
            self._tell(EventKind.PAUSED, known, now_s, "pauses: its owner needs the machine")
        elif was is State.PAUSED and known.state is State.ONLINE:
            self._tell(EventKind.RESUMED, known, now_s, "serves again")

    def _ended(self, known: _Peer, state: State, now_s: float) -> None:
        known.state, known.gone_at_s = state, now_s
        self._gone[known.record.peer_id] = None
        self.dirty.add(known.record.peer_id)
        if state is State.LEFT:
            self._tell(EventKind.LEFT, known, now_s, f"left; it served blocks {known.record.spans}")
        else:
            self._tell(EventKind.LOST, known, now_s, f"was lost; it served blocks {known.record.spans}")

    def _forget(self, now_s: float) -> None:
        while self._gone:
            oldest = next(iter(self._gone))
            gone_at_s = self._peers[oldest].gone_at_s
            assert gone_at_s is not None
            if len(self._gone) <= MAX_GONE and now_s - gone_at_s < GONE_S:
                return
            del self._gone[oldest], self._peers[oldest]
            self.dirty.add(oldest)

    def _tell(self, kind: EventKind, known: _Peer, now_s: float, text: str, before: Sequence[Span] = ()) -> None:
        record = known.record
        known.events.append(
            self._event(
                kind,
                now_s,
                record.model,
                record.model_name,
                _pairs(record.spans),
                f"{label(record)} {text}",
                peer_id=record.peer_id,
                name=record.name,
                before=list(before),
            )
        )

    def _event(
        self,
        kind: EventKind,
        now_s: float,
        model: ModelId,
        model_name: str,
        spans: list[Span],
        text: str,
        *,
        peer_id: str | None = None,
        name: str = "",
        before: list[Span] | None = None,
    ) -> Event:
        event = Event(
            id=self._next_event_id,
            at_s=_ms(now_s),
            kind=kind,
            model_id=model.hex,
            model_name=model_name,
            peer_id=peer_id,
            name=name,
            spans=spans,
            before=before or [],
            text=text,
        )
        self._next_event_id += 1
        self.total_events += 1
        self.events.append(event)
        return event

    # --- models ---

    def _look_at_models(self, now_s: float) -> None:
        snapshot = self.router.snapshot(now_s)
        members: dict[ModelId, list[_Peer]] = {}
        for known in self._peers.values():
            members.setdefault(known.record.model, []).append(known)
        shown = sorted(members, key=lambda model: (-len(members[model]), model))[:MAX_MODELS]
        self._left_out = len(members) - len(shown)
        healths = {model: coverage(snapshot, model) or _deserted(members[model]) for model in shown}
        before = self._models
        plans = {model: before[model].plan if model in before else _Plan() for model in shown}
        room = PLANNED_BLOCKS
        for model in sorted(shown, key=lambda model: plans[model].at_s):  # stable: those with most peers first
            if room > 0:
                plans[model] = self._plan(healths[model], plans[model].route, now_s)
                room -= healths[model].num_blocks
        self._models = {
            model: self._look_at(healths[model], members[model], plans[model], before.get(model), now_s)
            for model in shown
        }

    def _plan(self, health: ModelHealth, previous: Route | None, now_s: float) -> _Plan:
        try:
            route, problem = self.router.plan(request_for(health.model, health.num_blocks, previous), now_s), ""
        except NoRoute as error:
            route, problem = None, printable(str(error), 500)
        flow = by_span(part for a in health.peers if a.state is PeerState.ONLINE for part in capacities_of(a))
        return _Plan(
            at_s=now_s,
            route=route,
            hops=None if route is None else [self._hop(hop.peer_id, hop.span) for hop in route.hops],
            problem=problem,
            total_tokens_per_s=0.0 if health.gaps else round(max_flow(flow, health.num_blocks), 3),
        )

    def _look_at(
        self, health: ModelHealth, members: list[_Peer], plan: _Plan, before: _Model | None, now_s: float
    ) -> _Model:
        holders = [len(held_by) for held_by in health.holders]
        gaps = frozenset(block for block, count in enumerate(holders) if not count)
        if before is not None and before.view.num_blocks == health.num_blocks:
            for kind, blocks in (
                (EventKind.GAP_OPENED, gaps - before.gaps),
                (EventKind.GAP_HEALED, before.gaps - gaps),
            ):
                if blocks:
                    self._gap(kind, health, runs(blocks), now_s)
        free_tokens = {a.peer_id: _free_tokens(self._peers[a.peer_id]) for a in health.peers}
        held = {held_by: sum(free_tokens[peer] for peer in held_by) for held_by in set(health.holders)}
        view = ModelView(
            model_id=health.model.hex,
            name=health.model_name,
            num_blocks=health.num_blocks,
            healthy=not gaps,
            replication=min(holders),
            holders=holders,
            gaps=runs(gaps),
            single=runs(block for block, count in enumerate(holders) if count == 1),
            states=_count(known.state for known in members),
            sessions=sum(_sessions(known) for known in members if known.gone_at_s is None),
            queued_tokens=sum(known.pong.queued_tokens for known in members if _answers(known) and known.pong),
            free_tokens=min(held.values()),
            stream_tokens_per_s=None if plan.route is None else _per_s(plan.route),
            total_tokens_per_s=plan.total_tokens_per_s,
            route=plan.hops,
            route_problem=plan.problem,
        )
        return _Model(view=view, gaps=gaps, plan=plan)

    def _gap(self, kind: EventKind, health: ModelHealth, spans: list[Span], now_s: float) -> None:
        blocks = ", ".join(f"{start}:{end}" for start, end in spans[:8]) + (", …" if len(spans) > 8 else "")
        what = "nobody serves blocks {} any more" if kind is EventKind.GAP_OPENED else "blocks {} are served again"
        text = f"{health.model_name}: {what.format(blocks)}"
        self._event(kind, now_s, health.model, health.model_name, spans, text)

    def _hop(self, peer: PeerId, span: BlockSpan) -> RouteHop:
        return RouteHop(peer_id=peer, name=self._peers[peer].record.name, span=(span.start, span.end))

    # --- the view ---

    @property
    def models(self) -> list[ModelView]:
        """Those with most peers first."""
        return [model.view for model in self._models.values()]

    def model(self, name: str) -> ModelId | None:
        """By id, the beginning of one, or name; the one with most peers where several are called so."""
        for model, known in self._models.items():
            if known.view.name == name or (len(name) >= 4 and model.hex.startswith(name.lower())):
                return model
        return None

    def peers(self) -> Iterator[Announcement]:
        """The newest records of all that are not gone."""
        return (known.record for known in self._peers.values() if known.gone_at_s is None)

    def state(self, peer: PeerId) -> State | None:
        known = self._peers.get(peer)
        return None if known is None else known.state

    def heard_at_s(self) -> float:
        """When a peer answered last."""
        return max((known.status_at_s or 0.0 for known in self._peers.values()), default=0.0)

    def record(self, peer: str) -> Announcement | None:
        """The newest record of a peer, which may be gone."""
        known = self._peers.get(PeerId(peer))
        return None if known is None else known.record

    def events_after(self, total: int) -> list[Event]:
        """What happened since `total_events` was that; oldest first, and no more than is kept here."""
        return list(self.events)[max(0, len(self.events) - (self.total_events - total)) :]

    def overview(self, now_s: float) -> Overview:
        return Overview(
            network=self.network,
            version=VERSION,
            now_s=_ms(now_s),
            started_at_s=_ms(self.started_at_s),
            read_at_s=_ms_or_none(self.read_at_s),
            problem=self.problem,
            totals=self.totals(),
            models=self.models,
            models_left_out=self._left_out,
        )

    def totals(self) -> Totals:
        views = self.models
        answering = [known for known in self._peers.values() if _answers(known)]
        statuses = [known.status for known in answering if known.status is not None]
        return Totals(
            states=_count(known.state for known in self._peers.values()),
            models=len(views) + self._left_out,
            healthy_models=sum(view.healthy for view in views),
            sessions=sum(view.sessions for view in views),
            stream_tokens_per_s=views[0].stream_tokens_per_s if views else None,
            total_tokens_per_s=round(sum(view.total_tokens_per_s for view in views), 3),
            answering=len(answering),
            memory_offered_bytes=sum(status.memory_offered_bytes for status in statuses),
            memory_used_bytes=sum(status.memory_used_bytes for status in statuses),
        )

    def rows(self) -> list[PeerRow]:
        return [self._row(known) for known in self._peers.values()]

    def row(self, peer: PeerId) -> PeerRow | None:
        """None for a peer that is forgotten."""
        known = self._peers.get(peer)
        return None if known is None else self._row(known)

    def _row(self, known: _Peer) -> PeerRow:
        return PeerRow(**self._row_fields(known))  # type: ignore[arg-type]

    def _row_fields(self, known: _Peer) -> dict[str, object]:
        a, pong, status = known.record, known.pong, known.status
        relayed = all(map(is_relayed, a.addresses)) if a.addresses else None
        return {
            "peer_id": a.peer_id,
            "name": a.name,
            "model_id": a.model.hex,
            "model_name": a.model_name,
            "spans": _pairs(a.spans),
            "state": known.state,
            "dtype": a.dtype,
            "quantization": a.quantization,
            "version": a.version,
            "relayed": relayed,
            "decode_s_per_block": a.decode_s_per_block,
            "prefill_s_per_token_block": a.prefill_s_per_token_block,
            "cache_tokens": a.cache_tokens,
            "first_seen_at_s": _ms(known.first_seen_at_s),
            "record_at_s": _ms(known.record_at_s),
            "gone_at_s": _ms_or_none(known.gone_at_s),
            "free_tokens": _free_tokens(known),
            "queue_s": round(a.queue_s if status is None else status.queue_s, 4),
            "sessions": _sessions(known),
            "queued_tokens": None if pong is None else pong.queued_tokens,
            "started_at_s": _ms_or_none(known.started_at_s),
            "rtt_s": None if known.rtt_s is None else round(known.rtt_s, 4),
            "status_at_s": _ms_or_none(known.status_at_s),
            "problem": known.problem,
        }

    def detail(self, peer: str, now_s: float) -> PeerDetail | None:
        """Everything about one peer; None for one that was never seen, or is forgotten."""
        known = self._peers.get(PeerId(peer))
        if known is None:
            return None
        a = known.record
        mine, theirs = self._dealings(a.peer_id)
        return PeerDetail(
            **self._row_fields(known),  # type: ignore[arg-type]
            now_s=_ms(now_s),
            num_blocks=a.num_blocks,
            protocol=a.protocol,
            addresses=[
                AddressView(address=address, relayed=is_relayed(address), public=is_public(address))
                for address in a.addresses
            ],
            expires_at_s=a.expires_at_s,
            max_bytes_per_s=a.max_bytes_per_s or None,
            max_blocks=a.max_blocks or None,
            intent=None if a.intent is None else (a.intent.start, a.intent.end),
            place=None if a.place is None else (a.place.x_s, a.place.y_s, a.place.height_s, a.place.error),
            status=_status_view(known),
            round_trips=self._trips_of(a.peer_id),
            reputation=theirs,
            opinions=mine,
            events=list(reversed(known.events)),
        )

    def _trips_of(self, peer: PeerId) -> list[RoundTrip]:
        trips = []
        for measurer, other, rtt_s, at_s in self._trips():
            if peer in (measurer, other):
                by_it = measurer == peer
                far = other if by_it else measurer
                trips.append(RoundTrip(peer_id=far, name=self._name(far), rtt_s=rtt_s, measured_by_it=by_it, at_s=at_s))
        return sorted(trips, key=lambda trip: (trip.rtt_s, trip.peer_id))

    def _dealings(self, peer: PeerId) -> tuple[list[Opinion], list[Opinion]]:
        """What `peer` has against others, and others against it."""
        mine: list[Opinion] = []
        theirs: list[Opinion] = []
        for observer, known in self._peers.items():
            if known.status is None or known.status_at_s is None:
                continue
            for said in known.status.opinions:
                if (observer != peer and said.peer != peer) or said.peer not in self._peers:
                    continue
                far = PeerId(said.peer) if observer == peer else observer
                opinion = Opinion(
                    peer_id=far,
                    name=self._name(far),
                    strikes=round(said.strikes, 2),
                    backed_off_until_s=_ms(known.status_at_s + said.backoff_s) if said.backoff_s else None,
                    reason=printable(said.reason, 128),
                    at_s=_ms(known.status_at_s - said.age_s),
                )
                (mine if observer == peer else theirs).append(opinion)
        return mine, theirs

    def _trips(self) -> Iterator[tuple[PeerId, PeerId, float, float]]:
        """(measurer, other, rtt_s, at_s) between peers that are known."""
        for measurer, known in self._peers.items():
            if known.status is None or known.status_at_s is None or known.gone_at_s is not None:
                continue
            for trip in known.status.round_trips:
                other = PeerId(trip.peer)
                if other in self._peers and other != measurer:
                    yield measurer, other, round(trip.rtt_s, 4), _ms(known.status_at_s - trip.age_s)

    def topology(self, model: ModelId | None, now_s: float) -> Topology:
        """The peers of one model, or of all, without those that are gone."""
        shown = {
            peer: known
            for peer, known in self._peers.items()
            if known.gone_at_s is None and (model is None or known.record.model == model)
        }
        latest: dict[tuple[PeerId, PeerId], LinkView] = {}
        for measurer, other, rtt_s, at_s in self._trips():
            if measurer in shown and other in shown:
                a, b = min(measurer, other), max(measurer, other)
                if (a, b) not in latest or latest[a, b].at_s < at_s:
                    latest[a, b] = LinkView(a=a, b=b, rtt_s=rtt_s, at_s=at_s)
        links = sorted(latest.values(), key=lambda link: -link.at_s)[:MAX_LINKS]
        for peer, known in shown.items():
            if known.rtt_s is not None and known.status_at_s is not None:
                links.append(LinkView(a=HERE, b=peer, rtt_s=round(known.rtt_s, 4), at_s=_ms(known.status_at_s)))
        chosen = self._models.get(model) if model is not None else next(iter(self._models.values()), None)
        return Topology(
            now_s=_ms(now_s),
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
            route=[hop.peer_id for hop in chosen.view.route] if chosen and chosen.view.route else [],
        )

    def route(self, model: ModelId, now_s: float) -> RouteDetail:
        """The best route from here, and what each hop of it takes. Raises NoRoute."""
        known = self._models[model]
        said = self.router.explain(request_for(model, known.view.num_blocks, known.plan.route), now_s)
        hops = []
        for hop, options in zip(said.route.hops, said.options, strict=True):
            option = next(option for option in options if option.chosen)
            hops.append(
                HopDetail(
                    peer_id=hop.peer_id,
                    name=option.name,
                    span=(hop.span.start, hop.span.end),
                    trip_s=round(option.trip_s, 5),
                    queue_s=round(option.queue_s, 5),
                    compute_s=round(option.compute_s, 5),
                    measured=option.measured,
                    candidates=len(options),
                )
            )
        return RouteDetail(
            now_s=_ms(now_s),
            model_id=model.hex,
            cost_s=round(said.route.cost_s, 5),
            tokens_per_s=_per_s(said.route),
            hops=hops,
            left_out=[(who, printable(why, 200)) for who, _, why in said.left_out[:MAX_LEFT_OUT]],
        )

    def _name(self, peer: PeerId) -> str:
        return self._peers[peer].record.name


def request_for(model: ModelId, num_blocks: int, previous: Route | None = None) -> RouteRequest:
    """One token of a stream, from here."""
    return RouteRequest(
        model=model,
        num_blocks=num_blocks,
        bytes_per_token=BYTES_PER_TOKEN,
        protocol=PROTOCOL_VERSION,
        previous=previous,
    )


def runs(blocks: Iterable[int]) -> list[Span]:
    """Neighbouring blocks together, in order."""
    ordered = sorted(blocks)
    found: list[Span] = []
    for _, group in groupby(enumerate(ordered), key=lambda item: item[1] - item[0]):
        members = [block for _, block in group]
        found.append((members[0], members[-1] + 1))
    return found


def printable(text: str, most: int) -> str:
    """Bounded, and without what moves a terminal's cursor or reverses its text."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def label(record: Announcement) -> str:
    """What to call a peer: its name is a claim, the end of its id is not."""
    short = f"…{record.peer_id[-6:]}"
    return f"{record.name} ({short})" if record.name else short


def _status_view(known: _Peer) -> StatusView | None:
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
        at_s=_ms(known.status_at_s),
        uptime_s=_ms(status.uptime_s),
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
        moved_at_s=_ms(known.status_at_s - status.moved_ago_s) if status.moved_from else None,
    )


def _deserted(members: Sequence[_Peer]) -> ModelHealth:
    """A model of which all peers are gone."""
    record = members[-1].record
    return ModelHealth(
        model=record.model,
        model_name=record.model_name,
        num_blocks=record.num_blocks,
        peers=(),
        holders=((),) * record.num_blocks,
        gaps=(BlockSpan(0, record.num_blocks),),
    )


def _answers(known: _Peer) -> bool:
    return known.gone_at_s is None and known.pong is not None and not known.problem


def _free_tokens(known: _Peer) -> int:
    return min(known.record.free_tokens if known.pong is None else known.pong.free_tokens, known.record.cache_tokens)


def _sessions(known: _Peer) -> int:
    return known.record.sessions if known.pong is None else known.pong.sessions


def _count(states: Iterable[State]) -> dict[State, int]:
    counts = Counter(states)
    return {state: counts[state] for state in State}


def _pairs(spans: Iterable[BlockSpan]) -> list[Span]:
    return [(span.start, span.end) for span in spans]


def _per_s(route: Route) -> float:
    return round(1 / max(route.cost_s, 1e-6), 3)


def _ms(time_s: float) -> float:
    return round(time_s, 3) if math.isfinite(time_s) else 0.0


def _ms_or_none(time_s: float | None) -> float | None:
    return None if time_s is None else _ms(time_s)

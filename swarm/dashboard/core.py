"""What the dashboard knows, and what happened: records and answers in, a view and events out.

Guards the fold. Decides who joined, left, was lost or moved, and which gaps opened and healed; routes and flows are the
router's. Knows no network, no clock and no file: the time is an argument, in Unix seconds.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from peers.wire.messages import PROTOCOL_VERSION, Pong
from routing.cost import BYTES_PER_TOKEN
from routing.errors import NoRoute
from routing.flow import by_span, capacities_of, max_flow
from routing.health import ModelHealth, adapters, coverage
from routing.ids import BlockSpan, ModelId, PeerId
from routing.records import DIGEST_DIGITS, Announcement, PeerState
from routing.router import Router
from routing.routes import Route, RouteRequest
from routing.version import VERSION
from swarm.dashboard.peers import (
    KnownPeer,
    count_of,
    detail_of,
    label,
    milliseconds,
    milliseconds_or_none,
    pairs,
    printable,
    row_of,
    topology,
)
from swarm.dashboard.schemas import (
    AdapterView,
    Event,
    EventKind,
    HopDetail,
    ModelView,
    Overview,
    PeerDetail,
    PeerRow,
    RouteDetail,
    RouteHop,
    Span,
    State,
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
MAX_ADAPTERS: Final = 32
"""Of one model: those with most hosts, because anybody can announce any adapter."""
MAX_EVENTS: Final = 1000
MAX_LEFT_OUT: Final = 50


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
        self._peers: dict[PeerId, KnownPeer] = {}
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
        self._forget(live, now_s)
        self._look_at_models(now_s)

    def _appeared(self, record: Announcement, now_s: float) -> None:
        known = self._peers[record.peer_id] = KnownPeer(
            record=record, state=State(record.state), first_seen_at_s=now_s, record_at_s=now_s
        )
        self.dirty.add(record.peer_id)
        if self._baseline_until_s is not None and now_s > self._baseline_until_s:
            self._tell(EventKind.JOINED, known, now_s, f"joined with blocks {record.spans}")

    def _announced(self, known: KnownPeer, record: Announcement, now_s: float) -> None:
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
                EventKind.MOVED, known, now_s, f"moved from blocks {before.spans} to {to}", before=pairs(before.spans)
            )
        elif was is not known.state is State.PAUSED:
            self._tell(EventKind.PAUSED, known, now_s, "pauses: its owner needs the machine")
        elif was is State.PAUSED and known.state is State.JOINING:
            self._tell(EventKind.RESUMED, known, now_s, "comes back, and loads its blocks again")
        elif was is State.PAUSED and known.state is State.ONLINE:
            self._tell(EventKind.RESUMED, known, now_s, "serves again")

    def _ended(self, known: KnownPeer, state: State, now_s: float) -> None:
        known.state, known.gone_at_s = state, now_s
        self._gone[known.record.peer_id] = None
        self.dirty.add(known.record.peer_id)
        if state is State.LEFT:
            self._tell(EventKind.LEFT, known, now_s, f"left; it served blocks {known.record.spans}")
        else:
            self._tell(EventKind.LOST, known, now_s, f"was lost; it served blocks {known.record.spans}")

    def _forget(self, live: Container[PeerId], now_s: float) -> None:
        """Those longest gone; one whose record still lives would come back as one that joins."""
        for oldest in [peer for peer in self._gone if peer not in live]:
            gone_at_s = self._peers[oldest].gone_at_s
            assert gone_at_s is not None
            if len(self._gone) <= MAX_GONE and now_s - gone_at_s < GONE_S:
                return
            del self._gone[oldest], self._peers[oldest]
            self.dirty.add(oldest)

    def _tell(self, kind: EventKind, known: KnownPeer, now_s: float, text: str, before: Sequence[Span] = ()) -> None:
        record = known.record
        known.events.append(
            self._event(
                kind,
                now_s,
                record.model,
                record.model_name,
                pairs(record.spans),
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
            at_s=milliseconds(now_s),
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
        members: dict[ModelId, list[KnownPeer]] = {}
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
        usable = (a for a in health.peers if a.state is PeerState.ONLINE and a.addresses)
        flow = by_span(part for a in usable for part in capacities_of(a))
        return _Plan(
            at_s=now_s,
            route=route,
            hops=None if route is None else [self._hop(hop.peer_id, hop.span) for hop in route.hops],
            problem=problem,
            total_tokens_per_s=0.0 if health.gaps else round(max_flow(flow, health.num_blocks), 3),
        )

    def _look_at(
        self, health: ModelHealth, members: list[KnownPeer], plan: _Plan, before: _Model | None, now_s: float
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
        free_tokens = {a.peer_id: self._peers[a.peer_id].free_tokens for a in health.peers}
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
            states=count_of(known.state for known in members),
            sessions=sum(known.sessions for known in members if known.gone_at_s is None),
            queued_tokens=sum(known.pong.queued_tokens for known in members if known.answers and known.pong),
            free_tokens=min(held.values()),
            stream_tokens_per_s=None if plan.route is None else _per_s(plan.route),
            total_tokens_per_s=plan.total_tokens_per_s,
            route=plan.hops,
            route_problem=plan.problem,
            adapters=_adapters_of(health),
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
            now_s=milliseconds(now_s),
            started_at_s=milliseconds(self.started_at_s),
            read_at_s=milliseconds_or_none(self.read_at_s),
            problem=self.problem,
            totals=self.totals(),
            models=self.models,
            models_left_out=self._left_out,
        )

    def totals(self) -> Totals:
        views = self.models
        answering = [known for known in self._peers.values() if known.answers]
        statuses = [known.status for known in answering if known.status is not None]
        return Totals(
            states=count_of(known.state for known in self._peers.values()),
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
        return [row_of(known) for known in self._peers.values()]

    def row(self, peer: PeerId) -> PeerRow | None:
        """None for a peer that is forgotten."""
        known = self._peers.get(peer)
        return None if known is None else row_of(known)

    def detail(self, peer: str, now_s: float) -> PeerDetail | None:
        """Everything about one peer; None for one that was never seen, or is forgotten."""
        known = self._peers.get(PeerId(peer))
        return None if known is None else detail_of(self._peers, known, now_s)

    def topology(self, model: ModelId | None, now_s: float) -> Topology:
        """The peers of one model, or of all, with the best route of that model, or of the one with most peers."""
        chosen = self._models.get(model) if model is not None else next(iter(self._models.values()), None)
        return topology(self._peers, model, chosen.view.route or () if chosen else (), now_s)

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
            now_s=milliseconds(now_s),
            model_id=model.hex,
            cost_s=round(said.route.cost_s, 5),
            tokens_per_s=_per_s(said.route),
            hops=hops,
            left_out=[(who, printable(why, 200)) for who, _, why in said.left_out[:MAX_LEFT_OUT]],
        )


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


def _deserted(members: Sequence[KnownPeer]) -> ModelHealth:
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


def _adapters_of(health: ModelHealth) -> list[AdapterView]:
    return [
        AdapterView(
            name=each.adapter.name,
            digest=each.adapter.digest.hex()[:DIGEST_DIGITS],
            hosts=each.hosts,
            gaps=pairs(each.gaps),
        )
        for each in adapters(health, most=MAX_ADAPTERS)
    ]


def _per_s(route: Route) -> float:
    return round(1 / max(route.cost_s, 1e-6), 3)

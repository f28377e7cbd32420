"""The fold: who is there, what happened, and which blocks are held, whatever the order of news."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from peers.wire.messages import PROTOCOL_VERSION, Opinion, Pong, RoundTrip, Status
from routing.ids import BlockSpan, BlockSpans, PeerId
from routing.records import Announcement, PeerState
from routing.router import Router
from swarm.dashboard.core import GONE_S, MAX_GONE, MAX_MODELS, SETTLE_S, Core, request_for, runs
from swarm.dashboard.peers import label, printable
from swarm.dashboard.schemas import GONE, Event, EventKind, State
from tests.routing.swarms import MODEL, NOW_S, OTHER_MODEL, announcement, peer

ARRIVALS = (EventKind.JOINED, EventKind.RETURNED)
DEPARTURES = (EventKind.LEFT, EventKind.LOST)


class Watch:
    """A core and its clock, after the time in which who is found was there before."""

    def __init__(self) -> None:
        self.now_s = NOW_S
        self.core = Core(Router(), network="test", now_s=NOW_S, next_event_id=7)
        self.sequence = 0
        self.see()
        self.now_s += SETTLE_S + 1
        self.see()

    def record(self, number: int, start: int = 0, end: int = 10, **changes: Any) -> Announcement:
        self.sequence += 1
        fields = {"protocol": PROTOCOL_VERSION, "sequence": self.sequence, "expires_at_s": self.now_s + 20.0} | changes
        return announcement(peer(number), start, end, **fields)

    def see(self, *records: Announcement) -> list[Event]:
        """What happened when the index held these."""
        before = self.core.total_events
        self.core.read(records, self.now_s)
        self.core.advance(self.now_s)
        return self.core.events_after(before)

    def state(self, number: int) -> State | None:
        return self.core.state(peer(number))


def kinds(events: list[Event]) -> list[EventKind]:
    return [event.kind for event in events]


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_who_is_there_when_the_dashboard_begins_did_not_join() -> None:
    core = Core(Router(), network="test", now_s=NOW_S)
    core.read([announcement(peer(1))], NOW_S)
    core.advance(NOW_S)
    assert (core.total_events, core.state(peer(1))) == (0, State.ONLINE)


def test_a_peer_joins_is_lost_when_its_record_expires_and_returns(watch: Watch) -> None:
    (joined,) = watch.see(watch.record(1, name="bee"))
    assert (joined.kind, joined.id, joined.peer_id, joined.name, joined.spans) == (
        EventKind.JOINED, 7, peer(1), "bee", [(0, 10)],
    )  # fmt: skip
    watch.now_s += 19.0
    assert watch.see() == []
    watch.now_s += 1.0
    assert kinds(watch.see()) == [EventKind.LOST, EventKind.GAP_OPENED]
    assert watch.state(1) is State.LOST
    assert kinds(watch.see(watch.record(1))) == [EventKind.RETURNED, EventKind.GAP_HEALED]
    assert watch.state(1) is State.ONLINE


def test_a_goodbye_is_believed_at_the_first_silence_and_nothing_else_is(watch: Watch) -> None:
    watch.see(watch.record(1), watch.record(2))
    watch.core.silent(peer(2), "did not answer", watch.now_s)
    assert watch.state(2) is State.ONLINE
    watch.see(watch.record(1, state=PeerState.DRAINING))
    assert watch.state(1) is State.DRAINING
    watch.core.silent(peer(1), "refused", watch.now_s)
    assert watch.state(1) is State.LEFT
    assert watch.see(watch.record(1, state=PeerState.DRAINING)) == [], "its last record may come late"
    watch.now_s += 30.0
    assert EventKind.LOST in kinds(watch.see())
    assert [event.kind for event in watch.core.events if event.peer_id == peer(1)] == [
        EventKind.JOINED,
        EventKind.LEFT,
    ]


def test_a_goodbye_whose_record_expires_is_no_loss(watch: Watch) -> None:
    watch.see(watch.record(1, state=PeerState.DRAINING))
    watch.now_s += 30.0
    assert EventKind.LEFT in kinds(watch.see())


def test_a_move_a_pause_and_a_return_from_it_are_told(watch: Watch) -> None:
    watch.see(watch.record(1, 0, 10), watch.record(2, 10, 30))
    assert kinds(watch.see(watch.record(1, state=PeerState.PAUSED))) == [EventKind.PAUSED, EventKind.GAP_OPENED]
    assert kinds(watch.see(watch.record(1))) == [EventKind.RESUMED, EventKind.GAP_HEALED]
    assert kinds(watch.see(watch.record(1, state=PeerState.PAUSED))) == [EventKind.PAUSED, EventKind.GAP_OPENED]
    assert kinds(watch.see(watch.record(1, state=PeerState.JOINING))) == [EventKind.RESUMED], "it loads its blocks"
    assert kinds(watch.see(watch.record(1))) == [EventKind.GAP_HEALED]
    moved, opened = watch.see(watch.record(1, 5, 15))
    assert (moved.kind, moved.spans, moved.before) == (EventKind.MOVED, [(5, 15)], [(0, 10)])
    assert (opened.kind, opened.spans, opened.peer_id) == (EventKind.GAP_OPENED, [(0, 5)], None)
    (moved,) = [e for e in watch.see(watch.record(1, 5, 15, model=OTHER_MODEL)) if e.kind is EventKind.MOVED]
    assert moved.model_id == OTHER_MODEL.hex


def test_a_model_whose_peers_are_all_gone_is_one_gap_until_they_are_forgotten(watch: Watch) -> None:
    watch.see(watch.record(1, 0, 30))
    watch.now_s += 25.0
    watch.see()
    (view,) = watch.core.models
    assert (view.healthy, view.replication, view.gaps, view.route) == (False, 0, [(0, 30)], None)
    assert view.route_problem
    watch.now_s += GONE_S
    watch.see()
    assert watch.core.models == []
    assert watch.state(1) is None


def test_the_view_of_a_model_counts_holders_and_prices_the_route(watch: Watch) -> None:
    watch.see(watch.record(1, 0, 20), watch.record(2, 10, 30), watch.record(3, 10, 30))
    (view,) = watch.core.models
    assert view.holders == [1] * 10 + [3] * 10 + [2] * 10
    assert (view.replication, view.single, view.gaps) == (1, [(0, 10)], [])
    assert view.route is not None
    assert view.route[0].peer_id == peer(1)
    assert view.stream_tokens_per_s is not None
    assert view.stream_tokens_per_s > 0 < view.total_tokens_per_s
    assert view.free_tokens == 8192, "of the block that has least"
    detail = watch.core.route(MODEL, watch.now_s)
    plan = watch.core.router.plan(request_for(MODEL, 30), watch.now_s)
    assert detail.cost_s == pytest.approx(plan.cost_s, abs=1e-5)
    assert [hop.peer_id for hop in detail.hops] == [hop.peer_id for hop in view.route]


def test_who_says_not_where_it_is_carries_nothing(watch: Watch) -> None:
    watch.see(watch.record(1, 0, 30))
    (alone,) = watch.core.models
    watch.see(watch.record(1, 0, 30), watch.record(2, 0, 30, addresses=()))
    (view,) = watch.core.models
    assert view.states[State.ONLINE] == 2
    assert (view.holders, view.total_tokens_per_s) == (alone.holders, alone.total_tokens_per_s)


def test_an_answer_fills_the_row_and_silence_keeps_it_with_its_age(watch: Watch) -> None:
    watch.see(watch.record(1))
    pong = Pong(nonce=1, free_tokens=100, queued_tokens=3, sessions=2, status=Status(uptime_s=50.0, queue_s=0.25))
    watch.core.answered(peer(1), 0.02, pong, watch.now_s)
    heard_at_s = watch.now_s
    watch.now_s += 5.0
    watch.core.silent(peer(1), "did not\x1b[2J answer", watch.now_s)
    row = watch.core.row(peer(1))
    assert row is not None
    assert (row.free_tokens, row.queued_tokens, row.sessions, row.queue_s) == (100, 3, 2, 0.25)
    assert row.status_at_s == pytest.approx(heard_at_s, abs=0.01)
    assert row.started_at_s == pytest.approx(heard_at_s - 50, abs=1)
    assert row.problem == "did not?[2J answer"
    assert watch.core.totals().answering == 0
    watch.core.answered(peer(1), 0.02, pong, watch.now_s)
    assert watch.core.totals().answering == 1


def test_what_a_peer_says_of_others_counts_only_of_those_that_are_there(watch: Watch) -> None:
    watch.see(watch.record(1, name="one"), watch.record(2, name="two"))
    status = Status(
        uptime_s=1.0,
        device="<b>\x00\u202e",
        round_trips=(RoundTrip(peer(2), 0.5, 2.0), RoundTrip("<script>", 0.1, 0.0), RoundTrip(peer(1), 0.1, 0.0)),
        opinions=(Opinion(peer(2), 2.0, 4.0, 1.0, "slow\n\x07"), Opinion("nobody", 1.0, 1.0, 1.0, "x")),
    )
    watch.core.answered(peer(1), 0.01, Pong(nonce=1, status=status), watch.now_s)
    one, two = (watch.core.detail(peer(number), watch.now_s) for number in (1, 2))
    assert one is not None
    assert two is not None
    assert one.status is not None
    assert one.status.device == "<b>??"
    assert [(t.peer_id, t.measured_by_it, t.name) for t in one.round_trips] == [(peer(2), True, "two")]
    assert [(t.peer_id, t.measured_by_it) for t in two.round_trips] == [(peer(1), False)]
    assert [(o.peer_id, o.reason) for o in two.reputation] == [(peer(1), "slow??")]
    assert [(o.peer_id, o.backed_off_until_s is not None) for o in one.opinions] == [(peer(2), True)]
    assert two.opinions == one.reputation == []
    (link, *own) = watch.core.topology(None, watch.now_s).links
    assert {link.a, link.b} == {peer(1), peer(2)}
    assert [(each.a, each.b) for each in own] == [("", peer(1))]


def test_answers_of_peers_that_nobody_announced_change_nothing(watch: Watch) -> None:
    watch.core.answered(peer(9), 0.1, Pong(nonce=1), watch.now_s)
    watch.core.silent(peer(9), "x", watch.now_s)
    assert watch.core.rows() == []
    assert watch.core.detail(peer(9), watch.now_s) is None


def test_models_and_the_departed_are_bounded(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [type(MODEL)(bytes([number]) * 32) for number in range(MAX_MODELS + 5)]
    watch.see(
        *(watch.record(number, model=model) for number, model in enumerate(made)), watch.record(500, model=made[-1])
    )
    overview = watch.core.overview(watch.now_s)
    assert (len(overview.models), overview.models_left_out) == (MAX_MODELS, 5)
    assert overview.models[0].model_id == made[-1].hex, "those with most peers stay"
    assert MAX_GONE >= 1000
    monkeypatch.setattr("swarm.dashboard.core.MAX_GONE", 3)
    watch.now_s += 25.0
    watch.see()
    assert len(watch.core.rows()) == 3


def test_who_left_is_not_forgotten_while_its_record_lives(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be lost by the fold, and still be among a model's peers."""
    monkeypatch.setattr("swarm.dashboard.core.MAX_GONE", 1)
    watch.see(watch.record(1), watch.record(2), watch.record(3))
    watch.see(*(watch.record(number, state=PeerState.DRAINING) for number in (1, 2)))
    for number in (1, 2):
        watch.core.silent(peer(number), "refused", watch.now_s)
    assert watch.see() == []
    assert (watch.state(1), watch.state(2)) == (State.LEFT, State.LEFT)
    watch.now_s += 25.0
    assert kinds(watch.see()) == [EventKind.LOST, EventKind.GAP_OPENED]
    assert (watch.state(1), watch.state(2), watch.state(3)) == (None, None, State.LOST)


@pytest.mark.parametrize(("blocks", "expected"), [([], []), ([3], [(3, 4)]), ([5, 1, 2, 3, 7, 6], [(1, 4), (5, 8)])])
def test_neighbouring_blocks_are_one_run(blocks: list[int], expected: list[tuple[int, int]]) -> None:
    assert runs(blocks) == expected


def test_texts_of_strangers_are_bounded_and_printable() -> None:
    assert printable("a\x00b" * 10, 5) == "a?ba?"
    assert label(announcement(peer(1))) == f"…{peer(1)[-6:]}"


PEERS = st.integers(1, 4)
SPANS = st.sampled_from([(0, 10), (10, 20), (20, 30), (5, 25), (0, 30)])


class AnyOrder(RuleBasedStateMachine):
    """Peers announce, answer, fall silent and expire in any order. Starting from who was there, the events alone tell
    who is there now and which blocks are held."""

    def __init__(self) -> None:
        super().__init__()
        self.watch = Watch()
        self.there: dict[PeerId, bool] = {}
        self.gaps: set[int] | None = None

    def see(self, *records: Announcement) -> None:
        for event in self.watch.see(*records):
            if event.peer_id is not None:
                there, peer_id = self.there.get(PeerId(event.peer_id)), PeerId(event.peer_id)
                if event.kind in ARRIVALS:
                    assert there is (None if event.kind is EventKind.JOINED else False)
                    self.there[peer_id] = True
                else:
                    assert there is True
                    self.there[peer_id] = event.kind not in DEPARTURES
            else:
                blocks = {block for start, end in event.spans for block in range(start, end)}
                assert self.gaps is not None
                if event.kind is EventKind.GAP_OPENED:
                    assert not blocks & self.gaps
                    self.gaps |= blocks
                else:
                    assert blocks <= self.gaps
                    self.gaps -= blocks
        if self.gaps is None and self.watch.core.models:
            self.gaps = {block for start, end in self.watch.core.models[0].gaps for block in range(start, end)}

    @rule(number=PEERS, span=SPANS, state=st.sampled_from(PeerState))
    def announces(self, number: int, span: tuple[int, int], state: PeerState) -> None:
        self.see(self.watch.record(number, *span, state=state))

    @rule(number=PEERS)
    def answers(self, number: int) -> None:
        self.watch.core.answered(peer(number), 0.01, Pong(nonce=1), self.watch.now_s)

    @rule(number=PEERS)
    def is_silent(self, number: int) -> None:
        before = self.watch.core.total_events
        self.watch.core.silent(peer(number), "nothing heard", self.watch.now_s)
        if self.watch.core.total_events > before:
            self.there[peer(number)] = False

    @rule(number=PEERS)
    def an_old_record_is_read_again(self, number: int) -> None:
        known = self.watch.core.record(peer(number))
        if known is not None:
            self.see(dataclasses.replace(known, sequence=max(0, known.sequence - 1)))

    @rule(seconds=st.sampled_from([0.5, 7.0, 21.0]))
    def time_passes(self, seconds: float) -> None:
        self.watch.now_s += seconds
        self.see()

    @invariant()
    def the_events_tell_the_state(self) -> None:
        core = self.watch.core
        rows = {PeerId(row.peer_id): row for row in core.rows()}
        assert {peer_id: row.state not in GONE for peer_id, row in rows.items()} == self.there
        assert all((row.gone_at_s is not None) == (row.state in GONE) for row in rows.values())
        assert sum(core.totals().states.values()) == len(rows)
        ids = [event.id for event in core.events]
        assert ids == sorted(set(ids))

    @invariant()
    def the_gaps_are_where_nobody_serves(self) -> None:
        core = self.watch.core
        core.advance(self.watch.now_s)
        online = [row for row in core.rows() if row.state is State.ONLINE]
        held = {block for row in online for start, end in row.spans for block in range(start, end)}
        for view in core.models:
            assert {block for block, count in enumerate(view.holders) if count} == held
            assert self.gaps == set(range(30)) - held
            assert (view.route is None) or view.healthy


AnyOrder.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_several_spans_of_one_peer_are_all_counted(watch: Watch) -> None:
    watch.see(watch.record(1, spans=BlockSpans.of(BlockSpan(0, 4), BlockSpan(8, 12))))
    assert watch.core.models[0].gaps == [(4, 8), (12, 30)]


def test_large_models_that_one_peer_made_up_are_planned_in_turn_and_hold_up_nobody(watch: Watch) -> None:
    made = [type(MODEL)(bytes([number]) * 32) for number in range(1, 6)]
    whole = BlockSpans.of(BlockSpan(0, 4096))
    watch.see(
        watch.record(1, 0, 30),
        watch.record(2, 0, 30),
        *(watch.record(10 + at, model=model, num_blocks=4096, spans=whole) for at, model in enumerate(made)),
    )
    planned = [view.model_id for view in watch.core.models if view.route is not None]
    assert planned[0] == MODEL.hex
    assert len(planned) == 2
    for _ in range(len(made)):
        watch.now_s += 1.0
        watch.see()
    assert all(view.route is not None and view.total_tokens_per_s > 0 for view in watch.core.models)


def test_who_hears_nobody_concludes_nothing_and_goes_on_where_it_was(watch: Watch) -> None:
    watch.see(watch.record(1), watch.record(2))
    before = watch.core.total_events
    for _ in range(60):
        watch.now_s += 1.0
        watch.core.failed("deaf")
        watch.core.advance(watch.now_s)
    assert (watch.state(1), watch.state(2), watch.core.total_events) == (State.ONLINE, State.ONLINE, before)
    assert watch.core.overview(watch.now_s).problem == "deaf"
    assert kinds(watch.see(watch.record(1))) == [EventKind.LOST]
    assert (watch.state(1), watch.state(2)) == (State.ONLINE, State.LOST)

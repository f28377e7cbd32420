"""The session table: every row of its transition table, then random histories against a simple model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peers.errors import Busy, Refused
from peers.serving.ledger import AlreadyRunning, Entry, Ledger, LedgerLimits, Overtaken, Repeat, Run
from peers.wire.messages import MAX_UNDER_WAY, Code, Open, Step
from routing.ids import BlockSpan, PeerId, Place, SessionId, StepId

CLIENT, OTHER, BEFORE, AFTER = (PeerId(name) for name in ("client", "other", "before", "after"))
A, B, C = (SessionId(bytes([number]) * 16) for number in range(3))
LIMITS = LedgerLimits(max_positions=100, lease_s=60.0)


def open_message(session: SessionId = A, epoch: int = 1, **changes: Any) -> Open:
    fields: dict[str, Any] = {"model": bytes(32), "start": 0, "end": 4, "previous": BEFORE, "next": AFTER}
    return Open(session=session.raw, epoch=epoch, **fields | changes)


def step_message(step: int, first: int, count: int = 1, session: SessionId = A, epoch: int = 1, **changes: Any) -> Step:
    parent = changes.pop("parent", None)
    fields: dict[str, Any] = {
        "block": 0,
        "want_from": 0,
        "dtype": "float32",
        "hidden": 4,
        "parent": parent and parent.raw,
    }
    return Step(session=session.raw, epoch=epoch, step=step, first=first, count=count, **fields | changes)


class Table(Ledger[str, object]):
    """A ledger with a session opened by `CLIENT`, and short words for what tests do all the time."""

    def __init__(self, limits: LedgerLimits = LIMITS) -> None:
        super().__init__(limits)
        self.link = object()
        self.open(CLIENT, self.link, open_message(), 0.0)

    def run(
        self, step: int, first: int, count: int = 1, now_s: float = 0.0, **changes: Any
    ) -> tuple[Entry[str, object], Run]:
        entry, verdict = self.step(CLIENT, step_message(step, first, count, **changes), now_s)
        assert isinstance(verdict, Run)
        return entry, verdict

    def do(self, step: int, first: int, count: int = 1, size: int = 10, now_s: float = 0.0, **changes: Any) -> None:
        entry, run = self.run(step, first, count, now_s, **changes)
        assert self.completed(entry, run, f"answer {step}", size, now_s)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(Refused) as caught:
        action()
    return caught.value.code


# --- the rows of the table ---


def test_a_session_that_nobody_opened_takes_no_step() -> None:
    table = Table()
    assert refusal(lambda: table.step(CLIENT, step_message(1, 0, session=B), 0.0)) == Code.UNKNOWN_SESSION
    assert refusal(lambda: table.step(CLIENT, step_message(1, 0, session=B, parent=C), 0.0)) == Code.UNKNOWN_SESSION


def test_a_higher_epoch_starts_at_position_0_without_answers() -> None:
    table = Table()
    table.do(1, 0, 5)
    entry = table.open(CLIENT, table.link, open_message(epoch=2, previous=None), 0.0)
    assert (entry.epoch, entry.positions, entry.previous) == (2, 0, None)
    assert refusal(lambda: table.step(CLIENT, step_message(2, 5, epoch=1), 0.0)) == Code.STALE_EPOCH
    assert refusal(lambda: table.step(CLIENT, step_message(2, 5, epoch=2), 0.0)) == Code.GAP
    table.run(1, 0, 5, epoch=2)


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_equal_or_lower_epoch_is_stale(epoch: int) -> None:
    table = Table()
    assert refusal(lambda: table.open(CLIENT, table.link, open_message(epoch=epoch), 0.0)) == Code.STALE_EPOCH
    assert table.get(Place(A, 0)) is not None


def test_nobody_takes_over_a_session_of_another() -> None:
    table = Table()
    assert refusal(lambda: table.open(OTHER, object(), open_message(epoch=9), 0.0)) == Code.FORBIDDEN
    assert table.close(OTHER, [A]) == []
    assert table.get(Place(A, 0)) is not None


def test_only_the_client_and_the_named_predecessor_may_send_steps() -> None:
    table = Table()
    table.step(BEFORE, step_message(1, 0), 0.0)
    table.step(CLIENT, step_message(2, 1), 0.0)
    for stranger in (OTHER, AFTER):
        assert refusal(lambda sender=stranger: table.step(sender, step_message(3, 2), 0.0)) == Code.FORBIDDEN  # type: ignore[misc]
    table.open(CLIENT, table.link, open_message(epoch=2, previous=None), 0.0)
    assert refusal(lambda: table.step(BEFORE, step_message(1, 0, epoch=2), 0.0)) == Code.FORBIDDEN


def test_a_refused_step_changes_nothing() -> None:
    table = Table()
    table.do(1, 0, 5)
    entry = table.get(Place(A, 0))
    assert entry is not None
    before = (entry.positions, entry.lease_expires_at_s, dict(entry.answers), dict(entry.running))
    for sender, step in [
        (OTHER, step_message(2, 0)),
        (BEFORE, step_message(2, 0, epoch=0)),
        (BEFORE, step_message(2, 6)),
        (BEFORE, step_message(2, 0, 0)),
        (BEFORE, step_message(2, 0, 2, want_from=3)),
        (BEFORE, step_message(2, 5, 96)),
    ]:
        refusal(lambda sender=sender, step=step: table.step(sender, step, 30.0))  # type: ignore[misc]
        assert (entry.positions, entry.lease_expires_at_s, dict(entry.answers), dict(entry.running)) == before


def test_a_step_may_not_leave_a_gap_nor_pass_the_limit() -> None:
    table = Table()
    assert refusal(lambda: table.step(CLIENT, step_message(1, 1), 0.0)) == Code.GAP
    assert refusal(lambda: table.step(CLIENT, step_message(1, 0, 101), 0.0)) == Code.TOO_LONG
    table.run(1, 0, 100)


def test_a_repeated_step_is_answered_from_the_table_or_awaited_but_not_run_again() -> None:
    table = Table()
    entry, run = table.run(7, 0, 5)
    assert table.step(CLIENT, step_message(7, 0, 5), 0.0)[1] == AlreadyRunning()
    assert table.completed(entry, run, "answer", 10, 0.0)
    assert table.step(BEFORE, step_message(7, 0, 5), 0.0)[1] == Repeat("answer")
    assert entry.positions == 5


def test_an_answer_too_large_to_keep_is_computed_again() -> None:
    table = Table(LedgerLimits(max_positions=100, max_answer_bytes=10, max_answers_bytes=25))
    table.do(1, 0, 5, size=11)
    table.run(1, 0, 5)
    table.do(2, 5, size=10)
    table.do(3, 6, size=10)
    table.do(4, 7, size=10)  # would be 30 in all
    assert table.step(CLIENT, step_message(3, 6), 0.0)[1] == Repeat("answer 3")
    table.run(4, 7)


def test_closed_sessions_give_their_answers_bytes_back() -> None:
    table = Table(LedgerLimits(max_positions=100, max_answer_bytes=10, max_answers_bytes=10))
    table.do(1, 0, size=10)
    table.close(CLIENT, [A])
    table.open(CLIENT, table.link, open_message(), 0.0)
    table.do(2, 0, size=10)
    table.open(CLIENT, table.link, open_message(epoch=2), 0.0)
    table.do(3, 0, size=10, epoch=2)
    assert table.step(CLIENT, step_message(3, 0, epoch=2), 0.0)[1] == Repeat("answer 3")


def test_a_window_repeated_after_a_pause_leaves_no_gap_behind_it() -> None:
    """Whatever part of the window was still stored: what comes next must fit."""
    for kept in range(5):
        table = Table(LedgerLimits(max_positions=100, answers_per_session=kept))
        for step in range(4):
            table.do(step, 10 * step, 10)
        for step in range(4):
            entry, verdict = table.step(CLIENT, step_message(step, 10 * step, 10), 0.0)
            if isinstance(verdict, Run):
                table.completed(entry, verdict, f"answer {step}", 10, 0.0)
        table.run(4, 40, 1)


def test_whatever_a_client_may_have_under_way_is_not_computed_twice_after_a_pause() -> None:
    table = Table()
    for step in range(MAX_UNDER_WAY):
        table.do(step, 3 * step, 3)
    for step in range(MAX_UNDER_WAY):
        assert table.step(CLIENT, step_message(step, 3 * step, 3), 0.0)[1] == Repeat(f"answer {step}")


def test_a_step_undone_by_a_rollback_runs_again_when_repeated() -> None:
    table = Table()
    table.do(1, 0, 10)
    table.do(2, 10, 4)
    entry, late = table.run(3, 14, 4)
    table.do(4, 8, 4)
    assert refusal(lambda: table.step(CLIENT, step_message(2, 13, 4), 0.0)) == Code.GAP
    table.run(2, 10, 4)
    assert table.completed(entry, late, "of an undone step", 10, 0.0), "its client may still wait for it"
    assert refusal(lambda: table.step(CLIENT, step_message(3, 15, 4), 0.0)) == Code.GAP
    assert entry.positions == 14


def test_a_step_that_comes_once_more_undoes_nothing_and_begins_no_fork() -> None:
    table = Table()
    for step, first, count in ((1, 0, 5), (2, 5, 4), (3, 5, 1)):
        table.do(step, first, count)
    entry, verdict = table.step(CLIENT, step_message(2, 5, 4, again=True), 0.0)
    assert (verdict, entry.positions) == (Overtaken(), 6)
    _, verdict = table.step(CLIENT, step_message(3, 5, again=True), 0.0)
    assert verdict == Repeat("answer 3")
    _, verdict = table.step(CLIENT, step_message(1, 8, again=True), 0.0)
    assert verdict == Repeat("answer 1"), "by its id"
    table.do(4, 4, 2, again=True)
    entry, _ = table.run(2, 6, 1, again=True)
    assert entry.positions == 7, "the end of its session, it may have been lost"
    assert refusal(lambda: table.step(CLIENT, step_message(5, 3, session=B, parent=A, again=True), 0.0)) == (
        Code.UNKNOWN_SESSION
    )
    assert table.get(Place(B, 0)) is None


def test_a_failed_step_takes_back_its_positions_and_those_behind_it() -> None:
    table = Table()
    table.do(1, 0, 10)
    entry, second = table.run(2, 10, 10)
    _, third = table.run(3, 20, 10)
    assert table.failed(entry, second)
    assert entry.positions == 10
    assert refusal(lambda: table.step(CLIENT, step_message(4, 20), 0.0)) == Code.GAP
    _, again = table.run(2, 10, 10)
    _, behind = table.run(3, 20, 10)
    assert not table.failed(entry, third), "the same step is running again: nobody wants to hear of the first try"
    assert entry.positions == 30
    assert table.completed(entry, again, "2", 10, 0.0)
    assert table.completed(entry, behind, "3", 10, 0.0)
    table.run(4, 30)


def test_nobody_hears_of_steps_of_an_older_epoch_or_of_a_closed_session() -> None:
    table = Table()
    entry, run = table.run(1, 0)
    table.open(CLIENT, table.link, open_message(epoch=2), 0.0)
    assert not table.completed(entry, run, "late", 10, 0.0)
    entry, run = table.run(1, 0, epoch=2)
    table.close(CLIENT, [A])
    assert not table.failed(entry, run)


def test_a_session_has_a_place_for_each_hop_that_this_peer_is_to_it() -> None:
    table = Table()
    there = open_message(start=8, end=12, previous=AFTER, next=None)
    table.open(CLIENT, table.link, there, 0.0)
    table.do(1, 0, 5)
    table.step(AFTER, step_message(1, 0, 5, block=8), 0.0)
    assert refusal(lambda: table.step(BEFORE, step_message(2, 5, block=8), 0.0)) == Code.FORBIDDEN
    assert refusal(lambda: table.step(CLIENT, step_message(2, 5, block=4), 0.0)) == Code.UNKNOWN_SESSION
    assert refusal(lambda: table.open(CLIENT, table.link, there, 0.0)) == Code.STALE_EPOCH
    assert table.before(Place(A, 4)) is table.get(Place(A, 0))
    assert table.before(Place(A, 12)) is table.get(Place(A, 8))
    assert table.before(Place(A, 8)) is None
    child, _ = table.run(3, 5, block=8, session=B, parent=A)
    assert (child.place, child.span) == (Place(B, 8), BlockSpan(8, 12))
    assert set(table.close(CLIENT, [A])) == {Place(A, 0), Place(A, 8)}


# --- forks ---


def test_a_fork_inherits_the_route_and_the_positions_asked_for() -> None:
    table = Table()
    table.do(1, 0, 10)
    known = table.get(Place(A, 0))
    assert known is not None
    known.relay_until_s = 30.0
    child, run = table.run(1, 6, 2, session=B, parent=A)
    assert run.forks
    assert (child.place, child.owner, child.owner_link, child.epoch) == (Place(B, 0), CLIENT, table.link, 1)
    assert (child.previous, child.next, child.span) == (known.previous, known.next, known.span)
    assert child.relay_until_s == 30.0, "the successor is as unreachable for the child"
    assert (child.positions, known.positions) == (8, 10)
    assert not table.run(2, 8, session=B, parent=A)[1].forks, "it exists by now"
    assert set(table.close(CLIENT, [A, B])) == {Place(A, 0), Place(B, 0)}


@pytest.mark.parametrize(
    ("sender", "changes", "code"),
    [
        (OTHER, {}, Code.FORBIDDEN),
        (CLIENT, {"epoch": 0}, Code.STALE_EPOCH),
        (CLIENT, {"first": 11}, Code.GAP),
        (CLIENT, {"count": 0}, Code.MALFORMED),
    ],
)
def test_a_refused_fork_leaves_no_child(sender: PeerId, changes: dict[str, Any], code: str) -> None:
    table = Table()
    table.do(1, 0, 10)
    fields: dict[str, Any] = {"step": 1, "first": 10, "session": B, "parent": A}
    step = step_message(**fields | changes)
    assert refusal(lambda: table.step(sender, step, 0.0)) == code
    assert table.get(Place(B, 0)) is None


def test_a_fork_whose_first_step_failed_forks_again_when_it_is_repeated() -> None:
    table = Table()
    table.do(1, 0, 10)
    child, run = table.run(1, 10, session=B, parent=A)
    assert table.failed(child, run)
    assert table.get(Place(B, 0)) is None
    assert table.run(1, 10, session=B, parent=A)[1].forks


def test_a_fork_into_a_full_table_is_told_to_come_back() -> None:
    table = Table(LedgerLimits(max_positions=100, max_sessions_per_owner=1))
    table.do(1, 0, 10)
    with pytest.raises(Busy):
        table.step(CLIENT, step_message(1, 10, session=B, parent=A), 0.0)
    assert table.get(Place(B, 0)) is None


# --- shares, leases, links ---


def test_a_full_table_is_busy_for_new_sessions_only() -> None:
    table = Table(LedgerLimits(max_positions=100, max_sessions=2, max_sessions_per_owner=1))
    with pytest.raises(Busy):
        table.open(CLIENT, table.link, open_message(B), 0.0)
    table.open(OTHER, object(), open_message(B), 0.0)
    with pytest.raises(Busy):
        table.open(AFTER, object(), open_message(C), 0.0)
    table.open(CLIENT, table.link, open_message(epoch=2), 0.0)
    table.close(OTHER, [B])
    table.open(AFTER, object(), open_message(C), 0.0)


def test_one_who_holds_most_of_the_pool_opens_no_more_while_others_are_here() -> None:
    table = Table(LedgerLimits(max_positions=100, pool_positions=40, expected_positions=1))
    table.do(1, 0, 30)
    table.open(CLIENT, table.link, open_message(C), 0.0)  # alone, all of it may be theirs
    table.open(OTHER, object(), open_message(B), 0.0)
    with pytest.raises(Busy, match="hold, or were promised, 31 of this peer's 40"):
        table.open(CLIENT, table.link, open_message(SessionId(bytes([9]) * 16)), 0.0)
    table.do(2, 30, 5)  # what there is goes on
    table.open(CLIENT, table.link, open_message(epoch=2), 0.0)  # also on another route, from nothing
    table.open(CLIENT, table.link, open_message(SessionId(bytes([9]) * 16)), 0.0)


def test_a_lease_runs_from_the_last_step_and_not_while_one_is_running() -> None:
    table = Table()
    assert table.expire(59.0) == []
    entry, run = table.run(1, 0, now_s=59.0)
    assert table.expire(500.0) == []
    table.completed(entry, run, "answer", 10, 500.0)
    assert table.expire(559.0) == [], "a step of 441 s was no idle time"
    table.step(CLIENT, step_message(1, 0), 559.0)
    assert table.expire(618.0) == []
    assert table.expire(619.0) == [Place(A, 0)]
    assert len(table) == 0


def test_the_end_of_a_link_ends_the_sessions_opened_over_it_and_no_others() -> None:
    table = Table()
    table.open(CLIENT, object(), open_message(B), 0.0)
    table.do(1, 0, 10)
    table.run(1, 10, session=C, parent=A)
    assert set(table.link_lost(table.link)) == {Place(A, 0), Place(C, 0)}
    assert table.get(Place(B, 0)) is not None


# --- random histories ---


@dataclass
class Model:
    """What a session is, without cleverness: a list of steps accepted since the route was opened."""

    owner: PeerId
    link: object
    epoch: int
    lease_s: float
    positions: int = 0
    born: bool = True
    running: dict[int, tuple[Entry[str, object], Run]] = field(default_factory=dict)
    answered: dict[int, int] = field(default_factory=dict)
    """Step id to its end, of those that no later step rolled back."""

    def roll_back(self, to: int) -> None:
        self.answered = {step: end for step, end in self.answered.items() if end <= to}
        self.running = {step: known for step, known in self.running.items() if known[1].end <= to}


class LedgerMachine(RuleBasedStateMachine):
    LIMITS = LedgerLimits(
        max_positions=40,
        lease_s=60.0,
        max_sessions=6,
        max_sessions_per_owner=4,
        answers_per_session=2,
        max_answer_bytes=10,
        max_answers_bytes=40,
    )
    sessions = st.integers(0, 3).map(lambda number: SessionId(bytes([number]) * 16))
    places = st.builds(Place, sessions, st.sampled_from([0, 8]))
    owners = st.sampled_from([CLIENT, OTHER])
    ids = st.integers(0, 9)

    def __init__(self) -> None:
        super().__init__()
        self.ledger: Ledger[str, object] = Ledger(self.LIMITS)
        self.model: dict[Place, Model] = {}
        self.links = {(owner, number): (owner, number) for owner in (CLIENT, OTHER) for number in range(2)}
        self.now_s = 0.0
        self.orphans: list[tuple[Entry[str, object], Run]] = []

    def is_full(self, owner: PeerId) -> bool:
        mine = sum(model.owner == owner for model in self.model.values())
        return len(self.model) >= self.LIMITS.max_sessions or mine >= self.LIMITS.max_sessions_per_owner

    def end(self, place: Place) -> None:
        self.orphans += self.model.pop(place).running.values()

    @rule(owner=owners, number=st.integers(0, 1), place=places, epoch=st.integers(0, 5))
    def opens(self, owner: PeerId, number: int, place: Place, epoch: int) -> None:
        link, known = self.links[owner, number], self.model.get(place)
        message = open_message(place.session, epoch, start=place.block, end=place.block + 4)
        if known is not None and known.owner != owner:
            assert refusal(lambda: self.ledger.open(owner, link, message, self.now_s)) == Code.FORBIDDEN
        elif known is not None and epoch <= known.epoch:
            assert refusal(lambda: self.ledger.open(owner, link, message, self.now_s)) == Code.STALE_EPOCH
        elif known is None and self.is_full(owner):
            with pytest.raises(Busy):
                self.ledger.open(owner, link, message, self.now_s)
        else:
            if known is not None:
                self.end(place)
            self.ledger.open(owner, link, message, self.now_s)
            self.model[place] = Model(owner, link, epoch, self.now_s + 60.0)

    @rule(
        sender=st.sampled_from([CLIENT, OTHER, BEFORE, AFTER]),
        place=places,
        parent=st.none() | sessions,
        step=ids,
        back=st.sampled_from([0, 0, 0, 0, 1, 5, -1]),
        count=st.sampled_from([0, 1, 3, 15]),
        stale=st.sampled_from([0, 0, 0, 1]),
    )
    def steps(
        self, sender: PeerId, place: Place, parent: SessionId | None, step: int, back: int, count: int, stale: int
    ) -> None:
        known = self.model.get(place)
        source = known or (self.model.get(Place(parent, place.block)) if parent is not None else None)
        first = max(0, (source.positions if source else 0) - back)
        epoch = max(0, (source.epoch if source else 1) - stale)
        message = step_message(step, first, count, place.session, epoch, parent=parent, block=place.block)

        def deliver() -> object:
            return self.ledger.step(sender, message, self.now_s)

        if source is None:
            assert refusal(deliver) == Code.UNKNOWN_SESSION
        elif sender not in (source.owner, BEFORE):
            assert refusal(deliver) == Code.FORBIDDEN
        elif epoch != source.epoch:
            assert refusal(deliver) == Code.STALE_EPOCH
        elif count == 0:
            assert refusal(deliver) == Code.MALFORMED
        elif first + count > self.LIMITS.max_positions:
            assert refusal(deliver) == Code.TOO_LONG
        elif known is not None and step in known.running:
            assert self.ledger.step(sender, message, self.now_s)[1] == AlreadyRunning()
        elif first > source.positions and not (known is not None and step in known.answered):
            assert refusal(deliver) == Code.GAP
        elif known is None and self.is_full(source.owner):
            with pytest.raises(Busy):
                deliver()
        else:
            self.accepted(sender, message, known, source)

    def accepted(self, sender: PeerId, message: Step, known: Model | None, source: Model) -> None:
        place, step = Place(SessionId(message.session), message.block), message.step
        entry = self.ledger.get(place)
        if entry is not None and StepId(step) not in entry.answers and message.first > entry.positions:
            # its answer was not kept, and it no longer fits
            assert refusal(lambda: self.ledger.step(sender, message, self.now_s)) == Code.GAP
            return
        entry, verdict = self.ledger.step(sender, message, self.now_s)
        if known is None:
            known = self.model[place] = Model(
                source.owner, source.link, source.epoch, 0.0, positions=source.positions, born=False
            )
        known.lease_s = self.now_s + 60.0
        if isinstance(verdict, Repeat):
            assert verdict.answer == f"{place} {step} {known.answered[step]}"
            return
        assert isinstance(verdict, Run), "at most once, unless it was rolled back or its answer not kept"
        assert verdict.forks is not (known.born or bool(known.running))
        known.roll_back(message.first)
        known.positions = message.first + message.count
        known.running[step] = (entry, verdict)

    @precondition(lambda self: any(model.running for model in self.model.values()))
    @rule(data=st.data(), size=st.sampled_from([5, 10, 11]))
    def completes(self, data: st.DataObject, size: int) -> None:
        place = data.draw(st.sampled_from([s for s, model in self.model.items() if model.running]))
        known = self.model[place]
        step = data.draw(st.sampled_from(list(known.running)))
        entry, run = known.running.pop(step)
        assert self.ledger.completed(entry, run, f"{place} {step} {run.end}", size, self.now_s)
        known.answered[step], known.born, known.lease_s = run.end, True, self.now_s + 60.0

    @precondition(lambda self: any(model.running for model in self.model.values()))
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from([s for s, model in self.model.items() if model.running]))
        known = self.model[place]
        step = data.draw(st.sampled_from(list(known.running)))
        entry, run = known.running.pop(step)
        assert self.ledger.failed(entry, run)
        known.positions = min(known.positions, run.first)
        if not known.born:
            self.end(place)

    @precondition(lambda self: self.orphans)
    @rule(good=st.booleans())
    def an_orphan_ends(self, good: bool) -> None:
        entry, run = self.orphans.pop()
        wanted = self.ledger.completed(entry, run, "late", 5, self.now_s) if good else self.ledger.failed(entry, run)
        assert not wanted

    @rule(owner=owners, some=st.lists(sessions, max_size=3))
    def closes(self, owner: PeerId, some: list[SessionId]) -> None:
        mine = {place for place, model in self.model.items() if place.session in some and model.owner == owner}
        closed = self.ledger.close(owner, some)
        assert (set(closed), len(closed)) == (mine, len(mine))
        for place in mine:
            self.end(place)

    @rule(owner=owners, number=st.integers(0, 1))
    def a_link_ends(self, owner: PeerId, number: int) -> None:
        link = self.links[owner, number]
        mine = {place for place, model in self.model.items() if model.link is link}
        assert set(self.ledger.link_lost(link)) == mine
        for place in mine:
            self.end(place)

    @rule(after_s=st.sampled_from([1.0, 30.0, 61.0]))
    def time_passes(self, after_s: float) -> None:
        self.now_s += after_s
        over = {s for s, model in self.model.items() if model.lease_s <= self.now_s and not model.running}
        assert set(self.ledger.expire(self.now_s)) == over
        for place in over:
            self.end(place)

    @invariant()
    def the_tables_agree(self) -> None:
        assert len(self.ledger) == len(self.model)
        for place, model in self.model.items():
            entry = self.ledger.get(place)
            assert entry is not None
            assert (entry.owner, entry.epoch, entry.positions) == (model.owner, model.epoch, model.positions)
            assert set(entry.running) == set(model.running)
            assert set(entry.answers) <= set(model.answered)
            assert len(entry.answers) <= self.LIMITS.answers_per_session
            assert entry.lease_expires_at_s == model.lease_s
        kept = [kept.answer_bytes for entry in self.entries() for kept in entry.answers.values()]
        assert sum(kept) <= self.LIMITS.max_answers_bytes
        assert max(kept, default=0) <= self.LIMITS.max_answer_bytes

    def entries(self) -> Iterator[Entry[str, object]]:
        yield from (entry for place in self.model if (entry := self.ledger.get(place)) is not None)

    def teardown(self) -> None:
        """Everything opened is closable by its owner, and then nothing at all is left."""
        for owner in (CLIENT, OTHER):
            self.ledger.close(owner, [place.session for place in self.model])
        assert len(self.ledger) == 0
        for name, value in vars(self.ledger).items():
            assert not value or name in ("limits", "_expectations"), name


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)

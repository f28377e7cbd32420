"""What sessions are expected to become, and that what was promised is there: of a pool, a table and the pressure policy
together, under random histories."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peers.errors import Busy
from peers.runtime.pages import PagePool
from peers.runtime.prefixes import PrefixIndex
from peers.runtime.pressure import grow_or_preempt
from peers.serving.ledger import Entry, Ledger, LedgerLimits, Run
from peers.serving.promises import OWNERS_MAX, Expectations
from peers.wire.messages import Open, Step
from routing.ids import PeerId, Place, SessionId

ALICE, BOB, CAROL, LIAR = (PeerId(name) for name in ("alice", "bob", "carol", "liar"))


# --- expectations ---


def test_a_session_is_expected_to_become_what_its_owners_usually_do_and_no_more_than_its_client_says() -> None:
    expectations = Expectations(512)
    assert [expectations.of(ALICE, told) for told in (0, 30, 4000)] == [1, 30, 512]
    for positions in (100, 200):
        expectations.ended(ALICE, 4000, positions)
    assert [expectations.of(ALICE, told) for told in (30, 4000)] == [30, 150]


def test_of_a_new_owner_is_expected_what_the_median_owners_sessions_become() -> None:
    expectations = Expectations(512)
    for owner, positions in ((ALICE, 100), (BOB, 300), *((CAROL, 1),) * 50):
        expectations.ended(owner, 4000, positions)
    assert expectations.of(PeerId("new"), 4000) == 100, "however many sessions one of them had"


def test_the_word_of_who_broke_it_last_time_is_not_believed() -> None:
    expectations = Expectations(512)
    expectations.ended(LIAR, 1, 4000)
    assert expectations.of(LIAR, 1) == 4000
    expectations.ended(LIAR, 2000, 2000)
    assert expectations.of(LIAR, 1) == 1


def test_a_crowd_of_owners_is_forgotten_again() -> None:
    expectations = Expectations(512)
    for number in range(OWNERS_MAX + 1):
        expectations.ended(PeerId(str(number)), 4000, 100 if number else 7)
    assert (expectations.of(PeerId("0"), 4000), len(expectations._seen)) == (100, OWNERS_MAX)


# --- promises ---


class Pool:
    """A ledger over a real pool of pages of one position, with what the engine and the handler would do."""

    def __init__(self, positions: int, expected: int, **limits: Any) -> None:
        self.pages = PagePool(positions, 1)
        self.prefixes = PrefixIndex(self.pages)
        self.ledger: Ledger[str, str] = Ledger(
            LedgerLimits(
                max_positions=positions,
                pool_positions=positions,
                free_positions=lambda: self.pages.free_pages,
                expected_positions=expected,
                **limits,
            )
        )
        self.outgrew: set[int] = set()
        self.preempted: list[tuple[PeerId, PeerId]] = []
        """Whose sessions gave way, and to whose."""
        self.now_s = 0.0
        self._opened = 0

    def open(self, owner: PeerId, told: int = 0, **changes: Any) -> Entry[str, str]:
        self._opened += 1
        fields: dict[str, Any] = {"epoch": 1, "model": bytes(32), "start": 0, "end": 4, "previous": None, "next": None}
        message = Open(session=self._opened.to_bytes(16, "big"), expects=told, **fields | changes)
        entry = self.ledger.open(owner, owner, message, self.now_s)
        self.pages.open(self._opened)
        return entry

    def write(self, entry: Entry[str, str], count: int = 1, expects: int = 0) -> bool:
        """Whether the session grew; else it is gone."""
        number = int.from_bytes(entry.place.session.raw, "big")
        message = Step(
            session=entry.place.session.raw,
            block=0,
            epoch=1,
            step=entry.positions,
            first=entry.positions,
            count=count,
            want_from=0,
            dtype="float32",
            hidden=4,
            expects=expects,
        )
        _, run = self.ledger.step(entry.owner, message, self.now_s)
        assert isinstance(run, Run)
        if entry.positions > entry.told:
            self.outgrew.add(number)
        entries = {int.from_bytes(entry.place.session.raw, "big"): entry for entry in self.ledger.entries()}
        copies, victims = grow_or_preempt(
            self.pages,
            self.prefixes,
            number,
            entry.positions,
            lambda number: entries[number].owner,
            self.outgrew.__contains__,
        )
        for victim in victims:
            self.preempted.append((entries[victim].owner, entry.owner))
            if victim != number:
                self.ledger.drop(entries[victim].place)
        if copies is None:
            self.ledger.failed(entry, run)
            self.ledger.drop(entry.place)
            return False
        return self.ledger.completed(entry, run, "answer", 1, self.now_s)

    def end(self, entry: Entry[str, str]) -> None:
        (gone,) = self.ledger.close(entry.owner, [entry.place.session])
        self.pages.release(int.from_bytes(gone.session.raw, "big"))


def test_what_was_promised_is_not_promised_again_though_nobody_has_written_it_yet() -> None:
    pool = Pool(80, expected=30)
    first = pool.open(ALICE, 30)
    assert pool.ledger.owed(0.0) == 30
    second = pool.open(BOB, 60)
    assert (second.expected, pool.ledger.owed(0.0)) == (30, 60), "of 60 positions that may be, 30 are to be expected"
    with pytest.raises(Busy, match="no 30 positions are free"):
        pool.open(CAROL, 30)
    assert pool.write(first, 20)
    assert pool.ledger.owed(0.0) == 40, "what is held is owed no more"
    pool.end(second)
    pool.open(CAROL, 30)


def test_who_is_alone_is_promised_everything_until_somebody_else_waits() -> None:
    pool = Pool(100, expected=40, turned_away_s=30.0)
    entries = [pool.open(ALICE) for _ in range(5)]
    for entry in entries[:4]:
        assert pool.write(entry, 24)
    with pytest.raises(Busy):
        pool.open(BOB)
    with pytest.raises(Busy, match="your sessions hold"):
        pool.open(ALICE)
    pool.now_s = 30.0
    pool.open(ALICE)


def test_a_promise_that_is_not_used_is_over_and_comes_back_with_the_next_step() -> None:
    pool = Pool(100, expected=70, promise_s=10.0)
    entry = pool.open(ALICE)
    with pytest.raises(Busy):
        pool.open(BOB)
    pool.now_s = 10.0
    assert pool.ledger.owed(10.0) == 0
    assert pool.write(entry, 10)
    assert pool.ledger.owed(10.0) == 60
    pool.now_s = 20.0
    pool.open(BOB)


def test_an_owner_is_promised_its_share_of_the_pool_at_most() -> None:
    pool = Pool(100, expected=20)
    pool.open(BOB)
    for _ in range(3):
        pool.open(ALICE)
    with pytest.raises(Busy, match="your sessions hold, or were promised, 60"):
        pool.open(ALICE)
    assert pool.ledger.limits.owner_share == 0.75


def test_a_session_that_goes_on_says_so_and_is_believed_where_there_is_room() -> None:
    pool = Pool(90, expected=60)
    alices, bobs = pool.open(ALICE, 10), pool.open(BOB, 10)
    assert pool.write(alices, 10)
    assert pool.write(alices, 5, expects=40)
    assert (alices.told, alices.expected, pool.ledger.owed(0.0)) == (40, 40, 25 + 10)
    assert pool.write(bobs, 10, expects=80)
    assert (bobs.told, bobs.expected) == (10, 10), "no room for 60, so its word stays what it was, and its room too"
    assert pool.write(bobs, 20)
    assert pool.outgrew == {2}


def test_standbys_and_forks_are_promised_nothing_and_tell_nothing_of_how_long_sessions_become() -> None:
    pool = Pool(100, expected=30)
    standby, entry = pool.open(ALICE, 30, standby=True), pool.open(ALICE, 30)
    assert pool.write(entry, 5)
    child = SessionId(bytes([9]) * 16)
    message = Step(
        session=child.raw, block=0, epoch=1, step=9, first=5, count=1, want_from=0, dtype="float32", hidden=4,
        parent=entry.place.session.raw,
    )  # fmt: skip
    fork, _ = pool.ledger.step(ALICE, message, 0.0)
    assert (standby.expected, fork.expected, fork.told, pool.ledger.owed(0.0)) == (0, 0, 30, 25)
    pool.ledger.drop(standby.place)
    pool.ledger.drop(Place(child, 0))
    assert pool.ledger._expectations.of(ALICE, 100) == 30


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_honest_sessions_keep_what_was_promised_whatever_liars_say_and_write(data: st.DataObject) -> None:
    """Honest sessions become as long as they say. Liars say one position, and write as much as they can."""
    length = data.draw(st.integers(2, 12))
    pool = Pool(40, expected=length, promise_s=1e9, lease_s=1e10)
    for owner in (ALICE, BOB):
        pool.ledger._expectations.ended(owner, length, length)
    pool.open(CAROL, 1)  # so that nobody is alone
    entries: list[Entry[str, str]] = []
    for _ in range(data.draw(st.integers(1, 120))):
        entries = [entry for entry in entries if pool.ledger.get(entry.place) is entry]
        entry = data.draw(st.sampled_from([None, *entries]))
        if entry is None:
            owner = data.draw(st.sampled_from([ALICE, BOB, LIAR]))
            with suppress(Busy):
                entries.append(pool.open(owner, 1 if owner == LIAR else length))
        elif entry.owner != LIAR and entry.positions == length:
            pool.end(entry)
        elif entry.owner != LIAR:
            assert pool.write(entry, data.draw(st.integers(1, length - entry.positions)))
        elif entry.positions < 39:
            pool.write(entry, data.draw(st.integers(1, 39 - entry.positions)))
        assert all(victim == LIAR for victim, _ in pool.preempted)
        assert pool.pages.free_pages + pool.pages.used_pages == 40
        free = pool.pages.free_pages + sum(pool.pages.length(number) for number in pool.outgrew & pool.pages.sessions)
        owed = sum(pool.ledger._owed(entry, 0.0) for entry in pool.ledger.entries() if entry.owner != LIAR)
        assert owed <= free, "what is promised is free, or held by those who give way"

"""The page allocator against a memory in which every position can be recognised."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peers.runtime.pages import PagePool


class PoolMachine(RuleBasedStateMachine):
    """A memory of slots beside the pool: whatever a session wrote must be what its runs read, whoever else forks,
    rolls back, grows or leaves."""

    @initialize(num_pages=st.integers(1, 24), page_size=st.integers(1, 5))
    def start(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.memory: list[int] = [-1] * (num_pages * page_size)
        self.written: dict[int, list[int]] = {}
        self.count = 0

    def fresh(self) -> int:
        self.count += 1
        return self.count

    @rule()
    def open(self) -> None:
        session = self.fresh()
        self.pool.open(session)
        self.written[session] = []

    @precondition(lambda self: self.written)
    @rule(data=st.data(), tokens=st.integers(0, 40))
    def append(self, data: st.DataObject, tokens: int) -> None:
        session = data.draw(st.sampled_from(sorted(self.written)))
        held = len(self.written[session])
        before = (self.pool.free_pages, self.pool.runs(session, held))
        copies = self.pool.grow(session, held + tokens)
        if copies is None:
            assert (self.pool.free_pages, self.pool.runs(session, held)) == before
            return
        for copy in copies:
            self.memory[copy.target : copy.target + copy.slots] = self.memory[copy.source : copy.source + copy.slots]
        slots = self.slots(session, held + tokens)
        for slot in slots[held:]:
            self.memory[slot] = self.fresh()
            self.written[session].append(self.memory[slot])

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.written)))
        length = data.draw(st.integers(0, len(self.written[session])))
        self.pool.truncate(session, length)
        del self.written[session][length:]

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(sorted(self.written)))
        length = data.draw(st.integers(0, len(self.written[parent])))
        free, child = self.pool.free_pages, self.fresh()
        self.pool.fork(parent, child, length)
        self.written[child] = self.written[parent][:length]
        assert self.pool.free_pages == free

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.written)))
        self.pool.release(session)
        del self.written[session]

    def slots(self, session: int, length: int) -> list[int]:
        runs = self.pool.runs(session, length)
        assert all(first + count != following for (first, count), (following, _) in itertools.pairwise(runs))
        return [slot for first, count in runs for slot in range(first, first + count)]

    @invariant()
    def every_session_reads_what_it_wrote(self) -> None:
        for session, written in getattr(self, "written", {}).items():
            assert self.pool.length(session) == len(written)
            assert [self.memory[slot] for slot in self.slots(session, len(written))] == written

    @invariant()
    def free_plus_used_pages_is_constant(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.used_pages == self.pool.distinct_pages(self.written)
            assert self.pool.used_pages + self.pool.free_pages == self.pool.num_pages
            assert len(self.pool.sessions) == len(self.written)


PoolMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_session_that_grows_alone_stays_in_one_run() -> None:
    pool = PagePool(64, 4)
    pool.open(0)
    for length in range(1, 200):
        assert pool.grow(0, length) == []
        assert len(pool.runs(0, length)) == 1


def test_sessions_that_grow_side_by_side_stay_in_one_run_each() -> None:
    pool = PagePool(16 * 32, 4)
    for session in range(16):
        pool.open(session)
        pool.grow(session, 10)
    for length in range(11, 60):
        for session in range(16):
            pool.grow(session, length)
    assert [len(pool.runs(session, 59)) for session in range(16)] == [1] * 16


def test_a_fork_costs_no_page_until_one_of_the_two_writes() -> None:
    pool = PagePool(8, 4)
    pool.open(0)
    pool.grow(0, 10)
    pool.fork(0, 1, 9)
    assert pool.used_pages == 3
    (copy,) = pool.grow(1, 10) or []
    assert copy.slots == 1  # only position 8 lies in the page that is shared and not full
    assert pool.used_pages == 4
    assert pool.grow(0, 11) == []  # the other keeps the original

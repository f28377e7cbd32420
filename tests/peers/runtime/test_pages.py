"""The page allocator against a memory in which every position can be recognised."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peers.runtime.pages import PagePool

WINDOWS = st.one_of(st.just([None]), st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=3))


class PoolMachine(RuleBasedStateMachine):
    """A memory of slots beside the pool: whatever a session wrote must be what its runs read, whoever else forks,
    rolls back, grows, slides or leaves. In each table a position has a content of its own."""

    @initialize(
        num_pages=st.integers(3, 24), page_size=st.integers(1, 5), windows=WINDOWS, slack=st.sampled_from([0, 1, 7])
    )
    def start(self, num_pages: int, page_size: int, windows: list[int | None], slack: int) -> None:
        self.pool = PagePool(num_pages, page_size, windows, slack)
        self.memory: list[object] = [None] * (num_pages * page_size)
        self.written: dict[int, list[int]] = {}
        self.slid: dict[int, int] = {}
        """Of how long a session pages were returned."""
        self.count = 0

    def fresh(self) -> int:
        self.count += 1
        return self.count

    @rule()
    def open(self) -> None:
        session = self.fresh()
        self.pool.open(session)
        self.written[session], self.slid[session] = [], 0

    @precondition(lambda self: self.written)
    @rule(data=st.data(), tokens=st.integers(0, 40))
    def append(self, data: st.DataObject, tokens: int) -> None:
        session = data.draw(st.sampled_from(sorted(self.written)))
        held = len(self.written[session])
        before = (self.pool.free_pages, [self.slots(session, held, table) for table in self.tables])
        copies = self.pool.grow(session, held + tokens)
        if copies is None:
            assert (self.pool.free_pages, [self.slots(session, held, table) for table in self.tables]) == before
            return
        for copy in copies:
            self.memory[copy.target : copy.target + copy.slots] = self.memory[copy.source : copy.source + copy.slots]
        new = [self.fresh() for _ in range(tokens)]
        self.written[session] += new
        for table in self.tables:
            slots = self.slots(session, held + tokens, table)
            for slot, content in zip(slots[len(slots) - tokens :], new, strict=True):
                self.memory[slot] = (table, content)

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.written)))
        length = data.draw(st.integers(0, len(self.written[session])))
        if self.reaches(session, length):
            self.pool.truncate(session, length)
            del self.written[session][length:]
            self.slid[session] = min(self.slid[session], length + self.pool.slack) if length else 0

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def slide(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.written)))
        self.pool.slide(session)
        self.slid[session] = max(self.slid[session], len(self.written[session]))
        for table, window in enumerate(self.pool.windows):
            if window is not None:  # no page more than some position needs, who may go back
                end = len(self.written[session])
                seen = max(0, end - self.pool.slack - window + 1)
                assert len(self.slots(session, end, table)) <= end - seen // self.pool.page_size * self.pool.page_size

    def reaches(self, session: int, length: int) -> bool:
        """As the pool says, which is always yes within the slack."""
        assert self.pool.reaches(session, length) or 0 < length < self.slid[session] - self.pool.slack
        return self.pool.reaches(session, length)

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(sorted(self.written)))
        length = data.draw(st.integers(0, len(self.written[parent])))
        if not self.reaches(parent, length):
            return
        free, child = self.pool.free_pages, self.fresh()
        self.pool.fork(parent, child, length)
        self.written[child], self.slid[child] = self.written[parent][:length], self.slid[parent] if length else 0
        assert self.pool.free_pages == free

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.written)))
        self.pool.release(session)
        del self.written[session]

    @property
    def tables(self) -> range:
        return range(len(self.pool.windows))

    def slots(self, session: int, length: int, table: int) -> list[int]:
        runs = self.pool.runs(session, length, table)
        assert all(first + count != following for (first, count), (following, _) in itertools.pairwise(runs))
        return [slot for first, count in runs for slot in range(first, first + count)]

    @invariant()
    def every_session_reads_what_it_wrote(self) -> None:
        for session, written in getattr(self, "written", {}).items():
            assert self.pool.length(session) == len(written)
            assert self.pool.reaches(session, len(written))
            for table, window in enumerate(self.pool.windows):
                first = self.pool.first(session, table)
                assert first == 0 or (window is not None and first <= max(0, len(written) - window + 1))
                read = [self.memory[slot] for slot in self.slots(session, len(written), table)]
                assert read == [(table, content) for content in written[first:]]

    @invariant()
    def free_plus_used_pages_is_constant(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.used_pages == self.pool.distinct_pages(self.written)
            assert self.pool.used_pages + self.pool.free_pages == self.pool.num_pages
            assert len(self.pool.sessions) == len(self.written)


PoolMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


@given(
    windows=WINDOWS,
    slack=st.integers(0, 9),
    pages=st.integers(3, 99),
    page_size=st.integers(1, 5),
    work=st.integers(1, 9),
)
def test_a_session_as_long_as_promised_fits(
    windows: list[int | None], slack: int, pages: int, page_size: int, work: int
) -> None:
    pool = PagePool(pages, page_size, windows, slack)
    longest = pool.longest(pages, work, 500)
    assert longest >= pool.tokens(pages)
    pool.open(0)
    while (held := pool.length(0)) < longest:
        pool.slide(0)
        end = min(held + work, longest)
        assert pool.needed(held, end) <= pages
        assert pool.grow(0, end) == []
    assert pool.distinct_pages([0]) <= pages


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

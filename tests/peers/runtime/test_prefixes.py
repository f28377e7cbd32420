"""What sessions begin with, against a memory in which every position tells all that came before it."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peers.runtime.pages import PagePool
from peers.runtime.prefixes import PrefixIndex
from peers.wire.messages import PREFIX_POSITIONS

BLOCK = PREFIX_POSITIONS


def keys_of(content: list[int], salt: str = "") -> list[bytes]:
    """As a client makes them: each key names everything up to the end of its block."""
    ends = range(BLOCK, len(content) + 1, BLOCK)
    return [hashlib.blake2b(repr((salt, content[:end])).encode(), digest_size=16).digest() for end in ends]


class PrefixMachine(RuleBasedStateMachine):
    """Sessions open with the keys of a text, send it, go back, go on otherwise, fork and leave, in any order.

    A slot of the memory holds the whole text up to its position, so a wrong page, or a right one in a wrong place, is
    seen at once: `held_texts` says what each session would hold had it computed everything itself.
    """

    @initialize(
        positions=st.sampled_from([256, 512, 1024]),
        page_size=st.sampled_from([8, 16, 24, 64, 128]),
        windows=st.sampled_from([[None], [None], [9], [None, 9, 100]]),
    )
    def start(self, positions: int, page_size: int, windows: list[int | None]) -> None:
        num_pages = positions // page_size * len(windows)
        self.pool = PagePool(num_pages, page_size, windows, slack=BLOCK)
        self.index = PrefixIndex(self.pool)
        self.memory: list[object] = [None] * (num_pages * page_size)
        self.held_texts: dict[int, list[int]] = {}
        self.plans: dict[int, list[int]] = {}
        self.sent: dict[int, int] = {}
        self.faithful: set[int] = set()
        self.numbers = itertools.count()

    @rule(
        owner=st.sampled_from(["alice", "alice", "bob"]),
        blocks=st.sampled_from([[0, 0, 0], [0, 0, 1], [1]]),
        tail=st.integers(0, BLOCK - 1),
    )
    def open(self, owner: str, blocks: list[int], tail: int) -> None:
        session = next(self.numbers)
        plan = [token for block in blocks for token in [block] * BLOCK] + [2] * tail
        held = self.index.open(session, owner, keys_of(plan, owner))
        assert held <= len(plan)
        assert self.pool.length(session) == held
        self.held_texts[session], self.plans[session] = plan[:held], plan
        self.sent[session] = 0
        self.faithful.add(session)

    @precondition(lambda self: self.held_texts)
    @rule(
        data=st.data(),
        back=st.one_of(st.just(0), st.integers(0, 100)),
        count=st.sampled_from([1, 20, BLOCK, 150]),
        other=st.booleans(),
    )
    def send(self, data: st.DataObject, back: int, count: int, other: bool) -> None:
        """A work, which first rolls back; what it sends for the first time is what the keys said."""
        session = data.draw(st.sampled_from(sorted(self.held_texts)))
        text = self.held_texts[session]
        start = max(0, len(text) - back)
        if not self.pool.reaches(session, start):
            start = 0
        plan = self.plans[session]
        if other and start < self.sent[session]:
            self.faithful.discard(session)
        new = plan[start : start + count] if session in self.faithful else []
        new += [3] * (count - len(new))
        end = start + len(new)
        if self.pool.needed(0, end) > self.pool.num_pages:
            return
        del text[start:]
        self.sent[session] = end
        self.index.begun(session, start, end)
        self.pool.truncate(session, start)
        self.pool.slide(session)
        copies = self.pool.grow(session, end)
        while copies is None and self.index.make_room(session, end):
            copies = self.pool.grow(session, end)
        if copies is None:
            assert self.pool.idle_pages == 0  # nobody gives way before everything that is only kept has gone
            self.pool.release(session)
            self.index.close(session)
            del self.held_texts[session]
            return
        for copy in copies:
            self.memory[copy.target : copy.target + copy.slots] = self.memory[copy.source : copy.source + copy.slots]
        computed = data.draw(st.sampled_from([len(new), len(new), len(new) // 2]))
        text += new[:computed]
        for table in self.tables:
            slots = self.slots(session, end, table)
            for position in range(start, start + computed):
                self.memory[slots[position]] = (table, *text[: position + 1])
        self.index.computed(session, len(text))
        self.pool.truncate(session, len(text))

    @precondition(lambda self: self.held_texts)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent, child = data.draw(st.sampled_from(sorted(self.held_texts))), next(self.numbers)
        length = data.draw(st.integers(0, len(self.held_texts[parent])))
        if not self.pool.reaches(parent, length):
            return
        self.pool.fork(parent, child, length)
        self.held_texts[child], self.plans[child] = self.held_texts[parent][:length], []
        self.sent[child] = length

    @precondition(lambda self: self.held_texts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.held_texts)))
        self.index.close(session)
        self.pool.release(session)
        del self.held_texts[session]

    @rule()
    def clear(self) -> None:
        self.index.clear()
        assert len(self.index) == self.pool.idle_pages == 0

    @property
    def tables(self) -> range:
        return range(len(self.pool.windows))

    def slots(self, session: int, length: int, table: int) -> dict[int, int]:
        runs = self.pool.runs(session, length, table)
        slots = [slot for first, count in runs for slot in range(first, first + count)]
        return dict(enumerate(slots, start=self.pool.first(session, table)))

    @invariant()
    def every_session_reads_what_it_would_have_computed(self) -> None:
        for session, text in getattr(self, "held_texts", {}).items():
            assert self.pool.length(session) == len(text)
            for table in self.tables:
                for position, slot in self.slots(session, len(text), table).items():
                    assert self.memory[slot] == (table, *text[: position + 1])

    @invariant()
    def free_held_and_kept_pages_are_all_pages(self) -> None:
        if hasattr(self, "pool"):
            held = self.pool.distinct_pages(self.held_texts)
            assert self.pool.free_pages + held + self.pool.idle_pages == self.pool.num_pages
            kept = len(self.index) * self.index.block // self.pool.page_size * len(self.pool.windows)
            assert self.pool.idle_pages <= kept <= self.pool.num_pages // 2

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for session in self.held_texts:
            self.index.close(session)
            self.pool.release(session)
        newcomer, everything = next(self.numbers), self.pool.tokens(self.pool.num_pages)
        self.pool.open(newcomer)
        while self.pool.grow(newcomer, everything) is None:
            assert self.index.make_room(newcomer, everything)
        assert len(self.index) == 0
        self.pool.release(newcomer)
        assert self.pool.free_pages == self.pool.num_pages


PrefixMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestPrefixes = PrefixMachine.TestCase


def index_of(positions: int) -> tuple[PagePool, PrefixIndex]:
    pool = PagePool(positions // 16, 16)
    return pool, PrefixIndex(pool)


def compute(pool: PagePool, index: PrefixIndex, session: int, start: int, end: int) -> None:
    index.begun(session, start, end)
    pool.truncate(session, start)
    assert pool.grow(session, end) is not None
    index.computed(session, end)


TEXT = list(range(4 * BLOCK))


def test_a_session_begins_with_the_longest_kept_prefix_of_its_own_scope() -> None:
    pool, index = index_of(16 * BLOCK)
    assert index.open(0, "alice", keys_of(TEXT)) == 0
    compute(pool, index, 0, 0, 3 * BLOCK + 1)
    assert index.open(1, "alice", keys_of(TEXT)) == 3 * BLOCK  # while the first still runs
    assert index.open(2, "alice", keys_of(TEXT[: BLOCK + 5])) == BLOCK
    assert index.open(3, "alice", keys_of(TEXT[: 2 * BLOCK] + TEXT)) == 2 * BLOCK
    assert index.open(4, "bob", keys_of(TEXT)) == 0
    assert index.open(5, "alice", keys_of(TEXT, "another secret")) == 0
    assert index.open(6, "alice", keys_of(TEXT)[1:]) == 2 * BLOCK  # nonsense, but nobody else's and within bounds
    assert (index.hits, index.hit_positions) == (4, 8 * BLOCK)


def test_what_was_sent_after_going_back_is_not_kept() -> None:
    pool, index = index_of(16 * BLOCK)
    index.open(0, "alice", keys_of(TEXT))
    compute(pool, index, 0, 0, BLOCK + 10)
    compute(pool, index, 0, BLOCK + 5, 4 * BLOCK)
    assert index.open(1, "alice", keys_of(TEXT)) == BLOCK
    compute(pool, index, 1, BLOCK // 2, 3 * BLOCK)  # its first work repeats what it was given
    assert index.open(2, "alice", keys_of(TEXT)) == 3 * BLOCK


def test_the_longest_unused_prefixes_go_first_and_from_their_ends() -> None:
    pool, index = index_of(8 * BLOCK)
    for session, salt in enumerate(["old", "new"]):
        index.open(session, salt, keys_of(TEXT[: 2 * BLOCK], salt))
        compute(pool, index, session, 0, 2 * BLOCK)
        index.close(session)
        pool.release(session)
    assert pool.free_pages == pool.idle_pages == 4 * BLOCK // pool.page_size
    pool.open(2)
    assert index.make_room(2, 5 * BLOCK)
    pool.grow(2, 5 * BLOCK)
    assert index.open(3, "old", keys_of(TEXT, "old")) == BLOCK
    assert index.open(4, "new", keys_of(TEXT, "new")) == 2 * BLOCK
    assert not index.make_room(2, 8 * BLOCK)  # what others use is not let go: it would free nothing
    assert len(index) == 3


def test_a_session_may_go_back_into_what_is_kept_of_it_when_no_page_is_free() -> None:
    pool, index = index_of(4 * BLOCK)
    pool.open(0)
    pool.grow(0, 2 * BLOCK)
    index.open(1, "alice", keys_of(TEXT[: 2 * BLOCK]))
    compute(pool, index, 1, 0, 2 * BLOCK)
    assert (len(index), pool.free_pages) == (2, 0)
    pool.truncate(1, 2 * BLOCK - 5)
    assert pool.grow(1, 2 * BLOCK) is None  # the last page is kept and would have to be copied
    assert index.make_room(1, 2 * BLOCK)
    assert pool.grow(1, 2 * BLOCK) == []
    assert len(index) == 1


@pytest.mark.parametrize(("positions", "kept"), [(BLOCK, 0), (4 * BLOCK, 2)])
def test_at_most_half_of_the_pool_is_kept_and_a_long_prefix_keeps_its_beginning(positions: int, kept: int) -> None:
    pool, index = index_of(positions)
    index.open(0, "alice", keys_of(TEXT[:positions]))
    compute(pool, index, 0, 0, positions)
    assert len(index) == kept
    assert index.open(1, "alice", keys_of(TEXT[:positions])) == kept * BLOCK

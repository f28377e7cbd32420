"""What a hop sent, kept by position: against a plain model of it, and within its bounds."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peers.serving.journal import Journal, JournalLimits
from peers.serving.spill import Disk
from peers.wire.messages import PREFIX_POSITIONS
from routing.ids import BlockSpan, PeerId, Place
from tests.peers.serving.hops import session_id

ANN, BOB = PeerId("ann"), PeerId("bob")
SPAN = BlockSpan(0, 4)
ROW = 4
UNBOUNDED = JournalLimits(max_bytes=1 << 40, max_bytes_per_peer=1 << 40)


def place(number: int) -> Place:
    return Place(session_id(number), 0)


def rows(first: int, count: int, mark: int = 0) -> memoryview:
    return memoryview(
        b"".join(bytes([position % 251, position // 251, mark, 0]) for position in range(first, first + count))
    )


def opened(journal: Journal, *sessions: int, owner: PeerId = ANN, keys: tuple[bytes, ...] = (), held: int = 0) -> None:
    for session in sessions:
        journal.open(place(session), owner, SPAN, keys, held)


def append(journal: Journal, session: int, first: int, count: int, mark: int = 0) -> None:
    journal.append(place(session), first, count, "float32", rows(first, count, mark))


def read(journal: Journal, session: int, first: int, end: int) -> bytes | None:
    kept = journal.read(place(session), first, end)
    return None if kept is None else bytes(kept[1])


def test_what_was_sent_can_be_read_in_any_cut_until_it_is_rolled_back_or_released() -> None:
    journal = Journal(UNBOUNDED)
    opened(journal, 1)
    append(journal, 1, 0, 10)
    append(journal, 1, 10, 1)
    assert read(journal, 1, 3, 11) == rows(3, 8)
    assert read(journal, 1, 3, 12) is None
    append(journal, 1, 8, 2, mark=7)
    assert read(journal, 1, 0, 10) == bytes(rows(0, 8)) + bytes(rows(8, 2, 7))
    assert read(journal, 1, 0, 11) is None
    journal.release(place(1))
    assert (len(journal), journal.memory_bytes.total(), read(journal, 1, 0, 1)) == (0, 0, None)
    append(journal, 1, 0, 1)
    assert len(journal) == 0, "of a session that nobody opened"


def test_a_hole_leaves_what_comes_from_there_on() -> None:
    journal = Journal(UNBOUNDED)
    opened(journal, 1)
    append(journal, 1, 0, 4)
    append(journal, 1, 6, 4)
    assert journal.start(place(1), 10) == 6
    assert journal.start(place(1), 11) == 11, "not so far"
    assert journal.start(place(2), 5) == 5, "nothing"
    journal.append(place(1), 10, 1, "bfloat16", rows(10, 1))
    assert journal.start(place(1), 11) == 10, "one dtype"


def test_a_fork_shares_what_is_paid_for_once() -> None:
    journal = Journal(UNBOUNDED)
    opened(journal, 1)
    append(journal, 1, 0, 10)
    journal.fork(place(1), place(2), 6)
    append(journal, 2, 6, 2, mark=1)
    append(journal, 1, 4, 1, mark=2)
    assert read(journal, 2, 0, 8) == bytes(rows(0, 6)) + bytes(rows(6, 2, 1))
    assert journal.memory_bytes == {ANN: 13 * ROW}
    journal.release(place(1))
    assert journal.memory_bytes == {ANN: 12 * ROW}
    journal.release(place(2))
    assert journal.memory_bytes == {}


@pytest.mark.parametrize("rolled_back", [False, True])
def test_a_prefix_is_kept_for_sessions_to_come_as_far_as_it_was_sent_as_described(rolled_back: bool) -> None:
    journal, keys = Journal(UNBOUNDED), (b"a", b"b")
    opened(journal, 1, keys=keys)
    append(journal, 1, 0, 100)
    if rolled_back:
        append(journal, 1, 90, 5, mark=1)
    append(journal, 1, 100 - 5 * rolled_back, 60)
    journal.release(place(1))
    opened(journal, 2, keys=keys, held=PREFIX_POSITIONS)
    assert read(journal, 2, 0, PREFIX_POSITIONS) == rows(0, PREFIX_POSITIONS)
    opened(journal, 3, keys=keys, held=2 * PREFIX_POSITIONS)
    missing = 2 * PREFIX_POSITIONS if rolled_back else 0
    assert journal.start(place(3), 2 * PREFIX_POSITIONS) == missing
    opened(journal, 4, owner=BOB, keys=keys, held=PREFIX_POSITIONS)
    assert journal.start(place(4), PREFIX_POSITIONS) == PREFIX_POSITIONS, "another client's"


def test_who_has_too_much_loses_what_was_used_longest_ago_and_nobody_else_does() -> None:
    journal = Journal(JournalLimits(max_bytes=30 * ROW, max_bytes_per_peer=20 * ROW))
    opened(journal, 1, 2)
    opened(journal, 3, owner=BOB)
    append(journal, 3, 0, 10)
    append(journal, 1, 0, 10)
    append(journal, 2, 0, 11)
    assert journal.start(place(1), 10) == 10, "ann has too much, and used this longest ago"
    append(journal, 1, 10, 1)
    assert read(journal, 1, 10, 11) == rows(10, 1), "it goes on from there"
    assert (read(journal, 2, 0, 11), read(journal, 3, 0, 10)) == (rows(0, 11), rows(0, 10))
    append(journal, 3, 10, 9)
    assert journal.start(place(3), 19) == 19, "all together have too much, and bob has most"
    assert read(journal, 2, 0, 11) == rows(0, 11)
    assert journal.evictions == 2


def test_what_leaves_memory_goes_to_disk_where_there_is_room() -> None:
    room = [1]

    def spill(payloads: Any) -> list[memoryview] | None:
        if not room:
            return None
        room.pop()
        return [memoryview(bytes(payload)) for payload in payloads]

    journal = Journal(JournalLimits(max_bytes=10 * ROW), spill)
    opened(journal, 1, 2)
    append(journal, 1, 0, 8)
    append(journal, 2, 0, 8)
    assert journal.memory_bytes == {ANN: 8 * ROW}
    assert read(journal, 1, 0, 8) == rows(0, 8)
    append(journal, 1, 8, 8)
    assert (read(journal, 2, 0, 8), read(journal, 1, 0, 16)) == (None, rows(0, 16))


def test_the_disk_holds_what_it_was_given_until_nobody_needs_it_and_a_full_one_says_no(tmp_path: Path) -> None:
    disk = Disk(tmp_path, max_bytes=100)
    moved = disk([memoryview(b"a" * 60), memoryview(b"b" * 30)])
    assert moved is not None
    assert [bytes(view) for view in moved] == [b"a" * 60, b"b" * 30]
    assert disk([memoryview(b"c" * 11)]) is None
    del moved[0]
    assert disk.used_bytes == 90, "one file"
    del moved
    assert disk.used_bytes == 0
    assert list(tmp_path.iterdir()) == []
    assert Disk(tmp_path / "gone", max_bytes=100)([memoryview(b"a")]) is None


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The system cuts a write off there with an error, as on a disk that has just become full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("payloads", [[100], [100_000], [10] * 20, [10] * 20_000])
def test_a_disk_that_fills_up_in_the_middle_says_so_once_and_keeps_nothing_of_it(
    payloads: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    disk, journal = Disk(tmp_path, max_bytes=1 << 20), [memoryview(bytes(size)) for size in payloads]
    with no_file_larger_than(64):
        assert disk(journal) is None
        assert disk(journal) is None
    assert (disk.used_bytes, list(tmp_path.iterdir())) == (0, [])
    assert disk(journal) == journal
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


class JournalMachine(RuleBasedStateMachine):
    """Sessions of one client, each beside the plain bytes that it sent."""

    @property
    def limits(self) -> JournalLimits:
        return JournalLimits(max_bytes=150 * ROW, max_bytes_per_peer=100 * ROW)

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal(self.limits)
        self.sent: dict[int, bytes] = {}
        self.mark = 0

    numbers = st.integers(1, 4)

    @rule(session=numbers)
    def open(self, session: int) -> None:
        opened(self.journal, session, owner=(ANN, BOB)[session % 2])
        self.sent[session] = b""

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), count=st.integers(1, 40))
    def append(self, data: st.DataObject, count: int) -> None:
        session = data.draw(st.sampled_from(sorted(self.sent)))
        first = data.draw(st.integers(0, len(self.sent[session]) // ROW))
        self.mark = (self.mark + 1) % 256
        append(self.journal, session, first, count, self.mark)
        self.sent[session] = self.sent[session][: first * ROW] + bytes(rows(first, count, self.mark))

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), child=numbers)
    def fork(self, data: st.DataObject, child: int) -> None:
        parent = data.draw(st.sampled_from(sorted(self.sent)))
        if child == parent or (child - parent) % 2:
            return
        position = data.draw(st.integers(0, len(self.sent[parent]) // ROW))
        self.journal.fork(place(parent), place(child), position)
        self.sent[child] = self.sent[parent][: position * ROW]

    @rule(session=numbers)
    def release(self, session: int) -> None:
        self.journal.release(place(session))
        self.sent.pop(session, None)

    @invariant()
    def it_says_what_was_sent_or_nothing(self) -> None:
        for session, sent in self.sent.items():
            end = len(sent) // ROW
            start = self.journal.start(place(session), end)
            if start < end:
                assert read(self.journal, session, start, end) == sent[start * ROW :]

    @invariant()
    def it_stays_within_its_bounds(self) -> None:
        assert self.journal.memory_bytes.total() <= self.limits.max_bytes
        assert all(0 < used <= self.limits.max_bytes_per_peer for used in self.journal.memory_bytes.values())

    def teardown(self) -> None:
        for session in list(self.sent):
            self.release(session)
        assert self.journal.memory_bytes == {}


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

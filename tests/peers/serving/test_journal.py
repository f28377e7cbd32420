"""What a hop sent, kept by position: against a plain model of it, and within its bounds."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peers.serving import spill
from peers.serving.journal import Journal, JournalLimits, Settle
from peers.serving.spill import Disk
from peers.transport.tasks import Tasks
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


def opened(
    journal: Journal,
    *sessions: int,
    owner: PeerId = ANN,
    keys: tuple[bytes, ...] = (),
    held: int = 0,
    shared: bool = False,
) -> None:
    for session in sessions:
        journal.open(place(session), owner, (SPAN, None if shared else owner), keys, held)


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
    end = PREFIX_POSITIONS + 10
    append(journal, 1, 0, end)
    if rolled_back:
        append(journal, 1, end - 10, 5, mark=1)
    append(journal, 1, end - 5 * rolled_back, PREFIX_POSITIONS)
    journal.release(place(1))
    opened(journal, 2, keys=keys, held=PREFIX_POSITIONS)
    assert read(journal, 2, 0, PREFIX_POSITIONS) == rows(0, PREFIX_POSITIONS)
    opened(journal, 3, keys=keys, held=2 * PREFIX_POSITIONS)
    missing = 2 * PREFIX_POSITIONS if rolled_back else 0
    assert journal.start(place(3), 2 * PREFIX_POSITIONS) == missing
    opened(journal, 4, owner=BOB, keys=keys, held=PREFIX_POSITIONS)
    assert journal.start(place(4), PREFIX_POSITIONS) == PREFIX_POSITIONS, "another client's"


def test_prefixes_that_are_forgotten_take_nothing_from_sessions_that_began_with_them() -> None:
    journal, keys = Journal(UNBOUNDED), (b"a",)
    opened(journal, 1, keys=keys)
    append(journal, 1, 0, PREFIX_POSITIONS)
    journal.release(place(1))
    opened(journal, 2, keys=keys, held=PREFIX_POSITIONS)
    journal.forget_prefixes()
    assert read(journal, 2, 0, PREFIX_POSITIONS) == rows(0, PREFIX_POSITIONS)
    opened(journal, 3, keys=keys, held=PREFIX_POSITIONS)
    assert journal.start(place(3), PREFIX_POSITIONS) == PREFIX_POSITIONS
    journal.release(place(2))
    assert journal.memory_bytes == {}


def test_a_prefix_that_all_may_use_is_paid_for_by_whoever_sent_it_for_as_long_as_somebody_does() -> None:
    block, keys = PREFIX_POSITIONS, (b"a",)
    journal = Journal(JournalLimits(max_bytes=4 * block * ROW, max_bytes_per_peer=2 * block * ROW))
    opened(journal, 1, keys=keys, shared=True)
    append(journal, 1, 0, block)
    journal.release(place(1))
    opened(journal, 2, owner=BOB, keys=keys, held=block, shared=True)
    append(journal, 2, block, 10)
    assert read(journal, 2, 0, block + 10) == rows(0, block + 10)
    assert journal.memory_bytes == {ANN: block * ROW, BOB: 10 * ROW}
    opened(journal, 3)
    append(journal, 3, 0, block + 20)
    assert journal.memory_bytes == {ANN: (block + 20) * ROW, BOB: 10 * ROW}, "what takes its room goes, whoever uses it"
    assert journal.start(place(2), block + 10) == block, "and nothing else of his"
    assert read(journal, 2, block, block + 10) == rows(block, 10)
    assert read(journal, 3, 0, block + 20) == rows(0, block + 20)


def test_sessions_of_who_has_too_much_go_before_what_others_share_of_it() -> None:
    block, keys = PREFIX_POSITIONS, (b"a",)
    journal = Journal(JournalLimits(max_bytes=9 * block * ROW, max_bytes_per_peer=3 * block * ROW))
    opened(journal, 1, keys=keys, shared=True)
    append(journal, 1, 0, block)
    journal.release(place(1))
    opened(journal, 2, owner=BOB, keys=keys, held=block, shared=True)
    append(journal, 2, block, 10)
    opened(journal, 3, 4)
    append(journal, 3, 0, block)
    append(journal, 4, 0, block + 10)
    assert (journal.start(place(3), block), journal.start(place(4), block + 10)) == (block, 0)
    assert journal.start(place(2), block + 10) == 0
    append(journal, 4, block + 10, block)
    assert (journal.start(place(2), block + 10), journal.start(place(4), 2 * block + 10)) == (block, 0)


def test_a_step_whose_blocks_are_shared_one_by_one_is_paid_for_and_spilled_once() -> None:
    disk, block = SlowDisk(2), PREFIX_POSITIONS
    keys = (b"a", b"b", b"c", b"d")
    journal = Journal(JournalLimits(max_bytes=1 << 20, max_bytes_per_peer=6 * block * ROW), disk)
    opened(journal, 1, keys=keys)
    append(journal, 1, 0, 4 * block + 5)
    journal.release(place(1))
    opened(journal, 2, keys=keys, held=4 * block)
    opened(journal, 3)
    append(journal, 3, 0, 5 * block)
    assert journal.memory_bytes == {ANN: 5 * block * ROW}
    disk.settle(lost=False)
    assert read(journal, 2, 0, 4 * block) == rows(0, 4 * block)
    assert journal.memory_bytes == {ANN: 5 * block * ROW}


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


class SlowDisk:
    """Takes so many writes at a time, and settles them when it is told to."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.waiting: deque[tuple[list[bytes], Settle]] = deque()

    def __call__(self, payloads: Sequence[memoryview], settle: Settle) -> bool:
        if len(self.waiting) == self.room:
            return False
        self.waiting.append(([bytes(payload) for payload in payloads], settle))
        return True

    def settle(self, *, lost: bool = False) -> None:
        written, settle = self.waiting.popleft()
        settle(None if lost else [memoryview(payload) for payload in written])


@pytest.mark.parametrize("settled", [False, True])
def test_what_leaves_memory_goes_to_disk_where_there_is_room_and_can_be_read_all_the_while(settled: bool) -> None:
    disk = SlowDisk(1)
    journal = Journal(JournalLimits(max_bytes=10 * ROW), disk)
    opened(journal, 1, 2)
    append(journal, 1, 0, 8)
    append(journal, 2, 0, 8)
    assert journal.memory_bytes == {ANN: 8 * ROW}
    assert read(journal, 1, 0, 8) == rows(0, 8)
    if settled:
        disk.settle()
        disk.room = 0
    append(journal, 1, 8, 8)
    assert (read(journal, 2, 0, 8), read(journal, 1, 0, 16)) == (None, rows(0, 16))


def test_what_a_disk_loses_is_lost_to_all_who_share_it_and_counted() -> None:
    disk, keys = SlowDisk(1), (b"a",)
    journal = Journal(JournalLimits(max_bytes=(PREFIX_POSITIONS + 10) * ROW), disk)
    opened(journal, 1, keys=keys)
    append(journal, 1, 0, PREFIX_POSITIONS)
    journal.fork(place(1), place(2), 5)
    opened(journal, 3)
    append(journal, 3, 0, 11)
    assert disk.waiting
    disk.settle(lost=True)
    assert journal.evictions == 3, "the prefix first, for want of room; then one session, and its fork"
    assert journal.memory_bytes == {ANN: 11 * ROW}
    assert [journal.start(place(1), PREFIX_POSITIONS), journal.start(place(2), 5)] == [PREFIX_POSITIONS, 5]
    append(journal, 1, PREFIX_POSITIONS, 1)
    assert read(journal, 1, PREFIX_POSITIONS, PREFIX_POSITIONS + 1) == rows(PREFIX_POSITIONS, 1), "it goes on"


Moved = list[list[memoryview] | None]


def files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_the_disk_holds_what_it_was_given_until_nobody_needs_it_and_a_full_one_says_no(tmp_path: Path) -> None:
    tasks, moved = Tasks(), Moved()
    disk = Disk(tmp_path, 100, tasks)
    assert disk([memoryview(b"a" * 60), memoryview(b"b" * 30)], moved.append)
    assert not disk([memoryview(b"c" * 11)], moved.append)
    await tasks.settled(timeout_s=60)
    assert moved == [[b"a" * 60, b"b" * 30]]
    assert not disk([memoryview(b"c" * 11)], moved.append)
    assert moved[0] is not None
    del moved[0][0]
    assert disk.used_bytes == 90, "one file"
    moved.clear()
    assert disk.used_bytes == 0
    assert files_in(tmp_path) == []
    gone = Disk(tmp_path / "gone", 100, tasks)
    assert gone([memoryview(b"a")], moved.append)
    await tasks.settled(timeout_s=60)
    assert (moved, gone.used_bytes) == ([None], 0)


async def test_a_disk_that_blocks_keeps_neither_the_loop_nor_readers_waiting_and_little_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_on, written = threading.Event(), spill._written

    def blocked(*arguments: Any) -> Any:
        assert go_on.wait(timeout=60)
        return written(*arguments)

    monkeypatch.setattr(spill, "_written", blocked)
    monkeypatch.setattr(spill, "WAITING_BYTES_MAX", 16 * ROW)
    tasks = Tasks()
    disk = Disk(tmp_path, 1 << 20, tasks)
    journal = Journal(JournalLimits(max_bytes=10 * ROW), disk)
    opened(journal, 1, 2, 3, 4)
    for session in (1, 2, 3, 4):
        append(journal, session, 0, 8)
        await asyncio.sleep(0)  # the loop turns
    kept = [read(journal, session, 0, 8) for session in (1, 2, 3, 4)]
    assert kept == [rows(0, 8), rows(0, 8), None, rows(0, 8)], "what more than waits already is dropped"
    assert (journal.evictions, disk.used_bytes, files_in(tmp_path)) == (1, 16 * ROW, [])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    journal.release(place(2))
    go_on.set()
    await tasks.settled(timeout_s=60)
    assert disk.used_bytes == 8 * ROW
    assert read(journal, 1, 0, 8) == rows(0, 8)
    append(journal, 3, 8, 8)
    await tasks.settled(timeout_s=60)
    assert [read(journal, 4, 0, 8), read(journal, 3, 8, 16)] == [rows(0, 8), rows(8, 8)], "it takes more again"
    journal.release(place(1))
    journal.release(place(4))
    assert disk.used_bytes == 0


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
async def test_a_disk_that_fills_up_in_the_middle_says_so_once_and_keeps_nothing_of_it(
    payloads: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tasks, moved, journal = Tasks(), Moved(), [memoryview(bytes(size)) for size in payloads]
    disk = Disk(tmp_path, 1 << 20, tasks)
    with no_file_larger_than(64):
        assert disk(journal, moved.append)
        assert disk(journal, moved.append)
        await tasks.settled(timeout_s=60)
    assert (moved, disk.used_bytes, files_in(tmp_path)) == ([None, None], 0, [])
    assert disk(journal, moved.append)
    await tasks.settled(timeout_s=60)
    assert moved[2] == journal
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


class JournalMachine(RuleBasedStateMachine):
    """Sessions of one client, each beside the plain bytes that it sent."""

    @property
    def limits(self) -> JournalLimits:
        return JournalLimits(max_bytes=150 * ROW, max_bytes_per_peer=100 * ROW)

    def __init__(self) -> None:
        super().__init__()
        self.disk = SlowDisk(2)
        self.journal = Journal(self.limits, self.disk)
        self.sent: dict[int, bytes] = {}
        self.mark = 0

    numbers = st.integers(1, 4)

    @rule(session=numbers)
    def open(self, session: int) -> None:
        opened(self.journal, session, owner=(ANN, BOB)[session % 2], keys=(bytes([session, len(self.sent)]),))
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

    @rule()
    def forget_prefixes(self) -> None:
        self.journal.forget_prefixes()

    @precondition(lambda self: self.disk.waiting)
    @rule(lost=st.booleans())
    def settle(self, lost: bool) -> None:
        self.disk.settle(lost=lost)

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
        self.journal.forget_prefixes()
        assert self.journal.memory_bytes == {}


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

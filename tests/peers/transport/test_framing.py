"""Frames are cut from any sequence of reads, and nothing that is too long is ever stored."""

from __future__ import annotations

import asyncio
import os
import socket
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peers.errors import ProtocolError, StreamClosed
from peers.transport.base import MAX_FRAME_BYTES, Rest
from peers.transport.framing import FramedStream
from routing.ids import PeerId


class _DeafTransport(asyncio.Transport):
    """Stands where asyncio's transport would: says whether it may be read, and forgets what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = True
        self.aborted = False

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def abort(self) -> None:
        self.aborted = True


def feed(stream: FramedStream, data: bytes) -> None:
    while data:
        buffer = stream.get_buffer(-1)
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        stream.buffer_updated(count)
        data = data[count:]


def framed(frame: bytes) -> bytes:
    return len(frame).to_bytes(4, "big") + frame


def new_stream() -> tuple[FramedStream, _DeafTransport]:
    stream, transport = FramedStream(), _DeafTransport()
    stream.connection_made(transport)
    return stream, transport


small = st.integers(0, 40)
around_the_buffer = st.sampled_from([16_375, 16_380, 16_384, 16_385, 40_000])
streams_and_reads = st.one_of(
    st.tuples(st.lists(small, max_size=20), st.lists(st.integers(1, 9), min_size=1)),
    st.tuples(st.lists(small | around_the_buffer, max_size=8), st.lists(st.integers(300, 20_000), min_size=1)),
)


@settings(deadline=None)
@given(streams_and_reads)
async def test_however_the_bytes_arrive_the_frames_are_the_same(case: tuple[list[int], list[int]]) -> None:
    frames, reads = case
    stream, _ = new_stream()
    contents = [os.urandom(size) for size in frames]
    data = b"\x03abc" + b"".join(map(framed, contents))
    position = turn = 0
    while position < len(data):
        step = reads[turn % len(reads)]
        feed(stream, data[position : position + step])
        position, turn = position + step, turn + 1
    assert stream.greeting.result() == b"abc"
    assert [bytes(await stream.receive()) for _ in contents] == contents


async def test_a_frame_above_the_limit_is_refused_before_it_takes_memory() -> None:
    stream, transport = new_stream()
    stream.remote = PeerId("somebody")
    feed(stream, b"\x00" + framed(b"good"))
    tracemalloc.start()
    feed(stream, (MAX_FRAME_BYTES + 1).to_bytes(4, "big") + b"x" * 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 1024
    assert transport.aborted
    assert await stream.receive() == b"good"
    with pytest.raises(ProtocolError, match="somebody announces"):
        await stream.receive()


async def test_a_greeting_longer_than_the_buffer_is_refused() -> None:
    stream, transport = new_stream()
    feed(stream, b"\xff\xff\x7f" + b"x" * 100)
    assert transport.aborted
    stream.connection_lost(None)
    with pytest.raises(ProtocolError, match="greeting"):
        await stream.greeting


async def test_a_stream_that_ends_inside_a_frame_says_so() -> None:
    stream, _ = new_stream()
    feed(stream, b"\x00" + framed(b"whole") + framed(b"cut")[:5])
    stream.connection_lost(None)
    assert await stream.receive() == b"whole"
    with pytest.raises(StreamClosed, match="middle of a frame"):
        await stream.receive()


async def test_a_frame_is_handled_where_it_arrives_unless_something_before_it_is_waited_for() -> None:
    stream, _ = new_stream()
    handled: list[bytes] = []
    waited, may_go_on = asyncio.Event(), asyncio.Event()

    async def rest() -> None:
        waited.set()
        await may_go_on.wait()
        handled.append(b"rest")

    def handle(frame: bytearray) -> Rest | None:
        handled.append(bytes(frame))
        return rest if frame == b"slow" else None

    feed(stream, b"\x00" + framed(b"before"))
    reading = asyncio.create_task(stream.each(handle))
    await asyncio.sleep(0)
    assert handled == [b"before"]
    feed(stream, framed(b"one") + framed(b"two"))
    assert handled == [b"before", b"one", b"two"]
    feed(stream, framed(b"slow") + framed(b"three"))
    assert handled[3:] == [b"slow"]
    await waited.wait()
    feed(stream, framed(b"four"))
    assert handled[3:] == [b"slow"]
    may_go_on.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert handled[4:] == [b"rest", b"three", b"four"]
    feed(stream, framed(b"last"))
    assert handled[7:] == [b"last"]
    stream.connection_lost(None)
    with pytest.raises(StreamClosed):
        await reading


async def test_who_stops_reading_handles_no_more_and_what_a_frame_left_to_do_is_dropped() -> None:
    stream, _ = new_stream()
    feed(stream, b"\x00")

    async def rest() -> None:
        raise AssertionError

    reading = asyncio.create_task(stream.each(lambda _: rest))
    await asyncio.sleep(0)
    feed(stream, framed(b"slow"))
    reading.cancel()
    await asyncio.wait([reading])
    feed(stream, framed(b"later"))
    assert await stream.receive() == b"later"


async def test_reading_pauses_while_frames_wait_and_goes_on_when_they_are_taken() -> None:
    stream, transport = new_stream()
    feed(stream, b"\x00")
    count = 0
    while transport.reading:
        feed(stream, framed(bytes(100_000)))
        count += 1
    assert 10 <= count <= 12
    for _ in range(count):
        await stream.receive()
    assert transport.reading


async def test_a_stream_dropped_before_its_connection_was_made_leaves_none_open() -> None:
    stream, transport = FramedStream(), _DeafTransport()
    stream.abort()
    stream.connection_made(transport)
    assert transport.aborted


async def test_a_broken_connection_wakes_reader_and_writer() -> None:
    stream, _ = new_stream()
    feed(stream, b"\x00")
    stream.pause_writing()
    receiving, sending = asyncio.create_task(stream.receive()), asyncio.create_task(stream.send(b"x"))
    await asyncio.sleep(0)
    stream.connection_lost(ConnectionResetError("reset"))
    for task in (receiving, sending):
        with pytest.raises(StreamClosed, match="reset"):
            await task


async def test_a_stream_works_over_a_socket_in_both_directions() -> None:
    loop = asyncio.get_running_loop()
    one_socket, other_socket = socket.socketpair()
    _, one = await loop.create_connection(FramedStream, sock=one_socket)
    transport, other = await loop.create_connection(FramedStream, sock=other_socket)
    one._transport.write(b"\x00")  # type: ignore[union-attr]
    transport.write(b"\x00")
    frame = os.urandom(5_000_000)
    sending = asyncio.create_task(one.send(frame[:17], memoryview(frame)[17:]))
    assert await other.receive() == frame
    await sending
    await asyncio.gather(one.close(), other.close())

"""A node's event loop: its clock moves, and streams keep their promises in it."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from peers.errors import StreamClosed
from peers.transport.framing import FramedStream
from peers.transport.loop import new_event_loop


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = new_event_loop()
    yield loop
    loop.close()


def test_the_clock_does_not_stand_still_between_two_turns(loop: asyncio.AbstractEventLoop) -> None:
    async def times() -> tuple[float, float, float]:
        before_s = loop.time()
        while time.monotonic() == before_s:
            pass
        return before_s, time.monotonic(), loop.time()

    before_s, between_s, after_s = loop.run_until_complete(times())
    assert before_s < between_s <= after_s


def test_it_is_asyncios_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    loop = new_event_loop()
    assert type(loop).__module__.startswith("asyncio")
    loop.close()


def test_frames_of_any_size_arrive_in_order_and_a_slow_reader_stops_their_sender(
    loop: asyncio.AbstractEventLoop,
) -> None:
    sizes = [0, 3, 20_000, 3_000_000, 5]

    async def exchange() -> None:
        one, other = FramedStream(), FramedStream()
        for stream, sock in zip((one, other), socket.socketpair(), strict=True):
            await loop.create_unix_connection(lambda stream=stream: stream, sock=sock)  # type: ignore[misc]
            stream._connected().write(b"\x00")  # a greeting of nothing
        await asyncio.gather(one.greeting, other.greeting)
        sending = [asyncio.ensure_future(one.send(bytes([number]) * size)) for number, size in enumerate(sizes * 3)]
        while one.ready:  # noqa: ASYNC110  # nine million bytes are more than anybody keeps
            await asyncio.sleep(0)
        received = [bytes(await other.receive()) for _ in sending]
        await asyncio.gather(*sending)
        assert received == [bytes([number]) * size for number, size in enumerate(sizes * 3)]
        assert one.ready
        one.send_now(b"last")
        assert bytes(await other.receive()) == b"last"
        await asyncio.gather(one.close(), other.close())
        with pytest.raises(StreamClosed):
            await one.send(b"more")

    loop.run_until_complete(exchange())

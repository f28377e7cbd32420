"""Frames over a byte stream: a 4-byte big-endian length, then the frame.

Owns the length prefix, the receive queue and back-pressure in both directions. Knows no libp2p: the daemon's end of
the socket belongs to `hivemind_p2p`, which reads one greeting from the daemon before the frames begin.

An `asyncio.BufferedProtocol` instead of a StreamReader, because every token of every session crosses it several times:
one copy per small frame, none for the body of a large one, and a third of the CPU time (35 against 106 µs for a round
trip of 2.5 KB on one core).
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, cast

from peers.errors import ProtocolError, StreamClosed
from peers.transport.base import MAX_FRAME_BYTES, Buffer, Rest, frame_bytes
from peers.transport.patience import Patience
from routing.errors import PeerError
from routing.ids import PeerId

_LENGTH: Final = struct.Struct(">I")
_SCRATCH_BYTES: Final = 16 * 1024
"""Frames up to this size (a token's hidden state in any model) are cut from one reused buffer."""
_JOIN_BYTES: Final = 64 * 1024
"""Smaller frames leave in one system call; above, joining the parts would cost more than a second call."""
_QUEUE_BYTES: Final = 1024 * 1024
"""Received but not yet taken: above this the socket is no longer read, and libp2p's window stops the sender."""
_FRAME_OVERHEAD_BYTES: Final = 64
"""Counted for each queued frame, so that empty frames fill the queue too."""
_CLOSE_TIMEOUT_S: Final = 2.0


class FramedStream(asyncio.BufferedProtocol):
    """A `Stream` over one socket. `greeting` resolves with the delimited message that precedes the frames.

    `remote` is unknown (empty) until the owner, having read the greeting, sets it.
    """

    def __init__(self) -> None:
        self.remote = PeerId("")
        self.greeting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._scratch = bytearray(_SCRATCH_BYTES)
        self._room = memoryview(self._scratch)
        self._filled = 0
        self._large: bytearray | None = None
        self._large_filled = 0
        self._frames: deque[bytearray] = deque()
        self._queued_bytes = 0
        self._paused = False
        self._arrived: asyncio.Future[None] | None = None
        self._handle: Callable[[bytearray], Rest | None] | None = None
        self._rest: Rest | None = None
        """Of the frame that was handled last."""
        self._writable = asyncio.Event()
        self._writable.set()
        self._lost = asyncio.Event()
        self._closing = False
        self._aborted = False
        self._end: tuple[type[PeerError], str] | None = None
        self._lost_callback: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"FramedStream({self.remote or 'unknown peer'})"

    # The stream.

    async def send(self, *parts: Buffer) -> None:
        size = frame_bytes(parts)
        # Earlier frames first: so at most one frame waits in memory, however many tasks send.
        while not self._writable.is_set():
            await self._writable.wait()
        if self._end is not None or self._closing:
            raise self._closed()
        self._write(size, parts)
        if not self._writable.is_set():
            await self._writable.wait()
            if self._end is not None or self._closing:
                raise self._closed()

    @property
    def ready(self) -> bool:
        return self._end is None and not self._closing and self._writable.is_set()

    def send_now(self, *parts: Buffer) -> None:
        assert self.ready
        self._write(frame_bytes(parts), parts)

    async def receive(self) -> bytearray:
        while not self._frames:
            await self._arrival()
        return self._take()

    async def each(self, handle: Callable[[bytearray], Rest | None]) -> None:
        self._handle = handle
        try:
            while True:
                while not self._frames and self._rest is None:
                    await self._arrival()
                rest, self._rest = self._rest, None
                if rest is None:
                    rest = handle(self._take())
                if rest is not None:
                    await rest()
        finally:
            self._handle = self._rest = None

    async def _arrival(self) -> None:
        """Wait until there is something to handle. Raises as `receive`."""
        if self._end is not None or self._closing:
            raise self._closed()
        assert self._arrived is None, "two tasks receive from one stream"
        self._arrived = asyncio.get_running_loop().create_future()
        try:
            await self._arrived
        finally:
            self._arrived = None

    def _take(self) -> bytearray:
        frame = self._frames.popleft()
        self._queued_bytes -= len(frame) + _FRAME_OVERHEAD_BYTES
        if self._paused and self._queued_bytes <= _QUEUE_BYTES // 2:
            self._paused = False
            self._connected().resume_reading()
        return frame

    async def close(self) -> None:
        """Half-close, then read to the other side's end.

        Closing outright with unread bytes would reset the stream, and libp2p drops what a reset overtakes.
        """
        if self._transport is None:
            return
        if not self._closing:
            self._closing = True
            self._writable.set()  # whoever waits for a peer that reads nothing waits no more
            self._wake_receiver()
            if self._end is None:
                if self._paused:
                    self._transport.resume_reading()
                self._transport.write_eof()
        try:
            async with Patience(_CLOSE_TIMEOUT_S):
                await self._lost.wait()
        except TimeoutError:
            pass  # the other side does not close: it loses the rest
        finally:
            self._transport.abort()

    def abort(self) -> None:
        """Drop the stream at once, be it before its connection is made; what is still buffered is lost."""
        self._aborted = True
        if self._transport is not None:
            self._transport.abort()

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call once when the connection is gone, now if it is already."""
        if self._lost.is_set():
            callback()
        else:
            self._lost_callback = callback

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._aborted:
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._large is not None:
            return memoryview(self._large)[self._large_filled :]
        return self._room[self._filled :] if self._filled else self._room

    def buffer_updated(self, nbytes: int) -> None:
        if self._large is not None:
            self._large_filled += nbytes
            if self._large_filled == len(self._large):
                frame, self._large = self._large, None
                self._queue(frame)
            return
        self._filled += nbytes
        if self._closing:
            self._filled = 0
            return
        position = 0 if self.greeting.done() else self._read_greeting()
        if self.greeting.done():
            position = self._cut_frames(position)
        if position:
            rest = self._filled - position
            self._scratch[:rest] = self._scratch[position : self._filled]
            self._filled = rest

    def eof_received(self) -> None:
        """The other side has closed; asyncio closes ours once it has written what is buffered."""

    def connection_lost(self, exc: Exception | None) -> None:
        if self._end is None:
            cut = self._large is not None or self._filled
            reason = f"broke: {exc}" if exc else "ended in the middle of a frame" if cut else "was closed"
            self._end = (StreamClosed, f"the stream with {self.remote or 'the daemon'} {reason}")
        if not self.greeting.done():
            self.greeting.set_exception(self._closed())
        self._large = None
        self._lost.set()
        self._writable.set()
        self._wake_receiver()
        if self._lost_callback is not None:
            self._lost_callback()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _write(self, size: int, parts: Sequence[Buffer]) -> None:
        """In one go: frames of concurrent senders do not mix, and cancellation cannot cut one."""
        transport = self._connected()
        if size <= _JOIN_BYTES:
            transport.write(b"".join((_LENGTH.pack(size), *parts)))
        else:
            transport.write(_LENGTH.pack(size))
            for part in parts:
                if len(part):  # an empty memoryview cannot be cast
                    transport.write(memoryview(part).cast("B"))

    # Parsing.

    def _read_greeting(self) -> int:
        """Take the message behind its varint length; returns where the frames begin, 0 while it is incomplete."""
        size = shift = 0
        for position in range(min(self._filled, 3)):
            byte = self._scratch[position]
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                end = position + 1 + size
                if end > _SCRATCH_BYTES:
                    break
                if end <= self._filled:
                    self.greeting.set_result(bytes(self._scratch[position + 1 : end]))
                    return end
                return 0
        else:
            if self._filled < 3:
                return 0
        self._fail(f"the daemon's greeting is longer than {_SCRATCH_BYTES} bytes")
        return self._filled

    def _cut_frames(self, position: int) -> int:
        while self._filled - position >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._scratch, position)
            if size > MAX_FRAME_BYTES:
                self._fail(f"{self.remote} announces a frame of {size} bytes; the limit is {MAX_FRAME_BYTES}")
                return self._filled
            start = position + _LENGTH.size
            if start + size <= self._filled:
                self._queue(self._scratch[start : start + size])
                position = start + size
            elif _LENGTH.size + size > _SCRATCH_BYTES:
                self._large = bytearray(size)
                self._large_filled = self._filled - start
                self._large[: self._large_filled] = self._scratch[start : self._filled]
                return self._filled
            else:
                break
        return position

    def _queue(self, frame: bytearray) -> None:
        if self._handle is not None and self._arrived is not None and not self._arrived.done():
            self._rest = self._handle(frame)  # who would take it from the queue waits for it
            if self._rest is not None:
                self._wake_receiver()
            return
        self._frames.append(frame)
        self._queued_bytes += len(frame) + _FRAME_OVERHEAD_BYTES
        if self._queued_bytes > _QUEUE_BYTES and not self._paused and not self._closing:
            self._paused = True
            self._connected().pause_reading()
        self._wake_receiver()

    def _fail(self, reason: str) -> None:
        self._end = (ProtocolError, reason)
        self._connected().abort()
        self._wake_receiver()

    def _wake_receiver(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def _closed(self) -> PeerError:
        kind, reason = self._end or (StreamClosed, f"the stream with {self.remote} was closed on this side")
        return kind(reason)

    def _connected(self) -> asyncio.Transport:
        assert self._transport is not None, "asyncio connects before anything else happens"
        return self._transport

"""The in-memory twin: the same promises as the real transport, inside one event loop.

Owns latency, broken connections, dead peers and partitions, all set by the test. With a virtual clock (looptime) and
the same seed, every run is the same. Knows no sockets and no libp2p; it passes the conformance suite of `base`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Final

from peers.errors import PeerSilent, PeerUnreachable, ProtocolError, StreamClosed
from peers.transport.base import MAX_FRAME_BYTES, MAX_STREAMS_PER_PEER, Buffer, Handler, Rest, frame_bytes
from peers.transport.patience import Patience
from peers.transport.record_table import RecordTable
from routing.addresses import peer_id_in, validate_multiaddr
from routing.errors import CallerError, InvalidAddress, InvalidRecord, SwarmError, Unavailable
from routing.ids import PeerId
from routing.store import StoredRecord

logger = logging.getLogger(__name__)

_WINDOW_BYTES: Final = 1024 * 1024
"""Under way or waiting to be taken, in one direction; more makes the sender wait, as libp2p's window does."""
_TICK_S: Final = 1e-6
"""A virtual clock counts microseconds: it never reaches a time that lies between two."""


class MemoryNetwork:
    """Where memory transports meet. `latency_s` is one way, `bytes_per_s` from any node to any other one; `loss` is the
    chance that a frame breaks its stream."""

    def __init__(
        self,
        *,
        latency_s: float | Callable[[PeerId, PeerId], float] = 0.0,
        loss: float = 0.0,
        bytes_per_s: float = math.inf,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` is the DHT's: seconds since the epoch, against which records expire."""
        self.latency_s = latency_s
        self.loss = loss
        self.bytes_per_s = bytes_per_s
        self._sent_s: dict[tuple[PeerId, PeerId], float] = {}
        """When the last frame from one to another has left the queue."""
        self.clock: Final = clock
        self.table: Final = RecordTable()
        """What all stores of this network share."""
        self._rng = rng or random.Random(0)
        self._transports: dict[PeerId, MemoryTransport] = {}
        self._streams: list[MemoryStream] = []
        self._cut: set[PeerId] = set()
        self._group_of: dict[PeerId, int] = {}
        self._next_host = 1

    def transport(self, peer_id: PeerId, *, client_mode: bool = False) -> MemoryTransport:
        """A node's transport; in client mode it only dials. Raises CallerError when the peer has one already."""
        if peer_id in self._transports:
            raise CallerError(f"peer {peer_id} is on this network already")
        host = self._next_host
        self._next_host += 1
        address = f"/ip4/10.{host >> 16 & 255}.{host >> 8 & 255}.{host & 255}/tcp/4001/p2p/{peer_id}"
        self._transports[peer_id] = MemoryTransport(self, peer_id, () if client_mode else (address,))
        return self._transports[peer_id]

    def store(self, peer_id: PeerId) -> MemoryStore:
        """The DHT as this peer sees it."""
        return MemoryStore(self, peer_id)

    def cut(self, peer: PeerId) -> None:
        """The peer dies: its streams break at once, as when a process is killed, and nobody can dial it."""
        self._cut.add(peer)
        for stream in [stream for stream in self._streams if peer in (stream.local, stream.remote)]:
            stream.abort("the connection broke")

    def heal(self, peer: PeerId) -> None:
        """The peer is back; broken streams stay broken."""
        self._cut.discard(peer)

    def partition(self, *groups: Collection[PeerId]) -> None:
        """Silence between the groups, with streams left open, until the next call: without groups all is well again.

        What was sent meanwhile arrives then. Peers in no group hear everybody.
        """
        self._group_of = {peer: number for number, group in enumerate(groups) for peer in group}
        for stream in self._streams:
            stream.wake()

    def latency(self, sender: PeerId, receiver: PeerId) -> float:
        return self.latency_s if isinstance(self.latency_s, int | float) else self.latency_s(sender, receiver)

    def due_s(self, sender: PeerId, receiver: PeerId, size: int) -> float:
        """When a frame that is sent now arrives."""
        sent_s = max(_now(), self._sent_s.get((sender, receiver), 0.0)) + size / self.bytes_per_s
        self._sent_s[sender, receiver] = sent_s
        return sent_s + self.latency(sender, receiver)

    def is_cut(self, *peers: PeerId) -> bool:
        return not self._cut.isdisjoint(peers)

    def separated(self, one: PeerId, other: PeerId) -> bool:
        groups = self._group_of
        return one in groups and other in groups and groups[one] != groups[other]

    def breaks(self) -> bool:
        """Whether the next frame breaks its stream."""
        return self.loss > 0 and self._rng.random() < self.loss

    def find(self, peer: PeerId) -> MemoryTransport | None:
        return self._transports.get(peer)

    def leave(self, peer: PeerId) -> None:
        self._transports.pop(peer, None)

    def streams_between(self, local: PeerId, remote: PeerId) -> list[MemoryStream]:
        return [stream for stream in self._streams if (stream.local, stream.remote) == (local, remote)]

    def streams_of(self, local: PeerId) -> list[MemoryStream]:
        return [stream for stream in self._streams if stream.local == local]

    def connect(self, opener: PeerId, acceptor: PeerId) -> tuple[MemoryStream, MemoryStream]:
        near, far = MemoryStream(self, opener, acceptor), MemoryStream(self, acceptor, opener)
        near.other, far.other = far, near
        far.incoming = True
        self._streams += [near, far]
        return near, far

    def forget(self, stream: MemoryStream) -> None:
        if stream in self._streams:
            self._streams.remove(stream)


class MemoryStream:
    """One end of a stream; `other` is the far one."""

    def __init__(self, network: MemoryNetwork, local: PeerId, remote: PeerId) -> None:
        self.local: Final = local
        self.remote: Final = remote
        self.other: MemoryStream = self
        self.incoming = False
        self._network = network
        # (when it arrives, the frame), None for the end of the stream
        self._arriving: deque[tuple[float, bytes | None]] = deque()
        self._arriving_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._waiting: asyncio.Future[None] | None = None
        self._end: str | None = None

    def __repr__(self) -> str:
        return f"MemoryStream({self.local} with {self.remote})"

    async def send(self, *parts: Buffer) -> None:
        frame_bytes(parts)
        frame = b"".join(parts)
        while not self.other._room.is_set() and self._end is None:
            await self.other._room.wait()
        if self._end is None and self._network.breaks():
            self.abort("the connection broke")
        if self._end is not None:
            raise self._closed()
        if self._closed_there():
            raise StreamClosed(f"the stream with {self.remote} is over: the other side closed it")
        self.other.arrive(frame)

    @property
    def ready(self) -> bool:
        return self._end is None and not self._closed_there() and self.other._room.is_set()

    def send_now(self, *parts: Buffer) -> None:
        assert self.ready
        frame_bytes(parts)
        if self._network.breaks():
            self.abort("the connection broke")  # and the frame is lost
        self.other.arrive(b"".join(parts))

    def _closed_there(self) -> bool:
        return bool(self._arriving) and self._arriving[-1][1] is None and self._arriving[-1][0] <= _now()

    async def each(self, handle: Callable[[bytes | bytearray], Rest | None]) -> None:
        while True:
            if (rest := handle(await self.receive())) is not None:
                await rest()

    async def receive(self) -> bytearray:
        while True:
            delay_s: float | None = None
            if self._arriving and not self._network.separated(self.local, self.remote):
                due_s, frame = self._arriving[0]
                delay_s = due_s - _now()
                if delay_s < _TICK_S:
                    self._arriving.popleft()
                    return self._take(frame)
            if self._end is not None:
                raise self._closed()
            await self._wait(delay_s)

    async def close(self) -> None:
        if self._end is None:
            self._end = "closed on this side"
            self._network.forget(self)
            self.other.arrive(None)
            self.wake()
            self._room.set()

    def abort(self, reason: str) -> None:
        """Break both ends; what has not arrived is lost."""
        for stream in (self, self.other):
            stream._end = stream._end or reason
            while stream._arriving and stream._arriving[-1][0] > _now():
                stream._arriving.pop()
            self._network.forget(stream)
            stream.wake()
            stream._room.set()

    def arrive(self, frame: bytes | None) -> None:
        """Put a frame, or the end, on its way to this end."""
        if self._end is not None:
            return
        due_s = self._network.due_s(self.remote, self.local, len(frame or b""))
        if self._arriving:
            due_s = max(due_s, self._arriving[-1][0])  # a shorter latency overtakes nobody
        self._arriving.append((due_s, frame))
        self._arriving_bytes += len(frame or b"")
        if self._arriving_bytes > _WINDOW_BYTES:
            self._room.clear()
        self.wake()

    def wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _take(self, frame: bytes | None) -> bytearray:
        if frame is None:
            self.abort("the other side closed it")
            raise self._closed()
        self._arriving_bytes -= len(frame)
        if self._arriving_bytes <= _WINDOW_BYTES:
            self._room.set()
        if len(frame) > MAX_FRAME_BYTES:
            self.abort("a frame was too long")
            raise ProtocolError(f"{self.remote} sent a frame of {len(frame)} bytes; the limit is {MAX_FRAME_BYTES}")
        return bytearray(frame)

    def _closed(self) -> StreamClosed:
        return StreamClosed(f"the stream with {self.remote} is over: {self._end}")

    async def _wait(self, delay_s: float | None) -> None:
        assert self._waiting is None, "two tasks receive from one stream"
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        timer = None if delay_s is None else loop.call_later(delay_s, self.wake)
        try:
            await self._waiting
        finally:
            self._waiting = None
            if timer is not None:
                timer.cancel()


class MemoryTransport:
    """See `peers.transport.base.Transport`."""

    def __init__(self, network: MemoryNetwork, peer_id: PeerId, addresses: tuple[str, ...]) -> None:
        self._network = network
        self._peer_id = peer_id
        self._addresses = addresses
        self._handlers: dict[str, Handler] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    async def open_stream(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, timeout_s: float
    ) -> MemoryStream:
        for address in addresses:
            if peer_id_in(validate_multiaddr(address, need_peer_id=True)) != peer:
                raise InvalidAddress(f"{address} is not an address of peer {peer}")
        try:
            async with Patience(timeout_s):
                await asyncio.sleep(2 * self._network.latency(self._peer_id, peer))
                while self._network.separated(self._peer_id, peer):
                    await asyncio.Event().wait()  # no answer comes, until the timeout
        except TimeoutError as error:
            raise PeerSilent(f"peer {peer} did not answer in time") from error
        remote = self._network.find(peer)
        if remote is None or self._network.is_cut(peer, self._peer_id):
            raise PeerUnreachable(f"cannot reach peer {peer}: connection refused")
        if not remote.addresses or (addresses and set(addresses).isdisjoint(remote.addresses)):
            raise PeerUnreachable(f"cannot reach peer {peer}: nothing listens there")
        if protocol not in remote._handlers:
            raise PeerUnreachable(f"peer {peer} does not serve protocol {protocol}")
        near, far = self._network.connect(self._peer_id, peer)
        remote._accept(protocol, far)
        return near

    async def serve(self, protocol: str, handler: Handler) -> None:
        if protocol in self._handlers:
            raise CallerError(f"protocol {protocol} is served already")
        self._handlers[protocol] = handler

    async def observed_addresses(self, peer: PeerId) -> tuple[str, ...]:
        remote = self._network.find(peer)
        connected = self._network.streams_between(self._peer_id, peer)
        return tuple(a.partition("/p2p/")[0] for a in remote.addresses) if remote is not None and connected else ()

    async def close(self) -> None:
        self._network.leave(self._peer_id)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for stream in self._network.streams_of(self._peer_id):
            stream.abort("the node left")

    def _accept(self, protocol: str, stream: MemoryStream) -> None:
        mine = [one for one in self._network.streams_between(self._peer_id, stream.remote) if one.incoming]
        if len(mine) > MAX_STREAMS_PER_PEER:
            stream.abort("too many streams")
            return
        task = asyncio.create_task(self._run_handler(protocol, stream), name="incoming stream")
        self._tasks.add(task)
        task.add_done_callback(self._handler_ended)

    async def _run_handler(self, protocol: str, stream: MemoryStream) -> None:
        try:
            await self._handlers[protocol](stream)
        finally:
            await stream.close()

    def _handler_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, SwarmError):
            logger.debug("incoming stream ended: %s", error)
        elif error is not None:
            logger.error("the handler of an incoming stream failed", exc_info=error)


class MemoryStore:
    """`RecordStore` over the network's one table, under the same admission rule as a libp2p node."""

    def __init__(self, network: MemoryNetwork, peer_id: PeerId) -> None:
        self._network = network
        self._peer_id = peer_id

    async def put(self, record: StoredRecord) -> None:
        await self._round_trip()
        if self._network.is_cut(self._peer_id):
            raise Unavailable("no node can be reached")
        try:
            self._network.table.put(record, sender=self._peer_id, now_s=self._network.clock())
        except InvalidRecord as error:
            raise Unavailable(f"no node accepted the record under {record.key}: {error}", hint=error.hint) from error

    async def get(self, keys: Sequence[str]) -> list[StoredRecord]:
        await self._round_trip()
        if self._network.is_cut(self._peer_id):
            return []
        now_s = self._network.clock()
        return [record for key in dict.fromkeys(keys) for record in self._network.table.get(key, now_s=now_s)]

    async def _round_trip(self) -> None:
        await asyncio.sleep(2 * self._network.latency(self._peer_id, self._peer_id))


def _now() -> float:
    return asyncio.get_running_loop().time()

"""`Transport` over the daemon's binary streams.

Owns the incoming handlers, the streams that are open, and the node's own addresses. Knows no frames (`framing`) and no
DHT. The remote id of a stream comes from libp2p's handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Final
from weakref import WeakValueDictionary

from hivemind.p2p import PeerID
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from peers.errors import PeerSilent, PeerUnreachable, Refused, StreamClosed
from peers.transport.base import MAX_STREAMS_PER_PEER, Handler
from peers.transport.framing import FramedStream
from peers.transport.hivemind_p2p.daemon import Daemon, address_text, peer_id_from, translated
from peers.transport.hivemind_p2p.detour import detours, look_for
from peers.transport.patience import Patience
from routing.addresses import peer_id_in, validate_multiaddr
from routing.errors import CallerError, InvalidAddress, SwarmError
from routing.ids import PeerId
from routing.records import MAX_ADDRESSES

logger = logging.getLogger(__name__)

_GREETING_TIMEOUT_S: Final = 10.0
_HEAD_START_S: Final = 1.0
"""Of libp2p, before anybody else looks whether a peer is there."""
_MAX_GONE: Final = 1024


class HivemindTransport:
    """See `peers.transport.base.Transport`. Nodes of another network do not answer under our protocol names."""

    def __init__(self, daemon: Daemon, peer_id: PeerId, network: str) -> None:
        self._daemon = daemon
        self._peer_id = peer_id
        self._network = network
        self._addresses: tuple[str, ...] = ()
        self._handlers: dict[str, Handler] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._incoming: dict[PeerId, set[FramedStream]] = {}
        self._outgoing: dict[PeerId, set[FramedStream]] = {}
        self._gone: dict[PeerId, None] = {}
        """Peers whose streams ended, or that were not reached, since they were reached last. They may have died."""
        self._dialling: WeakValueDictionary[PeerId, asyncio.Lock] = WeakValueDictionary()
        self._closed = False

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """As many as an announcement may carry, those first that serve the most."""
        return self._addresses

    async def listen(self) -> None:
        """Wait for the daemon's connections, one for each incoming stream. Once, before `serve`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._accept, path=str(self._daemon.streams_path))
        await self.refresh_addresses()

    async def refresh_addresses(self) -> None:
        """Ask the daemon where it can be reached now: networks change under a running node."""
        response = await self._daemon.ask(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        texts = [text for raw in response.identify.addrs if (text := address_text(raw)) is not None]
        texts.sort(key=_remoteness)
        self._addresses = tuple(f"{text}/p2p/{self._peer_id}" for text in texts[:MAX_ADDRESSES])

    async def open_stream(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, timeout_s: float
    ) -> FramedStream:
        for address in addresses:
            if peer_id_in(validate_multiaddr(address, need_peer_id=True)) != peer:
                raise InvalidAddress(f"{address} is not an address of peer {peer}")
        async with self._reaching(peer, timeout_s):
            if addresses:
                await self._connect(peer, addresses, timeout_s)
            stream = await self._daemon.open_stream(peer, self._protocol_id(protocol), timeout_s=timeout_s)
        self._keep(self._outgoing, stream)
        return stream

    async def connect(self, peer: PeerId, addresses: Sequence[str], *, timeout_s: float) -> None:
        """Dial, unless there is a connection; without addresses, where the daemon knows some. Raises PeerUnreachable.

        A peer that was away is reached as soon as it is back, however often it was dialled in vain.
        """
        async with self._reaching(peer, timeout_s):
            await self._connect(peer, addresses, timeout_s)

    @contextlib.asynccontextmanager
    async def _reaching(self, peer: PeerId, timeout_s: float) -> AsyncIterator[None]:
        try:
            with translated(peer):
                async with Patience(timeout_s):
                    yield
        except PeerUnreachable:
            self._note_gone(peer)
            raise

    async def _connect(self, peer: PeerId, addresses: Sequence[str], timeout_s: float) -> None:
        async with self._dialling.setdefault(peer, asyncio.Lock()):  # a detour ends for all who came by it
            if peer not in self._gone:
                try:
                    await self._dial(peer, addresses, timeout_s)
                    return
                except PeerSilent:
                    raise
                except PeerUnreachable:
                    pass  # refused just now, or put off for something that failed earlier
            await self._connect_again(peer, addresses, timeout_s)
            self._gone.pop(peer, None)

    async def _dial(self, peer: PeerId, addresses: Sequence[str], timeout_s: float) -> None:
        """Given up as soon as nothing answers plain TCP either: libp2p waits 5 s for that, and 15 s on the internet."""
        dialling = asyncio.create_task(self._daemon.connect(peer, addresses, timeout_s=timeout_s))
        tasks = [dialling]
        try:
            await asyncio.wait(tasks, timeout=_HEAD_START_S)
            if not dialling.done():
                tasks.append(asyncio.create_task(look_for(peer, addresses)))
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not dialling.done():
                await tasks[1]
            await dialling
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _connect_again(self, peer: PeerId, addresses: Sequence[str], timeout_s: float) -> None:
        for last in (False, True):
            async with detours(peer, addresses) as found:
                await self._daemon.connect(peer, [*found.alive, *found.offered], timeout_s=timeout_s)
            offered = {address.removesuffix(f"/p2p/{peer}") for address in found.offered}
            while not offered.isdisjoint(await self.observed_addresses(peer)):
                pass  # until the daemon has seen its end
            try:
                await self._daemon.connect(peer, found.alive, timeout_s=timeout_s)
                return
            except PeerUnreachable:
                if last:
                    raise  # else the peer, which was there just now, dialled too: its libp2p puts that off from now on

    def _note_gone(self, peer: PeerId) -> None:
        if peer not in self._gone and len(self._gone) >= _MAX_GONE:
            del self._gone[next(iter(self._gone))]
        self._gone[peer] = None

    async def serve(self, protocol: str, handler: Handler) -> None:
        protocol_id = self._protocol_id(protocol)
        if protocol_id in self._handlers:
            raise CallerError(f"protocol {protocol} is served already")
        self._handlers[protocol_id] = handler
        request = p2pd_pb2.StreamHandlerRequest(
            addr=Multiaddr(f"/unix{self._daemon.streams_path}").to_bytes(), proto=[protocol_id], balanced=False
        )
        await self._daemon.ask(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER, streamHandler=request))

    async def observed_addresses(self, peer: PeerId) -> tuple[str, ...]:
        response = await self._daemon.ask(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        wanted = PeerID.from_base58(peer).to_bytes()
        texts = [address_text(raw) for info in response.peers if info.id == wanted for raw in info.addrs]
        return tuple(text for text in dict.fromkeys(texts) if text is not None)

    def has_streams(self, peer: PeerId) -> bool:
        return peer in self._incoming or peer in self._outgoing

    async def close(self) -> None:
        """End every stream, also those that come from now on."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for stream in [stream for streams in self._outgoing.values() for stream in streams]:
            stream.abort()

    def stop_listening(self) -> None:
        """After the daemon's end: asyncio loses a connection that it has just accepted when its server closes."""
        if self._server is not None:
            self._server.close()

    def _protocol_id(self, protocol: str) -> str:
        return f"/hive/{self._network}/{protocol}"

    def _accept(self) -> FramedStream:
        stream = FramedStream()
        if self._closed:
            stream.abort()
            return stream
        task = asyncio.create_task(self._run_handler(stream), name="incoming stream")
        self._tasks.add(task)
        task.add_done_callback(self._handler_ended)
        task.add_done_callback(lambda _: stream.abort())  # also where it was cancelled before it began
        return stream

    async def _run_handler(self, stream: FramedStream) -> None:
        async with Patience(_GREETING_TIMEOUT_S):
            info = p2pd_pb2.StreamInfo.FromString(await stream.greeting)
        stream.remote = peer_id_from(info.peer)
        if len(self._incoming.get(stream.remote, ())) >= MAX_STREAMS_PER_PEER:
            raise Refused(f"peer {stream.remote} has {MAX_STREAMS_PER_PEER} streams open already", code="streams")
        self._keep(self._incoming, stream)
        await self._handlers[info.proto](stream)
        await stream.close()

    def _handler_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, StreamClosed):
            logger.debug("incoming stream: %s", error)
        elif isinstance(error, SwarmError):
            logger.info("incoming stream ended: %s", error)
        elif error is not None:
            logger.error("the handler of an incoming stream failed", exc_info=error)

    def _keep(self, open_streams: dict[PeerId, set[FramedStream]], stream: FramedStream) -> None:
        open_streams.setdefault(stream.remote, set()).add(stream)

        def forget() -> None:
            streams = open_streams[stream.remote]
            streams.remove(stream)
            if not streams:
                del open_streams[stream.remote]
                self._note_gone(stream.remote)

        stream.on_lost(forget)


def _remoteness(address: str) -> int:
    """Whom an address serves, the most first: everybody, this network, this machine (for others it is their own)."""
    _, family, host, *_ = address.split("/")
    if family not in ("ip4", "ip6"):
        return 0
    ip = ipaddress.ip_address(host)
    return 3 if ip.is_link_local else 2 if ip.is_loopback else 0 if ip.is_global else 1

"""Links: typed messages between two nodes, multiplexed over two streams ("lanes") per pair.

Owns the handshake (protocol version, network, clock), the lanes and their end. Knows messages, but not what they mean
to a session: the owner receives them through one callback, and names the links that its sessions need. Small frames
never wait behind bulk ones; within a lane order is kept. Only the side that dialled opens lanes; the other answers on
them, which works from behind a NAT. So it is also the side that dialled which closes a link that nobody needs; the
other one does so only when it is full.

A node may be held to a number of bytes per second, each way, because one way takes nothing from the other. Payloads
wait before they are sent; what comes in is read later, so that back-pressure holds the sender. Messages without a
payload never wait to be sent: they are small, and a ping that does is taken for a death.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from msgspec.structs import replace

from peers.errors import PeerSilent, PeerUnreachable, ProtocolError, StreamClosed, VersionMismatch
from peers.transport.base import Rest, Stream, Transport, frame_bytes
from peers.transport.pacer import Pacer
from peers.transport.patience import Patience
from peers.transport.tasks import Tasks
from peers.wire import codec
from peers.wire.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    DialBack,
    DialBackReply,
    Hello,
    Message,
    Ping,
    Pong,
    Status,
    Trace,
    Traced,
)
from routing.errors import InvalidAddress, PeerError
from routing.ids import PeerId

logger = logging.getLogger(__name__)

STREAM_PROTOCOL = "/hiveswarm/link"
BULK_BYTES = 64 * 1024
"""Payloads from this size on travel in the bulk lane."""
TIMED_BYTES = 128 * 1024
"""Payloads from this size on are timed, where somebody wants to know how fast the way is."""
TIMED_TIMEOUT_S = 60.0
QUIET_S = 2.0
"""What was sent longer ago than this has left the buffers on the way, and does not count for what is sent now."""
JOINED_BYTES = 1 << 20
"""Messages share a frame up to this size; a larger one has a frame of its own."""
HELLO_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 30.0
"""A peer that reads nothing for this long is given up; until then back-pressure holds the sender."""
MAX_SKEW_S = 3.0
ANSWER_FADES = 0.75
"""Of the longest answer, with each that is shorter."""
SKEW_PEERS_MIN, SKEW_PEERS_MAX, SKEW_AGE_S = 2, 64, 600.0
"""Clocks by which this node's own is judged."""
STEADY_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""It goes on while the machine sleeps (on Darwin, the monotonic one does), and nobody sets it."""
MAX_INBOUND_LINKS_PER_PEER = 8
MAX_INBOUND_LINKS = 512
MAX_OUTBOUND_LINKS = 512
IDLE_S = 60.0
"""A dialled link over which nothing but pings went for this long is closed, unless it is needed."""
FRESH_S = 10.0
"""A link used within this time does not make room for another peer's: its first message may be on the way."""

SMALL, BULK = "small", "bulk"

AMessage = TypeVar("AMessage", bound=Message)
Receiver = Callable[["Link", AMessage, memoryview], Awaitable[None]]


class Link:
    """One side's view of a pair of nodes. Created by `Links`; closed when any lane ends."""

    def __init__(self, owner: Links, remote: PeerId, *, outbound: bool, addresses: Sequence[str] = ()) -> None:
        self.remote = remote
        self.outbound = outbound
        self.closed = False
        self.wanted = False
        """Whether anybody but a ping asked for it."""
        self.pings = 0
        """Under way."""
        self.used_at_s = asyncio.get_running_loop().time()
        """When it last carried anything but a ping, or was asked for."""
        self.heard_at_s = self.used_at_s
        """When its other side gave its last sign of life."""
        self.answer_s = 0.0
        """What the other side lately took for an answer, at most: a short while, or the machines are busy."""
        self._owner = owner
        self._addresses = tuple(addresses)
        self._lanes: dict[str, Lane] = {}
        self._bulk_at_s = -math.inf
        """When the last bulk payload was sent."""
        self._timing = False
        self._opening = asyncio.Lock()
        self._behind = 0
        """Tasks that wait for a bulk lane, and that none may overtake when it is there."""

    def __repr__(self) -> str:
        return f"<Link {'to' if self.outbound else 'from'} {self.remote[-8:]}>"

    async def send(self, message: AnyMessage, payload: codec.Buffer = b"", *, bulk: bool = False) -> None:
        """One message, in order within its lane. Waits for back-pressure up to SEND_TIMEOUT_S. Raises StreamClosed.

        Where this node's bandwidth is bounded, a payload waits for its turn before that, and may be overtaken by
        messages without one. Messages that several tasks send in one turn of the event loop share a frame, which leaves
        at its end: `payload` must not change any more.
        """
        if self.closed:
            raise _closed(self)
        if not isinstance(message, Ping | Pong):
            self.used_at_s = asyncio.get_running_loop().time()
        if self._owner.upload is not None and len(payload):
            await self._owner.upload.admit(_size(payload), bulk=bulk)
        lane = self._lanes.get(BULK if bulk else SMALL)
        if lane is not None and lane.ready and not bulk:  # a token on its way waits for nothing
            lane.post(message, payload)
            return
        try:
            if lane is None or (bulk and self._behind):
                lane = await self._missing_lane()
            began_s, before = asyncio.get_running_loop().time(), lane.queued_bytes
            timed = bulk and self._worth_timing(_size(payload), began_s)
            async with Patience(SEND_TIMEOUT_S):
                await lane.send(message, payload)
            if timed:
                self._owner.tasks.spawn(self._time(lane, before, began_s), name=f"time {self.remote[-8:]}")
        except TimeoutError as error:
            await self.close()
            raise StreamClosed(f"{self.remote} read nothing for {SEND_TIMEOUT_S:.0f} s") from error
        except PeerError:
            await self.close()
            raise

    def send_now(self, message: AnyMessage, payload: codec.Buffer = b"", *, alone: bool = True) -> bool:
        """As `send` in the small lane, if nothing has to be waited for; else, or where the link is closed, False, and
        nothing was sent. If not `alone`, at the end of this turn of the event loop, with what others send by then."""
        lane = self._lanes.get(SMALL)
        if self.closed or lane is None or not lane.ready or self._owner.upload is not None:
            return False
        if alone:
            lane.send_now(message, payload)
        else:
            lane.post(message, payload)
        self.used_at_s = asyncio.get_running_loop().time()
        return True

    def _worth_timing(self, size: int, now_s: float) -> bool:
        quiet, self._bulk_at_s = now_s - self._bulk_at_s >= QUIET_S, now_s
        wanted = self._owner.on_transfer is not None and self.outbound and not self._timing
        return wanted and quiet and size >= TIMED_BYTES

    async def _time(self, lane: Lane, before: int, began_s: float) -> None:
        """Ask behind what has been sent since, in its lane, when it has been read."""
        if self._timing or self.closed:
            return
        self._timing = True
        size = lane.queued_bytes - before
        try:
            await self._owner.request(self, lambda nonce: Ping(nonce=nonce), timeout_s=TIMED_TIMEOUT_S, bulk=True)
        except PeerError as error:
            logger.debug("%r was not timed: %s", self, error)
        else:
            assert self._owner.on_transfer is not None
            self._owner.on_transfer(self.remote, size, asyncio.get_running_loop().time() - began_s)
        finally:
            self._timing = False

    async def _missing_lane(self) -> Lane:
        if not self.outbound:
            return next(iter(self._lanes.values()))  # the other side opens lanes, or does without
        self._behind += 1
        try:
            async with self._opening:
                if BULK not in self._lanes:
                    await self._owner.open_lane(self, BULK)
                return self._lanes[BULK]
        finally:
            self._behind -= 1

    async def close(self) -> None:
        """End both lanes and tell the owner. Idempotent."""
        if not self.closed:
            self.closed = True
            self._owner.forget(self)
            await asyncio.gather(*(lane.close() for lane in self._lanes.values()))

    def retire(self) -> None:
        """As `close`, in the background: nobody gets this link any more."""
        if not self.closed:
            self.closed = True
            self._owner.forget(self)
            for lane in self._lanes.values():
                self._owner.tasks.spawn(lane.close(), name=f"close {self.remote[-8:]}")

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    def adopt(self, lane: str, stream: Stream) -> None:
        self._lanes[lane] = Lane(stream, self._owner.tasks, self._owner.volume)

    def has(self, lane: str) -> bool:
        return lane in self._lanes


@dataclass(slots=True)
class Volume:
    """Bytes of frames that all links of a node carried."""

    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Frame:
    """Messages that will leave together."""

    parts: list[codec.Buffer] = field(default_factory=list)
    size: int = 0
    sent: asyncio.Future[None] | None = None
    """For those who wait for it."""

    def settle(self, error: PeerError | None = None) -> None:
        if self.sent is None:
            return
        if error is None:
            self.sent.set_result(None)
        else:
            self.sent.set_exception(error)
            self.sent.exception()  # marked as seen: every sender may have been cancelled


class Lane:
    """One stream of a link, and the frame that leaves next."""

    def __init__(self, stream: Stream, tasks: Tasks, volume: Volume) -> None:
        self.stream = stream
        self._tasks = tasks
        self._volume = volume
        self.queued_bytes = 0
        """Handed over so far."""
        self._next: _Frame | None = None
        self._waiting: deque[_Frame] = deque()
        """Frames for which the stream had no room yet, while a task sends them."""

    @property
    def ready(self) -> bool:
        """Whether what is sent now need not wait."""
        return not self._waiting and self.stream.ready

    async def send(self, message: AnyMessage, payload: codec.Buffer) -> None:
        """Returns when the frame with this message was sent; raises what the stream raises."""
        frame = self.post(message, payload)
        if frame.sent is None:
            frame.sent = asyncio.get_running_loop().create_future()
        await asyncio.shield(frame.sent)

    def post(self, message: AnyMessage, payload: codec.Buffer) -> _Frame:
        """The frame in which the message will leave. Raises CallerError above MAX_FRAME_BYTES."""
        head = codec.encode(message, _size(payload))
        size = frame_bytes((head, payload))
        if self._next is not None and self._next.size + size > JOINED_BYTES:
            self._flush(self._next)
        frame = self._next
        if frame is None:
            frame = self._next = _Frame()
            asyncio.get_running_loop().call_soon(self._flush, frame)  # after all who have something to send now
        self.queued_bytes += size
        frame.parts += (head, payload)
        frame.size += size
        return frame

    def send_now(self, message: AnyMessage, payload: codec.Buffer) -> None:
        """While it is `ready`: at once, or with what leaves at the end of this turn. Raises CallerError as `post`."""
        if self._next is not None:
            self.post(message, payload)
            return
        size = _size(payload)
        head = codec.encode(message, size)
        self.stream.send_now(head, payload)
        size += len(head)
        self.queued_bytes += size
        self._volume.sent_bytes += size

    async def close(self) -> None:
        """As of the stream."""
        if self._next is not None:
            self._flush(self._next)
        await self.stream.close()

    def _flush(self, frame: _Frame) -> None:
        if frame is not self._next:
            return  # it has left
        self._next = None
        if self.ready:
            self.stream.send_now(*frame.parts)
            self._sent(frame)
            return
        self._waiting.append(frame)
        if len(self._waiting) == 1:
            self._tasks.spawn(self._send_waiting(), name="send").add_done_callback(self._ended)

    async def _send_waiting(self) -> None:
        while self._waiting:
            frame = self._waiting[0]
            try:
                await self.stream.send(*frame.parts)
            except PeerError as error:
                frame.settle(error)
            else:
                self._sent(frame)
            self._waiting.popleft()

    def _sent(self, frame: _Frame) -> None:
        self._volume.sent_bytes += frame.size
        frame.settle()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Who was to send what waits may have been cancelled, perhaps before it began."""
        if task.cancelled():
            while self._waiting:
                self._waiting.popleft().settle(StreamClosed("this node is closing"))


class Links:
    """All links of one node, both those it dialled and those it accepted."""

    def __init__(
        self,
        transport: Transport,
        *,
        network: str,
        software: str,
        max_bytes_per_s: int | None = None,
    ) -> None:
        """`network` and `software` go into every hello; a node of another network is refused. `max_bytes_per_s` bounds
        what all links together carry, each way."""
        self.upload = None if max_bytes_per_s is None else Pacer(max_bytes_per_s)
        self.download = None if max_bytes_per_s is None else Pacer(max_bytes_per_s)
        self.transport = transport
        self.volume = Volume()
        self._network = network
        self._software = software
        self.pong: Callable[[int], Pong] = lambda nonce: Pong(nonce=nonce)
        """Fills the answer to a ping; a peer replaces it to tell its load."""
        self.status: Callable[[], Status | None] = lambda: None
        """What a ping may ask for besides."""
        self.on_transfer: Callable[[PeerId, int, float], None] | None = None
        """Is told of large sends over links that this node dialled: to whom, how many bytes, and after how many seconds
        it was known here that the other side had read them."""
        self._receivers: dict[type[Message], Receiver[Any]] = {}
        self._at_once: dict[type[Message], Callable[[Link, Any, memoryview], Rest | None]] = {}
        self._lost: list[Callable[[Link], None]] = []
        self._needed: list[Callable[[], Iterable[Link]]] = []
        self._instance = secrets.token_bytes(16)
        self._outbound: dict[PeerId, Link] = {}
        self._dialling: WeakValueDictionary[PeerId, asyncio.Lock] = WeakValueDictionary()
        self._inbound: dict[tuple[PeerId, bytes], Link] = {}
        self._requests: dict[int, tuple[Link, asyncio.Future[AnyMessage]]] = {}
        self._nonces = itertools.count(1)
        self.tasks = Tasks()
        self._closing_idle: asyncio.Task[None] | None = None
        self._skew_named: set[PeerId] = set()
        self._clocks: OrderedDict[PeerId, tuple[float, float]] = OrderedDict()
        """Of those that said hello, how far their clocks are ahead of the steady one, and when it said so."""
        """Of the peers that said hello last: their clock minus ours, and when they did."""
        self._closed = False

    def handle(self, kind: type[AMessage], receiver: Receiver[AMessage]) -> None:
        """Give messages of `kind` to `receiver`, which slows that lane's sender for as long as it takes."""
        self._receivers[kind] = receiver

    def handle_at_once(
        self, kind: type[AMessage], receiver: Callable[[Link, AMessage, memoryview], Rest | None]
    ) -> None:
        """As `handle`, for a receiver that hardly ever has to wait, and returns what is left to be done when it has:
        it is called where the message arrives."""
        self._at_once[kind] = receiver

    def on_lost(self, callback: Callable[[Link], None]) -> None:
        """Call `callback` once for each link that ends, whoever ended it."""
        self._lost.append(callback)

    def keep(self, needed: Callable[[], Iterable[Link]]) -> None:
        """Never close the links that `needed` names for being idle, nor to make room for those of other peers."""
        self._needed.append(needed)

    async def serve(self) -> None:
        """Accept links from now on."""
        await self.transport.serve(STREAM_PROTOCOL, self._accept)

    async def to(self, peer: PeerId, addresses: Sequence[str] = (), *, timeout_s: float = 10.0) -> Link:
        """The link that this node dialled to `peer`, made now if there is none.

        Raises PeerUnreachable, VersionMismatch, ProtocolError, or Unavailable when this node cannot dial at all.
        """
        link = None if peer in self._dialling else self._outbound.get(peer)  # nobody overtakes who waited for it
        link = link or await self._dial(peer, addresses, timeout_s)
        link.wanted = True
        link.used_at_s = asyncio.get_running_loop().time()
        return link

    async def _dial(self, peer: PeerId, addresses: Sequence[str], timeout_s: float) -> Link:
        if self._closed:
            raise PeerUnreachable(f"{peer} is not dialled: this node is closing")
        lock = self._dialling.setdefault(peer, asyncio.Lock())
        try:
            async with Patience(timeout_s), lock:
                if (link := self._outbound.get(peer)) is not None:
                    return link
                link = Link(self, peer, outbound=True, addresses=addresses)
                await self.open_lane(link, SMALL, timeout_s=timeout_s)
                if len(self._outbound) >= MAX_OUTBOUND_LINKS:
                    needed = self._needed_links()
                    min(self._outbound.values(), key=lambda link: (link in needed, link.used_at_s)).retire()
                self._outbound[peer] = link
                if self._closing_idle is None or self._closing_idle.done():
                    self._closing_idle = self.tasks.spawn(self._close_idle(), name="close idle links")
                return link
        except TimeoutError as error:
            raise PeerSilent(f"{peer} did not answer within {timeout_s:.0f} s") from error
        except StreamClosed as error:
            raise PeerUnreachable(f"{peer} closed the connection before saying hello") from error

    def known(self, peer: PeerId) -> Link | None:
        """The link dialled to `peer`, if it is up."""
        return self._outbound.get(peer)

    def vouch(self, peer: PeerId) -> None:
        """Others brought a sign of life of `peer`, which works for us without a word to us."""
        if (link := self._outbound.get(peer)) is not None:
            link.heard_at_s = asyncio.get_running_loop().time()

    async def arrived(self, peer: PeerId, *, timeout_s: float) -> bool:
        """Whether everything large that was sent over the link that this node dialled to `peer` has been read there.

        A ping behind it, in the same lane, tells. True where there is no such link, False where it ends meanwhile.
        """
        link = self._outbound.get(peer)
        if link is None or not link.has(BULK):
            return True
        try:
            await self.request(link, lambda nonce: Ping(nonce=nonce), timeout_s=timeout_s, bulk=True)
        except PeerError:
            return False
        return True

    async def ping(
        self,
        peer: PeerId,
        addresses: Sequence[str] = (),
        *,
        timeout_s: float = 5.0,
        detail: bool = False,
        renews: bool = True,
    ) -> tuple[float, Pong]:
        """Round-trip seconds through both event loops, and the peer's present load. Raises as `to` does; `renews` as in
        `request`.

        With `detail` the peer is asked for its status, too. A link that was made only for this is closed again: peers
        have room for so many, and most of a swarm is pinged.
        """
        link = self._outbound.get(peer) or await self._dial(peer, addresses, timeout_s)
        link.pings += 1
        try:
            started_s = asyncio.get_running_loop().time()
            reply = await self.request(
                link, lambda nonce: Ping(nonce=nonce, detail=detail), timeout_s=timeout_s, renews=renews
            )
            if not isinstance(reply, Pong):
                raise ProtocolError(f"{peer} answered a ping with {type(reply).__name__}")
            return asyncio.get_running_loop().time() - started_s, reply
        finally:
            link.pings -= 1
            if not (link.wanted or link.pings):
                link.retire()

    async def request(
        self,
        link: Link,
        build: Callable[[int], Ping | Trace | DialBack],
        *,
        timeout_s: float,
        bulk: bool = False,
        renews: bool = True,
    ) -> Pong | Traced | DialBackReply:
        """Send a message with a fresh nonce and wait for its reply. Raises PeerSilent, StreamClosed.

        In the small lane, where an answer waits for nothing, a peer is silent that says nothing else either: whatever
        it says renews the time that it has, unless `renews` is false.
        """
        nonce, loop = next(self._nonces), asyncio.get_running_loop()
        future: asyncio.Future[AnyMessage] = loop.create_future()
        self._requests[nonce] = (link, future)
        try:
            async with Patience(timeout_s, (lambda: link.heard_at_s) if renews and not bulk else None):
                asked_at_s = loop.time()
                await link.send(build(nonce), bulk=bulk)
                reply = await future
                if not bulk:
                    link.answer_s = max(loop.time() - asked_at_s, link.answer_s * ANSWER_FADES)
        except TimeoutError as error:
            raise PeerSilent(f"{link.remote} did not answer within {timeout_s:.1f} s") from error
        finally:
            del self._requests[nonce]
        assert isinstance(reply, Pong | Traced | DialBackReply)
        return reply

    async def close(self) -> None:
        """End every link, and neither dial nor accept another."""
        self._closed = True
        await asyncio.gather(*(link.close() for link in (*self._outbound.values(), *self._inbound.values())))
        await self.tasks.close()

    # --- room ---

    def _needed_links(self) -> set[Link]:
        return {link for needed in self._needed for link in needed()}

    async def _close_idle(self) -> None:
        """Until no dialled link is left."""
        while self._outbound:
            await asyncio.sleep(IDLE_S / 4)
            for link in self._unneeded(self._outbound.values(), for_s=IDLE_S):
                logger.debug("closing %r: it is idle", link)
                link.retire()

    def _unneeded(self, links: Iterable[Link], *, for_s: float) -> list[Link]:
        """Those of `links` that nobody has used for so long, or waits for, or needs."""
        before_s = asyncio.get_running_loop().time() - for_s
        unused = [link for link in links if link.used_at_s <= before_s and not link.pings]
        needed = self._needed_links() if unused else set()
        return [link for link in unused if link not in needed]

    # --- lanes ---

    async def open_lane(self, link: Link, lane: str, *, timeout_s: float = HELLO_TIMEOUT_S) -> None:
        """Dial one more stream of `link` and shake hands on it. Raises PeerError."""
        try:
            stream = await self.transport.open_stream(link.remote, link.addresses, STREAM_PROTOCOL, timeout_s=timeout_s)
        except InvalidAddress as error:  # others told us these addresses: our caller did not err
            raise PeerUnreachable(f"{link.remote} cannot be dialled: {error}") from error
        try:
            async with Patience(timeout_s):
                await stream.send(codec.encode(self._hello(lane)))
                hello = await self._receive_hello(stream)
            self._check(hello, stream.remote)
            if self._closed or link.closed:
                raise StreamClosed(f"the link with {link.remote} was closed meanwhile")
        except TimeoutError as error:
            await stream.close()
            raise PeerSilent(f"{link.remote} did not say hello within {timeout_s:.0f} s") from error
        except BaseException:  # whatever happened, also cancellation: the stream must not outlive this call
            await stream.close()
            raise
        link.adopt(lane, stream)
        self.tasks.spawn(self._read(link, stream, lane), name=f"read {lane} {link.remote[-8:]}")

    async def _accept(self, stream: Stream) -> None:
        try:
            async with Patience(HELLO_TIMEOUT_S):
                hello = await self._receive_hello(stream)
                await stream.send(codec.encode(self._hello(hello.lane)))
            self._check(hello, stream.remote)
            if self._closed:
                raise StreamClosed("this node is closing")
            link = self._join(hello, stream)
        except (PeerError, TimeoutError) as error:
            logger.info("refused a stream from %s: %s", stream.remote, error)
            await stream.close()
            return
        await self._read(link, stream, hello.lane)

    def _join(self, hello: Hello, stream: Stream) -> Link:
        key = (stream.remote, hello.instance)
        link = self._inbound.get(key)
        if hello.lane not in (SMALL, BULK) or (link is not None and link.has(hello.lane)):
            raise ProtocolError(f"a second or unknown lane {hello.lane!r}")
        if link is None:
            of_peer = sum(1 for peer, _ in self._inbound if peer == stream.remote)
            if of_peer < MAX_INBOUND_LINKS_PER_PEER and len(self._inbound) >= MAX_INBOUND_LINKS:
                idlest = min(self._unneeded(self._inbound.values(), for_s=FRESH_S), key=_used_at_s, default=None)
                if idlest is not None:
                    idlest.retire()
            if of_peer >= MAX_INBOUND_LINKS_PER_PEER or len(self._inbound) >= MAX_INBOUND_LINKS:
                raise ProtocolError(f"too many links ({of_peer} from this peer, {len(self._inbound)} in all)")
            link = self._inbound[key] = Link(self, stream.remote, outbound=False)
        link.adopt(hello.lane, stream)
        return link

    async def _read(self, link: Link, stream: Stream, lane: str) -> None:
        try:
            await stream.each(lambda frame: self._take(link, lane, frame))
        except StreamClosed as error:
            logger.debug("%r ended: %s", link, error)
        except PeerError as error:
            logger.warning("closing %r: %s", link, error)
        finally:
            await link.close()

    def _take(self, link: Link, lane: str, frame: bytes | bytearray) -> Rest | None:
        """Handle a frame; returns what is left to be done, if anything is."""
        if link.closed:
            return partial(_raise, _closed(link))
        link.heard_at_s = asyncio.get_running_loop().time()
        self.volume.received_bytes += len(frame)
        try:
            messages = iter(codec.decode(frame))
            for message, payload in messages:
                if (rest := self._dispatch(link, message, payload)) is not None:
                    return partial(self._take_rest, link, lane, len(frame), rest, messages)
        except PeerError as error:
            return partial(_raise, error)
        return None if self.download is None else partial(self.download.admit, len(frame), bulk=lane == BULK)

    async def _take_rest(
        self, link: Link, lane: str, size: int, rest: Rest, messages: Iterator[tuple[AnyMessage, memoryview]]
    ) -> None:
        """Of `_take`, from where it came upon `rest`."""
        await rest()
        for message, payload in messages:
            if link.closed:  # whoever was told of its end must not hear of it again
                raise _closed(link)
            if (more := self._dispatch(link, message, payload)) is not None:
                await more()
        if self.download is not None:
            await self.download.admit(size, bulk=lane == BULK)

    def _dispatch(self, link: Link, message: AnyMessage, payload: memoryview) -> Rest | None:
        kind = type(message)
        if (at_once := self._at_once.get(kind)) is not None:
            link.used_at_s = link.heard_at_s
            return at_once(link, message, payload)
        if (receiver := self._receivers.get(kind)) is not None:
            link.used_at_s = link.heard_at_s
            return partial(receiver, link, message, payload)
        if isinstance(message, Ping):
            pong = self.pong(message.nonce)
            return partial(link.send, replace(pong, status=self.status()) if message.detail else pong)
        if isinstance(message, Pong | Traced | DialBackReply):
            waiting_link, future = self._requests.get(message.nonce, (None, None))
            if future is not None and waiting_link is link and not future.done():
                future.set_result(message)
            return None
        raise ProtocolError(f"{link.remote} sent {type(message).__name__}, which nothing here expects")

    def forget(self, link: Link) -> None:
        if self._outbound.get(link.remote) is link:
            del self._outbound[link.remote]
        for key in [key for key, known in self._inbound.items() if known is link]:
            del self._inbound[key]
        for waiting_link, future in self._requests.values():
            if waiting_link is link and not future.done():
                future.set_exception(StreamClosed(f"{link.remote} went away"))
                future.exception()  # marked as seen: whoever asked may learn it from sending the question
        for callback in self._lost:
            callback(link)

    # --- handshake ---

    def _hello(self, lane: str) -> Hello:
        return Hello(
            version=PROTOCOL_VERSION,
            network=self._network,
            software=self._software,
            lane=lane,
            instance=self._instance,
            time_s=time.time(),
        )

    @staticmethod
    async def _receive_hello(stream: Stream) -> Hello:
        (message, _), *others = codec.decode(await stream.receive())
        if others or not isinstance(message, Hello):
            raise ProtocolError(f"{stream.remote} began with {type(message).__name__} instead of hello alone")
        return message

    @property
    def clock_skew_s(self) -> float | None:
        """This node's clock minus those of the peers that said hello within SKEW_AGE_S, by the one in the middle: no
        minority that is wrong itself is believed. None where too few did. Whoever sets this node's clock makes that
        known at once, as others' are remembered by one that cannot be set."""
        steady_s = _steady_s()
        ahead_s = time.time() - steady_s
        skews = [ahead_s - other_s for other_s, at_s in self._clocks.values() if at_s >= steady_s - SKEW_AGE_S]
        return sorted(skews, key=abs)[(len(skews) - 1) // 2] if len(skews) >= SKEW_PEERS_MIN else None

    def _check(self, hello: Hello, remote: PeerId) -> None:
        if hello.version != PROTOCOL_VERSION:
            raise VersionMismatch(
                f"{remote} speaks protocol {hello.version} ({hello.software}), "
                f"this node speaks protocol {PROTOCOL_VERSION} ({self._software})",
                hint="update the older of the two",
            )
        if hello.network != self._network:
            raise ProtocolError(f"{remote} belongs to network {hello.network!r}, this node to {self._network!r}")
        skew_s = hello.time_s - time.time()
        if math.isfinite(skew_s):
            steady_s = _steady_s()
            self._clocks[remote] = hello.time_s - steady_s, steady_s
            self._clocks.move_to_end(remote)
            if len(self._clocks) > SKEW_PEERS_MAX:
                self._clocks.popitem(last=False)
        if abs(skew_s) > MAX_SKEW_S and remote not in self._skew_named and len(self._skew_named) < 1024:
            self._skew_named.add(remote)
            logger.warning(
                "the clock of %s is %.1f s %s this one; records may be refused: set both by NTP",
                remote,
                abs(skew_s),
                "ahead of" if skew_s > 0 else "behind",
            )


def _steady_s() -> float:
    return time.clock_gettime(STEADY_CLOCK)


async def _raise(error: PeerError) -> None:
    raise error


def _closed(link: Link) -> StreamClosed:
    return StreamClosed(f"the link with {link.remote} is closed")


def _size(payload: codec.Buffer) -> int:
    return payload.nbytes if isinstance(payload, memoryview) else len(payload)


_used_at_s = attrgetter("used_at_s")

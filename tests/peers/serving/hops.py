"""Hops and a client on the memory twin, for the tests of serving.

The engine is a toy on the event loop, so that virtual time is the only time; its outputs depend on every row that the
session holds, so that a wrong cache shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from peers.runtime.engine import Engine
from peers.runtime.works import Done, EngineConfig, EngineStats, PositionGap, SessionKey, SessionReleased, Work
from peers.serving.admission import Admission, AdmissionLimits
from peers.serving.handler import Handler, Served
from peers.serving.journal import Journal, JournalLimits
from peers.serving.ledger import Ledger, LedgerLimits
from peers.serving.push import Delivery
from peers.transport.links import Link, Links
from peers.transport.memory import MemoryNetwork
from peers.wire import tensors
from peers.wire.messages import AnyMessage, Close, Failed, Message, Open, Opened, Relay, Result, Step
from routing.identity import SigningKey
from routing.ids import BlockSpan, BlockSpans, ModelId, PeerId, SessionId

HIDDEN = 4
MODEL = ModelId(b"m" * 32)
LATENCY_S = 0.01
AMessage = TypeVar("AMessage", bound=Message)


def peer_id(number: int) -> PeerId:
    return SigningKey.from_seed(number.to_bytes(32, "big")).peer_id


def session_id(number: int) -> SessionId:
    return SessionId(bytes([number]) * 16)


def rows(first: int, count: int) -> Tensor:
    """The rows that the tests send for positions `[first, first + count)`: small integers, exact in every dtype."""
    return (torch.arange(first, first + count)[:, None] % 3 + torch.arange(HIDDEN)).float()


def through(span: BlockSpan, hidden: Tensor) -> Tensor:
    """What the toy's blocks make of a whole sequence."""
    return hidden.cumsum(0) + span.start


class ToyEngine:
    """What the handler calls of the real one: works in order of submission, a moment of time for each."""

    def __init__(self) -> None:
        self.config = EngineConfig(cache_tokens=4096)
        self.sessions: dict[SessionKey, Tensor] = {}
        self.ran: list[Work] = []
        self.opened: list[tuple[SessionKey, PeerId, BlockSpan, tuple[bytes, ...]]] = []
        self.kept = 0
        """With how many positions the next sessions begin."""
        self.free_tokens = 42
        self.compute_s = 0.005
        self.position_s = 0.0
        """And for each of its positions."""
        self.batches = False
        """Whether what waits shares a forward."""
        self.errors: list[Exception] = []
        """Raised by the next works, one each."""
        self.momentary = False
        """Whether the next step of a session is computed in the call that asks for it."""
        self.resting = False
        self._turn = asyncio.Lock()
        self._waiting: list[Work] = []
        self._took_s = 0.0
        """The forward that ran last."""
        self._ended: dict[SessionKey, asyncio.Event] = {}

    def open(
        self, session: SessionKey, owner: PeerId, span: BlockSpan, keys: Sequence[bytes], adapter: bytes | None = None
    ) -> int:
        if not keys:
            return 0
        self.opened.append((session, owner, span, tuple(keys)))
        self.sessions[session] = rows(0, self.kept)
        return self.kept

    packs_sessions = True
    model = SimpleNamespace(prefix_shape=lambda _: (2, 2))

    def parts(self, span: BlockSpan) -> list[tuple[ToyEngine, BlockSpan]]:
        return [(self, span)]

    @staticmethod
    def linear_shape(block: int, path: str) -> tuple[int, int] | None:
        return (HIDDEN, 2) if path == "proj" else None

    dtype = "float32"

    def at_once(
        self, session: SessionKey, start: int, rows: memoryview, span: BlockSpan, regime_length: int
    ) -> tuple[memoryview, float] | None:
        held = self.sessions.get(session)
        if not self.momentary or self._turn.locked() or held is None or start != len(held):
            return None
        if self.errors:
            raise self.errors.pop(0)
        hidden = tensors.rows_in(rows, dtype=self.dtype, count=len(rows) // (HIDDEN * 4), hidden=HIDDEN)
        work = Work(session=session, owner=PeerId(""), start=start, hidden=hidden, span=span)
        self._took_s = self._takes_s([work])
        done = self._done(work, held)
        return tensors.pack(done.hidden, self.dtype), done.compute_s

    async def run(self, work: Work) -> Done:
        if self.errors:
            raise self.errors.pop(0)
        ended = self._ended.setdefault(work.session, asyncio.Event())
        if work.parent is not None:
            assert work.session not in self.sessions, "only a new session can be forked from another"
        held = self.sessions.setdefault(work.session, torch.empty(0, HIDDEN))
        self._waiting.append(work)
        async with self._turn:
            if any(work is other for other in self._waiting):  # else it was in the forward that just ended
                batch = self._waiting if self.batches else [work]
                self._waiting = [other for other in self._waiting if all(other is not one for one in batch)]
                self._took_s = self._takes_s(batch)
                await asyncio.sleep(self._took_s)
            if ended.is_set():
                raise SessionReleased(f"session {work.session} was released")
            held = self.sessions[work.session]
            if work.parent is not None:
                held = self.sessions[work.parent[0]][: work.parent[1]]
            if work.start > len(held):
                raise PositionGap(work.start, len(held))
            return self._done(work, held)

    def _takes_s(self, works: Sequence[Work]) -> float:
        return self.compute_s + self.position_s * sum(len(work.hidden) for work in works)

    def _done(self, work: Work, held: Tensor) -> Done:
        self.ran.append(work)
        held = self.sessions[work.session] = torch.cat([held[: work.start], work.hidden.float()])
        return Done(hidden=through(work.span, held)[work.start :], queue_s=0.0, compute_s=self._took_s)

    def release(self, session: SessionKey) -> None:
        self.sessions.pop(session, None)
        if (ended := self._ended.pop(session, None)) is not None:
            ended.set()

    def rest(self, resting: bool) -> None:
        self.resting = resting

    def held(self, session: SessionKey) -> int:
        return len(self.sessions.get(session, ()))

    def stats(self) -> EngineStats:
        return EngineStats(
            total_tokens=100,
            free_tokens=self.free_tokens,
            longest_tokens=100,
            room_tokens=42,
            queued_tokens=7,
            sessions=len(self.sessions),
        )


class Hop:
    """One serving peer of blocks `[4 * index, 4 * index + 4)`."""

    def __init__(
        self, network: MemoryNetwork, index: int, *, max_bytes_per_s: int | None = None, **limits: Any
    ) -> None:
        self.span = BlockSpan(4 * index, 4 * index + 4)
        self.transport = network.transport(peer_id(100 + index))
        self.peer_id = self.transport.peer_id
        self.links = Links(self.transport, network="test", software="test", max_bytes_per_s=max_bytes_per_s)
        self.engine = ToyEngine()
        self.ledger: Ledger[Delivery, Link] = Ledger(LedgerLimits(**{"max_positions": 1000} | limits))
        self.admission = Admission(AdmissionLimits(max_bytes_in_flight_per_peer=1 << 20))
        self.journal = Journal(JournalLimits())
        self.handler = Handler(
            links=self.links,
            engine=cast(Engine, self.engine),
            served=Served(model=MODEL, spans=BlockSpans.of(self.span), hidden_size=HIDDEN),
            ledger=self.ledger,
            admission=self.admission,
            journal=self.journal,
            clock=lambda: asyncio.get_running_loop().time(),
        )
        self.running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.links.serve()
        self.running = asyncio.create_task(self.handler.run(), name="handler")

    @property
    def empty(self) -> bool:
        in_flight = sum(account.bytes_in_flight for account in self.admission.accounts.values())
        return not self.engine.sessions and not len(self.ledger) and not len(self.handler.journal) and not in_flight

    async def close(self) -> None:
        assert self.running is not None
        self.running.cancel()
        await asyncio.wait([self.running])
        await self.links.close()
        await self.transport.close()


class Client:
    """Speaks the protocol by hand. `inbox` keeps what came, in order."""

    def __init__(self, network: MemoryNetwork, number: int = 1) -> None:
        self.transport = network.transport(peer_id(number), client_mode=True)
        self.links = Links(self.transport, network="test", software="test")
        self.links.keep(self._needed_links)
        self.inbox: list[tuple[Link, AnyMessage, bytes]] = []
        self._arrived = asyncio.Event()
        for kind in (Opened, Result, Failed, Relay):
            self.links.handle(kind, self._receive)

    def _needed_links(self) -> list[Link]:
        return list(self.links._outbound.values())

    async def _receive(self, link: Link, message: Any, payload: memoryview) -> None:
        self.inbox.append((link, message, bytes(payload)))
        self._arrived.set()

    async def send(self, hop: Hop, message: AnyMessage, payload: bytes | memoryview = b"") -> None:
        link = await self.links.to(hop.peer_id, hop.transport.addresses)
        await link.send(message, payload)

    async def next(self, kind: type[AMessage], *, timeout_s: float = 1000.0) -> tuple[AMessage, bytes]:
        """The next message of any kind, which must be of this one."""
        _, message, payload = await self.next_from(kind, timeout_s=timeout_s)
        return message, payload

    async def next_from(self, kind: type[AMessage], *, timeout_s: float = 1000.0) -> tuple[Link, AMessage, bytes]:
        """The same, and over which link it came."""
        async with asyncio.timeout(timeout_s):
            while not self.inbox:
                self._arrived.clear()
                await self._arrived.wait()
        link, message, payload = self.inbox.pop(0)
        assert isinstance(message, kind), message
        return link, message, payload

    async def open(self, hops: Sequence[Hop], session: int = 1, epoch: int = 1, **changes: Any) -> None:
        for message, hop in zip(self.opens(hops, session, epoch, **changes), hops, strict=True):
            await self.send(hop, message)
        for _ in hops:
            await self.next(Opened)

    @staticmethod
    def opens(hops: Sequence[Hop], session: int = 1, epoch: int = 1, **changes: Any) -> list[Open]:
        made = []
        for index, hop in enumerate(hops):
            following = hops[index + 1] if index + 1 < len(hops) else None
            fields: dict[str, Any] = {
                "session": session_id(session).raw,
                "epoch": epoch,
                "model": MODEL.digest,
                "start": hop.span.start,
                "end": hop.span.end,
                "previous": hops[index - 1].peer_id if index else None,
                "next": None if following is None else following.peer_id,
                "next_addresses": () if following is None else following.transport.addresses,
            }
            made.append(Open(**fields | changes))
        return made

    async def step(self, hop: Hop, step: int, first: int, count: int = 1, **changes: Any) -> None:
        message, payload = step_of(step, first, count, **{"block": hop.span.start} | changes)
        await self.send(hop, message, payload)

    async def result(self) -> Tensor:
        message, payload = await self.next(Result)
        return tensors.unpack(payload, dtype=message.dtype, count=message.count, hidden=message.hidden)

    async def refusal(self) -> str:
        message, _ = await self.next(Failed)
        return message.code

    async def close_session(self, hops: Sequence[Hop], *sessions: int) -> None:
        for hop in hops:
            await self.send(hop, Close(sessions=tuple(session_id(session).raw for session in sessions)))

    async def close(self) -> None:
        await self.links.close()
        await self.transport.close()


def step_of(step: int, first: int, count: int = 1, session: int = 1, **changes: Any) -> tuple[Step, memoryview]:
    hidden = changes.pop("rows", None)
    hidden = rows(first, count) if hidden is None else hidden
    fields: dict[str, Any] = {
        "session": session_id(session).raw,
        "block": 0,
        "epoch": 1,
        "step": step,
        "first": first,
        "count": count,
        "want_from": 0,
        "dtype": "float32",
        "hidden": HIDDEN,
    }
    message = Step(**fields | changes)
    return message, tensors.pack(hidden, "float32")


def expected(hops: Sequence[Hop], first: int, end: int) -> Tensor:
    """Rows `[first, end)` of what the whole route makes of the tests' rows."""
    hidden = rows(0, end)
    for hop in hops:
        hidden = through(hop.span, hidden)
    return hidden[first:]


class Route:
    """Three hops and a client, and what a test does when it has ended: everything must be released."""

    def __init__(self, num_hops: int = 3, **limits: Any) -> None:
        self.network = MemoryNetwork(latency_s=LATENCY_S)
        self.hops = [Hop(self.network, index, **limits) for index in range(num_hops)]
        self.client = Client(self.network)
        self.others: list[Client] = []

    def another_client(self) -> Client:
        self.others.append(Client(self.network, 2 + len(self.others)))
        return self.others[-1]

    def reset(self, sender: Hop, receiver: Hop) -> None:
        """End the connections that one hop has dialled to another, with what is under way on them."""
        for stream in self.network.streams_between(sender.peer_id, receiver.peer_id):
            stream.abort("the connection was reset")

    async def __aenter__(self) -> Route:
        for hop in self.hops:
            await hop.start()
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        for client in (self.client, *self.others):
            await client.close()
        await asyncio.sleep(1.0)
        empty = [hop.empty for hop in self.hops]
        failures = [hop.running.exception() for hop in self.hops if hop.running is not None and hop.running.done()]
        for hop in self.hops:
            await hop.close()
        if kind is None:
            assert all(empty), "pages, sessions or bytes are left"
            assert failures == [], "a stranger brought a peer down"

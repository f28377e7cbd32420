"""A whole swarm on a virtual clock, in one event loop: real handlers, announcers, discovery and session drivers, wires
in memory, and toys for engines. Minutes of it take seconds.

A user's next row follows from the last output, so that one wrong position changes everything after it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from peers.runtime.works import Done, Work
from peers.serving.announce import Announcer
from peers.serving.handler import Served
from peers.transport.memory import MemoryNetwork, MemoryTransport
from peers.wire.messages import PROTOCOL_VERSION
from routing.errors import SwarmError
from routing.identity import SigningKey
from routing.ids import BlockSpan, BlockSpans, PeerId
from routing.records import RECORD_RENEW_S, Announcement, PeerState
from routing.store import RecordStore
from swarm.network import ClientNode, NetworkThread
from swarm.session.core import SessionConfig
from swarm.session.driver import SwarmRemote
from swarm.session.live import RemoteModel
from swarm.session.remote import RemoteSession, RowStep
from tests.helpers.late_loop import LateLoop
from tests.peers.serving.hops import HIDDEN, MODEL, Hop, peer_id, through

T = TypeVar("T")
EPOCH_S = 1_750_000_000.0
THIRDS = (BlockSpan(0, 4), BlockSpan(4, 8), BlockSpan(8, 12))
ROWS = 7
"""Values of an input, from 0 on: so small that everything is exact."""


class TwinLoop(LateLoop):
    """What is done in a thread elsewhere takes no time."""

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        done: asyncio.Future[T] = self.create_future()
        done.set_result(func(*args))
        return done


class Node:
    """A client's, that only dials."""

    def __init__(self, network: MemoryNetwork, number: int) -> None:
        self.transport: MemoryTransport = network.transport(peer_id(number), client_mode=True)
        self.store: RecordStore = network.store(peer_id(number))

    async def wait_closed(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        await self.transport.close()


class Here:
    """In place of a network's thread: this loop."""

    closed = False

    def __init__(self, client: ClientNode) -> None:
        self.client = client

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            work.send(None)
        except StopIteration as ended:
            return cast(T, ended.value)
        raise AssertionError("it waits for something")

    def post(self, callback: Callable[..., None], *arguments: object) -> None:
        asyncio.get_running_loop().call_soon(callback, *arguments)


REFUSES_S = 10.0
"""A peer that failed."""


class Peer(Hop):
    """One that announces itself, with an engine that takes `compute_s` for each work, and may be told to fail."""

    def __init__(self, twin: Twin, number: int, span: BlockSpan, compute_s: float) -> None:
        super().__init__(twin.network, number)
        self.twin, self.span = twin, span
        self.handler.served = Served(model=MODEL, spans=BlockSpans.of(span), hidden_size=HIDDEN)
        self.engine.compute_s = compute_s
        self.state = PeerState.ONLINE
        self.queue_s = self.ran_at_s = 0.0
        self.fails: Callable[[], bool] = lambda: False
        self._run = self.engine.run
        self.engine.run = self._run_or_fail  # type: ignore[method-assign]
        key = SigningKey.from_seed((100 + number).to_bytes(32, "big"))
        self.announcer = Announcer(
            twin.network.store(key.peer_id),
            key,
            network="test",
            describe=self._describe,
            outage=lambda problem: None,
            clock=twin.now_s,
        )
        self.announcing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await super().start()
        self.announcing = asyncio.create_task(self.announcer.run(), name="announce")

    def refuse(self, on: bool) -> None:
        """Its connections end, its sessions are gone, and it takes no other; or all is well again."""
        if not on:
            self.twin.network.heal(self.peer_id)
            return
        self.twin.network.cut(self.peer_id)
        for place in self.ledger.expire(float("inf")):
            self.handler.release(place)

    async def leave(self) -> None:
        """As after Ctrl-C."""
        self.state = PeerState.DRAINING
        await self.announcer.announce()
        await self.handler.drain(timeout_s=20.0)
        self.twin.network.cut(self.peer_id)

    def separate(self, on: bool) -> None:
        """It and everybody else hear nothing of each other, and their connections stand; or all hear all again."""
        others = [peer for peer in self.twin.network._transports if peer != self.peer_id]
        self.twin.network.partition(*([[self.peer_id], others] if on else []))

    async def _run_or_fail(self, work: Work) -> Done:
        if self.fails():
            self.refuse(True)
            asyncio.get_running_loop().call_later(REFUSES_S, self.refuse, False)
        began_s = asyncio.get_running_loop().time()
        done = await self._run(work)
        waited_s = max(0.0, asyncio.get_running_loop().time() - began_s - done.compute_s)
        self.queue_s, self.ran_at_s = self.queue_s + 0.3 * (waited_s - self.queue_s), began_s
        return replace(done, queue_s=waited_s)

    def _describe(self, sequence: int, expires_at_s: float) -> Announcement:
        engine = self.engine
        decode_s = (engine.compute_s + engine.position_s) / len(self.span)
        return Announcement(
            peer_id=self.peer_id,
            model=MODEL,
            model_name="toy",
            num_blocks=THIRDS[-1].end,
            spans=BlockSpans.of(self.span),
            state=self.state,
            dtype="float32",
            version="0",
            protocol=PROTOCOL_VERSION,
            addresses=self.transport.addresses,
            decode_s_per_block=decode_s,
            prefill_s_per_token_block=engine.position_s / len(self.span) if engine.batches else decode_s,
            cache_tokens=100_000,
            free_tokens=100_000,
            queue_s=self.queue_s if self.twin.now_s() - EPOCH_S < self.ran_at_s + RECORD_RENEW_S else 0.0,
            sessions=len(self.engine.sessions),
            sequence=sequence,
            expires_at_s=expires_at_s,
        )

    async def close(self) -> None:
        if self.announcing is not None:
            self.announcing.cancel()
            await asyncio.wait([self.announcing])
        await super().close()


class User:
    """A client with one conversation at a time."""

    def __init__(self, twin: Twin, number: int, config: SessionConfig | None = None) -> None:
        self.client = ClientNode(Node(twin.network, number), network="test")
        self.client.discovery._clock = twin.now_s
        self.client.start()
        model = RemoteModel(model=MODEL, num_blocks=THIRDS[-1].end, hidden_size=HIDDEN, regime_key=lambda length: 0)
        self.remote = SwarmRemote(
            cast(NetworkThread, Here(self.client)),
            model,
            lambda ids, first: ids,
            config=config,
            owns_network=False,
            rng=random.Random(number),
        )
        self.times_s: list[float] = []
        """When each output of the last answer was there."""

    async def step(self, session: RemoteSession, start: int, hidden_TD: Tensor) -> Tensor:
        """The last output. Raises SwarmError."""
        done: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()

        def tell(step: RowStep, result: Tensor | SwarmError) -> None:
            if isinstance(result, SwarmError):
                done.set_exception(result)
            else:
                done.set_result(result)

        count = len(hidden_TD)
        step = RowStep(
            session=session,
            start=start,
            hidden_TD=hidden_TD,
            token_ids_T=None,
            position_offset=0,
            want_from=count - 1,
            regime_length=start + count,
        )
        self.remote.start([step], tell)
        return await done

    async def generate(self, prompt: Tensor, count: int, *, on_step: Callable[[int], None] = lambda _: None) -> Tensor:
        """So many rows more. Raises SwarmError."""
        session, rows = self.remote.open(), [prompt]
        self.times_s = []
        try:
            for number in range(count):
                start = 0 if not number else len(prompt) + number - 1
                output_1D = await self.step(session, start, rows[-1])
                self.times_s.append(asyncio.get_running_loop().time())
                rows.append(following(output_1D))
                on_step(number)
        finally:
            self.remote.release([session])
        return torch.cat(rows[1:])

    @property
    def route(self) -> list[PeerId]:
        """The one that was installed last."""
        return [] if self.remote.route is None else [hop.peer_id for hop in self.remote.route.hops]

    @property
    def longest_s(self) -> float:
        """Between two outputs."""
        return max(b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False))

    async def close(self) -> None:
        await self.remote._stop()
        await self.client.close()


class Twin:
    """`async with Twin(copies=2) as twin`: so many peers for each third of the model, or for each of `spans`."""

    def __init__(
        self,
        *,
        copies: int = 2,
        spans: Sequence[BlockSpan] = THIRDS,
        latency_s: float = 0.005,
        compute_s: Sequence[float] = (0.005,),
        seed: int = 0,
    ) -> None:
        """`compute_s`: of each copy, for its span."""
        self.network = MemoryNetwork(latency_s=latency_s, rng=random.Random(seed), clock=self.now_s)
        self.rng = random.Random(seed)
        self._numbers = iter(range(1000))
        self.peers: list[Peer] = []
        self.users: list[User] = []
        for copy in range(copies):
            for span in spans:
                self._make(span, compute_s[copy % len(compute_s)])

    @staticmethod
    def now_s() -> float:
        return EPOCH_S + asyncio.get_running_loop().time()

    def _make(self, span: BlockSpan, compute_s: float) -> Peer:
        self.peers.append(Peer(self, next(self._numbers), span, compute_s))
        return self.peers[-1]

    async def join(self, span: BlockSpan, compute_s: float = 0.005) -> Peer:
        peer = self._make(span, compute_s)
        await peer.start()
        return peer

    def user(self, config: SessionConfig | None = None) -> User:
        self.users.append(User(self, 1 + len(self.users), config))
        return self.users[-1]

    def peer(self, peer_id: PeerId) -> Peer:
        return next(peer for peer in self.peers if peer.peer_id == peer_id)

    def prompt(self, length: int = 8) -> Tensor:
        return torch.tensor([[float(self.rng.randrange(ROWS)) for _ in range(HIDDEN)] for _ in range(length)])

    async def __aenter__(self) -> Twin:
        for peer in self.peers:
            await peer.start()
        await asyncio.sleep(1.0)
        return self

    async def __aexit__(self, *_: object) -> None:
        for user in self.users:
            await user.close()
        for peer in self.peers:
            await peer.close()


def following(output_1D: Tensor) -> Tensor:
    return output_1D % ROWS


def local(prompt: Tensor, count: int, spans: Sequence[BlockSpan] = THIRDS) -> Tensor:
    """What `User.generate` must say."""
    rows = prompt
    for _ in range(count):
        hidden = rows
        for span in spans:
            hidden = through(span, hidden)
        rows = torch.cat([rows, following(hidden[-1:])])
    return rows[len(prompt) :]


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """In a loop of its own."""
    loop = TwinLoop()
    try:
        return loop.run_until_complete(work())
    finally:
        loop.close()

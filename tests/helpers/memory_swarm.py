"""A whole swarm in one process: real peers, real engines, real client; only the wires are memory.

Peers and client share the event loop of a `NetworkThread`, so tests are ordinary blocking code.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import pytest
import torch

from peers.capacity import plan_capacity
from peers.discovery import Discovery
from peers.host import blocks
from peers.host.server import ServerPeer
from peers.model.catalog import Checkpoint, resolve
from peers.model.loading import kept_block_bytes, load_config
from peers.model.lora import AdapterFolder
from peers.runtime.cost import ForwardCost
from peers.runtime.probe import Probe
from peers.runtime.works import Sharing
from peers.transport.memory import MemoryNetwork, MemoryTransport
from peers.wire.messages import Urgency
from routing.identity import SigningKey
from routing.ids import BlockSpan, BlockSpans, PeerId
from routing.routes import Route, RouteRequest
from routing.store import RecordStore
from swarm.models.loading import load_model
from swarm.network import ClientNode, NetworkThread
from swarm.session.core import SessionConfig
from swarm.session.driver import SwarmRemote
from swarm.session.live import RemoteModel
from swarm.session.remote import Embed
from swarm.session.training import TrainingConfig

PROBE = Probe(
    decode_s_per_block=1e-3,
    prefill_s_per_token_block=1e-4,
    block_cost=ForwardCost(base_s=1e-3, per_token_s=1e-4, per_token_past_s=0.0),
    token_budget=256,
    forward_bytes=1 << 20,
)
"""What tiny peers announce instead of measuring for a second."""

_seeds = itertools.count(1)


def new_key() -> SigningKey:
    return SigningKey.from_seed(next(_seeds).to_bytes(32, "big"))


@contextmanager
def impatient() -> Iterator[None]:
    """Blocks that nobody serves are waited for only until everybody's records were read, however long that takes."""
    patient = Discovery.route

    async def route(self: Discovery, request: RouteRequest, *, patience_s: float | None = None) -> Route:
        self.watch(request.model)
        for _ in range(2):  # the first look may have begun before what is to be seen
            await self.refresh()
        return await patient(self, request, patience_s=0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Discovery, "route", route)
        yield


class MemoryNode:
    def __init__(self, network: MemoryNetwork, key: SigningKey, *, client_mode: bool = False) -> None:
        self.transport: MemoryTransport = network.transport(key.peer_id, client_mode=client_mode)
        self.store: RecordStore = network.store(key.peer_id)
        self.died: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait_closed(self) -> None:
        await asyncio.shield(self.died)

    async def close(self) -> None:
        await self.transport.close()


class Guest(NetworkThread):
    """One more client in the thread of another one."""

    def __init__(self, host: NetworkThread, client: ClientNode) -> None:
        self._loop, self._thread, self._awaited, self.client = host._loop, host._thread, host._awaited, client
        self.post(client.start)


class MemorySwarm:
    """`spans` as (start, end) pairs, or as of `--blocks`; every peer on one thread, all of one checkpoint folder."""

    def __init__(
        self,
        folder: Path,
        spans: Sequence[tuple[int, int] | str],
        *,
        cache_tokens: int = 1024,
        page_size: int = 4,
        dtype: str = "float32",
        device: str = "cpu",
        latency_s: float = 0.0,
        lease_s: float = 600.0,
        session_config: SessionConfig | None = None,
        cache: Path | None = None,
        share_prefixes: Sharing = "owner",
        movable: bool = False,
        training: bool = False,
    ) -> None:
        self.checkpoint: Checkpoint = resolve(str(folder), cache=cache)
        self.network: MemoryNetwork
        self.peers: list[ServerPeer] = []
        self._serving: list[asyncio.Task[None]] = []
        self._cache_tokens = cache_tokens
        self._page_size = page_size
        self._dtype = dtype
        self._device = device
        self._lease_s = lease_s
        self._latency_s = latency_s
        self._session_config = session_config
        self._share_prefixes: Sharing = share_prefixes
        self._movable = movable
        self._training = training
        self._guests: list[Guest] = []
        self._spans = spans
        self._models: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("swarm.network.START_TIMEOUT_S", 600.0)  # of a client: here all peers start within it
            self.thread = NetworkThread(self._make)

    async def _make(self) -> ClientNode:
        self.network = MemoryNetwork(latency_s=self._latency_s)
        for span in self._spans:
            await self._add(BlockSpans.parse(span if isinstance(span, str) else "{}:{}".format(*span)))
        return await self._client()

    async def _client(self) -> ClientNode:
        return ClientNode(MemoryNode(self.network, new_key(), client_mode=True), network="test")

    async def _add(
        self,
        spans: BlockSpans,
        quantization: str = "none",
        adapters: Mapping[str, AdapterFolder] = MappingProxyType({}),
    ) -> ServerPeer:
        key = new_key()
        node = MemoryNode(self.network, key)
        peer = ServerPeer(node.transport, node.store, key=key, network="test", lease_s=self._lease_s, adapters=adapters)
        config = load_config(self.checkpoint)
        plan = plan_capacity(
            config,
            dtype=self._dtype,
            device=self._device,
            max_memory_bytes=8 << 30,
            cache_tokens=self._cache_tokens,
            blocks=spans,
            quantization=quantization,
            training=self._training,
            hosted=adapters.values(),
            kept_block_bytes=kept_block_bytes(self.checkpoint, config),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "PREPARATION_S", 0.0)  # none of these is in a hurry later
            await peer.load(
                self.checkpoint,
                spans,
                plan,
                threads=1,
                page_size=self._page_size,
                share_prefixes=self._share_prefixes,
                probe=PROBE,
                movable=self._movable,
            )
        self._serving.append(asyncio.create_task(peer.serve()))
        await peer.announced()
        self.peers.append(peer)
        return peer

    def add_peer(self, start: int, end: int, quantization: str = "none", **adapters: AdapterFolder) -> ServerPeer:
        return self.thread.call(self._add(BlockSpans.of(BlockSpan(start, end)), quantization, adapters))

    def model(
        self,
        *,
        guest: bool = False,
        prefix_secret: bytes | None = None,
        min_precision: str | None = None,
        adapter: str | None = None,
        urgency: Urgency = Urgency.INTERACTIVE,
        training: TrainingConfig | None = None,
        reviews: bool = False,
        **options: Any,
    ) -> Any:
        """A client's model; closed with the swarm. A `guest` is a client of its own. Unless it `reviews` its routes,
        none that works is left for one that seems faster: what steps take here, this machine decides."""
        thread = self.thread
        if guest:
            thread = Guest(self.thread, self.thread.call(self._client()))
            self._guests.append(thread)

        def connect(model: RemoteModel, embed: Embed) -> SwarmRemote:
            remote = SwarmRemote(
                thread,
                model,
                embed,
                config=self._session_config,
                owns_network=False,
                prefix_secret=prefix_secret,
                urgency=urgency,
                training=training,
            )
            if not reviews:
                remote.reconsider = lambda session: None  # type: ignore[method-assign]
            return remote

        model = load_model(
            self.checkpoint,
            dtype=torch.float32,
            device="cpu",
            connect=connect,
            min_precision=min_precision,
            adapter=adapter,
            **options,
        )
        self._models.append(model)
        return model

    def kill_peer(self, peer_id: PeerId) -> None:
        """The peer dies at once; nobody is told."""

        async def cut() -> None:
            self.network.cut(peer_id)

        self.thread.call(cut())

    def pause_peer(self, peer_id: PeerId, paused: bool = True) -> None:
        """The peer steps back for its owner, or returns."""

        async def pause() -> None:
            next(peer for peer in self.peers if peer._key.peer_id == peer_id).pause(paused)

        self.thread.call(pause())

    def drain_peer(self, peer_id: PeerId) -> Future[None]:
        """The peer begins to leave; the future ends when it may exit."""
        peer = next(peer for peer in self.peers if peer._key.peer_id == peer_id)
        return asyncio.run_coroutine_threadsafe(peer.drain(timeout_s=20.0), self.thread._loop)

    def forget_sessions(self) -> None:
        """Every lease ends at once, as after a long pause."""

        async def forget() -> None:
            for peer in self.peers:
                for session in peer.handler.ledger.expire(float("inf")):
                    peer.handler.release(session)

        self.thread.call(forget())

    def settled(self) -> bool:
        """Every peer holds no session and all of its pages are free."""
        return all(
            len(peer.handler.ledger) == len(peer.handler.journal) == 0
            and peer.engine.stats().free_tokens == peer.engine.stats().total_tokens
            for peer in self.peers
        )

    def eventually_settled(self, timeout_s: float = 60.0) -> bool:
        """`settled`, once the goodbyes under way have arrived: long before any lease would end."""
        return self.eventually(self.settled, timeout_s)

    def eventually(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
        """Wait until something is true of this swarm. Raises TimeoutError."""

        async def wait() -> bool:
            async with asyncio.timeout(timeout_s):
                while not condition():  # noqa: ASYNC110  # several engines; no one event tells
                    await asyncio.sleep(0.01)
            return True

        return self.thread.call(wait())

    def close(self) -> None:
        for model in self._models:
            model.close()

        async def stop() -> None:
            for guest in self._guests:
                await guest.client.close()
            for task in self._serving:
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)
            for peer in self.peers:
                await peer.close()

        self.thread.call(stop())
        self.thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Peers that join at the same time, on a virtual clock: they find different blocks, whoever looks first."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from peers.discovery import Discovery
from peers.serving.joining import MAX_ROUNDS, SETTLE_S, settle
from peers.transport.links import Links
from peers.transport.memory import MemoryNetwork
from routing.ids import BlockSpan, BlockSpans
from routing.placement import before_me, choose_span
from routing.records import Announcement, PeerState, model_key, sign_record
from routing.router import Router
from routing.store import StoredRecord
from tests.peers.transport.nodes import MODEL, NETWORK, announcement, signing_key

pytestmark = pytest.mark.looptime


class Joiner:
    """Fits ten of thirty blocks."""

    def __init__(self, network: MemoryNetwork, number: int) -> None:
        self.key = signing_key(number)
        self.network, self.store, self.sequence = network, network.store(self.key.peer_id), 0
        links = Links(network.transport(self.key.peer_id), network=NETWORK, software="test")
        self.discovery = Discovery(store=self.store, router=Router(), links=links, network=NETWORK, clock=network.clock)
        self.discovery.watch(MODEL)
        self.rng = random.Random(number)

    def choose(self, others: list[Announcement]) -> BlockSpan:
        return choose_span(before_me(others, self.key.peer_id), 30, 10, self.network.clock())

    async def announce(self, span: BlockSpan, *, settled: bool = False) -> None:
        self.sequence += 1
        record = replace(
            announcement(self.key, sequence=self.sequence, expires_at_s=round(self.network.clock() + 20, 3)),
            spans=BlockSpans.of(span),
            state=PeerState.JOINING,
            intent=None if settled else span,
        )
        key = model_key(NETWORK, MODEL, self.key.peer_id)
        value = sign_record(record, key, self.key)
        await self.store.put(
            StoredRecord(key=key, subkey=self.key.peer_id, value=value, expires_at_s=record.expires_at_s)
        )

    async def join(self) -> BlockSpan:
        await asyncio.sleep(self.rng.uniform(0.0, 0.5))
        await self.discovery.refresh()
        span = await settle(self.discovery, MODEL, self.choose, self.announce, rng=self.rng)
        await self.announce(span, settled=True)
        return span


@pytest.mark.parametrize("seed", range(8))
async def test_peers_that_join_at_the_same_time_cover_the_model(seed: int) -> None:
    began_s = asyncio.get_running_loop().time()
    network = MemoryNetwork(latency_s=0.05, clock=lambda: 1e9 + asyncio.get_running_loop().time())
    joiners = [Joiner(network, 1 + 3 * seed + number) for number in range(3)]
    spans = sorted(await asyncio.gather(*(joiner.join() for joiner in joiners)))
    assert [str(span) for span in spans] == ["0:10", "10:20", "20:30"]
    assert asyncio.get_running_loop().time() - began_s < 4 * 1.5 * SETTLE_S + 1


async def test_more_peers_than_rounds_settle_all_the_same() -> None:
    network = MemoryNetwork(latency_s=0.05, clock=lambda: 1e9 + asyncio.get_running_loop().time())
    spans = await asyncio.gather(*(Joiner(network, number).join() for number in range(1, 3 * MAX_ROUNDS)))
    counts = [sum(block in span for span in spans) for block in range(30)]
    assert min(counts) >= MAX_ROUNDS - 3, counts

"""The collector over wires of memory: real records, links and calls; only waits are shortened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from peers.transport.links import Links
from peers.transport.memory import MemoryNetwork
from peers.wire.messages import PROTOCOL_VERSION, Pong, Status
from routing.errors import Unavailable
from routing.identity import SigningKey
from routing.records import PeerState, index_key, sign_record
from routing.router import Router
from routing.store import StoredRecord
from swarm.dashboard import collector as module
from swarm.dashboard.collector import Collector
from swarm.dashboard.core import Core
from swarm.dashboard.feed import Feed
from swarm.dashboard.history import EventQuery, History
from swarm.dashboard.schemas import EventKind, State
from swarm.network import ClientNode
from tests.helpers.memory_swarm import MemoryNode, new_key
from tests.peers.transport.nodes import announcement


class World:
    """A network of memory, a collector that runs in it, and what it knows."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.closed: list[MemoryNode] = []
        self.core = Core(Router(), network="test", now_s=time.time())
        self.history = History.open(None, "test")
        self.feed = Feed(self.core, epoch="e")
        self.entry = self.network.transport(new_key().peer_id)
        """Of a node that serves nothing."""
        self.collector = Collector(
            self.enter, self.core, entries=self.entry.addresses, feed=self.feed, history=self.history
        )
        self.entered: list[MemoryNode] = []
        self.refusals = 0
        self.sequence = 1

    async def enter(self, router: Router) -> ClientNode:
        if self.refusals:
            self.refusals -= 1
            raise Unavailable("the entry nodes are down")
        self.entered.append(MemoryNode(self.network, new_key(), client_mode=True))
        return ClientNode(self.entered[-1], network="test", router=router)

    async def peer(self) -> SigningKey:
        key = new_key()
        links = Links(self.network.transport(key.peer_id), network="test", software="test")
        links.pong = lambda nonce: Pong(nonce=nonce, sessions=3)
        links.status = lambda: Status(uptime_s=9.0)
        await links.serve()
        await self.announce(key)
        return key

    async def announce(self, key: SigningKey, state: PeerState = PeerState.ONLINE) -> None:
        self.sequence += 1
        transport = self.network.find(key.peer_id)
        assert transport is not None
        record = replace(
            announcement(key, expires_at_s=round(time.time() + 100, 3), sequence=self.sequence),
            addresses=transport.addresses,
            protocol=PROTOCOL_VERSION,
            state=state,
        )
        under = index_key("test", key.peer_id)
        value = sign_record(record, under, key)
        await self.network.store(key.peer_id).put(
            StoredRecord(key=under, subkey=key.peer_id, value=value, expires_at_s=record.expires_at_s)
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110  # a file that was written tells nobody
                await asyncio.sleep(0.005)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    # real time, because records are verified in a thread; so nothing here may wait for long
    for name, seconds in (("READ_S", 0.02), ("TICK_S", 0.01), ("CALL_S", 0.05), ("ENTER_AGAIN_S", 0.02)):
        monkeypatch.setattr(module, name, seconds)
    world = World()
    await Links(world.entry, network="test", software="test").serve()
    yield world
    world.history.close()
    for key in list(world.network._transports.values()):
        await key.close()


@pytest.fixture
async def running(world: World) -> AsyncIterator[World]:
    task = asyncio.create_task(world.collector.run())
    yield world
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_readers_hear_of_news(running: World) -> None:
    async with asyncio.timeout(60):
        waiting = asyncio.create_task(running.collector.news())
        key = await running.peer()
        await waiting
        while key.peer_id not in running.feed.snapshot().data:
            await running.collector.news()


async def test_who_announces_is_called_and_who_falls_silent_keeps_its_last_answer(running: World) -> None:
    key = await running.peer()
    await running.until(lambda: any(row.status_at_s for row in running.core.rows()))
    (row,) = running.core.rows()
    assert (row.sessions, row.state, row.problem) == (3, State.ONLINE, "")
    running.network.cut(key.peer_id)
    await running.until(lambda: running.core.rows()[0].problem != "")
    (row,) = running.core.rows()
    assert (row.sessions, row.state) == (3, State.ONLINE)
    assert row.status_at_s is not None
    running.network.heal(key.peer_id)
    await running.until(lambda: running.core.rows()[0].problem == "")
    assert min(running.collector.calls.values()) > 0


async def test_a_goodbye_is_seen_and_kept_without_waiting_for_the_record_to_expire(running: World) -> None:
    key = await running.peer()
    await running.until(lambda: running.core.state(key.peer_id) is State.ONLINE)
    await running.announce(key, PeerState.DRAINING)
    running.network.cut(key.peer_id)
    await running.until(lambda: running.core.state(key.peer_id) is State.LEFT)
    query = EventQuery(kinds=[EventKind.LEFT])
    await running.until(lambda: bool(running.history.events(query)))
    assert running.history.events(query)[0].peer_id == key.peer_id


async def test_a_network_that_cannot_be_entered_or_is_lost_is_tried_again_with_all_that_is_known(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.refusals = 3
    key = await world.peer()
    task = asyncio.create_task(world.collector.run())
    await world.until(lambda: "the entry nodes are down" in world.core.problem)
    await world.until(lambda: world.core.problem == "" and world.core.state(key.peer_id) is not None)
    assert caplog.text.count("the entry nodes are down") == 1, "said once"
    world.refusals = 1
    world.entered[0].died.set_exception(Unavailable("the daemon ended"))
    await world.until(lambda: len(world.entered) == 2)
    await world.until(lambda: world.core.problem == "")
    assert world.core.state(key.peer_id) is State.ONLINE
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_empty_index_is_believed_while_somebody_answers(running: World) -> None:
    entry = running.entry
    await running.until(lambda: running.core.read_at_s is not None)
    assert (running.core.problem, list(running.core.peers())) == ("", [])
    key = await running.peer()
    await running.until(lambda: running.core.state(key.peer_id) is State.ONLINE)
    running.network.table._entries.clear()
    running.network.cut(key.peer_id)
    await running.until(lambda: running.core.rows()[0].problem != "")
    read_at_s = running.core.read_at_s
    await running.until(lambda: running.core.read_at_s != read_at_s)
    assert running.core.problem == "", "the entry node answers"
    running.network.cut(entry.peer_id)
    await running.until(lambda: "nobody answers" in running.core.problem)
    assert running.core.state(key.peer_id) is State.ONLINE, "who hears nobody concludes nothing"
    running.network.heal(entry.peer_id)
    await running.until(lambda: running.core.problem == "")


async def test_a_thousand_are_called_in_turn_and_a_few_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALLS_PER_S", 1000.0)
    under_way, most, called, all_taken = 0, 0, list[str](), asyncio.Event()

    class Slow:
        async def ping(self, peer: str, *_: object, **__: object) -> tuple[float, Pong]:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            called.append(peer)
            if under_way == module.MAX_CALLS:
                all_taken.set()
            await all_taken.wait()
            under_way -= 1
            return 0.01, Pong(nonce=1)

    now_s = time.time()
    records = [replace(announcement(new_key()), sequence=2) for _ in range(120)]
    world.core.read(records, now_s)
    world.core.advance(now_s)
    client = type("Client", (), {"links": Slow()})()
    calling = asyncio.create_task(world.collector._calling(client))
    async with asyncio.timeout(60):
        while len(called) < 120:  # noqa: ASYNC110  # the calls are made up: nothing tells
            await asyncio.sleep(0.01)
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    assert len(set(called[:120])) == 120, "everybody once before anybody twice"
    assert most == module.MAX_CALLS

"""Discovery: what is found, what is measured, and how soon a gap is named."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from peers import discovery as module
from peers.discovery import Discovery
from peers.errors import PeerSilent
from peers.transport.links import Links
from peers.transport.memory import MemoryNetwork, MemoryStore
from routing.errors import NoRoute, Unavailable
from routing.ids import BlockSpan, BlockSpans
from routing.records import index_key, model_key, sign_record
from routing.router import Router
from routing.routes import RouteRequest
from routing.store import StoredRecord
from tests.helpers.late_loop import LateLoop, at_once, run
from tests.peers.transport.nodes import MODEL, announcement, signing_key

READER, PEER, OTHER = (signing_key(number) for number in (1, 2, 3))
REQUEST = RouteRequest(model=MODEL, num_blocks=30, bytes_per_token=100)


class Store(MemoryStore):
    """Counts the looks, and may fall silent or hand out nonsense."""

    def __init__(self, network: MemoryNetwork) -> None:
        super().__init__(network, READER.peer_id)
        self.looks: asyncio.Queue[Sequence[str]] = asyncio.Queue()
        self.silent = False
        self.takes_s = 0.0
        self.nonsense: list[StoredRecord] = []

    async def get(self, keys: Sequence[str]) -> list[StoredRecord]:
        self.looks.put_nowait(keys)
        if self.silent:
            await asyncio.Event().wait()
        await asyncio.sleep(self.takes_s)
        return [*self.nonsense, *await super().get(keys)]


class Reader:
    """A node that reads. The clock by which records expire and peers are left alone stands still unless it is set."""

    def __init__(self) -> None:
        self.now_s = 1_750_000_000.0
        self.network = MemoryNetwork(clock=lambda: self.now_s)
        self.store = Store(self.network)
        self.links = Links(self.network.transport(READER.peer_id), network="test", software="test")
        self.discovery = Discovery(
            store=self.store, router=Router(), links=self.links, network="test", clock=self.network.clock
        )

    async def announce(self, number: int, start: int, end: int) -> None:
        """A peer that also answers pings."""
        key = signing_key(number)
        transport = self.network.transport(key.peer_id)
        await Links(transport, network="test", software="test").serve()
        mine = replace(
            announcement(key, expires_at_s=self.now_s + 100),
            spans=BlockSpans.of(BlockSpan(start, end)),
            addresses=transport.addresses,
        )
        for name in (model_key("test", MODEL, key.peer_id), index_key("test", key.peer_id)):
            record = StoredRecord(
                key=name, subkey=key.peer_id, value=sign_record(mine, name, key), expires_at_s=mine.expires_at_s
            )
            await self.network.store(key.peer_id).put(record)

    async def close(self) -> None:
        await self.links.close()
        for key in (READER, PEER, OTHER):
            if (transport := self.network.find(key.peer_id)) is not None:
                await transport.close()


@pytest.fixture
async def reader(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reader]:
    # real time, because records are verified in a thread; so nothing here may wait for long
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.01)
    made = Reader()
    yield made
    await made.close()


async def test_a_route_is_found_as_soon_as_the_missing_blocks_are_announced(reader: Reader) -> None:
    await reader.announce(2, 0, 10)
    waiting = asyncio.create_task(reader.discovery.route(REQUEST, patience_s=60.0))
    for _ in range(3):
        await reader.store.looks.get()
    assert not waiting.done()
    await reader.announce(3, 10, 30)
    route = await waiting
    assert [(hop.peer_id, str(hop.span)) for hop in route.hops] == [(PEER.peer_id, "0:10"), (OTHER.peer_id, "10:30")]


@pytest.mark.parametrize("silent", [False, True])
async def test_a_gap_is_named_when_patience_ends_also_while_the_dht_is_silent(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    assert module.NO_ROUTE_PATIENCE_S < 5.0, "what a user is promised"
    monkeypatch.setattr(module, "NO_ROUTE_PATIENCE_S", 1e9)
    await reader.announce(2, 0, 10)
    reader.discovery.watch(MODEL)
    await reader.discovery.refresh()
    reader.store.silent = silent
    with pytest.raises(NoRoute) as caught:
        await reader.discovery.route(REQUEST, patience_s=0.2)
    assert caught.value.missing == ((10, 30),)
    await reader.discovery._tasks.close()


def test_nothing_is_missing_before_the_records_were_read_however_long_this_node_stood_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(loop: LateLoop) -> None:
        reader = Reader()
        await reader.announce(2, 0, 30)
        reader.store.takes_s = 0.2
        loop.call_later(0.1, loop.miss, 60.0)
        route = await reader.discovery.route(REQUEST, patience_s=1.0)
        assert [hop.peer_id for hop in route.hops] == [PEER.peer_id]
        await reader.discovery._tasks.close()
        await reader.close()

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    run(work)


async def test_who_waits_for_longer_is_told_in_the_log_and_gets_a_peer_that_was_left_alone_meanwhile(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "NO_ROUTE_PATIENCE_S", 0.1)
    await reader.announce(2, 0, 30)
    reader.discovery.watch(MODEL)
    await reader.discovery.refresh()
    reader.discovery.router.on_failure(PEER.peer_id, reader.now_s, "refused")
    with pytest.raises(NoRoute, match="backed off"):
        await reader.discovery.route(REQUEST)
    assert "s more: no route" not in caplog.text
    waiting = asyncio.create_task(reader.discovery.route(REQUEST, patience_s=60.0))
    while reader.discovery.waited_for(MODEL) is None:
        assert not waiting.done()
        await asyncio.sleep(0)
    assert "backed off" in str(reader.discovery.waited_for(MODEL))
    reader.now_s += 3.0
    route = await waiting
    assert [hop.peer_id for hop in route.hops] == [PEER.peer_id]
    assert caplog.text.count("s more: no route") == 1
    assert reader.discovery.waited_for(MODEL) is None
    await reader.discovery._tasks.close()


async def test_bad_records_are_dropped_one_by_one(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await reader.announce(2, 0, 30)
    reader.store.nonsense = [
        StoredRecord(key="k", subkey=OTHER.peer_id, value=b"garbage", expires_at_s=reader.now_s + 100)
    ]
    assert [found.peer_id for found in await reader.discovery.read_index()] == [PEER.peer_id]
    assert f"dropped a record of {OTHER.peer_id}" in caplog.text


async def test_callers_at_the_same_time_share_one_look(reader: Reader) -> None:
    reader.discovery.watch(MODEL)
    await asyncio.gather(*(reader.discovery.refresh() for _ in range(10)))
    assert reader.store.looks.qsize() == 1


async def test_peers_are_measured_and_the_silent_ones_are_left_alone(reader: Reader) -> None:
    await reader.announce(2, 0, 30)
    await reader.announce(3, 0, 30)
    reader.discovery.watch(MODEL)
    await reader.discovery.refresh()
    now_s, router = reader.now_s, reader.discovery.router
    reader.network.cut(OTHER.peer_id)
    await reader.discovery.measure(router.snapshot(now_s).peers)
    assert router.rtt_s(PEER.peer_id, now_s) is not None
    assert router.rtt_s(OTHER.peer_id, now_s) is None
    assert [hop.peer_id for hop in (await reader.discovery.route(REQUEST)).hops] == [PEER.peer_id]
    streams = len(reader.network._streams)
    await reader.discovery.measure(router.snapshot(now_s).peers)
    assert len(reader.network._streams) == streams, "not again within half a minute"


async def test_a_peer_that_answers_again_is_used_at_once_where_nobody_else_holds_its_blocks(reader: Reader) -> None:
    await reader.announce(2, 0, 30)
    reader.discovery.watch(MODEL)
    await reader.discovery.refresh()
    router, now_s = reader.discovery.router, reader.now_s
    for second in range(6):
        router.on_failure(PEER.peer_id, now_s + 20 * second, "silent", unreachable=True)
    reader.network.cut(PEER.peer_id)
    waiting = asyncio.create_task(reader.discovery.route(REQUEST, patience_s=60.0))
    await reader.store.looks.get()
    await reader.store.looks.get()
    reader.network.heal(PEER.peer_id)
    assert [hop.peer_id for hop in (await waiting).hops] == [PEER.peer_id]
    await reader.discovery._tasks.close()


async def test_a_ping_that_is_missed_says_little_and_a_refused_connection_all(reader: Reader) -> None:
    for number in (2, 3):
        await reader.announce(number, 0, 30)
    reader.discovery.watch(MODEL)
    await reader.discovery.refresh()
    router, peers = reader.discovery.router, reader.discovery.router.snapshot(reader.now_s).peers
    lost, gone = sorted(peers, key=lambda peer: peer.peer_id != PEER.peer_id)
    reader.network.cut(gone.peer_id)
    reader.network.partition([lost.peer_id], [reader.discovery.peer_id])
    left_alone = []
    for _ in range(module.MISSED_MAX):
        for peer in (lost, gone):
            await reader.discovery._ping(peer, timeout_s=0.05)
        left_alone.append({peer.peer_id for peer in router.silent(reader.now_s)})
    assert left_alone == [{gone.peer_id}] * (module.MISSED_MAX - 1) + [{gone.peer_id, lost.peer_id}]


@pytest.mark.parametrize("late", [False, True])
async def test_peers_that_may_only_be_late_are_waited_for_and_those_that_are_gone_are_not(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr(module, "LATE_PATIENCE_S", 60.0)
    await reader.announce(2, 0, 30)
    reader.discovery.watch(MODEL)
    await reader.discovery.refresh()
    now_s = reader.now_s
    for second in (-30, 0):
        reader.discovery.router.on_failure(PEER.peer_id, now_s + second, "silent", unreachable=True, late=late)
    reader.network.cut(PEER.peer_id)
    waiting = asyncio.create_task(reader.discovery.route(REQUEST, patience_s=0.1))
    await asyncio.wait([waiting], timeout=0.6)
    if late:
        assert not waiting.done()
        reader.network.heal(PEER.peer_id)
        assert [hop.peer_id for hop in (await waiting).hops] == [PEER.peer_id]
    else:
        with pytest.raises(NoRoute):
            await waiting
    await reader.discovery._tasks.close()


async def test_a_node_that_cannot_dial_for_a_moment_blames_nobody_and_goes_on(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    await reader.announce(2, 0, 30)
    reader.discovery.watch(MODEL)
    await reader.discovery.refresh()

    async def ping(*_: object, **__: object) -> None:
        raise Unavailable("no descriptors left")

    monkeypatch.setattr(reader.links, "ping", ping)
    await reader.discovery.measure(reader.discovery.router.snapshot(reader.now_s).peers)
    assert [hop.peer_id for hop in (await reader.discovery.route(REQUEST)).hops] == [PEER.peer_id]


async def test_running_leaves_nothing_behind(reader: Reader) -> None:
    before = asyncio.all_tasks()
    reader.store.silent = True
    reader.discovery.watch(MODEL)
    running = asyncio.create_task(reader.discovery.run())
    await reader.store.looks.get()
    running.cancel()
    await asyncio.wait([running])
    assert asyncio.all_tasks() == before


@pytest.mark.looptime
async def test_it_looks_so_often_that_a_goodbye_is_read_within_five_seconds_however_long_pings_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, looked_s = MemoryNetwork(), list[float]()
    links = Links(network.transport(READER.peer_id), network="test", software="test")
    made = Discovery(store=Store(network), router=Router(), links=links, network="test")
    loop = asyncio.get_running_loop()

    async def look() -> None:
        looked_s.append(loop.time())

    async def measure(_: object) -> None:
        await asyncio.sleep(module.PING_TIMEOUT_S)

    monkeypatch.setattr(made, "refresh", look)
    monkeypatch.setattr(made, "measure", measure)
    running = asyncio.create_task(made.run())
    await asyncio.sleep(20)
    running.cancel()
    assert looked_s == [0.0, 4.5, 9.0, 13.5, 18.0]


async def test_those_that_did_not_answer_are_asked_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    network, clock, asked = MemoryNetwork(), [0.0], list[tuple[float, str]]()
    links = Links(network.transport(READER.peer_id), network="test", software="test")
    made = Discovery(store=Store(network), router=Router(), links=links, network="test", clock=lambda: clock[0])
    known = [announcement(key, expires_at_s=2000.0) for key in (PEER, OTHER)]

    async def ping(peer: str, *_: object, **__: object) -> tuple[float, None]:
        asked.append((clock[0], peer))
        if peer == OTHER.peer_id:
            raise PeerSilent("nothing is heard")
        return 0.01, None

    monkeypatch.setattr(links, "ping", ping)
    looks_s = [1000.0, 1000.0 + module.READ_EVERY_S - 0.1, 1000.0 + 2 * module.READ_EVERY_S]
    for clock[0] in looks_s:
        await made.measure(known)
    assert [peer for _, peer in asked].count(PEER.peer_id) == 1
    assert [at_s for at_s, peer in asked if peer == OTHER.peer_id] == looks_s

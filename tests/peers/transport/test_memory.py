"""The twin's own powers: latency, death, silence and chance, on a virtual clock."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from peers.errors import PeerUnreachable, StreamClosed
from peers.transport.base import Stream
from peers.transport.memory import MemoryNetwork, MemoryTransport
from routing.errors import CallerError, Unavailable
from routing.ids import PeerId
from tests.peers.transport.nodes import record, signing_key

pytestmark = pytest.mark.looptime

ONE, OTHER, THIRD = (signing_key(number).peer_id for number in (1, 2, 3))


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def pair(network: MemoryNetwork) -> tuple[MemoryTransport, MemoryTransport]:
    one, other = network.transport(ONE), network.transport(OTHER)
    await other.serve("echo", echo)
    return one, other


async def dial(one: MemoryTransport, other: PeerId = OTHER, timeout_s: float = 5) -> Stream:
    return await one.open_stream(other, (), "echo", timeout_s=timeout_s)


async def test_a_frame_takes_the_latency_of_its_direction() -> None:
    network = MemoryNetwork(latency_s=lambda sender, receiver: 0.1 if sender == ONE else 0.3)
    one, _ = await pair(network)
    stream = await dial(one)
    started_s = now_s()
    await stream.send(b"x")
    await stream.receive()
    assert now_s() - started_s == pytest.approx(0.4)


async def test_a_falling_latency_does_not_reorder_frames() -> None:
    delays = iter([0.5, 0.0, 0.0])
    network = MemoryNetwork()
    one, _ = await pair(network)
    stream = await dial(one)
    network.latency_s = lambda sender, receiver: next(delays) if sender == ONE else 0.0
    for number in (b"1", b"2", b"3"):
        await stream.send(number)
    assert [bytes(await stream.receive()) for _ in range(3)] == [b"1", b"2", b"3"]


async def test_a_dead_peer_breaks_its_streams_and_cannot_be_dialled_until_it_is_back() -> None:
    network = MemoryNetwork()
    one, _ = await pair(network)
    stream = await dial(one)
    receiving = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    network.cut(OTHER)
    with pytest.raises(StreamClosed, match="broke"):
        await receiving
    with pytest.raises(PeerUnreachable, match="refused"):
        await dial(one)
    network.heal(OTHER)
    with pytest.raises(StreamClosed):
        await stream.send(b"x")
    fresh = await dial(one)
    await fresh.send(b"x")
    assert await fresh.receive() == b"x"


async def test_a_partition_is_silent_and_delivers_late() -> None:
    network = MemoryNetwork(latency_s=0.01)
    one, _ = await pair(network)
    third = network.transport(THIRD)
    await third.serve("echo", echo)
    stream = await dial(one)
    network.partition([ONE], [OTHER])
    await stream.send(b"x")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(60):
            await stream.receive()
    started_s = now_s()
    with pytest.raises(PeerUnreachable, match="in time"):
        await dial(one, timeout_s=3)
    assert now_s() - started_s == pytest.approx(3)
    await (await dial(one, THIRD)).send(b"in no group")
    network.partition()
    assert await stream.receive() == b"x"


async def test_loss_breaks_the_same_frame_whenever_the_seed_is_the_same() -> None:
    async def frames_until_loss(seed: int) -> int:
        network = MemoryNetwork(loss=0.05, rng=random.Random(seed))
        one, _ = await pair(network)
        stream = await dial(one)
        for count in itertools.count():
            try:
                await stream.send(b"x")
                await stream.receive()
            except StreamClosed:
                return count
        raise AssertionError

    counts = [await frames_until_loss(seed) for seed in range(6)]
    assert counts == [await frames_until_loss(seed) for seed in range(6)]
    assert len(set(counts)) > 1


async def test_the_end_of_a_stream_travels_behind_its_frames() -> None:
    network = MemoryNetwork(latency_s=0.2)
    one, other = network.transport(ONE), network.transport(OTHER)
    ended_at_s: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def read(stream: Stream) -> None:
        assert await stream.receive() == b"last"
        try:
            await stream.receive()
        finally:
            ended_at_s.set_result(now_s())

    await other.serve("echo", read)
    stream = await dial(one)
    closed_at_s = now_s()
    await stream.send(b"last")
    await stream.close()
    assert await ended_at_s == pytest.approx(closed_at_s + 0.2)


async def test_a_node_that_leaves_cancels_its_handlers_and_frees_its_place() -> None:
    network = MemoryNetwork()
    one, other = await pair(network)
    stream = await dial(one)
    with pytest.raises(CallerError, match="already"):
        network.transport(OTHER)
    await other.close()
    with pytest.raises(StreamClosed):
        await stream.receive()
    with pytest.raises(PeerUnreachable):
        await dial(one)
    network.transport(OTHER)


async def test_the_store_takes_a_round_trip_and_is_out_of_reach_for_the_dead() -> None:
    network = MemoryNetwork(latency_s=0.05)
    mine = record(signing_key(1))
    store = network.store(ONE)
    started_s = now_s()
    await store.put(mine)
    assert await network.store(OTHER).get([mine.key]) == [mine]
    assert now_s() - started_s == pytest.approx(0.2)
    network.cut(ONE)
    with pytest.raises(Unavailable):
        await store.put(mine)
    assert await store.get([mine.key]) == []

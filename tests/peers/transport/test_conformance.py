"""What `peers.transport.base` and `routing.store` promise, on the memory twin and on libp2p alike."""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial

import pytest
import pytest_asyncio

from peers.errors import PeerSilent, PeerUnreachable, ProtocolError, StreamClosed
from peers.transport.base import MAX_FRAME_BYTES, MAX_STREAMS_PER_PEER, Handler, Rest, Stream
from peers.transport.hivemind_p2p import HivemindNode, NodeConfig
from peers.transport.memory import MemoryNetwork
from routing.errors import CallerError, InvalidAddress, Unavailable
from routing.records import MAX_RECORD_BYTES, ModelId, index_key, index_keys, model_key, model_keys
from tests.peers.transport.nodes import MODEL, NETWORK, Node, World, record, signing_key

pytestmark = pytest.mark.asyncio(loop_scope="module")

_numbers = itertools.count()


@contextlib.asynccontextmanager
async def memory_world() -> AsyncIterator[World]:
    network = MemoryNetwork()

    def node(number: int, *, client_mode: bool = False) -> Node:
        key = signing_key(number)
        transport = network.transport(key.peer_id, client_mode=client_mode)
        return Node(key=key, transport=transport, store=network.store(key.peer_id))

    async def forge_frame(stream: Stream, size: int) -> None:
        stream.other.arrive(bytes(size))  # type: ignore[attr-defined]

    nodes = [node(1), node(2), node(3, client_mode=True), node(4)]
    network.cut(nodes[3].peer_id)
    yield World(one=nodes[0], other=nodes[1], dialler=nodes[2], unreachable=nodes[3], forge_frame=forge_frame)
    for one in nodes:
        await one.transport.close()


@contextlib.asynccontextmanager
async def hivemind_world() -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:

        async def node(number: int, initial_peers: tuple[str, ...] = (), client_mode: bool = False) -> Node:
            key = signing_key(number)
            config = NodeConfig(network=NETWORK, signing_key=key, initial_peers=initial_peers, client_mode=client_mode)
            created = await stack.enter_async_context(await HivemindNode.create(config))
            return Node(key=key, transport=created.transport, store=created.store)

        async def forge_frame(stream: Stream, size: int) -> None:
            stream._transport.write(size.to_bytes(4, "big") + b"x")  # type: ignore[attr-defined]

        one = await node(1)
        other = await node(2, one.transport.addresses)
        dialler = await node(3, one.transport.addresses, client_mode=True)
        async with await HivemindNode.create(NodeConfig(network=NETWORK, signing_key=signing_key(4))) as gone:
            unreachable = Node(key=gone.signing_key, transport=gone.transport, store=gone.store)
        yield World(one=one, other=other, dialler=dialler, unreachable=unreachable, forge_frame=forge_frame)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["memory", "hivemind"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with {"memory": memory_world, "hivemind": hivemind_world}[request.param]() as world:
        yield world


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def serve(node: Node, handler: Handler) -> str:
    """The name of a protocol that no other test uses."""
    protocol = f"test-{next(_numbers)}"
    await node.transport.serve(protocol, handler)
    return protocol


async def dial(opener: Node, acceptor: Node, protocol: str) -> Stream:
    addresses = acceptor.transport.addresses
    return await opener.transport.open_stream(acceptor.peer_id, addresses, protocol, timeout_s=10)


async def connected(world: World) -> tuple[Stream, Stream]:
    """A stream from `other` to `one`: the opener's end and the acceptor's."""
    accepted: asyncio.Queue[Stream] = asyncio.Queue()
    released = asyncio.Event()

    async def hold(stream: Stream) -> None:
        accepted.put_nowait(stream)
        await released.wait()

    near = await dial(world.other, world.one, await serve(world.one, hold))
    await near.send(b"hello")
    far = await accepted.get()
    assert await far.receive() == b"hello"
    return near, far


# Streams.


async def test_both_ends_know_who_the_other_is(world: World) -> None:
    near, far = await connected(world)
    assert (near.remote, far.remote) == (world.one.peer_id, world.other.peer_id)
    await near.close()
    await far.close()


async def test_frames_arrive_whole_and_in_order(world: World) -> None:
    stream = await dial(world.other, world.one, await serve(world.one, echo))
    sizes = [0, 1, 3, 4, 2500, 16_379, 16_380, 16_381, 16_384, 65_535, 65_536, 65_537, 300_000, 0, 7]
    frames = [os.urandom(size) for size in sizes]

    async def send_all() -> None:
        for frame in frames:
            await stream.send(frame)

    sending = asyncio.create_task(send_all())
    assert [bytes(await stream.receive()) for _ in frames] == frames
    await sending
    await stream.close()


async def test_each_frame_is_handled_in_order_behind_what_those_before_it_left_to_do(world: World) -> None:
    near, far = await connected(world)
    handled: list[bytes] = []

    def handle(frame: bytes | bytearray) -> Rest | None:
        handled.append(bytes(frame))
        return partial(later, bytes(frame)) if int(frame) % 3 == 0 else None

    async def later(frame: bytes) -> None:
        await asyncio.sleep(0)
        handled.append(b"rest of " + frame)
        if frame == b"6":
            raise PeerSilent("enough")

    for number in range(10):
        await near.send(str(number).encode())
    with pytest.raises(PeerSilent, match="enough"):
        await far.each(handle)
    assert handled == [b"0", b"rest of 0", b"1", b"2", b"3", b"rest of 3", b"4", b"5", b"6", b"rest of 6"]
    assert await far.receive() == b"7"
    await near.close()
    with pytest.raises(StreamClosed):
        await far.each(lambda _: None)
    await far.close()


async def test_the_parts_of_a_frame_are_joined_whatever_their_type(world: World) -> None:
    stream = await dial(world.other, world.one, await serve(world.one, echo))
    floats = array.array("f", range(50_000))
    for values in (floats[:10], floats):
        await stream.send(b"head", bytearray(b"er"), memoryview(b""), memoryview(values))
        assert await stream.receive() == b"header" + values.tobytes()
    await stream.close()


async def test_a_frame_of_twenty_megabytes_comes_back_unchanged(world: World) -> None:
    stream = await dial(world.other, world.one, await serve(world.one, echo))
    frame = os.urandom(20 * 1024 * 1024)
    await stream.send(frame)
    assert await stream.receive() == frame
    await stream.close()


async def test_a_frame_above_the_limit_is_refused_by_the_receiver(world: World) -> None:
    near, far = await connected(world)
    await near.send(b"before")
    await world.forge_frame(near, MAX_FRAME_BYTES + 1)
    assert await far.receive() == b"before"
    with pytest.raises(ProtocolError, match=str(MAX_FRAME_BYTES)):
        await far.receive()
    with pytest.raises(StreamClosed):
        await near.receive()


async def test_a_frame_above_the_limit_is_not_sent(world: World) -> None:
    stream = await dial(world.other, world.one, await serve(world.one, echo))
    with pytest.raises(CallerError, match="limit"):
        await stream.send(bytes(MAX_FRAME_BYTES), b"x")
    await stream.send(b"still usable")
    assert await stream.receive() == b"still usable"
    await stream.close()


async def test_what_was_sent_before_closing_arrives_and_then_the_stream_ends(world: World) -> None:
    near, far = await connected(world)
    large = os.urandom(3_000_000)
    await far.send(b"never read by the other side")
    sending = asyncio.create_task(near.send(large))
    assert await far.receive() == large
    await sending
    await near.send(b"last")
    closing = asyncio.create_task(near.close())
    assert await far.receive() == b"last"
    for _ in range(2):
        with pytest.raises(StreamClosed):
            await far.receive()
    with pytest.raises(StreamClosed):
        await far.send(b"too late")
    await closing
    await near.close()
    with pytest.raises(StreamClosed):
        await near.send(b"too late")


async def test_closing_wakes_the_task_that_receives(world: World) -> None:
    near, far = await connected(world)
    receiving = asyncio.create_task(near.receive())
    await asyncio.sleep(0)
    await near.close()
    with pytest.raises(StreamClosed):
        await receiving
    await far.close()


async def test_a_cancelled_receive_loses_no_frame(world: World) -> None:
    near, far = await connected(world)
    receiving = asyncio.create_task(far.receive())
    await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.wait([receiving])
    await near.send(b"kept")
    assert await far.receive() == b"kept"
    await near.close()
    await far.close()


async def test_a_reader_that_does_not_read_stops_the_sender(world: World) -> None:
    near, far = await connected(world)
    frame = bytes(1024 * 1024)
    sent = 0

    async def send_all() -> None:
        nonlocal sent
        for _ in range(64):
            await near.send(frame)
            sent += 1

    sending = asyncio.create_task(send_all())
    progress = -1
    while progress < sent:
        progress = sent
        await asyncio.wait([sending], timeout=0.3)
    assert sent < 64
    for _ in range(64):
        assert len(await far.receive()) == len(frame)
    await sending
    await near.close()
    await far.close()


async def test_frames_of_concurrent_senders_do_not_mix(world: World) -> None:
    near, far = await connected(world)
    frames = [bytes([number]) * (number * 7_001) for number in range(40)]
    sending = asyncio.gather(*(near.send(frame) for frame in frames))
    received = [bytes(await far.receive()) for _ in frames]
    await sending
    assert sorted(received) == sorted(frames)
    await near.close()
    await far.close()


async def test_many_streams_work_at_once_and_one_too_many_is_closed(world: World) -> None:
    protocol = await serve(world.one, echo)
    streams = [await dial(world.dialler, world.one, protocol) for _ in range(MAX_STREAMS_PER_PEER)]

    async def talk(stream: Stream, number: int) -> None:
        for round_number in range(5):
            message = f"{number}/{round_number}".encode() * 500
            await stream.send(message)
            assert await stream.receive() == message

    await asyncio.gather(*(talk(stream, number) for number, stream in enumerate(streams)))
    surplus = await dial(world.dialler, world.one, protocol)
    with pytest.raises(StreamClosed):
        await surplus.receive()
    other = await dial(world.other, world.one, protocol)
    await talk(other, 0)
    await asyncio.gather(*(stream.close() for stream in [*streams, other]))


async def test_a_handler_that_fails_ends_its_own_stream_only(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def fail_at_two(stream: Stream) -> None:
        while (await stream.receive()) != b"2":
            await stream.send(b"fine")
        raise RuntimeError("this handler has a bug")

    protocol = await serve(world.one, fail_at_two)
    doomed, healthy = await dial(world.other, world.one, protocol), await dial(world.other, world.one, protocol)
    await doomed.send(b"2")
    with pytest.raises(StreamClosed):
        await doomed.receive()
    await healthy.send(b"1")
    assert await healthy.receive() == b"fine"
    assert "this handler has a bug" in caplog.text
    await healthy.close()


# Peers.


async def test_a_node_that_only_dials_has_no_address_and_still_an_identity(world: World) -> None:
    async def who(stream: Stream) -> None:
        await stream.send(stream.remote.encode())

    stream = await dial(world.dialler, world.one, await serve(world.one, who))
    assert await stream.receive() == world.dialler.peer_id.encode()
    assert world.dialler.transport.addresses == ()
    await stream.close()


async def test_addresses_are_dialable_and_end_in_the_peer_id(world: World) -> None:
    assert world.one.transport.addresses
    assert all(address.endswith(f"/p2p/{world.one.peer_id}") for address in world.one.transport.addresses)


async def test_an_unreachable_peer_is_reported_within_the_deadline(world: World) -> None:
    peer, addresses = world.unreachable.peer_id, world.unreachable.transport.addresses
    started_s = time.monotonic()
    with pytest.raises(PeerUnreachable, match=peer):
        await world.one.transport.open_stream(peer, addresses, "anything", timeout_s=20)
    assert time.monotonic() - started_s < 20


async def test_a_protocol_that_is_not_served_is_reported(world: World) -> None:
    with pytest.raises(PeerUnreachable):
        await dial(world.other, world.one, "nobody-serves-this")


async def test_another_peers_address_is_refused(world: World) -> None:
    with pytest.raises(InvalidAddress, match="not an address of"):
        await world.dialler.transport.open_stream(
            world.other.peer_id, world.one.transport.addresses, "anything", timeout_s=2
        )


async def test_a_protocol_is_served_once(world: World) -> None:
    protocol = await serve(world.one, echo)
    with pytest.raises(CallerError, match=protocol):
        await world.one.transport.serve(protocol, echo)


async def test_the_remote_ends_of_live_connections_can_be_seen(world: World) -> None:
    stream = await dial(world.other, world.one, await serve(world.one, echo))
    seen = await world.other.transport.observed_addresses(world.one.peer_id)
    assert f"{seen[0]}/p2p/{world.one.peer_id}" in world.one.transport.addresses
    assert await world.one.transport.observed_addresses(world.unreachable.peer_id) == ()
    await stream.close()


# Records.


async def test_a_record_is_found_by_others_under_its_keys(world: World) -> None:
    under_model = record(world.other.key)
    under_index = record(world.other.key, under=index_key(NETWORK, world.other.peer_id))
    await world.other.store.put(under_model)
    await world.other.store.put(under_index)
    for reader in (world.one, world.other, world.dialler):
        assert await reader.store.get(model_keys(NETWORK, MODEL)) == [under_model]
        assert await reader.store.get(index_keys(NETWORK)) == [under_index]
    assert await world.one.store.get(model_keys("elsewhere", MODEL)) == []
    assert await world.one.store.get([]) == []


async def test_a_peer_that_only_dials_can_announce_too(world: World) -> None:
    mine = record(world.dialler.key)
    await world.dialler.store.put(mine)
    assert mine in await world.one.store.get([mine.key])


async def test_a_renewed_record_is_seen_at_once(world: World) -> None:
    for sequence in range(100, 105):
        renewed = record(world.other.key, sequence=sequence)
        await world.other.store.put(renewed)
        assert renewed in await world.dialler.store.get([renewed.key])


@pytest.mark.parametrize(
    "forgery",
    [
        "signed by another",
        "another key",
        "another model's key",
        "plain value without a subkey",
        "another peer's subkey",
        "later expiry",
        "too far ahead",
        "expired",
        "older sequence",
        "same sequence with other content",
        "oversized",
    ],
)
async def test_what_is_not_this_peers_valid_record_is_refused(world: World, forgery: str) -> None:
    victim, attacker = world.one, world.other
    for node in (victim, attacker):
        sequence = time.time_ns()
        honest = record(node.key, sequence=sequence)
        await node.store.put(honest)
    theirs = record(attacker.key, sequence=sequence + 1)
    forged = {
        "signed by another": replace(honest, value=record(victim.key, sequence=sequence + 1).value),
        "another key": replace(theirs, key=model_key(NETWORK, MODEL, signing_key(77).peer_id)),
        "another model's key": replace(theirs, key=model_key(NETWORK, ModelId(b"x" * 32), attacker.peer_id)),
        "plain value without a subkey": replace(theirs, subkey=""),
        "another peer's subkey": replace(theirs, subkey=victim.peer_id),
        "later expiry": replace(honest, expires_at_s=honest.expires_at_s + 100),
        "too far ahead": record(attacker.key, sequence=sequence + 1, expires_at_s=time.time() + 4000),
        "expired": record(attacker.key, sequence=sequence + 1, expires_at_s=time.time() - 60),
        "older sequence": record(attacker.key, sequence=sequence - 1),
        "same sequence with other content": record(attacker.key, sequence=sequence, name="other"),
        "oversized": replace(theirs, value=theirs.value + bytes(MAX_RECORD_BYTES)),
    }[forgery]
    with pytest.raises(Unavailable):
        await attacker.store.put(forged)
    assert honest in await victim.store.get([honest.key])
    assert forged not in await victim.store.get([forged.key])


async def test_nobody_can_store_another_peers_record_not_even_a_valid_one(world: World) -> None:
    valid = record(world.one.key, sequence=time.time_ns())
    with pytest.raises(Unavailable):
        await world.other.store.put(valid)
    assert valid not in await world.dialler.store.get([valid.key])
    await world.one.store.put(valid)
    assert valid in await world.dialler.store.get([valid.key])

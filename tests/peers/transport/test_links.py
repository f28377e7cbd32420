"""Links over the memory twin and a virtual clock: handshake, lanes, requests, and every way to end."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import pytest

from peers.errors import PeerSilent, PeerUnreachable, ProtocolError, StreamClosed, VersionMismatch
from peers.transport import links as module
from peers.transport.base import Rest, Stream
from peers.transport.links import BULK, MAX_INBOUND_LINKS_PER_PEER, SMALL, STREAM_PROTOCOL, Link, Links
from peers.transport.memory import MemoryNetwork, MemoryTransport
from peers.transport.patience import RENEWALS_MAX
from peers.wire import codec
from peers.wire.messages import PROTOCOL_VERSION, AnyMessage, Close, Failed, Hello, Ping, Pong, Status, Step
from routing.errors import PeerError
from routing.ids import PeerId
from routing.router import Router
from tests.peers.transport.nodes import signing_key

pytestmark = pytest.mark.looptime

ONE, OTHER, THIRD = (signing_key(number).peer_id for number in (1, 2, 3))
SESSION = bytes(16)


def now_s() -> float:
    return asyncio.get_running_loop().time()


class Node:
    """Links of one peer that writes down what happens to it."""

    def __init__(
        self, network: MemoryNetwork, peer: PeerId, *, name: str = "test", max_bytes_per_s: int | None = None
    ) -> None:
        self.transport: MemoryTransport = network.transport(peer)
        software = f"software of {peer[-4:]}"
        self.links = Links(self.transport, network=name, software=software, max_bytes_per_s=max_bytes_per_s)
        self.received: list[tuple[Link, AnyMessage, int]] = []
        self.lost: list[Link] = []
        self.gate = asyncio.Event()
        """While it is closed, whoever sends a step waits."""
        self.gate.set()
        self.links.handle(Close, self._receive)
        self.links.handle(Step, self._receive)
        self.links.on_lost(self.lost.append)

    async def _receive(self, link: Link, message: AnyMessage, payload: memoryview) -> None:
        if isinstance(message, Step):
            await self.gate.wait()
        self.received.append((link, message, len(payload)))

    def numbers(self) -> list[int]:
        return [message.step for _, message, _ in self.received if isinstance(message, Step)]

    async def close(self) -> None:
        await self.links.close()
        await self.transport.close()


class World:
    def __init__(self) -> None:
        self.network = MemoryNetwork(latency_s=0.01)
        self.one, self.other = Node(self.network, ONE), Node(self.network, OTHER)

    async def dial(self) -> Link:
        return await self.one.links.to(OTHER, self.other.transport.addresses)

    async def raw(self, peer: MemoryTransport | None = None, **hello: Any) -> Stream:
        """A stream to the other node on which whatever a stranger likes was said for hello."""
        transport = peer or self.one.transport
        stream = await transport.open_stream(OTHER, (), STREAM_PROTOCOL, timeout_s=5)
        await stream.send(codec.encode(a_hello(**hello)))
        return stream

    def streams(self) -> int:
        return len(self.network._streams)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Whatever a test does, closing both nodes leaves no task and no stream behind."""
    before = asyncio.all_tasks() - {asyncio.current_task()}
    world = World()
    await world.other.links.serve()
    yield world
    world.other.gate.set()
    await world.one.close()
    await world.other.close()
    await asyncio.sleep(0.1)
    assert asyncio.all_tasks() - {asyncio.current_task()} == before
    assert world.streams() == 0


def a_hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "network": "test",
        "software": "stranger",
        "lane": SMALL,
        "instance": secrets.token_bytes(16),
        "time_s": time.time(),
    }
    return Hello(**fields | changes)


def step(number: int, size: int = 0) -> tuple[Step, bytes]:
    fields = {"first": 0, "count": 1, "want_from": 0, "dtype": "float32", "hidden": 1}
    return Step(session=SESSION, block=0, epoch=1, step=number, **fields), bytes(size)  # type: ignore[arg-type]


async def ended(stream: Stream) -> bool:
    """Reads what is left, until the stream ends."""
    try:
        async with asyncio.timeout(1):
            while True:
                await stream.receive()
    except StreamClosed:
        return True
    except TimeoutError:
        return False


# --- handshake ---


@pytest.mark.parametrize("lane", [SMALL, BULK])
async def test_what_is_sent_in_the_turn_in_which_a_lane_is_ready_overtakes_nothing_that_waited_for_it(
    world: World, lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a step would meet a gap at the next hop, and its session would be computed again everywhere."""
    tasks: list[asyncio.Task[None]] = []
    open_lane = world.one.links.open_lane

    async def send(number: int) -> None:
        message, payload = step(number)
        await (await world.dial()).send(message, payload, bulk=lane == BULK)

    async def opened(link: Link, name: str, **options: Any) -> None:
        await open_lane(link, name, **options)
        if name == lane:
            tasks.append(asyncio.create_task(send(4)))

    monkeypatch.setattr(world.one.links, "open_lane", opened)
    tasks += [asyncio.create_task(send(number)) for number in (1, 2, 3)]
    await asyncio.sleep(1.0)
    await asyncio.gather(*tasks)
    assert world.other.numbers() == [1, 2, 3, 4]


async def test_messages_arrive_with_their_authenticated_sender_and_can_be_answered(world: World) -> None:
    link = await world.dial()
    message, payload = step(1, 100)
    await link.send(message, payload)
    await link.send(Close(sessions=(SESSION,)))
    await asyncio.sleep(0.1)
    assert [(link.remote, message, size) for link, message, size in world.other.received] == [
        (ONE, message, 100),
        (ONE, Close(sessions=(SESSION,)), 0),
    ]
    back = world.other.received[0][0]
    assert not back.outbound
    await back.send(Close(sessions=()), bulk=True)  # before the dialler opened a bulk lane: on the lane there is
    await asyncio.sleep(0.1)
    assert [message for _, message, _ in world.one.received] == [Close(sessions=())]
    assert world.one.received[0][0] is link


async def test_a_version_mismatch_names_both_versions_at_both_ends(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stream = await world.raw(version=PROTOCOL_VERSION + 6)
    ((answer, _),) = codec.decode(await stream.receive())
    assert isinstance(answer, Hello)
    assert answer.version == PROTOCOL_VERSION, "the newer side can say what is wrong as well"
    assert await ended(stream)
    assert f"speaks protocol {PROTOCOL_VERSION + 6} (stranger)" in caplog.text
    assert f"this node speaks protocol {PROTOCOL_VERSION}" in caplog.text

    async def future(stream: Stream) -> None:
        await stream.receive()
        await stream.send(codec.encode(a_hello(version=PROTOCOL_VERSION + 6)))
        await stream.receive()

    third = world.network.transport(THIRD)
    await third.serve(STREAM_PROTOCOL, future)
    with pytest.raises(VersionMismatch, match=rf"protocol {PROTOCOL_VERSION + 6} .* protocol {PROTOCOL_VERSION} "):
        await world.one.links.to(THIRD)
    assert world.one.links.known(THIRD) is None
    await third.close()


async def test_a_node_of_another_network_is_refused_by_both_sides(world: World) -> None:
    third = Node(world.network, THIRD, name="elsewhere")
    with pytest.raises(ProtocolError, match=r"'elsewhere'.*'test'|'test'.*'elsewhere'"):
        await third.links.to(OTHER)
    await asyncio.sleep(0.1)
    assert world.streams() == 0
    assert world.other.links._inbound == {}
    await third.close()


@pytest.mark.parametrize(("skew_s", "said"), [(30.0, "30.0 s ahead"), (-7.0, "7.0 s behind"), (2.0, "")])
async def test_a_clock_that_is_off_is_named_once(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, skew_s: float, said: str
) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    for _ in range(2):
        await world.raw(time_s=1000.0 + skew_s)
    await asyncio.sleep(0.1)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == bool(said)
    assert all(said in warning and ONE in warning for warning in warnings)


async def test_a_node_knows_by_most_of_the_others_that_its_own_clock_is_off(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to_s = 1000.0
    monkeypatch.setattr("time.time", lambda: set_to_s)
    monkeypatch.setattr(module, "_steady_s", lambda: 5.0)
    strangers = [world.network.transport(signing_key(number).peer_id) for number in range(10, 15)]
    links = world.other.links
    for stranger, time_s in zip(strangers, (700.0, 701.0, 699.0, float("nan"), 5000.0), strict=True):
        await world.raw(stranger, time_s=time_s)
        await asyncio.sleep(0.1)
        if stranger is strangers[0]:
            assert links.clock_skew_s is None, "two clocks that differ: whose is wrong?"
    assert links.clock_skew_s == pytest.approx(299.5, abs=1.0), "one that is wrong itself is not believed"
    set_to_s -= 300.0
    assert links.clock_skew_s == pytest.approx(-0.5, abs=1.0), "as soon as it is set"
    monkeypatch.setattr(module, "_steady_s", lambda: 5.1 + module.SKEW_AGE_S)
    assert links.clock_skew_s is None
    for stranger in strangers:
        await stranger.close()


@pytest.mark.parametrize("time_s", [float("nan"), float("inf"), -1e300])
async def test_an_absurd_clock_harms_nobody(world: World, time_s: float) -> None:
    await world.raw(time_s=time_s)
    await world.one.links.ping(OTHER)


async def test_a_stream_that_says_something_else_or_nothing_is_closed(world: World) -> None:
    silent = await world.one.transport.open_stream(OTHER, (), STREAM_PROTOCOL, timeout_s=5)
    rude = await world.one.transport.open_stream(OTHER, (), STREAM_PROTOCOL, timeout_s=5)
    await rude.send(codec.encode(Ping(nonce=1)))
    assert await ended(rude)
    assert not await ended(silent)
    await asyncio.sleep(module.HELLO_TIMEOUT_S)
    assert await ended(silent)


async def test_a_dialler_does_not_wait_for_ever_for_a_hello(world: World) -> None:
    async def mute(stream: Stream) -> None:
        await asyncio.Event().wait()

    third = world.network.transport(THIRD)
    await third.serve(STREAM_PROTOCOL, mute)
    started_s = now_s()
    with pytest.raises(PeerUnreachable):
        await world.one.links.to(THIRD, timeout_s=2.0)
    assert now_s() - started_s == pytest.approx(2.0, abs=0.1)
    await third.close()


@pytest.mark.parametrize("lane", ["", "middle", "BULK"])
async def test_an_unknown_lane_is_refused(world: World, lane: str) -> None:
    assert await ended(await world.raw(lane=lane))


async def test_a_second_lane_of_one_kind_is_refused_and_the_first_lives_on(world: World) -> None:
    instance = secrets.token_bytes(16)
    first = await world.raw(instance=instance)
    await asyncio.sleep(0.1)
    assert await ended(await world.raw(instance=instance))
    await first.send(codec.encode(Close(sessions=())))
    await asyncio.sleep(0.1)
    assert len(world.other.received) == 1


async def test_a_stranger_who_opens_only_a_bulk_lane_is_answered_on_it(world: World) -> None:
    stream = await world.raw(lane=BULK)
    await stream.receive()
    await stream.send(codec.encode(Ping(nonce=5)))
    assert codec.decode(await stream.receive())[0][0] == Pong(nonce=5)


# --- lanes ---


async def test_a_lane_keeps_order_and_small_frames_overtake_bulk(world: World) -> None:
    link = await world.dial()
    world.other.gate.clear()
    senders = [asyncio.create_task(link.send(*step(number, 600_000), bulk=True)) for number in range(8)]
    await asyncio.sleep(1.0)
    assert not all(sender.done() for sender in senders), "back-pressure holds the sender"
    await link.send(Close(sessions=()))
    rtt_s, _ = await world.one.links.ping(OTHER)
    assert rtt_s == pytest.approx(0.02)
    assert [type(message) for _, message, _ in world.other.received] == [Close]
    world.other.gate.set()
    await asyncio.gather(*senders)
    await asyncio.sleep(0.1)
    assert world.other.numbers() == list(range(8))
    assert world.streams() == 4, "two lanes, each with two ends"


async def test_the_first_bulk_frames_open_one_lane_between_them(world: World) -> None:
    link = await world.dial()
    await asyncio.gather(*(link.send(*step(number, 10), bulk=True) for number in range(5)))
    await asyncio.sleep(0.1)
    assert world.other.numbers() == [0, 1, 2, 3, 4]
    assert world.streams() == 4


async def test_a_link_closed_while_its_bulk_lane_opens_leaves_no_stream(world: World) -> None:
    link = await world.dial()
    sending = asyncio.create_task(link.send(*step(1, 10), bulk=True))
    await asyncio.sleep(0.03)  # dialled, and waiting for hello
    assert world.streams() == 4
    await link.close()
    with pytest.raises(StreamClosed):
        await sending
    await asyncio.sleep(0.1)
    assert world.streams() == 0


async def test_a_peer_that_reads_nothing_is_given_up(world: World) -> None:
    link = await world.dial()
    world.other.gate.clear()
    started_s = now_s()
    sending = [link.send(*step(number, 600_000)) for number in range(9)]
    with pytest.raises(StreamClosed, match="read nothing"):
        await asyncio.gather(*sending)
    assert now_s() - started_s == pytest.approx(module.SEND_TIMEOUT_S, abs=1.0)
    assert world.one.lost == [link]


# --- a bounded bandwidth ---


@pytest.fixture
async def capped(world: World) -> AsyncIterator[Node]:
    """A node that carries 1 MB/s each way, linked with the other one."""
    third = Node(world.network, THIRD, max_bytes_per_s=1_000_000)
    await third.links.serve()
    yield third
    third.gate.set()
    await third.close()


async def test_what_a_capped_node_sends_keeps_to_the_rate_in_order_and_nobody_is_given_up(
    world: World, capped: Node
) -> None:
    link = await capped.links.to(OTHER)
    started_s = now_s()
    await asyncio.gather(*(link.send(*step(number, 600_000), bulk=True) for number in range(80)))
    assert now_s() - started_s == pytest.approx(79 * 0.6 - 0.25, abs=0.1), "more than a slow reader is given"
    await asyncio.sleep(0.1)
    assert world.other.numbers() == list(range(80))
    assert not link.closed


async def test_beside_its_bulk_frames_a_capped_node_sends_tokens_and_answers_pings_at_once(
    world: World, capped: Node
) -> None:
    link = await capped.links.to(OTHER)
    bulk = [asyncio.create_task(link.send(*step(number, 600_000), bulk=True)) for number in range(10)]
    for number in range(100, 120):
        await asyncio.sleep(0.1)
        started_s = now_s()
        await link.send(*step(number, 2_000))
        assert now_s() - started_s < 0.02
        rtt_s, _ = await world.other.links.ping(THIRD, capped.transport.addresses)
        assert rtt_s == pytest.approx(0.02)
    await asyncio.gather(*bulk)
    await asyncio.sleep(0.1)
    assert sorted(world.other.numbers()) == [*range(10), *range(100, 120)]


async def test_what_a_capped_node_receives_holds_the_sender(world: World, capped: Node) -> None:
    link = await world.one.links.to(THIRD, capped.transport.addresses)
    started_s = now_s()
    for number in range(20):
        await link.send(*step(number, 600_000), bulk=True)
        small_s = now_s()
        await link.send(Close(sessions=()))
        assert now_s() == small_s
    assert now_s() - started_s > 15 * 0.6, "all but what the streams hold"
    await asyncio.sleep(5.0)
    assert capped.numbers() == list(range(20))


async def test_who_stops_waiting_for_bandwidth_leaves_nothing_behind(world: World, capped: Node) -> None:
    link = await capped.links.to(OTHER)
    sending = [asyncio.create_task(link.send(*step(number, 600_000), bulk=True)) for number in range(5)]
    await asyncio.sleep(0.1)
    assert capped.links.upload is not None
    assert capped.links.upload.backlog_s == pytest.approx(4 * 0.6)
    await link.close()
    for task in sending[3:]:
        task.cancel()
    outcomes = await asyncio.gather(*sending, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes[1:]] == [StreamClosed] * 2 + [asyncio.CancelledError] * 2
    assert capped.links.upload.backlog_s == 0.0


# --- requests ---


async def test_a_ping_measures_the_way_there_and_back_and_carries_the_load(world: World) -> None:
    world.other.links.pong = lambda nonce: Pong(nonce=nonce, free_tokens=7, queued_tokens=3, sessions=2)
    await world.dial()
    rtt_s, pong = await world.one.links.ping(OTHER)
    assert rtt_s == pytest.approx(0.02)
    assert (pong.free_tokens, pong.queued_tokens, pong.sessions, pong.status) == (7, 3, 2, None)
    assert world.one.links._requests == {}


async def test_a_status_comes_only_to_who_asks_for_it_and_of_who_has_one(world: World) -> None:
    await world.dial()
    _, pong = await world.one.links.ping(OTHER, detail=True)
    assert pong.status is None
    world.other.links.status = lambda: Status(uptime_s=5.0)
    _, pong = await world.one.links.ping(OTHER, detail=True)
    assert pong.status == Status(uptime_s=5.0)
    _, pong = await world.one.links.ping(OTHER)
    assert pong.status is None


async def test_a_request_to_a_silent_peer_times_out_and_the_link_stays(world: World) -> None:
    link = await world.dial()
    world.network.partition({ONE}, {OTHER})
    started_s = now_s()
    with pytest.raises(PeerUnreachable, match=r"within 3\.0 s"):
        await world.one.links.ping(OTHER, timeout_s=3.0)
    assert now_s() - started_s == pytest.approx(3.0)
    assert world.one.links._requests == {}
    world.network.partition()
    await asyncio.sleep(0.1)  # the late pong arrives and is nobody's
    await world.one.links.ping(OTHER)
    assert await world.dial() is link


@pytest.mark.parametrize("vouched", [False, True])
async def test_a_peer_that_says_other_things_has_more_time_for_an_answer_but_not_for_ever(
    world: World, vouched: bool
) -> None:
    link = await world.dial()
    await link.send(Close(sessions=()))
    await asyncio.sleep(0.1)
    back = world.other.received[0][0]
    world.other.links.pong = lambda nonce: Pong(nonce=nonce + 1_000_000)  # nobody's
    ended_s = []

    async def ping(*, renews: bool) -> None:
        started_s = now_s()
        with pytest.raises(PeerSilent):
            await world.one.links.ping(OTHER, timeout_s=2.0, renews=renews)
        ended_s.append(now_s() - started_s)

    pinging = asyncio.gather(ping(renews=False), ping(renews=True))
    while not pinging.done():
        await asyncio.sleep(0.5)
        if vouched:
            world.one.links.vouch(OTHER)
        else:
            await back.send(Close(sessions=()))
    await pinging
    assert ended_s == [pytest.approx(2.0), pytest.approx(2.0 * (1 + RENEWALS_MAX))]
    world.one.links.vouch(THIRD)  # nobody this node has a link to: no matter
    assert not link.closed


async def test_a_request_ends_with_its_link(world: World) -> None:
    await world.dial()
    world.network.partition({ONE}, {OTHER})
    pinging = asyncio.create_task(world.one.links.ping(OTHER, timeout_s=60.0))
    await asyncio.sleep(0.1)
    started_s = now_s()
    world.network.cut(OTHER)
    with pytest.raises(StreamClosed):
        await pinging
    assert now_s() == started_s


async def test_who_learns_of_the_end_from_sending_leaves_no_error_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    link = await world.dial()

    async def send(*_: object, **__: object) -> None:
        world.one.links.forget(link)
        raise StreamClosed("while it was sent")

    with monkeypatch.context() as during:
        during.setattr(link, "send", send)
        with pytest.raises(StreamClosed, match="while it was sent"):
            await world.one.links.ping(OTHER, world.other.transport.addresses)
    gc.collect()
    assert complaints == []
    await link.close()


async def test_a_reply_from_another_peer_is_nobodys(world: World) -> None:
    third = Node(world.network, THIRD)
    await third.links.serve()
    link = await world.one.links.to(THIRD)
    await world.dial()
    world.network.partition({ONE}, {OTHER})
    pinging = asyncio.create_task(world.one.links.ping(OTHER, timeout_s=2.0))
    await link.send(Close(sessions=()))
    await asyncio.sleep(0.1)
    for nonce in range(10):
        await third.received[0][0].send(Pong(nonce=nonce))
    with pytest.raises(PeerUnreachable):
        await pinging
    await third.close()


# --- dialling ---


async def dials(world: World, monkeypatch: pytest.MonkeyPatch) -> list[PeerId]:
    seen: list[PeerId] = []
    open_stream = world.one.transport.open_stream

    async def counting(peer: PeerId, addresses: Sequence[str], protocol: str, *, timeout_s: float) -> Stream:
        seen.append(peer)
        return await open_stream(peer, addresses, protocol, timeout_s=timeout_s)

    monkeypatch.setattr(world.one.transport, "open_stream", counting)
    return seen


async def test_callers_at_the_same_time_share_one_dial(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = await dials(world, monkeypatch)
    got = await asyncio.gather(*(world.dial() for _ in range(10)))
    assert len(set(map(id, got))) == len(seen) == 1
    assert len(world.one.links._dialling) == 0


async def test_callers_who_wait_for_a_dial_that_fails_never_make_two_links(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fails, the second waited for it, and a third comes in that very moment."""
    world.network.cut(OTHER)

    async def fail_then_heal() -> None:
        with pytest.raises(PeerUnreachable):
            await world.dial()
        world.network.heal(OTHER)
        late.append(asyncio.create_task(world.dial()))

    late: list[asyncio.Task[Link]] = []
    _, second = await asyncio.gather(fail_then_heal(), world.dial())
    assert await late[0] is second
    await asyncio.sleep(0.1)
    assert world.streams() == 2


async def test_a_dead_peer_is_unreachable_and_found_again_when_it_is_back(world: World) -> None:
    world.network.cut(OTHER)
    with pytest.raises(PeerUnreachable):
        await world.dial()
    world.network.heal(OTHER)
    await world.dial()
    assert world.one.lost == []


@pytest.mark.parametrize("address", ["garbage", "/ip4/1.2.3.4/tcp/1", f"/ip4/1.2.3.4/tcp/1/p2p/{THIRD}"])
async def test_addresses_that_cannot_be_this_peers_make_it_unreachable(world: World, address: str) -> None:
    with pytest.raises(PeerUnreachable, match="cannot be dialled"):
        await world.one.links.to(OTHER, (address,))


async def test_a_cancelled_dial_leaves_nothing(world: World) -> None:
    dialling = asyncio.create_task(world.dial())
    await asyncio.sleep(0.03)
    dialling.cancel()
    await asyncio.wait([dialling])
    await asyncio.sleep(0.1)
    assert world.streams() == 0
    await world.dial()


# --- ends ---


async def test_a_dead_remote_ends_its_link_once(world: World) -> None:
    link = await world.dial()
    await link.send(*step(1, 10), bulk=True)
    await asyncio.sleep(0.1)
    world.network.cut(OTHER)
    await asyncio.sleep(0.1)
    assert world.one.lost == [link]
    assert [lost.remote for lost in world.other.lost] == [ONE]
    assert world.one.links.known(OTHER) is None
    with pytest.raises(StreamClosed):
        await link.send(Close(sessions=()))
    world.network.heal(OTHER)
    assert await world.dial() is not link


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xff" * 40,
        codec.encode(Ping(nonce=1))[:-1],
        codec.encode(Ping(nonce=1)) + b"payload",
        codec.encode(Failed(peer="p", session=SESSION, block=0, epoch=1, code="busy", message="nothing expects me")),
    ],
    ids=["empty", "noise", "short", "payload", "unexpected"],
)
async def test_a_malformed_frame_closes_that_link_only(world: World, frame: bytes) -> None:
    third = Node(world.network, THIRD)
    good = await third.links.to(OTHER)
    stream = await world.raw()
    await stream.send(frame)
    assert await ended(stream)
    assert [lost.remote for lost in world.other.lost] == [ONE]
    await third.links.ping(OTHER)
    assert not good.closed
    await third.close()


async def test_one_peer_may_hold_a_few_links_and_no_more(world: World) -> None:
    """Several processes may share an identity for a moment, say while one replaces the other."""
    streams = [await world.raw() for _ in range(MAX_INBOUND_LINKS_PER_PEER)]
    await asyncio.sleep(0.1)
    assert await ended(await world.raw())
    third = Node(world.network, THIRD)
    await third.links.to(OTHER)
    await streams[0].close()
    await asyncio.sleep(0.1)
    await world.raw()
    await asyncio.sleep(0.1)
    assert len(world.other.links._inbound) == MAX_INBOUND_LINKS_PER_PEER + 1
    await third.close()


async def test_all_together_hold_a_bounded_number_of_links(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INBOUND_LINKS", 2)
    await world.raw()
    await world.raw()
    await asyncio.sleep(0.1)
    third = Node(world.network, THIRD)
    with pytest.raises(PeerError):
        await third.links.ping(OTHER)
    await third.close()


async def test_a_closed_node_neither_dials_nor_accepts(world: World) -> None:
    link = await world.dial()
    await world.one.links.close()
    assert link.closed
    assert world.one.lost == [link]
    with pytest.raises(PeerUnreachable):
        await world.dial()
    await asyncio.sleep(0.1)
    assert [lost.remote for lost in world.other.lost] == [ONE], "the other side hears of it at once"
    await world.other.links.close()
    assert await ended(await world.raw())


async def test_closing_while_others_dial_and_send_leaves_nothing_behind(world: World) -> None:
    """The fixture looks for what is left."""
    link = await world.dial()
    world.other.gate.clear()
    busy: list[asyncio.Task[Any]] = [
        asyncio.create_task(link.send(*step(number, 600_000), bulk=True)) for number in range(5)
    ]
    third = Node(world.network, THIRD)
    busy += [asyncio.create_task(third.links.ping(OTHER)), asyncio.create_task(world.one.links.ping(OTHER))]
    await asyncio.sleep(0.015)
    await third.close()
    await world.one.close()
    await world.other.close()
    done, pending = await asyncio.wait(busy, timeout=1)
    assert not pending
    assert all(
        task.exception() is None or isinstance(task.exception(), StreamClosed | PeerUnreachable) for task in done
    )


async def frames_at(third: MemoryTransport) -> list[list[AnyMessage]]:
    """What it hears over one link, frame by frame."""
    frames: list[list[AnyMessage]] = []

    async def collect(stream: Stream) -> None:
        await stream.receive()
        await stream.send(codec.encode(a_hello()))
        while True:
            frames.append([message for message, _ in codec.decode(await stream.receive())])

    await third.serve(STREAM_PROTOCOL, collect)
    return frames


async def test_what_several_tasks_send_in_one_turn_travels_in_one_frame(world: World) -> None:
    third = world.network.transport(THIRD)
    frames = await frames_at(third)
    link = await world.one.links.to(THIRD)
    sent = [Close(sessions=(bytes([number] * 16),)) for number in range(5)]
    await asyncio.gather(*map(link.send, sent))
    await link.send(sent[0])
    await asyncio.sleep(0.1)
    assert frames == [sent, sent[:1]]
    await third.close()


async def test_what_is_sent_at_once_but_not_alone_shares_a_frame(world: World) -> None:
    third = world.network.transport(THIRD)
    frames = await frames_at(third)
    link = await world.one.links.to(THIRD)
    sent = [Close(sessions=(bytes([number] * 16),)) for number in range(4)]
    assert link.send_now(sent[0])
    assert link.send_now(sent[1], alone=False)
    assert link.send_now(sent[2], alone=False)
    assert link.send_now(sent[3]), "and overtakes nothing"
    await asyncio.sleep(0.1)
    assert frames == [sent[:1], sent[1:]]
    await third.close()


async def test_what_is_sent_at_once_leaves_behind_what_waits_for_the_end_of_the_turn_and_never_waits(
    world: World, capped: Node
) -> None:
    link = await world.dial()
    before = world.one.links.volume.sent_bytes
    assert link.send_now(*step(1, 4))
    await link.send(*step(2))
    assert link.send_now(*step(3))
    await asyncio.sleep(0.1)
    assert world.other.numbers() == [1, 2, 3]
    assert [size for _, _, size in world.other.received] == [4, 0, 0]
    assert world.one.links.volume.sent_bytes - before == world.other.links.volume.received_bytes - before
    link._lanes[SMALL].stream.other._room.clear()  # type: ignore[attr-defined]
    assert not link.send_now(*step(4))
    link._lanes[SMALL].stream.other._room.set()  # type: ignore[attr-defined]
    await link.close()
    assert not link.send_now(*step(5))
    slow = await capped.links.to(OTHER, world.other.transport.addresses)
    assert not slow.send_now(*step(6)), "its bytes take turns"
    await asyncio.sleep(0.1)
    assert world.other.numbers() == [1, 2, 3]


async def test_messages_of_one_frame_are_dispatched_in_order(world: World) -> None:
    stream = await world.raw()
    await stream.receive()
    await stream.send(b"".join(codec.encode(Ping(nonce=nonce)) for nonce in (1, 2, 3)))
    answers = codec.decode(await stream.receive())
    assert [message for message, _ in answers] == [Pong(nonce=nonce) for nonce in (1, 2, 3)]


async def test_what_is_handled_at_once_is_waited_for_only_where_it_leaves_something_to_be_done(world: World) -> None:
    handled: list[str] = []

    def handle(link: Link, message: Step, payload: memoryview) -> Rest | None:
        handled.append(f"step {message.step}")
        if message.step == 5:
            raise ProtocolError("no fifth step")
        return partial(rest, message.step) if message.step % 2 == 0 else None

    async def rest(number: int) -> None:
        await world.other.gate.wait()
        handled.append(f"rest of {number}")

    world.other.links.handle_at_once(Step, handle)
    world.other.gate.clear()
    stream = await world.raw()
    await stream.receive()
    await stream.send(b"".join(codec.encode(step(number)[0]) for number in (1, 2, 3, 4)))
    await stream.send(codec.encode(step(5)[0]) + codec.encode(step(6)[0]))
    await asyncio.sleep(0.1)
    assert handled == ["step 1", "step 2"]
    world.other.gate.set()
    await asyncio.sleep(0.1)
    assert handled[2:] == ["rest of 2", "step 3", "step 4", "rest of 4", "step 5"]
    assert await ended(stream)
    await stream.close()


async def test_what_was_sent_before_a_link_was_closed_arrives(world: World) -> None:
    third = world.network.transport(THIRD)
    received: asyncio.Future[AnyMessage] = asyncio.get_running_loop().create_future()

    async def take(stream: Stream) -> None:
        await stream.receive()
        await stream.send(codec.encode(a_hello()))
        received.set_result(codec.decode(await stream.receive())[0][0])

    await third.serve(STREAM_PROTOCOL, take)
    link = await world.one.links.to(THIRD)
    await link.send(Ping(nonce=7))
    await link.close()
    assert await received == Ping(nonce=7)
    await third.close()


async def test_a_link_that_only_pings_wanted_is_closed_again_and_any_other_stays(world: World) -> None:
    await asyncio.gather(world.one.links.ping(OTHER), world.one.links.ping(OTHER))
    assert world.one.links.known(OTHER) is None
    await asyncio.sleep(0.1)
    assert world.streams() == 0
    pinging = asyncio.create_task(world.one.links.ping(OTHER))
    await asyncio.sleep(0.025)  # the ping is on its way
    link = await world.dial()
    await pinging
    assert world.one.links.known(OTHER) is link
    await world.one.links.ping(OTHER)
    assert world.one.links.known(OTHER) is link


# --- room ---


async def test_a_dialled_link_that_nobody_uses_is_closed_and_pings_are_no_use(world: World) -> None:
    await world.dial()
    for _ in range(3):
        await asyncio.sleep(module.IDLE_S / 2)
        await world.one.links.ping(OTHER)
    assert world.one.links.known(OTHER) is None
    await asyncio.sleep(0.1)
    assert world.streams() == 0
    assert world.other.links._inbound == {}


async def test_a_link_that_is_used_or_needed_stays(world: World) -> None:
    needed = {await world.dial()}
    world.one.links.keep(lambda: needed)
    third = Node(world.network, THIRD)
    await third.links.serve()
    used = await world.one.links.to(THIRD)
    for _ in range(6):
        await asyncio.sleep(module.IDLE_S / 2)
        await used.send(Close(sessions=()))
    assert world.one.links.known(OTHER) in needed
    assert world.one.links.known(THIRD) is used
    (back,) = third.links._inbound.values()
    for _ in range(2):
        await asyncio.sleep(module.IDLE_S / 3)
        await back.send(Pong(nonce=0))
    await asyncio.sleep(module.IDLE_S)
    assert world.one.links.known(THIRD) is None, "a pong is no use either"
    needed.clear()
    await asyncio.sleep(module.IDLE_S)
    assert world.one.links.known(OTHER) is None
    assert (await world.dial()).closed is False
    await third.close()


async def test_an_idle_link_is_not_closed_under_a_ping(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.dial()
    await asyncio.sleep(module.IDLE_S - 1.0)
    world.network.partition([ONE], [OTHER])
    pinging = asyncio.create_task(world.one.links.ping(OTHER, timeout_s=module.IDLE_S))
    await asyncio.sleep(module.IDLE_S / 2)
    world.network.partition()
    await pinging


async def test_a_node_dials_a_bounded_number_and_gives_up_the_idlest_that_is_not_needed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_OUTBOUND_LINKS", 2)
    others = [Node(world.network, signing_key(number).peer_id) for number in (10, 11, 12)]
    needed = {await world.dial()}
    world.one.links.keep(lambda: needed)
    for other in others:
        await other.links.serve()
        await asyncio.sleep(1.0)
        await world.one.links.to(other.transport.peer_id)
        assert len(world.one.links._outbound) <= 2
    assert set(world.one.links._outbound) == {OTHER, others[-1].transport.peer_id}
    for other in others:
        await other.close()


async def test_when_full_the_idlest_that_nobody_needs_makes_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INBOUND_LINKS", 3)
    dialled = [Node(world.network, signing_key(number).peer_id) for number in (10, 11, 12)]
    for node in dialled:
        await node.links.to(OTHER)
        await asyncio.sleep(1.0)
    first, second, last = (link for link in world.other.links._inbound.values())
    world.other.links.keep(lambda: [first])
    await asyncio.sleep(module.FRESH_S)
    (link_of_second,) = dialled[1].links._outbound.values()
    await dialled[1].links.ping(OTHER)
    await world.dial()
    assert (first.closed, second.closed, last.closed) == (False, True, False)
    await asyncio.sleep(0.1)
    assert link_of_second.closed
    third = Node(world.network, THIRD)
    await third.links.to(OTHER)
    assert (first.closed, last.closed) == (False, True)
    with pytest.raises(PeerError):  # the others are needed, or have only just come
        await dialled[1].links.ping(OTHER)
    for node in (*dialled, third):
        await node.close()


async def test_whether_large_frames_arrived_is_told_by_a_ping_behind_them(world: World) -> None:
    assert await world.one.links.arrived(OTHER, timeout_s=1), "there is no link"
    link = await world.dial()
    assert await world.one.links.arrived(OTHER, timeout_s=1), "nothing large was sent"
    world.other.gate.clear()
    await link.send(*step(1, 100), bulk=True)
    assert not await world.one.links.arrived(OTHER, timeout_s=5)
    await world.one.links.ping(OTHER, timeout_s=1)
    world.other.gate.set()
    assert await world.one.links.arrived(OTHER, timeout_s=1)
    assert world.other.numbers() == [1]


async def test_large_sends_are_timed_until_they_were_read_on_the_other_side(world: World) -> None:
    timed: list[tuple[PeerId, int, float]] = []
    world.one.links.on_transfer = lambda *about: timed.append(about)
    link = await world.dial()
    await link.send(*step(0, module.TIMED_BYTES), bulk=True)  # opens the lane, which is not timed
    await link.send(*step(1, module.TIMED_BYTES - 1), bulk=True)
    await asyncio.sleep(module.QUIET_S)
    world.other.gate.clear()
    timed.clear()
    await link.send(*step(2, module.TIMED_BYTES), bulk=True)
    await link.send(*step(3, module.TIMED_BYTES), bulk=True)  # the way is not quiet any more
    await asyncio.sleep(3.0)
    assert timed == []
    world.other.gate.set()
    await asyncio.sleep(1.0)
    ((peer, size, seconds),) = timed
    assert peer == OTHER
    assert module.TIMED_BYTES <= size <= 2 * module.TIMED_BYTES + 2000
    assert seconds == pytest.approx(3.0 + 0.01, abs=0.02)


async def test_several_large_sends_tell_how_fast_a_node_sends(world: World) -> None:
    router = Router()
    world.one.links.on_transfer = lambda *about: router.on_transfer(*about, now_s())
    world.network.bytes_per_s = 1e6
    link = await world.dial()
    router.on_rtt(OTHER, 0.02, now_s())
    known = []
    for number in range(4):  # the first one opens the lane
        await link.send(*step(number, 8 * module.TIMED_BYTES), bulk=True)
        await asyncio.sleep(module.QUIET_S + 2.0)
        known.append(router.uplink_bytes_per_s(now_s()))
    assert known[-1] == 2**20
    assert known[0] == known[1] == 0
    await asyncio.sleep(600.0)
    assert router.uplink_bytes_per_s(now_s()) == 0


async def test_nobody_asks_behind_small_sends_nor_where_nobody_wants_to_know(world: World) -> None:
    pings: list[AnyMessage] = []
    link = await world.dial()
    request = world.one.links.request

    async def watched(link: Link, build: Any, **options: Any) -> Any:
        pings.append(build(0))
        return await request(link, build, **options)

    world.one.links.request = watched  # type: ignore[method-assign]
    await link.send(*step(0, module.TIMED_BYTES), bulk=True)
    world.one.links.on_transfer = lambda *_: None
    await asyncio.sleep(module.QUIET_S)
    await link.send(*step(1, module.TIMED_BYTES - 1), bulk=True)
    await asyncio.sleep(1.0)
    assert pings == []


async def test_nothing_is_handled_of_a_link_that_has_ended(world: World) -> None:
    """Who was told of its end would keep for ever what came behind it."""
    handled: list[int] = []

    def handle(link: Link, message: Step, payload: memoryview) -> Rest | None:
        handled.append(message.step)
        return link.close if message.step == 1 else None

    world.other.links.handle_at_once(Step, handle)
    stream = await world.raw()
    await stream.receive()
    await stream.send(codec.encode(step(1)[0]) + codec.encode(step(2)[0]))
    await stream.send(codec.encode(step(3)[0]))
    await asyncio.sleep(0.1)
    assert handled == [1]
    await stream.close()

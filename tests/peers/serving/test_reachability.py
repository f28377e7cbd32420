"""Dial-back over real loopback TCP; only where the asker is seen from is made up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from peers.errors import Busy, PeerUnreachable, ProtocolError
from peers.serving import reachability
from peers.serving.reachability import (
    MAX_ROUNDS,
    MIN_INTERVAL_S,
    DialBackService,
    Verdict,
    ask_to_dial_back,
    find_out,
    watch_reachability,
)
from peers.transport import dialling
from peers.transport.hivemind_p2p import HivemindNode, NodeConfig
from peers.transport.links import Link, Links
from peers.transport.memory import MemoryNetwork, MemoryTransport
from peers.wire.messages import DialBack, Pong
from routing.identity import SigningKey

GREETING = b"\x13/multistream/1.0.0\n"
ASKER, HELPER = (SigningKey.from_seed(bytes([number]) * 32).peer_id for number in (1, 2))


class Pair:
    """A node that asks and a node that answers, who sees the asker at 127.0.0.1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network = MemoryNetwork()
        self.asker = Links(network.transport(ASKER), network="test", software="test")
        self.helper = Links(network.transport(HELPER), network="test", software="test")
        self.now_s = 0.0
        self.seen_from: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/45678",)
        self.service = DialBackService(self.helper, clock=lambda: self.now_s)

        async def observed_addresses(peer: object) -> tuple[str, ...]:
            return self.seen_from

        monkeypatch.setattr(self.helper.transport, "observed_addresses", observed_addresses)

    async def ask(self, *addresses: str) -> list[str]:
        answers = await ask_to_dial_back(self.asker, HELPER, self.helper.transport.addresses, addresses)
        assert tuple(answers) == addresses
        return list(answers.values())

    async def ask_later(self, *addresses: str) -> list[str]:
        self.now_s += MIN_INTERVAL_S
        return await self.ask(*addresses)


@pytest.fixture
async def pair(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    pair = Pair(monkeypatch)
    await pair.helper.serve()
    yield pair
    for links in (pair.asker, pair.helper):
        await links.close()
        await links.transport.close()


@asynccontextmanager
async def listener(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], host: str = "127.0.0.1"
) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, 0)
    try:
        yield f"/ip4/{host}/tcp/{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As p2pd does: its half of multistream-select, unasked, and then it waits."""
    writer.write(GREETING)
    await reader.read()


async def test_a_listening_libp2p_node_is_reached(pair: Pair) -> None:
    async with listener(greet) as address:
        assert await pair.ask(address, f"{address}/p2p/{ASKER}") == ["", ""]


async def test_a_port_where_nothing_listens_is_refused(pair: Pair) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}"
        (problem,) = await pair.ask(address)
    assert problem.startswith("refused: ")


async def test_another_program_on_the_port_is_told_apart(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialling, "GREETING_TIMEOUT_S", 0.05)

    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()

    async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None: ...

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listener(http) as one, listener(hangs_up) as two, listener(silent) as three:
        assert await pair.ask(one, two, three) == ["something else listens there"] * 3


async def test_only_the_host_that_the_asker_is_seen_from_is_dialled(pair: Pair) -> None:
    dialled = asyncio.Event()

    async def notice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled.set()

    async with listener(notice, host="127.0.0.2") as address:
        assert await pair.ask(address) == ["not where you come from (127.0.0.1)"]
        pair.seen_from = ()
        assert await pair.ask_later(address) == ["not where you come from (unknown)"]
    assert not dialled.is_set()


async def test_what_is_no_tcp_address_is_named_and_harms_nobody(pair: Pair) -> None:
    addresses = ("/dns4/example.org/tcp/80", "/ip4/127.0.0.1/udp/80", "/ip4/127.0.0.1/tcp/70000", "garbage")
    assert await pair.ask(*addresses) == ["not a TCP address"] * 4
    assert await pair.ask_later("/ip4/127.0.0.1/tcp/0") == ["not a TCP address"]


async def test_who_asks_too_often_is_told_so_and_dials_nobody(pair: Pair) -> None:
    async with listener(greet) as address:
        assert await pair.ask(address) == [""]
        for wait_s in (0.0, MIN_INTERVAL_S - 0.1):
            pair.now_s += wait_s
            with pytest.raises(Busy, match="too often") as caught:
                await pair.ask(address)
            assert caught.value.retry_after_s == MIN_INTERVAL_S
        pair.now_s += 0.1
        assert await pair.ask(address) == [""]


async def test_a_helper_that_answers_something_else_is_a_peers_error(pair: Pair) -> None:
    async def pong(link: Link, message: DialBack, _: memoryview) -> None:
        await link.send(Pong(nonce=message.nonce))

    pair.helper.handle(DialBack, pong)
    with pytest.raises(ProtocolError, match="Pong"):
        await pair.ask("/ip4/127.0.0.1/tcp/80")


async def test_a_helper_that_is_gone_is_a_peers_error(pair: Pair) -> None:
    await pair.helper.transport.close()
    with pytest.raises(PeerUnreachable):
        await pair.ask("/ip4/127.0.0.1/tcp/80")


# --- verdicts ---


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MIN_INTERVAL_S", "RETRY_S", "LOOK_S"):
        monkeypatch.setattr(reachability, name, 0.05)


@pytest.mark.usefixtures("hurried")
async def test_a_busy_helper_is_asked_again_and_no_verdict_is_made_of_it(pair: Pair) -> None:
    helpers = pair.helper.transport.addresses
    pair.service._slots = asyncio.Semaphore(0)  # as when four others are dialled just now
    waiting = asyncio.create_task(find_out(pair.asker, helpers, ["/ip4/127.0.0.1/tcp/1"]))
    await asyncio.sleep(0.07)
    pair.service._slots.release()
    verdict = await waiting
    assert verdict.problems["/ip4/127.0.0.1/tcp/1"].startswith("refused: ")


@pytest.mark.usefixtures("hurried")
async def test_nobody_to_ask_is_a_verdict_of_its_own_that_says_why(pair: Pair) -> None:
    assert (await find_out(pair.asker, (), ())).unasked == "there is no other node to ask"
    pair.service._slots = asyncio.Semaphore(0)
    busy = await find_out(pair.asker, pair.helper.transport.addresses, ["/ip4/127.0.0.1/tcp/1"])
    assert busy.unasked == f"{HELPER} was asked too often"
    await pair.helper.transport.close()
    gone = await find_out(pair.asker, pair.helper.transport.addresses, ["/ip4/127.0.0.1/tcp/1"])
    assert HELPER in gone.unasked
    assert (gone.reached, gone.problems) == ((), {})
    assert MAX_ROUNDS * MIN_INTERVAL_S > dialling.DIAL_TIMEOUT_S + dialling.GREETING_TIMEOUT_S


@asynccontextmanager
async def watching(
    links: Links, *helpers: str, withdraw: Callable[[frozenset[str]], None] = lambda _: None
) -> AsyncIterator[asyncio.Queue[Verdict]]:
    told: asyncio.Queue[Verdict] = asyncio.Queue()
    task = asyncio.create_task(watch_reachability(links, helpers, told.put_nowait, withdraw))
    yield told
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.usefixtures("hurried")
async def test_it_is_asked_again_until_reached_and_when_addresses_change_and_told_only_once(
    pair: Pair,
) -> None:
    own = ["/ip4/127.0.0.1/tcp/1"]
    helpers = pair.helper.transport.addresses

    class Moving(MemoryTransport):
        addresses = property(lambda self: tuple(own))  # type: ignore[assignment]

    pair.asker.transport.__class__ = Moving
    pair.service._clock = lambda: asyncio.get_running_loop().time() * 1e6  # never too often
    async with watching(pair.asker, *helpers) as told, listener(greet) as address, asyncio.timeout(60):
        assert not (await told.get()).reached
        await asyncio.sleep(0.2)
        assert told.empty()
        own[:] = [address]
        assert (await told.get()).reached == (address,)
        await asyncio.sleep(0.2)
        assert told.empty()
        own[:] = ["/ip4/127.0.0.1/tcp/2"]
        assert list((await told.get()).problems) == own


@pytest.mark.usefixtures("hurried")
async def test_an_address_is_withdrawn_when_it_was_dialled_in_vain_twice_and_back_once_somebody_is_there(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, far, other = "/ip4/127.0.0.1/tcp/1", "/ip4/203.0.113.9/tcp/1", "/unix/socket"
    verdicts = [
        Verdict(problems={dead: "refused", far: "not where you come from (127.0.0.1)", other: "not a TCP address"}),
        Verdict(unasked="nobody there"),
        Verdict(problems={dead: "no answer", far: "not where you come from (127.0.0.1)", other: "not a TCP address"}),
        Verdict(problems={dead: "refused"}),
        Verdict(reached=(dead,)),
    ]
    told: list[frozenset[str]] = []
    over = asyncio.Event()

    async def find_out(*_: object) -> Verdict:
        return verdicts.pop(0)

    def withdraw(addresses: frozenset[str]) -> None:
        told.append(addresses)
        if not verdicts:
            over.set()

    monkeypatch.setattr(reachability, "find_out", find_out)
    async with watching(pair.asker, withdraw=withdraw), asyncio.timeout(60):
        await over.wait()
    assert told == [frozenset(), {dead}, {dead}, frozenset()]


async def test_two_real_nodes_find_out_what_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over libp2p, from restart to restart; the second of two lies about its port."""
    monkeypatch.setattr(reachability, "RETRY_S", 0.2)
    monkeypatch.setattr(reachability, "MIN_INTERVAL_S", 1.0)
    keys = [SigningKey.from_seed(bytes([number]) * 32) for number in (7, 8)]
    async with await HivemindNode.create(NodeConfig(network="test", signing_key=keys[0])) as helper:
        served = Links(helper.transport, network="test", software="test")
        DialBackService(served)
        await served.serve()
        wrong = "/ip4/127.0.0.1/tcp/1"
        for announce in ((), (wrong,)):
            config = NodeConfig(
                network="test", signing_key=keys[1], announce=announce, initial_peers=helper.transport.addresses
            )
            async with await HivemindNode.create(config) as node:
                links = Links(node.transport, network="test", software="test")
                async with watching(links, *helper.transport.addresses) as told:
                    verdict = await asyncio.wait_for(told.get(), 60)
                if announce:
                    assert verdict.problems[f"{wrong}/p2p/{node.peer_id}"].startswith("refused: ")
                else:
                    assert verdict.reached == node.transport.addresses
                await links.close()
        await served.close()

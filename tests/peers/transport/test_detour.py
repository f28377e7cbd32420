"""Connections that a daemon may take over: what passes through, how they end, and which are offered at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from peers.errors import PeerSilent, PeerUnreachable
from peers.transport.hivemind_p2p import detour
from peers.transport.hivemind_p2p.detour import detours
from peers.transport.loop import new_event_loop
from tests.peers.transport.nodes import signing_key

PEER = signing_key(1).peer_id
GREETING = b"\x13/multistream/1.0.0\n"
HELLO = bytes(95)
"""As short as a ServerHello can be."""
Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Peer:
    """Something that listens, greets, and hands over the connections that come in."""

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[Pair] = asyncio.Queue()

    async def __aenter__(self) -> Peer:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"/ip4/127.0.0.1/tcp/{self._server.sockets[0].getsockname()[1]}/p2p/{PEER}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        self.arrived.put_nowait((reader, writer))


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with Peer() as listening:
        yield listening


async def take(address: str) -> Pair:
    _, _, host, _, port, *_ = address.split("/")
    return await asyncio.open_connection(host, int(port))


@contextlib.asynccontextmanager
async def no_patience(seconds: float) -> AsyncIterator[None]:
    raise TimeoutError
    yield


async def ended(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""


async def end(*writers: asyncio.StreamWriter) -> None:
    for writer in writers:
        writer.close()


async def shake_hands() -> None:
    async with Peer() as peer, detours(PEER, [peer.address]) as found:
        assert found.alive == [peer.address]
        near_in, near_out = await take(found.offered[0])
        far_in, far_out = await peer.arrived.get()
        assert await near_in.readexactly(len(GREETING)) == GREETING, "said before anybody listened"
        for said in (GREETING + b"\x0b/tls/1.0.0\n", HELLO):
            near_out.write(said)
            assert await far_in.readexactly(len(said)) == said
            said = said.removeprefix(GREETING)
            far_out.write(said)
            assert await near_in.readexactly(len(said)) == said
        near_out.write(b"whoever hears this has a connection")
        await ended(near_in)
        assert await far_in.read() == b""
    await end(near_out, far_out)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, new_event_loop], ids=["asyncio", "the node's loop"])
def test_a_handshake_passes_both_ways_but_for_the_last_word(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(shake_hands())


async def test_both_ends_end_together(peer: Peer) -> None:
    async with detours(PEER, [peer.address]) as found:
        near_in, near_out = await take(found.offered[0])
        far_in, far_out = await peer.arrived.get()
        far_out.write(b"last")
        far_out.close()
        assert await near_in.read() == GREETING + b"last"
        assert await far_in.read() == b""
    await end(near_out)


async def test_who_says_too_much_is_not_heard_to_the_end(peer: Peer) -> None:
    async with detours(PEER, [peer.address]) as found:
        near_in, near_out = await take(found.offered[0])
        far_in, far_out = await peer.arrived.get()
        far_out.write(bytes(3_000_000))
        assert len(await near_in.read()) <= detour._HANDSHAKE_BYTES
        await ended(far_in)
    await end(near_out, far_out)


async def test_an_offer_is_for_one_and_ends_with_the_context(peer: Peer) -> None:
    async with detours(PEER, [peer.address]) as found:
        near_in, near_out = await take(found.offered[0])
        second_in, second_out = await take(found.offered[0])
        await ended(second_in)
        await near_in.readexactly(len(GREETING))
        _, far_out = await peer.arrived.get()
    async with detours(PEER, [peer.address]) as found:
        pass
    with pytest.raises(ConnectionRefusedError):
        await take(found.offered[0])
    far_in, other_out = await peer.arrived.get()
    await ended(far_in)
    await end(near_out, second_out, far_out, other_out)


async def test_what_is_not_plain_tcp_is_neither_asked_nor_offered(peer: Peer) -> None:
    relayed = f"{peer.address}/p2p-circuit/p2p/{PEER}"
    others = [relayed, f"/ip4/127.0.0.1/udp/1/quic-v1/p2p/{PEER}"]
    async with detours(PEER, others) as found:
        assert (found.alive, found.offered) == (others, [])
    async with detours(PEER, []) as found:
        assert found.alive == []


async def test_addresses_where_nothing_listens_are_left_out_and_named_when_all_are(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Peer() as gone:
        pass
    async with detours(PEER, [gone.address, peer.address]) as found:
        assert found.alive == [peer.address]
        assert len(found.offered) == 1
    with pytest.raises(PeerUnreachable, match="nothing listens at"):
        async with detours(PEER, [gone.address]):
            pass
    monkeypatch.setattr(detour, "Patience", no_patience)
    with pytest.raises(PeerSilent, match="nothing answers at"):
        async with detours(PEER, [peer.address]):
            pass
    await end((await peer.arrived.get())[1])

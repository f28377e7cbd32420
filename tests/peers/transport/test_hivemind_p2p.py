"""What is special to libp2p: the daemon's life, joining and finding back, and a DHT among strangers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace

import hivemind.dht.protocol
import hivemind.p2p.p2p_daemon_bindings.control
import hivemind.p2p.p2p_daemon_bindings.utils
import hivemind.utils.multiaddr.exceptions
import psutil
import pytest
import pytest_asyncio
from google.protobuf.message import DecodeError
from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2

from peers.errors import AddressInUse, PeerSilent, PeerUnreachable, ProtocolError, Refused, StreamClosed
from peers.transport.allowance import Allowance
from peers.transport.base import Stream
from peers.transport.hivemind_p2p import HivemindNode, NodeConfig, detour, dht, node, streams
from peers.transport.hivemind_p2p.daemon import Daemon, translated
from peers.transport.hivemind_p2p.detour import Detours, detours
from peers.transport.patience import Patience
from peers.transport.record_table import _Entry
from routing.errors import CallerError, InvalidAddress, SwarmError, Unavailable
from routing.ids import PeerId
from routing.records import MAX_EXPIRY_AHEAD_S, model_keys
from routing.store import StoredRecord
from tests.peers.transport.nodes import MODEL, NETWORK, foreign_records, record, signing_key

KEYS = model_keys(NETWORK, MODEL)


def daemons() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.name() == "p2pd"}


@pytest.fixture(autouse=True)
def no_daemon_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    before = daemons()
    yield
    if "strangers" not in request.fixturenames:
        assert daemons() <= before


class Swarm:
    """Nodes on loopback, numbered by their keys; all join through the first."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack
        self.bootstrap: HivemindNode | None = None

    async def node(
        self, number: int, *, client_mode: bool = False, listen: str = "/ip4/127.0.0.1/tcp/0"
    ) -> HivemindNode:
        config = NodeConfig(
            network=NETWORK,
            signing_key=signing_key(number),
            listen=(listen,),
            initial_peers=self.bootstrap.addresses if self.bootstrap is not None else (),
            client_mode=client_mode,
        )
        created = await self._stack.enter_async_context(await HivemindNode.create(config))
        self.bootstrap = self.bootstrap or created
        return created


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with contextlib.AsyncExitStack() as stack:
        yield Swarm(stack)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def strangers() -> AsyncIterator[tuple[HivemindNode, HivemindNode]]:
    """A victim and an attacker, for tests that leave no trace."""
    async with contextlib.AsyncExitStack() as stack:
        swarm = Swarm(stack)
        yield await swarm.node(1), await swarm.node(2)


async def eventually(condition: Callable[[], bool]) -> None:
    """For what another process or a background task brings about, in time in which this process ran."""
    async with Patience(60):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.02)


def port_of(created: HivemindNode) -> str:
    return created.addresses[0].split("/")[4]


def hold(holder: HivemindNode, one: StoredRecord) -> None:
    """Make a storing node keep a record that it should have refused."""
    assert holder.store.table is not None
    holder.store.table._entries.setdefault(one.key, {})[one.subkey] = _Entry(one, 2**62, one.expires_at_s)


# The daemon's life.


async def test_no_process_is_left_after_close_and_closing_twice_is_harmless() -> None:
    created = await HivemindNode.create(NodeConfig(network=NETWORK, signing_key=signing_key(1)))
    daemon = psutil.Process(created.daemon_pid)
    assert daemon.is_running()
    assert os.getsid(daemon.pid) != os.getsid(0), "Ctrl-C in a terminal must not reach the daemon"
    waiting = asyncio.create_task(created.wait_closed())
    await created.close()
    await created.close()
    await waiting
    assert not daemon.is_running()


_SCRIPT = """
import asyncio
from peers.transport.hivemind_p2p import HivemindNode, NodeConfig
from routing.identity import SigningKey
async def main():
    node = await HivemindNode.create(NodeConfig(network="test", signing_key=SigningKey.from_seed(bytes(32))))
    print(node.daemon_pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_the_daemon_ends_with_a_killed_process_and_nothing_is_printed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        daemon = psutil.Process(int(process.stdout.readline()))
        process.kill()
        process.wait()
        deadline_s = time.monotonic() + 60
        # In a container nobody may reap an orphan: a zombie has ended too.
        while daemon.is_running() and daemon.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert process.stderr.read() == ""


async def test_a_daemon_that_dies_is_reported_and_its_streams_end(swarm: Swarm) -> None:
    one, other = await swarm.node(1), await swarm.node(2)
    await one.transport.serve("wait", Stream.receive)  # type: ignore[arg-type]
    stream = await other.transport.open_stream(one.peer_id, one.addresses, "wait", timeout_s=60)
    waiting = asyncio.create_task(other.wait_closed())
    os.kill(other.daemon_pid, signal.SIGKILL)
    with pytest.raises(StreamClosed):
        await stream.receive()
    with pytest.raises(Unavailable, match="ended with status"):
        await waiting
    with pytest.raises(Unavailable, match="not running"):
        await other.transport.open_stream(one.peer_id, one.addresses, "wait", timeout_s=60)


def test_a_node_lives_in_any_threads_loop_and_raises_the_descriptor_limit() -> None:
    async def live() -> str:
        async with await HivemindNode.create(
            NodeConfig(network=NETWORK, signing_key=signing_key(1), client_mode=True)
        ) as created:
            return created.peer_id

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        assert thread.submit(asyncio.run, live()).result()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == resource.RLIM_INFINITY or soft >= 65_536 or soft == hard


def test_addresses_that_serve_more_come_first() -> None:
    addresses = ["/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.2/tcp/1", "/ip4/8.8.8.8/tcp/1", "/dns4/example.org/tcp/1"]
    assert sorted(addresses, key=streams._remoteness) == [addresses[2], addresses[3], addresses[1], addresses[0]]


# Joining.


async def test_a_taken_port_and_a_foreign_address_are_named(swarm: Swarm) -> None:
    taken = await swarm.node(1)
    for address in (f"/ip4/127.0.0.1/tcp/{port_of(taken)}", "/ip4/192.0.2.1/tcp/0"):
        with pytest.raises(AddressInUse, match=address) as refusal:
            await HivemindNode.create(NodeConfig(network=NETWORK, signing_key=signing_key(2), listen=(address,)))
        assert refusal.value.hint


@pytest.mark.parametrize(
    "wrong",
    [
        {"listen": ("127.0.0.1:4001",)},
        {"listen": ()},
        {"listen": (f"/ip4/127.0.0.1/tcp/0/p2p/{signing_key(1).peer_id}",)},
        {"announce": ("/ip4/203.0.113.1/tcp/0",)},
        {"initial_peers": ("/ip4/127.0.0.1/tcp/4001",)},
        {"network": "No Such Name"},
        {"startup_timeout_s": 0.0},
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(CallerError):
        NodeConfig(**{"network": NETWORK, "signing_key": signing_key(1)} | wrong)  # type: ignore[arg-type]


async def test_initial_peers_that_do_not_answer_are_named(swarm: Swarm) -> None:
    bootstrap = await swarm.node(1)
    strangers_id = bootstrap.addresses[0].replace(bootstrap.peer_id, signing_key(9).peer_id)
    nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{signing_key(9).peer_id}"
    for address, network in ((nobody, NETWORK), (strangers_id, NETWORK), (bootstrap.addresses[0], "elsewhere")):
        with pytest.raises(PeerUnreachable, match=address.split("/")[-1]) as refusal:
            await HivemindNode.create(NodeConfig(network=network, signing_key=signing_key(2), initial_peers=(address,)))
        assert network in refusal.value.hint
    one_of_two = (nobody, *bootstrap.addresses)
    config = NodeConfig(network=NETWORK, signing_key=signing_key(2), initial_peers=one_of_two)
    async with await HivemindNode.create(config) as joined:
        assert joined.known_nodes == 1


async def test_announced_addresses_replace_those_listened_on() -> None:
    config = NodeConfig(network=NETWORK, signing_key=signing_key(1), announce=("/dns4/example.org/tcp/4001",))
    async with await HivemindNode.create(config) as created:
        assert created.addresses == (f"/dns4/example.org/tcp/4001/p2p/{signing_key(1).peer_id}",)


async def test_an_address_that_never_answers_costs_the_deadline_and_no_more(swarm: Swarm) -> None:
    one = await swarm.node(1)
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{signing_key(9).peer_id}"
    with pytest.raises(PeerSilent):
        async with Patience(10):
            await one.transport.open_stream(signing_key(9).peer_id, [address], "any", timeout_s=0.5)
    silent.close()


async def test_clock_skew_is_measured_and_named(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await swarm.node(1)
    monkeypatch.setattr(hivemind.dht.protocol, "get_dht_time", lambda: time.time() - 4200)
    late = await swarm.node(2, client_mode=True)
    assert late.clock_skew_s == pytest.approx(4200, abs=60)
    assert "clock skew" in caplog.text
    assert "ahead of" in caplog.text


# Finding back.


async def test_a_swarm_heals_when_its_only_bootstrap_returns(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "KEEP_INTERVAL_S", 0.1)
    bootstrap, member, reader = await swarm.node(1), await swarm.node(2), await swarm.node(3, client_mode=True)
    listen = f"/ip4/127.0.0.1/tcp/{port_of(bootstrap)}"
    await bootstrap.close()
    mine = record(member.signing_key)
    with pytest.raises(Unavailable):
        await member.store.put(mine)
    assert await reader.store.get(KEYS) == [mine], "the others still know each other"
    await eventually(lambda: member.known_nodes == 0)
    # Many attempts fail meanwhile: libp2p alone would now wait longer and longer.
    await asyncio.sleep(1)
    swarm.bootstrap = None
    bootstrap = await swarm.node(1, listen=listen)
    await eventually(lambda: bootstrap.known_nodes == 1 and member.known_nodes == 1)
    newcomer = await swarm.node(4, client_mode=True)
    assert await newcomer.store.get(KEYS) == [mine]
    renewed = record(member.signing_key, sequence=2)
    await member.store.put(renewed)
    assert await reader.store.get(KEYS) == [renewed]


LIBP2P_WAIT_S = 5.0
"""How long libp2p puts off dialling what failed once (go-libp2p, `BackoffBase`)."""


class Away:
    """A node that another one dialled in vain until libp2p put off every further dial, and that can come back."""

    def __init__(self, here: HivemindNode) -> None:
        self.here = here
        self.config = NodeConfig(network=NETWORK, signing_key=signing_key(9))
        self.peer = self.config.signing_key.peer_id
        self.addresses: tuple[str, ...] = ()
        self._failed_s = 0.0
        """No dial can have failed before."""

    @contextlib.asynccontextmanager
    async def back(self) -> AsyncIterator[HivemindNode]:
        """The node, at the address where it was first; it serves "echo"."""
        listen = tuple(address.removesuffix(f"/p2p/{self.peer}") for address in self.addresses) or self.config.listen
        async with await HivemindNode.create(replace(self.config, listen=listen)) as there:
            self.addresses = there.addresses
            await there.transport.serve("echo", echo)
            yield there
            self._failed_s = time.monotonic()

    async def open(self, *, timeout_s: float = 60) -> Stream:
        return await self.here.transport.open_stream(self.peer, self.addresses, "echo", timeout_s=timeout_s)

    async def put_off(self) -> None:
        """Dial until libp2p does no more."""
        async with asyncio.timeout(60):
            while True:
                started_s = time.monotonic()
                try:
                    await self.here._daemon.connect(self.peer, self.addresses, timeout_s=1)
                except PeerUnreachable as error:
                    if "dial backoff" in str(error):
                        return
                    self._failed_s = started_s

    def still_put_off(self) -> None:
        """Skip the test if libp2p may have dialled again meanwhile: then nothing is known about detours."""
        if time.monotonic() - self._failed_s > LIBP2P_WAIT_S:
            pytest.skip("this machine was busy for longer than libp2p waits")


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive())


async def says(stream: Stream, frame: bytes) -> bool:
    await stream.send(frame)
    return await stream.receive() == frame


@pytest.fixture
async def away(swarm: Swarm) -> Away:
    return Away(await swarm.node(1))


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """An address whose connections nobody accepts or refuses, as on the far side of a firewall."""
    with contextlib.ExitStack() as sockets:
        full = sockets.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield f"/ip4/127.0.0.1/tcp/{full.getsockname()[1]}"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse what a full queue does not take")
async def test_an_entry_node_whose_packets_vanish_is_given_up_before_libp2p_would_and_keeps_no_other_waiting(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = Daemon.connect

    async def endless(self: Daemon, peer: PeerId, addresses: Sequence[str], *, timeout_s: float) -> None:
        """libp2p waits for 5 s, which may be over when this process runs again."""
        if all(one.startswith(address) for one in addresses):
            await asyncio.Event().wait()
        await connect(self, peer, addresses, timeout_s=timeout_s)

    monkeypatch.setattr(Daemon, "connect", endless)
    monkeypatch.setattr(streams, "_HEAD_START_S", 0.0)
    monkeypatch.setattr(detour, "_PROBE_TIMEOUT_S", 0.5)
    entry = await swarm.node(1)
    with black_hole() as address:
        lost, also = (f"{address}/p2p/{signing_key(number).peer_id}" for number in (2, 1))
        with pytest.raises(PeerUnreachable, match=f"nothing answers at {lost}"):
            await HivemindNode.create(NodeConfig(network=NETWORK, signing_key=signing_key(3), initial_peers=(lost,)))
        initial_peers = (lost, also, *entry.addresses)
        config = NodeConfig(network=NETWORK, signing_key=signing_key(3), initial_peers=initial_peers)
        async with await HivemindNode.create(config) as joined:
            assert joined.known_nodes == 1


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The detours that were found."""
    offered: list[str] = []

    @contextlib.asynccontextmanager
    async def seen(peer: PeerId, addresses: Sequence[str]) -> AsyncIterator[Detours]:
        async with detours(peer, addresses) as found:
            offered.extend(address.removesuffix(f"/p2p/{peer}") for address in found.offered)
            yield found

    monkeypatch.setattr(streams, "detours", seen)
    return offered


async def test_a_peer_that_returns_is_reached_at_once_however_often_it_was_missed(
    away: Away, offered: list[str]
) -> None:
    for met in (True, False):  # the second time it goes before anybody hears of it
        async with away.back():
            stream = await away.open() if met else None
        if stream is not None:
            with pytest.raises(StreamClosed):
                await stream.receive()
        await away.put_off()
        for _ in range(20):
            with pytest.raises(PeerUnreachable, match="nothing listens"):
                await away.open()
        async with away.back():
            opened = await asyncio.gather(*(away.open() for _ in range(3)))
            assert all(await asyncio.gather(*(says(stream, bytes(1_000_000)) for stream in opened)))
            away.still_put_off()
            (detoured,) = offered  # for all three
            offered.clear()
            assert detoured not in await away.here.transport.observed_addresses(away.peer), "nobody stays on it"


async def test_initial_peers_are_found_at_once_too(away: Away, offered: list[str]) -> None:
    async with away.back():
        pass
    await away.put_off()
    async with away.back(), asyncio.timeout(60):
        await away.here.reconnect(away.addresses)
        away.still_put_off()
        assert offered
        while away.here.known_nodes == 0:  # connected, and left for the next time, as its greeting took too long
            await away.here.reconnect()


async def test_a_peer_makes_no_connection_of_a_detour_that_the_daemon_has_one_of(away: Away) -> None:
    async with away.back() as there, detours(away.peer, away.addresses) as found:
        await away.here._daemon.connect(away.peer, found.offered, timeout_s=60)
        assert await there.transport.observed_addresses(away.here.peer_id) == ()


async def test_a_dial_that_crossed_one_of_the_peer_is_made_again(away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = Daemon.connect
    crossed = False

    async def crossing(self: Daemon, peer: PeerId, addresses: Sequence[str], *, timeout_s: float) -> None:
        nonlocal crossed
        if not crossed and tuple(addresses) == away.addresses:
            crossed = True
            raise PeerUnreachable("unexpected handshake message of type *tls.clientHelloMsg")
        await connect(self, peer, addresses, timeout_s=timeout_s)

    monkeypatch.setattr(Daemon, "connect", crossing)
    async with away.back():
        away.here.transport._note_gone(away.peer)
        assert await says(await away.open(), b"hello")
    assert crossed


async def test_whoever_listens_where_a_peer_was_is_not_taken_for_it(away: Away) -> None:
    async with away.back():
        pass
    await away.put_off()
    listen = tuple(address.removesuffix(f"/p2p/{away.peer}") for address in away.addresses)
    async with await HivemindNode.create(
        NodeConfig(network=NETWORK, signing_key=signing_key(8), listen=listen)
    ) as other:
        await other.transport.serve("echo", echo)
        for _ in range(2):
            with pytest.raises(PeerUnreachable, match=f"remote key matches {other.peer_id}"):
                await away.open()


async def test_a_reader_that_lost_everybody_finds_them_again(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "KEEP_INTERVAL_S", 0.1)
    bootstrap, reader = await swarm.node(1), await swarm.node(2, client_mode=True)
    listen = f"/ip4/127.0.0.1/tcp/{port_of(bootstrap)}"
    await bootstrap.close()
    assert await reader.store.get(KEYS) == []
    assert reader.known_nodes == 0
    swarm.bootstrap = None
    bootstrap = await swarm.node(1, listen=listen)
    mine = record(bootstrap.signing_key)
    await bootstrap.store.put(mine)
    await eventually(lambda: reader.known_nodes == 1)
    assert await reader.store.get(KEYS) == [mine]


async def test_a_stream_that_comes_while_a_node_closes_is_ended(swarm: Swarm) -> None:
    closing = await swarm.node(1)
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.connect(str(closing.transport._daemon.streams_path))
        daemon.settimeout(60)
        for _ in range(2):  # it has been accepted, and nothing else
            await asyncio.sleep(0)
        await closing.transport.close()
        assert await asyncio.to_thread(daemon.recv, 1) == b""


async def test_new_initial_peers_can_be_given_to_a_running_node(swarm: Swarm) -> None:
    alone, bootstrap = (
        await swarm.node(1),
        await HivemindNode.create(NodeConfig(network=NETWORK, signing_key=signing_key(2))),
    )
    async with bootstrap:
        await alone.reconnect(bootstrap.addresses)
        assert alone.known_nodes == 1
        with pytest.raises(InvalidAddress):
            await alone.reconnect(["nonsense"])


async def test_a_node_that_hangs_delays_readers_and_writers_by_the_grace_only(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CALL_TIMEOUT_S", "LOOKUP_TIMEOUT_S"):
        monkeypatch.setattr(dht, name, 60.0)
    _, hung, reader = await swarm.node(1), await swarm.node(2), await swarm.node(3, client_mode=True)
    writer = await swarm.node(4, client_mode=True)
    mine = record(writer.signing_key)
    os.kill(hung.daemon_pid, signal.SIGSTOP)
    try:
        started_s = time.monotonic()
        await writer.store.put(mine)
        assert time.monotonic() - started_s < dht.LOOKUP_TIMEOUT_S / 2
        started_s = time.monotonic()
        assert await reader.store.get(KEYS) == [mine]
        assert time.monotonic() - started_s < dht.LOOKUP_TIMEOUT_S / 2
    finally:
        os.kill(hung.daemon_pid, signal.SIGCONT)


# A DHT among strangers.


async def test_bad_records_are_dropped_one_by_one(swarm: Swarm) -> None:
    bootstrap, liar, reader = await swarm.node(1), await swarm.node(2), await swarm.node(3, client_mode=True)
    honest = [record(bootstrap.signing_key), record(liar.signing_key)]
    await bootstrap.store.put(honest[0])
    await liar.store.put(honest[1])
    later = honest[0].expires_at_s + 100
    hold(liar, replace(honest[0], expires_at_s=later))
    hold(liar, replace(record(signing_key(8)), key=honest[1].key))
    for number in range(20, 20 + 2 * dht.MAX_BAD_RECORDS):
        hold(liar, replace(record(signing_key(number)), key=KEYS[number % len(KEYS)], value=b"x" * number))
    assert sorted(await reader.store.get(KEYS), key=lambda one: one.subkey) == sorted(
        honest, key=lambda one: one.subkey
    )


async def test_the_highest_sequence_wins_not_the_latest_expiry(swarm: Swarm) -> None:
    bootstrap, lagging, reader = await swarm.node(1), await swarm.node(2), await swarm.node(3, client_mode=True)
    new = record(bootstrap.signing_key, sequence=2)
    await bootstrap.store.put(new)
    hold(lagging, record(bootstrap.signing_key, sequence=1, expires_at_s=time.time() + MAX_EXPIRY_AHEAD_S - 1))
    assert await reader.store.get(KEYS) == [new]


async def test_an_answer_that_would_be_too_large_is_continued(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht, "MAX_ANSWER_BYTES", 1000)
    bootstrap, reader = await swarm.node(1), await swarm.node(2, client_mode=True)
    held = [record(signing_key(number)) for number in range(20, 40)]
    assert bootstrap.store.table is not None
    for one in held:
        bootstrap.store.table.put(one, sender=one.subkey, now_s=time.time())
    found = await reader.store.get(KEYS)
    assert sorted(found, key=lambda one: one.subkey) == sorted(held, key=lambda one: one.subkey)


async def test_five_thousand_valid_foreign_records_do_not_hide_an_honest_peer(swarm: Swarm) -> None:
    bootstrap, honest, reader = await swarm.node(1), await swarm.node(2), await swarm.node(3, client_mode=True)
    assert bootstrap.store.table is not None
    for foreign in foreign_records(5000, expires_at_s=time.time() + MAX_EXPIRY_AHEAD_S - 1):
        bootstrap.store.table.put(foreign, sender=foreign.subkey, now_s=time.time())
    for sequence in (1, 2):
        mine = record(honest.signing_key, sequence=sequence)
        await honest.store.put(mine)
        found = await reader.store.get(KEYS)
        assert mine in found
        assert len(found) == 5001


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"subkeys": [b""]}, "may not store"),
        ({"subkeys": [signing_key(1).peer_id.encode()]}, "may not store"),
        ({"subkeys": [b"\xff"]}, "ascii"),
        ({"keys": [b"x" * 20]}, "nothing can be stored"),
        ({"keys": [b"x" * 20 + KEYS[0].encode()]}, "not that of the key"),
        ({"values": [b"x" * 5000]}, "5000 bytes"),
        ({"values": [b"x", b"y"]}, "exactly one record"),
        ({"subkeys": []}, "exactly one record"),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_store_call_that_is_not_one_own_record_is_refused(
    strangers: tuple[HivemindNode, HivemindNode], change: dict[str, list[bytes]], reason: str
) -> None:
    victim, attacker = strangers
    mine = record(attacker.signing_key)
    fields = {
        "keys": [dht._query(mine.key)],
        "subkeys": [mine.subkey.encode()],
        "values": [mine.value],
        "expiration_time": [mine.expires_at_s],
    } | change
    with pytest.raises(Refused, match=reason):
        await attacker._protocol._call(PeerID.from_base58(victim.peer_id), "rpc_store", dht_pb2.StoreRequest(**fields))


@pytest.mark.asyncio(loop_scope="module")
async def test_nobody_chooses_a_place_in_the_key_space(strangers: tuple[HivemindNode, HivemindNode]) -> None:
    victim, attacker = strangers
    before = dict(victim._protocol.routing_table.uid_to_peer_id)
    request = dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=b"\x01" * 20))
    await attacker._protocol._call(PeerID.from_base58(victim.peer_id), "rpc_ping", request)
    await asyncio.sleep(0)
    assert victim._protocol.routing_table.uid_to_peer_id == before


@pytest.mark.asyncio(loop_scope="module")
async def test_too_many_keys_and_too_many_calls_are_refused(
    strangers: tuple[HivemindNode, HivemindNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, attacker = strangers
    # however long they take
    monkeypatch.setattr(victim._protocol, "_allowance", Allowance(burst=dht.CALLS_AT_ONCE, per_second=1e-9))
    peer = PeerID.from_base58(victim.peer_id)
    with pytest.raises(Refused, match="65 keys"):
        await attacker._protocol.find(peer, [bytes(20)] * 65)
    calls = [attacker._protocol.find(peer, [bytes(20)]) for _ in range(2 * dht.CALLS_AT_ONCE)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
    assert "too many calls" in str(refused[0])
    assert dht.CALLS_AT_ONCE // 2 < len(outcomes) - len(refused) < 2 * dht.CALLS_AT_ONCE


async def test_refused_announcements_say_why_on_either_side(swarm: Swarm, caplog: pytest.LogCaptureFixture) -> None:
    await swarm.node(1)
    late = await swarm.node(2)
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"clocks is wrong: the record expires in (1000|9\d\d) s"):
            await late.store.put(record(late.signing_key, expires_at_s=time.time() + 1000))
    said = f"a record of {late.peer_id} is refused: one of the two clocks is wrong"
    assert sum(entry.getMessage().startswith(said) for entry in caplog.records) == 1


async def test_only_the_node_that_began_a_network_is_a_dht_by_itself(swarm: Swarm) -> None:
    first, other = await swarm.node(1), await swarm.node(2)
    await first.store.put(record(first.signing_key))
    await first.close()
    with pytest.raises(Unavailable, match="none can be reached"):
        await other.store.put(record(other.signing_key))


# Foreign errors.


def _errors_of(*modules: object) -> list[type[Exception]]:
    found = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__.startswith("hivemind.p2p")
    }
    return sorted(found, key=lambda kind: kind.__name__)


FOREIGN: list[Exception] = [
    *(
        kind("what happened")
        for kind in _errors_of(
            hivemind.p2p.p2p_daemon_bindings.utils, hivemind.p2p.p2p_daemon_bindings.control, hivemind.p2p
        )
    ),
    TimeoutError(),
    ConnectionRefusedError(),
    ConnectionResetError(),
    BrokenPipeError(),
    FileNotFoundError(),
    OSError(),
    asyncio.IncompleteReadError(b"", 4),
    DecodeError(),
    ValueError("Varint overflowed"),
    hivemind.utils.multiaddr.exceptions.StringParseError("bad", "/x"),
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda error: type(error).__name__)
def test_every_foreign_error_becomes_one_of_ours(foreign: Exception) -> None:
    for peer in (signing_key(1).peer_id, None):
        with pytest.raises(SwarmError) as caught, translated(peer):
            raise foreign
        assert caught.value.__cause__ is foreign
        assert str(caught.value)


def test_the_translation_says_who_erred() -> None:
    peer = signing_key(1).peer_id
    expected: list[tuple[Exception, type[SwarmError]]] = [
        (P2PDaemonError("Connect failed. msg=failed to dial:\n  * [/ip4/…] connection refused"), PeerUnreachable),
        (TimeoutError(), PeerUnreachable),
        (P2PHandlerError("InvalidRecord('forged')"), Refused),
        (DecodeError(), ProtocolError),
        (ConnectionResetError(), Unavailable),
    ]
    for foreign, kind in expected:
        with pytest.raises(kind), translated(peer):
            raise foreign
    for more in ("", "\n  * [/ip4/…] dial backoff"):
        with pytest.raises(PeerUnreachable, match=r": \[/ip4/…\] connection refused$"), translated(peer):
            raise P2PDaemonError(f"{expected[0][0]}{more}")
    assert len(_errors_of(hivemind.p2p.p2p_daemon_bindings.utils)) >= 4, "the list above is found by name"


def test_hivemind_prints_nothing_by_itself() -> None:
    assert logging.getLogger("hivemind").handlers == []
    assert logging.getLevelName(logging.WARNING) == "WARNING"

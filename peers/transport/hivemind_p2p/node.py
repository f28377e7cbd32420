"""One libp2p node: its configuration, its parts, and its place in the network.

Owns the order in which the parts start and stop, joining through the initial peers, and finding them again after a
sleep, a change of network or their restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import resource
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID
from hivemind.utils.multiaddr import Multiaddr

from peers.errors import PeerUnreachable
from peers.transport.hivemind_p2p.daemon import Daemon, translated
from peers.transport.hivemind_p2p.dht import DhtStore, RecordProtocol, create_dht
from peers.transport.hivemind_p2p.streams import HivemindTransport
from routing.addresses import peer_id_in, validate_multiaddr
from routing.errors import CallerError, InvalidAddress, PeerError, Unavailable
from routing.identity import SigningKey
from routing.ids import PeerId
from routing.records import CLOCK_SLACK_S, check_network

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S: Final = 8.0
KEEP_INTERVAL_S: Final = 2.0
"""How often a node makes sure that it still knows its initial peers; one look into a table when it does."""
TRUSTED_ASKED: Final = 2
MAX_ACQUAINTANCES: Final = 32
_DESCRIPTORS: Final = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """How one node joins a network. Raises CallerError (InvalidAddress) when it cannot be meant."""

    network: str
    """Nodes of different networks refuse each other's streams and DHT calls."""
    signing_key: SigningKey
    """The node's identity; the records it announces must be signed with the same key."""
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    """Multiaddrs to listen on; port 0 lets the system choose."""
    announce: tuple[str, ...] = ()
    """What others should dial instead of the addresses listened on (port forwards, clouds)."""
    initial_peers: tuple[str, ...] = ()
    """Full multiaddrs of nodes to join through; none for the first node of a network."""
    client_mode: bool = False
    """Only dial: no listening, no records kept for others, no place in anybody's routing table."""
    startup_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_network(self.network)
        if not (self.client_mode or self.listen):
            raise InvalidAddress("a node that serves must listen somewhere", hint="for example /ip4/0.0.0.0/tcp/0")
        for address in (*self.listen, *self.announce):
            validate_multiaddr(address, need_peer_id=False)
            if "/p2p/" in address:
                raise InvalidAddress(f"{address} names a peer", hint="this node adds its own id")
        if any("/tcp/0/" in f"{address}/" or "/udp/0/" in f"{address}/" for address in self.announce):
            raise InvalidAddress(
                "an announced address needs the port that others dial", hint="for example /ip4/203.0.113.7/tcp/4001"
            )
        for address in self.initial_peers:
            validate_multiaddr(address, need_peer_id=True)
        if not self.startup_timeout_s > 0:
            raise CallerError("the startup timeout must be positive", hint="leave it at its default")


class HivemindNode:
    """`transport` for streams, `store` for records. Belongs to the event loop that created it; no forks, no threads.

    Use `create`, then `close` (or `async with`).
    """

    def __init__(self, config: NodeConfig, daemon: Daemon, transport: HivemindTransport, dht: DHTNode) -> None:
        self.config: Final = config
        self.signing_key: Final = config.signing_key
        self.peer_id: Final = self.signing_key.peer_id
        self.transport: Final = transport
        self.store: Final = DhtStore(dht, self._trusted, lambda: not self._initial_peers)
        self.clock_skew_s: float | None = None
        """Our clock minus that of the initial peer last met; beyond the slack, announcements are refused."""
        self._daemon = daemon
        self._dht = dht
        self._protocol: RecordProtocol = dht.protocol
        self._initial_peers: dict[PeerId, tuple[str, ...]] = {}
        # Whom to look for when the routing table is empty and no initial peer answers; the newest last.
        self._acquaintances: OrderedDict[PeerId, None] = OrderedDict()
        self._keeper: asyncio.Task[None] | None = None
        self._parts = contextlib.AsyncExitStack()

    @classmethod
    async def create(cls, config: NodeConfig) -> Self:
        """Start the daemon, listen, and join through the initial peers, within `config.startup_timeout_s`.

        Raises AddressInUse (port taken, or no such address here), PeerUnreachable (none of the initial peers answers),
        Unavailable (the daemon does not start).
        """
        _raise_descriptor_limit()
        async with contextlib.AsyncExitStack() as parts:
            try:
                async with asyncio.timeout(config.startup_timeout_s):
                    node = await cls._start(config, parts)
                    await node._join()
            except TimeoutError as error:
                raise Unavailable(
                    f"the node did not start within {config.startup_timeout_s:.0f} s", hint="is the machine overloaded?"
                ) from error
            node._parts = parts.pop_all()
        node._keeper = asyncio.create_task(node._keep_joined(), name="keep joined")
        return node

    @classmethod
    async def _start(cls, config: NodeConfig, parts: contextlib.AsyncExitStack) -> Self:
        key = config.signing_key
        daemon = Daemon(key, listen=config.listen, announce=config.announce, client_mode=config.client_mode)
        transport = HivemindTransport(daemon, key.peer_id, config.network)
        parts.callback(transport.stop_listening)
        parts.push_async_callback(daemon.stop)
        await daemon.start()
        with translated(None):
            p2p = await P2P.replicate(Multiaddr(f"/unix{daemon.control_path}"))
        parts.push_async_callback(p2p.shutdown)
        parts.push_async_callback(transport.close)
        await transport.listen()
        with translated(None):
            dht = await create_dht(p2p, config.network, client_mode=config.client_mode)
        return cls(config, daemon, transport, dht)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.transport.addresses

    @property
    def daemon_pid(self) -> int:
        return self._daemon.pid

    @property
    def known_nodes(self) -> int:
        """DHT nodes in the routing table; 0 means alone, or cut off."""
        return len(self._protocol.routing_table.uid_to_peer_id)

    async def close(self) -> None:
        """End every stream, then the daemon: no process stays behind. Idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self._parts.aclose()

    async def wait_closed(self) -> None:
        """Returns when the node is closed. Raises Unavailable when its daemon died instead."""
        await self._daemon.wait_stopped()

    async def reconnect(self, initial_peers: Sequence[str] = ()) -> None:
        """Look for every initial peer that the routing table has lost; `initial_peers` are added for good.

        Runs by itself every KEEP_INTERVAL_S; call it when there is reason to think that the network is back. Whoever
        does not answer is left for the next time. Raises InvalidAddress, and Unavailable when the daemon died.
        """
        self._remember(initial_peers)
        await self.transport.refresh_addresses()
        known = self._protocol.routing_table.peer_id_to_uid
        for peer in known:
            self._acquaintances[PeerId(str(peer))] = None
            self._acquaintances.move_to_end(PeerId(str(peer)))
        while len(self._acquaintances) > MAX_ACQUAINTANCES:
            self._acquaintances.popitem(last=False)
        lost = {peer: found for peer, found in self._initial_peers.items() if PeerID.from_base58(peer) not in known}
        if not known:  # the daemon remembers for a while where the others were
            lost = dict.fromkeys(self._acquaintances, ()) | lost
        if lost and await self._greet_all(lost):
            await self._meet_neighbours()

    async def _join(self) -> None:
        self._remember(self.config.initial_peers)
        greetings = [asyncio.create_task(self._greet(peer, found)) for peer, found in self._initial_peers.items()]
        failures: list[PeerError] = []
        try:
            for greeting in asyncio.as_completed(greetings):
                try:
                    await greeting
                except PeerError as error:
                    failures.append(error)
                else:
                    break  # one is enough; the keeper looks for the others
        finally:
            for task in greetings:
                task.cancel()
            await asyncio.gather(*greetings, return_exceptions=True)
        if failures and len(failures) == len(greetings):
            raise PeerUnreachable(
                "no initial peer can be reached: " + "; ".join(map(str, failures)),
                hint=f"is a node of the network {self.config.network!r} running there, and is its address right?",
            ) from failures[0]
        await self._meet_neighbours()

    async def _keep_joined(self) -> None:
        while True:
            await asyncio.sleep(KEEP_INTERVAL_S)
            try:
                await self.reconnect()
            except Unavailable as error:
                logger.error("%s", error)
                return

    async def _greet_all(self, peers: Mapping[PeerId, Sequence[str]]) -> int:
        """How many of them answer."""
        outcomes = await asyncio.gather(*(self._greet(*item) for item in peers.items()), return_exceptions=True)
        for peer, outcome in zip(peers, outcomes, strict=True):
            if isinstance(outcome, PeerError):
                logger.debug("still without DHT node %s: %s", peer, outcome)
            elif outcome is not None:
                raise outcome
        return outcomes.count(None)

    async def _greet(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Connect, ping, and enter each other's routing table. Raises PeerError."""
        await self.transport.connect(peer, addresses, timeout_s=JOIN_TIMEOUT_S)
        try:
            skew_s = await self._protocol.greet(PeerID.from_base58(peer))
        except PeerError:
            # After a sleep the daemon may cling to a connection that is dead. Streams that are open would die with it,
            # so not while there are any: the peer may merely be slow.
            if not self.transport.has_streams(peer):
                await self._daemon.disconnect(peer)
            raise
        self._dht.blacklist.register_success(PeerID.from_base58(peer))
        self.clock_skew_s = skew_s
        if abs(skew_s) > CLOCK_SLACK_S:
            logger.warning(
                "clock skew: this machine is %.0f s %s peer %s; announcements will be refused until its time is right",
                abs(skew_s),
                "ahead of" if skew_s > 0 else "behind",
                peer,
            )

    async def _meet_neighbours(self) -> None:
        await self._dht.find_nearest_nodes([self._dht.node_id])

    def _remember(self, addresses: Iterable[str]) -> None:
        for text in addresses:
            address = validate_multiaddr(text, need_peer_id=True)
            peer = peer_id_in(address)
            assert peer is not None, "validated"
            if peer != self.peer_id:
                self._initial_peers[peer] = tuple(dict.fromkeys((*self._initial_peers.get(peer, ()), address)))

    def _trusted(self) -> list[PeerID]:
        """Some of the initial peers that answered lately."""
        known = self._protocol.routing_table.peer_id_to_uid
        answering = [peer for peer in map(PeerID.from_base58, self._initial_peers) if peer in known]
        return random.sample(answering, min(TRUSTED_ASKED, len(answering)))


def _raise_descriptor_limit() -> None:
    """Each stream takes a descriptor here and one in the daemon, and a common soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

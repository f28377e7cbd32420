"""The way to a peer that was away: is anything listening there, and a connection to it that libp2p will not put off.

libp2p waits five seconds before it dials an address again that has failed, then longer and longer, up to five minutes;
the daemon's own Kademlia is enough to make it fail, the moment the peer is gone. The wait is kept for each address, and
any connection with the peer ends it (go-libp2p, `Swarm.dialNextAddr` and `addConn`). So a peer that was away is looked
for by plain TCP, which libp2p does not hear of, and each connection that this makes is offered to the daemon behind an
address that never failed: a port of this process. Bytes pass through it unread; who is at the other end is proven by
libp2p's handshake, as on any connection.

    daemon                      here                       peer
      │   which protocol? TLS ─────┼───────────────────────▶ │
      │   ClientHello ─────────────┼───────────────────────▶ │
      │ ◀──────────────────────────┼── ServerHello … Finished│
      │   Certificate … Finished ──✕                         │

The daemon's last word is not passed on and ends the detour: it knows who is there, and has a connection, which ends its
wait; the peer has none. If both had one, either's Kademlia would ask the other something at once and, cut short, dial:
both at a time, from the ports that they listen on. TCP makes one connection of two such dials (RFC 9293, section 3.5,
simultaneous open), with a TLS client at each end, and both fail.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Final, cast

from peers.errors import PeerSilent, PeerUnreachable
from peers.transport.patience import Patience
from routing.ids import PeerId

_PROBE_TIMEOUT_S: Final = 3.0
_AGREEMENT_BYTES: Final = 64
"""More than a peer says to agree on TLS (32), less than its ServerHello (95 and more)."""
_HANDSHAKE_BYTES: Final = 65_536
"""More than any peer has to say in its handshake (some 1,000): what nobody takes is not kept without end."""
_LOOPBACK: Final = "127.0.0.1"


class Detours:
    """What was found at a peer's addresses."""

    def __init__(self) -> None:
        self.alive: list[str] = []
        """Those where something accepts connections, and those that are not plain TCP."""
        self.offered: list[str] = []
        """An address of this machine for each connection that was made: the first who connects there has it."""
        self._ports: list[asyncio.Server] = []
        self._probes: list[_Probe] = []

    async def _offer(self, peer: PeerId, probe: _Probe) -> None:
        port = await asyncio.get_running_loop().create_server(lambda: _Taker(probe), _LOOPBACK, 0)
        self._ports.append(port)
        self.offered.append(f"/ip4/{_LOOPBACK}/tcp/{port.sockets[0].getsockname()[1]}/p2p/{peer}")


@contextlib.asynccontextmanager
async def detours(peer: PeerId, addresses: Sequence[str]) -> AsyncIterator[Detours]:
    """Offers stand as long as the context; what was taken ends with the handshake, or with the context.

    Raises PeerUnreachable when nothing listens at any of the addresses.
    """
    found = Detours()
    failures: list[OSError] = []

    async def look(address: str) -> None:
        _, family, host, protocol, port, *_ = address.split("/")
        if protocol == "tcp" and "/p2p-circuit" not in address and family.startswith(("ip", "dns")):
            try:
                async with Patience(_PROBE_TIMEOUT_S):
                    _, probe = await asyncio.get_running_loop().create_connection(_Probe, host, int(port))
                    found._probes.append(probe)
                    await found._offer(peer, probe)
            except OSError as error:  # TimeoutError too
                failures.append(error)
                return
        found.alive.append(address)

    try:
        async with asyncio.TaskGroup() as group:
            for address in addresses:
                group.create_task(look(address))
        if addresses and not found.alive:
            if all(isinstance(failure, TimeoutError) for failure in failures):
                raise PeerSilent(f"nothing answers at {', '.join(addresses)}") from failures[0]
            reason = failures[0] or "timeout"
            raise PeerUnreachable(f"nothing listens at {', '.join(addresses)}: {reason}") from failures[0]
        yield found
    finally:
        for port in found._ports:
            port.close()
        for probe in found._probes:
            probe.transport.abort()


async def look_for(peer: PeerId, addresses: Sequence[str]) -> None:
    """Raises PeerUnreachable when nothing listens at any of the addresses."""
    async with detours(peer, addresses):
        pass


class _Probe(asyncio.Protocol):
    """The connection to the peer."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.taker: asyncio.Transport | None = None
        """The connection of who has taken it."""
        self.heard_bytes = 0
        self.early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.heard_bytes += len(data)
        if self.heard_bytes > _HANDSHAKE_BYTES:
            self.transport.abort()
        elif self.taker is None:
            self.early += data
            self.transport.pause_reading()  # now, as uvloop reads whatever is done in `connection_made`
        else:
            self.taker.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.taker is not None:
            self.taker.close()


class _Taker(asyncio.Protocol):
    """A connection to the port where the one to the peer is offered."""

    def __init__(self, probe: _Probe) -> None:
        self._probe = probe

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._probe.taker is not None or self._probe.transport.is_closing():
            self._transport.abort()
        else:
            self._probe.taker = self._transport
            self._transport.write(self._probe.early)
            self._probe.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._probe.heard_bytes > _AGREEMENT_BYTES:
            self._transport.abort()
        else:
            self._probe.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._probe.taker is self._transport:
            self._probe.transport.close()

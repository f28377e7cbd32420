"""The way to a peer that was away: is anything listening there, and a connection to it that libp2p will not put off.

libp2p waits five seconds before it dials an address again that has failed, then longer and longer, up to five minutes;
the daemon's own Kademlia is enough to make it fail, the moment the peer is gone. The wait is kept for each address, and
any connection with the peer ends it (go-libp2p, `Swarm.dialNextAddr` and `addConn`). So a peer that was away is looked
for by plain TCP, which libp2p does not hear of, and each connection that this makes is offered to the daemon behind an
address that never failed: a port of this process. Bytes pass through it unread; who is at the other end is proven by
libp2p's handshake, as on any connection.
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
_LOOPBACK: Final = "127.0.0.1"


class Detours:
    """What was found at a peer's addresses."""

    def __init__(self) -> None:
        self.alive: list[str] = []
        """Those where something accepts connections, and those that are not plain TCP."""
        self.offered: list[str] = []
        """An address of this machine for each connection that was made: the first who connects there has it."""
        self._ports: list[asyncio.Server] = []
        self._ends: list[_End] = []

    @property
    def taken(self) -> bool:
        return any(end.other is not None for end in self._ends)

    def close(self) -> None:
        """End the connections, also those that were taken. Idempotent."""
        for end in self._ends:
            end.transport.abort()

    async def _offer(self, peer: PeerId, end: _End) -> None:
        port = await asyncio.get_running_loop().create_server(lambda: _End(end), _LOOPBACK, 0)
        self._ports.append(port)
        self.offered.append(f"/ip4/{_LOOPBACK}/tcp/{port.sockets[0].getsockname()[1]}/p2p/{peer}")


@contextlib.asynccontextmanager
async def detours(peer: PeerId, addresses: Sequence[str]) -> AsyncIterator[Detours]:
    """Offers stand as long as the context; what was taken lasts until `close`, or until one side ends it.

    Raises PeerUnreachable when nothing listens at any of the addresses.
    """
    found = Detours()
    failures: list[OSError] = []

    async def probe(address: str) -> None:
        _, family, host, protocol, port, *_ = address.split("/")
        if protocol == "tcp" and "/p2p-circuit" not in address and family.startswith(("ip", "dns")):
            try:
                async with Patience(_PROBE_TIMEOUT_S):
                    _, end = await asyncio.get_running_loop().create_connection(_End, host, int(port))
                    found._ends.append(end)
                    await found._offer(peer, end)
            except OSError as error:  # TimeoutError too
                failures.append(error)
                return
        found.alive.append(address)

    try:
        async with asyncio.TaskGroup() as group:
            for address in addresses:
                group.create_task(probe(address))
        if addresses and not found.alive:
            if all(isinstance(failure, TimeoutError) for failure in failures):
                raise PeerSilent(f"nothing answers at {', '.join(addresses)}") from failures[0]
            reason = failures[0] or "timeout"
            raise PeerUnreachable(f"nothing listens at {', '.join(addresses)}: {reason}") from failures[0]
        yield found
    finally:
        for port in found._ports:
            port.close()
        for end in found._ends:
            if end.other is None:
                end.transport.abort()


async def look_for(peer: PeerId, addresses: Sequence[str]) -> None:
    """Raises PeerUnreachable when nothing listens at any of the addresses."""
    async with detours(peer, addresses):
        pass


class _End(asyncio.Protocol):
    """One of the two connections of a pipe: what is heard here is said at the other end, which made the first."""

    transport: asyncio.Transport

    def __init__(self, other: _End | None = None) -> None:
        self.other = other
        self._early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.other is None:
            return
        if self.other.other is not None or self.other.transport.is_closing():
            self.other = None
            self.transport.abort()
        else:
            self.other.other = self
            self.transport.write(self.other._early)
            self.other.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early += data  # once: uvloop reads whatever is done in `connection_made`
            self.transport.pause_reading()
        else:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        assert self.other is not None, "nothing is written before"
        self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()

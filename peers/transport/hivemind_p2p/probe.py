"""Does anything listen there? Asked by a plain TCP connection, which libp2p does not hear of."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from peers.errors import PeerSilent, PeerUnreachable
from peers.transport.patience import Patience
from routing.ids import PeerId

_PROBE_TIMEOUT_S: Final = 3.0


async def listening(peer: PeerId, addresses: Sequence[str]) -> list[str]:
    """Those addresses where something accepts connections, and those that are not plain TCP. Raises PeerUnreachable.

    libp2p waits longer and longer, up to five minutes, before it dials an address again that has failed; so a peer that
    was away for a while would be found late. This probe fails for free.
    """
    failures: list[OSError] = []

    async def probe(address: str) -> bool:
        _, family, host, protocol, port, *_ = address.split("/")
        if protocol != "tcp" or "/p2p-circuit" in address or not family.startswith(("ip", "dns")):
            return True
        try:
            async with Patience(_PROBE_TIMEOUT_S):
                _, writer = await asyncio.open_connection(host, int(port))
        except OSError as error:  # TimeoutError too
            failures.append(error)
            return False
        writer.close()
        return True

    async with asyncio.TaskGroup() as group:
        probes = {address: group.create_task(probe(address)) for address in addresses}
    alive = [address for address, task in probes.items() if task.result()]
    if addresses and not alive:
        if all(isinstance(failure, TimeoutError) for failure in failures):
            raise PeerSilent(f"nothing answers at {', '.join(addresses)}") from failures[0]
        raise PeerUnreachable(f"nothing listens at {', '.join(addresses)}: {failures[0] or 'timeout'}") from failures[0]
    return alive

"""Can others reach this node? Another node dials back on a fresh connection and says how it went.

Any node answers such requests, within limits that keep it from being used to probe third parties: it dials only the
address that the asking node is seen from, a few addresses at a time, rarely (as libp2p's AutoNAT, specs/autonat).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from peers.errors import ProtocolError
from peers.transport.links import Link, Links
from peers.wire.messages import DialBack, DialBackReply
from routing.ids import PeerId

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 5.0
GREETING_TIMEOUT_S = 2.0
MIN_INTERVAL_S = 5.0
MAX_CONCURRENT = 4
_IP_TCP = re.compile(r"/ip[46]/([^/]+)/tcp/(\d{1,5})(?=/|$)")
_GREETING = b"\x13/multistream/1.0.0\n"
"""What a libp2p listener says first, unasked (specs/connections, multistream-select)."""


class DialBackService:
    """Answers other nodes' requests to be dialled back."""

    def __init__(self, links: Links, clock: Callable[[], float] = time.monotonic) -> None:
        self._links = links
        self._clock = clock
        self._last_s: OrderedDict[PeerId, float] = OrderedDict()
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        links.handle(DialBack, self._answer)

    async def _answer(self, link: Link, message: DialBack, _: memoryview) -> None:
        now_s = self._clock()
        if now_s - self._last_s.get(link.remote, -MIN_INTERVAL_S) < MIN_INTERVAL_S or self._slots.locked():
            results = tuple((address, "asked too often; try later") for address in message.addresses)
        else:
            self._last_s[link.remote] = now_s
            self._last_s.move_to_end(link.remote)
            while len(self._last_s) > 1024:
                self._last_s.popitem(last=False)
            seen = await self._links.transport.observed_addresses(link.remote)
            hosts = {endpoint[0] for address in seen if (endpoint := _endpoint(address))}
            async with self._slots:
                outcomes = await asyncio.gather(*(_try(address, hosts) for address in message.addresses))
            results = tuple(zip(message.addresses, outcomes, strict=True))
        await link.send(DialBackReply(nonce=message.nonce, results=results))


async def ask_to_dial_back(
    links: Links, helper: PeerId, helper_addresses: Sequence[str], own_addresses: Sequence[str]
) -> dict[str, str]:
    """Ask `helper` to dial `own_addresses`; maps each to "" (reached) or to what went wrong. Raises PeerError."""
    link = await links.to(helper, helper_addresses)
    reply = await links.request(
        link,
        lambda nonce: DialBack(nonce=nonce, addresses=tuple(own_addresses[:8])),
        timeout_s=DIAL_TIMEOUT_S + 5.0,
    )
    if not isinstance(reply, DialBackReply):
        raise ProtocolError(f"{helper} answered a request to dial back with {type(reply).__name__}")
    return dict(reply.results)


async def _try(address: str, allowed_hosts: set[str]) -> str:
    endpoint = _endpoint(address)
    if endpoint is None:
        return "not a TCP address"
    host, port = endpoint
    if host not in allowed_hosts:
        return f"not where you come from ({', '.join(sorted(allowed_hosts)) or 'unknown'})"
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                async with asyncio.timeout(GREETING_TIMEOUT_S):
                    greeting = await reader.readexactly(len(_GREETING))
            except (TimeoutError, asyncio.IncompleteReadError):
                greeting = b""
            finally:
                writer.close()
    except TimeoutError:
        return "no answer: a firewall drops the packets, or the router does not forward this port"
    except OSError as error:
        return f"refused: {error}"
    return "" if greeting == _GREETING else "something else listens there"


def _endpoint(address: str) -> tuple[str, int] | None:
    """(host, port) of an IP/TCP multiaddr; None for any other."""
    match = _IP_TCP.match(address)
    return (match[1], int(match[2])) if match and 0 < int(match[2]) < 1 << 16 else None

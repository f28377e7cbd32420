"""Is something of ours listening at an address? A fresh TCP connection, and what it is greeted with.

Knows no peer: who answers there is proven by the transport's handshake alone.
"""

from __future__ import annotations

import asyncio
import re

from peers.transport.patience import Patience

DIAL_TIMEOUT_S = 5.0
GREETING_TIMEOUT_S = 2.0
_IP_TCP = re.compile(r"/ip[46]/([^/]+)/tcp/(\d{1,5})(?=/|$)")
_GREETING = b"\x13/multistream/1.0.0\n"
"""What a libp2p listener says first, unasked (specs/connections, multistream-select)."""


def endpoint(address: str) -> tuple[str, int] | None:
    """(host, port) of an IP/TCP multiaddr; None for any other."""
    match = _IP_TCP.match(address)
    return (match[1], int(match[2])) if match and 0 < int(match[2]) < 1 << 16 else None


async def greeting_problem(host: str, port: int) -> str:
    """ "" where a libp2p node greets, else what went wrong, for people."""
    try:
        async with Patience(DIAL_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                async with Patience(GREETING_TIMEOUT_S):
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

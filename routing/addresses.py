"""Multiaddrs that one node may give to another: which are allowed, and which peer they lead to.

Owns the grammar (host, TCP or UDP port, a known wrapping, then the peer, perhaps through a relay) and leaves the values
to the package `multiaddr`. A closed list, because addresses come from strangers and are dialled: a UNIX path, for
example, must never reach the dialler. Knows no network and resolves no names.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from typing import Final

from multiaddr import Multiaddr
from multiaddr.exceptions import ParseError

from routing.errors import InvalidAddress
from routing.identity import public_key_of
from routing.ids import PeerId

MAX_ADDRESS_CHARS: Final = 256

_GRAMMAR: Final = re.compile(
    r"""/(?P<family>ip4|ip6|dns|dns4|dns6) / (?P<host>[^/]+)
        /(?P<transport>tcp|udp) / (?P<port>[0-9]{1,5})
        (?P<wrapping>(?: /(?:quic|quic-v1|tls|ws|wss) )*)
        (?: /p2p/ (?P<first>[^/]+) (?P<circuit> /p2p-circuit (?: /p2p/ (?P<second>[^/]+) )? )? )?""",
    re.VERBOSE | re.ASCII,
)
_HINT: Final = "write for example /ip4/203.0.113.7/tcp/4001/p2p/12D3Koo…"


# Records are renewed every few seconds with the same addresses, and parsing one takes a tenth of a millisecond.
@functools.lru_cache(maxsize=8192)
def validate_multiaddr(text: str, *, need_peer_id: bool) -> str:
    """The canonical spelling of an address, ready for the dialler.

    With `need_peer_id` the address is one to dial: it must end in `/p2p/<Ed25519 peer id>` and name a real host and
    port. Without, it may also be one to listen on (`/ip4/0.0.0.0/tcp/0`). Raises InvalidAddress.
    """
    match = _match(text)
    try:
        canonical = str(Multiaddr(text))
    except ParseError as error:
        raise InvalidAddress(f"{text!r} is not a multiaddr", hint=_HINT) from error
    for peer_id in (match["first"], match["second"]):
        if peer_id is not None:
            public_key_of(peer_id)
    if need_peer_id:
        if _target(match) is None:
            raise InvalidAddress(f"{text!r} does not end in /p2p/<peer id>", hint=_HINT)
        unspecified = match["family"] in ("ip4", "ip6") and ipaddress.ip_address(match["host"]).is_unspecified
        if unspecified or int(match["port"]) == 0:
            raise InvalidAddress(f"{text!r} is an address to listen on, not one to dial", hint=_HINT)
    return canonical


def peer_id_in(address: str) -> PeerId | None:
    """The peer an address leads to (behind a relay, not the relay itself), or None. Raises InvalidAddress."""
    target = _target(_match(address))
    if target is not None:
        public_key_of(target)
    return target


def is_relayed(address: str) -> bool:
    """Whether the peer is reached through another one."""
    return "/p2p-circuit/" in address


def is_public(address: str) -> bool:
    """Whether it names a host by an IP address that anybody on the internet may dial.

    False for a name, which may lead anywhere, and for what is no address.
    """
    match = _GRAMMAR.fullmatch(address) if len(address) <= MAX_ADDRESS_CHARS else None
    if match is None or match["family"] not in ("ip4", "ip6"):
        return False
    try:
        host = ipaddress.ip_address(match["host"])
    except ValueError:
        return False
    host = getattr(host, "ipv4_mapped", None) or host
    return host.is_global and not host.is_multicast


def is_private(address: str) -> bool:
    """Whether it names a host by an IP address that means nothing on the internet. False for a name."""
    match = _GRAMMAR.fullmatch(address) if len(address) <= MAX_ADDRESS_CHARS else None
    return match is not None and match["family"] in ("ip4", "ip6") and not is_public(address)


def _match(text: str) -> re.Match[str]:
    match = _GRAMMAR.fullmatch(text) if len(text) <= MAX_ADDRESS_CHARS and text.isascii() else None
    if match is None:
        raise InvalidAddress(f"{text[:MAX_ADDRESS_CHARS]!r} is not an address of this network", hint=_HINT)
    return match


def _target(match: re.Match[str]) -> PeerId | None:
    target = match["second"] if match["circuit"] else match["first"]
    return None if target is None else PeerId(target)

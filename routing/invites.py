"""Invite links: `swarm://…`, everything a newcomer needs to find a network.

Owns the format. After `swarm://` stands, in URL-safe base64 without padding:

    byte 0        format, 1
    then          a MessagePack map: "n" network name, "b" list of bootstrap multiaddrs in binary form
    last 4 bytes  the first of the SHA-256 of all before

Later versions may add entries to the map; this one ignores them. The checksum catches a link that was cut short or
mistyped; it proves nothing about who wrote it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Final

import msgpack
import msgspec
from multiaddr import Multiaddr
from multiaddr.exceptions import ParseError

from routing.addresses import validate_multiaddr
from routing.errors import CallerError, InvalidAddress
from routing.records import check_network

SCHEME: Final = "swarm://"
MAX_LINK_CHARS: Final = 4096
MAX_BOOTSTRAPS: Final = 16
_FORMAT: Final = 1
_CHECKSUM_BYTES: Final = 4
_ALPHABET: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """A network's name and some of its entry nodes. Raises CallerError (also InvalidAddress) on bad fields."""

    network: str
    bootstraps: tuple[str, ...]
    """Dialable multiaddrs, each ending in a peer id."""

    def __post_init__(self) -> None:
        check_network(self.network)
        if not 1 <= len(self.bootstraps) <= MAX_BOOTSTRAPS:
            raise CallerError(
                f"an invite names 1 to {MAX_BOOTSTRAPS} bootstrap addresses", hint="give the most reliable of them"
            )
        for address in self.bootstraps:
            validate_multiaddr(address, need_peer_id=True)

    def to_link(self) -> str:
        """The link; equal invites give equal links. Raises CallerError when it would pass MAX_LINK_CHARS."""
        fields = {"n": self.network, "b": [Multiaddr(address).to_bytes() for address in self.bootstraps]}
        body = bytes([_FORMAT]) + msgpack.packb(fields)
        link = SCHEME + base64.urlsafe_b64encode(body + _checksum(body)).decode("ascii").rstrip("=")
        if len(link) > MAX_LINK_CHARS:
            raise CallerError(
                f"the invite link has {len(link)} characters, above {MAX_LINK_CHARS}", hint="give fewer addresses"
            )
        return link


class _Fields(msgspec.Struct, frozen=True):
    n: str
    b: tuple[bytes, ...]


def parse(link: str) -> Invite:
    """Read a link, as pasted: spaces around it and a final slash do no harm. Raises InvalidAddress."""
    encoded = link.strip().removesuffix("/")
    if not encoded.startswith(SCHEME) or len(encoded) > MAX_LINK_CHARS:
        raise InvalidAddress(f"{link[:64]!r} is not an invite", hint=f"an invite begins with {SCHEME}")
    body = _checked_body(encoded.removeprefix(SCHEME))
    if body[0] != _FORMAT:
        raise InvalidAddress(f"the invite has format {body[0]}, this version reads {_FORMAT}", hint="update hiveswarm")
    unpacker = msgpack.Unpacker(
        max_buffer_size=MAX_LINK_CHARS,
        max_str_len=256,
        max_bin_len=256,
        max_array_len=64,
        max_map_len=64,
        max_ext_len=0,
    )
    unpacker.feed(body[1:])
    try:
        fields = msgspec.convert(unpacker.unpack(), _Fields)
        return Invite(network=fields.n, bootstraps=tuple(str(Multiaddr(raw)) for raw in fields.b))
    except (msgpack.UnpackException, ValueError, msgspec.ValidationError, ParseError) as error:
        raise InvalidAddress("the invite cannot be read", hint="ask for a new one") from error
    except CallerError as error:
        raise InvalidAddress(f"the invite cannot be used: {error}", hint=error.hint) from error


def _checked_body(encoded: str) -> bytes:
    damaged = InvalidAddress("the invite is damaged: its checksum does not match", hint="copy the whole link")
    if not _ALPHABET.fullmatch(encoded):
        raise damaged
    try:
        raw = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except binascii.Error as error:
        raise damaged from error
    body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if not body or checksum != _checksum(body):
        raise damaged
    return body


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES]

"""A router that hides one host behind an address of its own: what its packets look like outside, and which come in.

Owns the mapping and the filter (RFC 4787): a port inside has one port outside, whoever it talks to (section 4.1:
endpoint-independent), and only answers come in (section 5: address- and port-dependent), as at most home routers.
Translates TCP and UDP; nothing else passes.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Final

MAX_FLOWS: Final = 4096
"""Remembered, and ports likewise; a real one forgets what is idle as well."""
FIRST_PORT: Final = 20_000
"""Outside: none that a host listens on."""

_IP: Final = 20
"""Bytes of an IPv4 header without options."""
_CHECKSUM_AT: Final = {6: _IP + 16, 17: _IP + 6}
"""Of TCP and UDP: where a packet has its own checksum."""


class Nat:
    """Of one host. Packets are whole IPv4 packets without options, neither cut short nor fragments."""

    def __init__(self, outside: bytes) -> None:
        """`outside`: the address that others see."""
        self.outside = outside
        self._inside = b""
        self._outer: OrderedDict[bytes, bytes] = OrderedDict()
        """Protocol and port inside → port outside; idle ones first."""
        self._inner: dict[bytes, bytes] = {}
        """Protocol and port outside → port inside."""
        self._answers: OrderedDict[bytes, None] = OrderedDict()
        """Protocol, other end and port outside of what was sent; idle ones first."""

    def leaving(self, packet: bytes) -> bytes | None:
        """A packet of the host as others get it; None for one that does not pass."""
        if packet[9] not in _CHECKSUM_AT:
            return None
        protocol, self._inside = packet[9:10], packet[12:16]
        port = self._port(protocol, packet[20:22])
        _remember(self._answers, protocol + packet[16:20] + packet[22:24] + port)
        return _readdressed(packet, 12, self.outside, 20, port)

    def entering(self, packet: bytes) -> bytes | None:
        """A packet to the host as the host gets it; None for one that does not pass."""
        protocol, port = packet[9:10], packet[22:24]
        answers = protocol + packet[12:16] + packet[20:22] + port
        if packet[16:20] != self.outside or answers not in self._answers or protocol + port not in self._inner:
            return None
        return _readdressed(packet, 16, self._inside, 22, self._inner[protocol + port])

    def _port(self, protocol: bytes, inside: bytes) -> bytes:
        outside = self._outer.pop(protocol + inside, None)
        if outside is None:
            taken = len(self._outer)
            outside = struct.pack("!H", FIRST_PORT + taken)
            if taken == MAX_FLOWS:
                idle, outside = self._outer.popitem(last=False)
                del self._inner[idle[:1] + outside]
            self._inner[protocol + outside] = inside
        self._outer[protocol + inside] = outside
        return outside


def _remember(known: OrderedDict[bytes, None], key: bytes) -> None:
    known[key] = None
    known.move_to_end(key)
    if len(known) > MAX_FLOWS:
        known.popitem(last=False)


def _readdressed(packet: bytes, address_at: int, address: bytes, port_at: int, port: bytes) -> bytes:
    """With another address and port, at these places, and checksums that say so."""
    old_address, old_port = packet[address_at : address_at + 4], packet[port_at : port_at + 2]
    changed = bytearray(packet)
    changed[address_at : address_at + 4], changed[port_at : port_at + 2] = address, port
    changed[10:12] = _updated(packet[10:12], old_address, address)
    at = _CHECKSUM_AT[packet[9]]
    if packet[at : at + 2] != b"\0\0" or packet[9] == 6:  # of UDP, 0 says that there is none
        changed[at : at + 2] = _updated(packet[at : at + 2], old_address + old_port, address + port)
    return bytes(changed)


def _updated(checksum: bytes, old: bytes, new: bytes) -> bytes:
    """Once words that it covers have changed (RFC 1624, equation 3)."""
    words = struct.unpack(f"!{(2 + len(old)) // 2}H", checksum + old)
    total = sum(word ^ 0xFFFF for word in words) + sum(struct.unpack(f"!{len(new) // 2}H", new))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", total ^ 0xFFFF or 0xFFFF)  # two ways to write 0, of which UDP has another use for one

"""The network between the hosts of a lab: which IPv4 packet goes where, and when.

Owns the links between hosts and what goes wrong on purpose: cut directions, hosts behind a NAT, hosts that refuse.
Decides only; `forwarder` moves the packets. Addresses are the 4 bytes in the packets.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

from tests.lab.links import Link, LinkProfile
from tests.lab.nat import Nat

_TCP: Final = 6
_HEADER: Final = 20
"""Bytes of an IPv4 header without options, and of a TCP header without them."""
_ACK, _RST = 0x10, 0x04


class Delivery(NamedTuple):
    """A packet that is to arrive at the host of this name then."""

    due_s: float
    host: str
    packet: bytes


@dataclass(slots=True)
class Refused:
    """Packets that no link was asked for."""

    foreign: int = 0
    """Not IPv4, or to nobody here (multicast)."""
    cut: int = 0
    filtered: int = 0
    """By a NAT."""
    reset: int = 0
    """Answered with a TCP reset."""


class Fabric:
    """Hosts joined each to each by a link of its own per direction."""

    def __init__(self, addresses: dict[str, bytes], *, profile: LinkProfile, seed: int) -> None:
        """`addresses` by host. `profile` is what every link starts with; a seed gives the same losses again."""
        self.refused = Refused()
        self._names = {address: name for name, address in addresses.items()}
        self._links = {
            (source, target): Link(profile, random.Random(f"{seed} {source} {target}"))
            for source in addresses
            for target in addresses
            if source != target
        }
        self._cut: set[tuple[str, str]] = set()
        self._nats: dict[str, Nat] = {}
        """By the host behind it."""
        self._refusing: set[str] = set()

    def shape(self, profile: LinkProfile, *, source: str | None = None, target: str | None = None) -> None:
        """Give links a profile: those from `source` to `target`, None meaning any."""
        for (one, other), link in self._links.items():
            if source in (None, one) and target in (None, other):
                link.profile = profile

    def cut(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Drop in silence what the first of a pair sends to the second."""
        self._cut.update(pairs)

    def heal(self, pairs: Sequence[tuple[str, str]] | None = None) -> None:
        """Undo `cut`; None: everywhere."""
        self._cut.difference_update(self._cut.copy() if pairs is None else pairs)

    def put_behind_nat(self, host: str, outside: bytes) -> None:
        """From now on others see it at the address `outside`, and only answers to what it sent reach it."""
        self._nats[host] = Nat(outside)
        self._names[outside] = host

    def refuse(self, host: str, *, on: bool) -> None:
        """Whether TCP from and to it is answered with resets, as if every connection were closed and none accepted."""
        (self._refusing.add if on else self._refusing.discard)(host)

    def accept(self, now_s: float, packet: bytes) -> Delivery | None:
        """What becomes of a packet that its host sends now; None if nothing."""
        source, target = self._names.get(packet[12:16]), self._names.get(packet[16:20])
        if packet[0] != 0x45 or len(packet) < _HEADER + 8 or source is None or target is None or source == target:
            self.refused.foreign += 1
            return None
        if (source, target) in self._cut:
            self.refused.cut += 1
            return None
        if self._refusing and not self._refusing.isdisjoint((source, target)) and packet[9] == _TCP:
            self.refused.reset += 1
            answer = tcp_reset(packet)
            return None if answer is None else Delivery(now_s, source, answer)
        outside = packet if source not in self._nats else self._nats[source].leaving(packet)
        inside = outside if target not in self._nats or outside is None else self._nats[target].entering(outside)
        if inside is None:
            self.refused.filtered += 1
            return None
        due_s = self._links[source, target].offer(now_s, len(packet))
        return None if due_s is None else Delivery(due_s, target, inside)

    def counts(self) -> dict[str, Any]:
        """Everything that was counted so far, ready for JSON: per link as "source target"."""
        links = {f"{source} {target}": asdict(link.counts) for (source, target), link in self._links.items()}
        return {"links": links, "refused": asdict(self.refused)}


def tcp_reset(packet: bytes) -> bytes | None:
    """What a host gets that sent `packet` to a closed port (RFC 9293, section 3.10.7.1); None for a reset or stump."""
    if len(packet) < 2 * _HEADER:
        return None
    source, target = packet[12:16], packet[16:20]
    source_port, target_port, sequence, acknowledged, offset, flags = struct.unpack_from("!HHIIBB", packet, _HEADER)
    if flags & _RST:
        return None
    if flags & _ACK:
        numbers, answer_flags = (acknowledged, 0), _RST
    else:
        length = len(packet) - _HEADER - (offset >> 4) * 4 + bool(flags & 0x02) + bool(flags & 0x01)
        numbers, answer_flags = (0, (sequence + length) & 0xFFFFFFFF), _RST | _ACK
    tcp = struct.pack("!HHIIBBHHH", target_port, source_port, *numbers, (_HEADER // 4) << 4, answer_flags, 0, 0, 0)
    tcp = tcp[:16] + checksum(target + source + struct.pack("!HH", _TCP, len(tcp)) + tcp) + tcp[18:]
    header = struct.pack("!BBHHHBBH", 0x45, 0, _HEADER + len(tcp), 0, 0, 64, _TCP, 0) + target + source
    return header[:10] + checksum(header) + header[12:] + tcp


def checksum(words: bytes) -> bytes:
    """RFC 1071, of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def bytes_into(counts: dict[str, Any], host: str, sources: Container[str] | None = None) -> int:
    """Of `Fabric.counts`: what the links into `host` carried, from `sources` alone if given."""
    links = ((*pair.split(), link["carried_bytes"]) for pair, link in counts["links"].items())
    return sum(size for source, target, size in links if target == host and (sources is None or source in sources))


def bytes_out_of(counts: dict[str, Any], host: str) -> int:
    """Of `Fabric.counts`: what the links out of `host` carried."""
    return sum(link["carried_bytes"] for pair, link in counts["links"].items() if pair.split()[0] == host)

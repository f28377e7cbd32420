"""Where packets go, and what is done to them on purpose."""

from __future__ import annotations

import struct

from tests.lab.fabric import MAX_FLOWS, Fabric, bytes_into, bytes_out_of, checksum, tcp_reset
from tests.lab.links import LinkProfile

A, B, C = (bytes([10, 77, 0, number]) for number in (1, 2, 3))
DELAY_S = 0.05
SYN, ACK, RST = 0x02, 0x10, 0x04


def fabric() -> Fabric:
    return Fabric({"a": A, "b": B, "c": C}, profile=LinkProfile(delay_s=DELAY_S), seed=1)


def tcp(source: bytes, target: bytes, ports: tuple[int, int] = (5000, 80), *, flags: int = ACK, data: int = 0) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40 + data, 0, 0, 64, 6, 0) + source + target
    return head + struct.pack("!HHIIBBHHH", *ports, 1000, 2000, 5 << 4, flags, 1024, 0, 0) + bytes(data)


def test_a_packet_arrives_at_its_host_after_the_delay_of_that_direction() -> None:
    net = fabric()
    net.shape(LinkProfile(delay_s=1.0), source="b", target="a")
    assert net.accept(10.0, tcp(A, B)) == (10.0 + DELAY_S, "b", tcp(A, B))
    assert net.accept(10.0, tcp(B, A)) == (11.0, "a", tcp(B, A))
    net.accept(10.0, tcp(A, C, data=60))
    counts = net.counts()
    assert (bytes_out_of(counts, "a"), bytes_into(counts, "a"), bytes_into(counts, "c")) == (140, 40, 100)
    assert (bytes_into(counts, "a", {"b"}), bytes_into(counts, "a", {"c"})) == (40, 0)


def test_packets_for_nobody_here_go_nowhere() -> None:
    net = fabric()
    ipv6, multicast = b"\x60" + bytes(59), tcp(A, bytes([224, 0, 0, 251]))
    assert [net.accept(0.0, packet) for packet in (ipv6, multicast, tcp(A, A), b"\x45" + bytes(9))] == [None] * 4
    assert net.refused.foreign == 4


def test_a_cut_takes_one_direction_until_it_is_healed() -> None:
    net = fabric()
    net.cut([("a", "b"), ("c", "b")])
    assert net.accept(0.0, tcp(A, B)) is None
    assert net.accept(0.0, tcp(B, A)) is not None
    net.heal([("a", "b")])
    assert net.accept(0.0, tcp(A, B)) is not None
    assert net.accept(0.0, tcp(C, B)) is None
    net.heal()
    assert net.accept(0.0, tcp(C, B)) is not None


def test_only_answers_come_in_through_a_nat() -> None:
    net = fabric()
    net.put_behind_nat("a")
    assert net.accept(0.0, tcp(B, A, (80, 5000))) is None
    assert net.accept(0.0, tcp(A, B, (5000, 80))) is not None
    assert net.accept(0.0, tcp(B, A, (80, 5000))) is not None
    assert net.accept(0.0, tcp(B, A, (81, 5000))) is None
    assert net.accept(0.0, tcp(C, A, (80, 5000))) is None
    assert net.accept(0.0, tcp(B, C)) is not None
    assert net.refused.filtered == 3


def test_a_nat_forgets_the_flow_that_was_idle_longest() -> None:
    net = fabric()
    net.put_behind_nat("a")
    for port in range(MAX_FLOWS + 1):
        net.accept(0.0, tcp(A, B, (port, 80)))
    assert net.accept(0.0, tcp(B, A, (80, 0))) is None
    assert net.accept(0.0, tcp(B, A, (80, 1))) is not None


def test_a_host_that_refuses_answers_everything_with_a_reset() -> None:
    net = fabric()
    net.refuse("b", on=True)
    answer = net.accept(7.0, tcp(A, B, data=10))
    assert answer is not None
    assert (answer.due_s, answer.host) == (7.0, "a")
    assert (answer.packet[12:16], answer.packet[16:20]) == (B, A)
    source_port, target_port, sequence, _, _, flags = struct.unpack_from("!HHIIBB", answer.packet, 20)
    assert (source_port, target_port, sequence, flags) == (80, 5000, 2000, RST)
    assert net.accept(7.0, tcp(B, A)).host == "b"  # its own connections, too
    assert net.accept(7.0, tcp(A, C)).host == "c"
    net.refuse("b", on=False)
    assert net.accept(7.0, tcp(A, B)).host == "b"


def test_a_reset_is_what_the_rfc_says_and_none_answers_a_reset() -> None:
    assert tcp_reset(tcp(A, B, flags=RST)) is None
    assert tcp_reset(tcp(A, B)[:30]) is None
    refused = tcp_reset(tcp(A, B, flags=SYN))
    assert refused is not None
    _, _, sequence, acknowledged, _, flags = struct.unpack_from("!HHIIBB", refused, 20)
    assert (sequence, acknowledged, flags) == (0, 1001, RST | ACK)
    assert checksum(refused[:20]) == b"\0\0"
    pseudo = refused[12:20] + struct.pack("!HH", 6, 20)
    assert checksum(pseudo + refused[20:]) == b"\0\0"

"""Where packets go, and what is done to them on purpose."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from tests.lab.fabric import Fabric, bytes_into, bytes_out_of, checksum, tcp_reset
from tests.lab.links import LinkProfile
from tests.lab.nat import MAX_FLOWS, Nat

A, B, C = (bytes([10, 77, 0, number]) for number in (1, 2, 3))
OUTSIDE = bytes([10, 77, 1, 1])
DELAY_S = 0.05
SYN, ACK, RST = 0x02, 0x10, 0x04


def fabric() -> Fabric:
    return Fabric({"a": A, "b": B, "c": C}, profile=LinkProfile(delay_s=DELAY_S), seed=1)


def tcp(source: bytes, target: bytes, ports: tuple[int, int] = (5000, 80), *, flags: int = ACK, data: int = 0) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40 + data, 0, 0, 64, 6, 0) + source + target
    return head + struct.pack("!HHIIBBHHH", *ports, 1000, 2000, 5 << 4, flags, 1024, 0, 0) + bytes(data)


def udp(source: bytes, target: bytes, ports: tuple[int, int] = (5000, 80), *, data: int = 0) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28 + data, 0, 0, 64, 17, 0) + source + target
    return head + struct.pack("!HHHH", *ports, 8 + data, 0) + bytes(data)


def sealed(packet: bytes) -> bytes:
    """With the checksums that it should have (RFC 9293, section 3.1; RFC 768)."""
    at, body = (36, 20) if packet[9] == 6 else (26, 20)
    packet = packet[:10] + b"\0\0" + packet[12:at] + b"\0\0" + packet[at + 2 :]
    pseudo = packet[12:20] + struct.pack("!HH", packet[9], len(packet) - body)
    own = checksum(pseudo + packet[body:] + b"\0" * (len(packet) % 2))
    packet = packet[:at] + (own if own != b"\0\0" else b"\xff\xff") + packet[at + 2 :]
    head = checksum(packet[:20])
    return packet[:10] + (head if head != b"\0\0" else b"\xff\xff") + packet[12:]


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


def test_others_see_a_host_behind_a_nat_elsewhere_and_only_answers_come_in() -> None:
    net = fabric()
    net.put_behind_nat("a", OUTSIDE)
    for at in (A, OUTSIDE):
        assert net.accept(0.0, tcp(B, at, (80, 5000))) is None
    sent = net.accept(0.0, tcp(A, B, (5000, 80)))
    assert (sent.host, sent.packet[12:16], sent.packet[16:20]) == ("b", OUTSIDE, B)
    port, _ = struct.unpack_from("!HH", sent.packet, 20)
    back = net.accept(0.0, sealed(tcp(B, OUTSIDE, (80, port))))
    assert (back.host, back.packet) == ("a", sealed(tcp(B, A, (80, 5000))))
    assert net.accept(0.0, tcp(B, A, (80, 5000))) is None, "nobody knows the way there"
    assert net.accept(0.0, tcp(B, OUTSIDE, (81, port))) is None
    assert net.accept(0.0, tcp(C, OUTSIDE, (80, port))) is None
    assert net.accept(0.0, tcp(B, C)) is not None
    assert net.refused.filtered == 5
    again = net.accept(0.0, tcp(A, C, (5000, 80)))
    assert struct.unpack_from("!HH", again.packet, 20) == (port, 80), "one port, whoever is talked to"
    assert net.accept(0.0, tcp(C, OUTSIDE, (80, port))).host == "a"


@given(st.binary(max_size=40), st.integers(1, 65535), st.integers(1, 65535), st.booleans())
def test_what_a_nat_changes_has_right_checksums(data: bytes, inside: int, remote: int, datagram: bool) -> None:
    make = udp if datagram else tcp
    net = fabric()
    net.put_behind_nat("a", OUTSIDE)
    sent = net.accept(0.0, sealed(make(A, B, (inside, remote), data=len(data))[: -len(data) or None] + data)).packet
    assert sealed(sent) == sent
    (port,) = struct.unpack_from("!H", sent, 20)
    back = net.accept(0.0, sealed(make(B, OUTSIDE, (remote, port)))).packet
    assert sealed(back) == back == sealed(make(B, A, (remote, inside)))


def test_a_nat_forgets_the_port_and_the_flow_that_were_idle_longest() -> None:
    nat = Nat(OUTSIDE)
    ports = [struct.unpack_from("!H", nat.leaving(tcp(A, B, (port, 80))), 20)[0] for port in range(1, MAX_FLOWS + 2)]
    assert len(set(ports)) == MAX_FLOWS
    assert ports[-1] == ports[0]
    assert nat.entering(tcp(B, OUTSIDE, (80, ports[0])))[22:24] == struct.pack("!H", MAX_FLOWS + 1)
    assert nat.entering(tcp(B, OUTSIDE, (80, ports[1]))) is not None
    for port in range(MAX_FLOWS):
        nat.leaving(tcp(A, B, (2, 81 + port)))
    assert nat.entering(tcp(B, OUTSIDE, (80, ports[1]))) is None


def test_a_nat_lets_nothing_pass_but_tcp_and_udp() -> None:
    net = fabric()
    net.put_behind_nat("a", OUTSIDE)
    echo = bytearray(udp(A, B))
    echo[9] = 1
    assert net.accept(0.0, bytes(echo)) is None


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

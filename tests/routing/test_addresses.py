from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.addresses import MAX_ADDRESS_CHARS, is_public, peer_id_in, validate_multiaddr
from routing.errors import InvalidAddress
from tests.routing.swarms import peer

A, B = peer(1), peer(2)

DIALABLE = [
    f"/ip4/203.0.113.7/tcp/4001/p2p/{A}",
    f"/ip6/2001:db8::1/tcp/4001/p2p/{A}",
    f"/dns4/peer.example.org/tcp/443/tls/ws/p2p/{A}",
    f"/dns/peer.example.org/tcp/443/wss/p2p/{A}",
    f"/ip4/203.0.113.7/udp/4001/quic-v1/p2p/{A}",
    f"/ip4/203.0.113.7/tcp/4001/p2p/{B}/p2p-circuit/p2p/{A}",
]
FOR_LISTENING = [
    "/ip4/0.0.0.0/tcp/0",
    "/ip6/::/tcp/4001",
    "/ip4/127.0.0.1/tcp/0",
    f"/ip4/192.0.2.1/tcp/1/p2p/{B}/p2p-circuit",
]
MALFORMED = [
    "",
    "/",
    "203.0.113.7:4001",
    "/ip4/203.0.113.7",
    "/ip4/203.0.113.256/tcp/4001",
    "/ip4/peer.example.org/tcp/4001",
    "/ip6/203.0.113.7/tcp/4001",
    "/ip4/203.0.113.7/tcp/65536",
    "/ip4/203.0.113.7/tcp/-1",
    "/ip4/203.0.113.7/tcp/http",
    "/ip4/203.0.113.7/tcp/4001/",
    "/ip4/203.0.113.7/tcp/4001/p2p",
    "/ip4/203.0.113.7/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    f"/ip4/203.0.113.7/tcp/4001/p2p/{A[:-1]}",
    f"/ip4/203.0.113.7/tcp/4001/p2p/{A}/p2p/{B}",
    f"/ip4/203.0.113.7/tcp/4001/p2p/{A}\n",
    f"/unix/tmp/socket/p2p/{A}",
    f"/p2p/{A}",
    f"/p2p-circuit/p2p/{A}",
    f"/dns4/a b/tcp/1/p2p/{A}",
    f"/dns4/{'a' * MAX_ADDRESS_CHARS}/tcp/1/p2p/{A}",
    f"/dns4/pe\u202eer.example.org/tcp/1/p2p/{A}",
]


@pytest.mark.parametrize("address", DIALABLE)
def test_an_address_to_dial_is_canonical_and_leads_to_its_peer(address: str) -> None:
    assert validate_multiaddr(address, need_peer_id=True) == address
    assert peer_id_in(address) == A


@pytest.mark.parametrize("address", FOR_LISTENING)
def test_an_address_to_listen_on_is_no_address_to_dial(address: str) -> None:
    assert validate_multiaddr(address, need_peer_id=False) == address
    assert peer_id_in(address) is None
    with pytest.raises(InvalidAddress):
        validate_multiaddr(address, need_peer_id=True)


@pytest.mark.parametrize(
    "address", [f"/ip4/0.0.0.0/tcp/1/p2p/{A}", f"/ip6/::/tcp/1/p2p/{A}", f"/ip4/192.0.2.1/tcp/0/p2p/{A}"]
)
def test_the_wildcard_host_and_port_cannot_be_dialled(address: str) -> None:
    with pytest.raises(InvalidAddress, match="listen on"):
        validate_multiaddr(address, need_peer_id=True)


@pytest.mark.parametrize("address", MALFORMED)
def test_a_malformed_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(InvalidAddress) as raised:
        validate_multiaddr(address, need_peer_id=False)
    assert "\n" not in str(raised.value)


def test_spellings_of_one_address_become_one() -> None:
    assert validate_multiaddr("/ip6/2001:DB8:0::1/tcp/04001", need_peer_id=False) == "/ip6/2001:db8::1/tcp/4001"


@given(
    st.text(max_size=100)
    | st.lists(st.sampled_from(["ip4", "ip6", "tcp", "p2p", "unix", "dns4", "1", "::", "", A, "="]), max_size=8).map(
        lambda parts: "/" + "/".join(parts)
    )
)
def test_any_text_gives_a_canonical_address_or_invalid_address(text: str) -> None:
    for need_peer_id in (True, False):
        try:
            canonical = validate_multiaddr(text, need_peer_id=need_peer_id)
        except InvalidAddress:
            continue
        assert validate_multiaddr(canonical, need_peer_id=need_peer_id) == canonical
        peer_id_in(canonical)


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("/ip4/1.2.3.4", True),
        ("/ip6/2606:4700::1111", True),
        ("/ip4/127.0.0.1", False),
        ("/ip4/10.1.2.3", False),
        ("/ip4/192.168.1.2", False),
        ("/ip4/100.64.0.1", False),
        ("/ip4/169.254.169.254", False),
        ("/ip4/224.0.0.1", False),
        ("/ip4/256.1.1.1", False),
        ("/ip6/::1", False),
        ("/ip6/fd00::1", False),
        ("/ip6/::ffff:10.0.0.1", False),
        ("/ip6/::ffff:1.2.3.4", True),
        ("/dns4/localhost", False),
        ("/unix/socket", False),
        ("", False),
    ],
)
def test_only_an_address_that_anybody_may_dial_is_public(host: str, public: bool) -> None:
    assert is_public(f"{host}/tcp/4001") is public
    assert is_public(f"{host}/tcp/4001/p2p/{peer(1)}") is public

from __future__ import annotations

import base64
import hashlib
import random

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import CallerError, InvalidAddress
from routing.invites import MAX_BOOTSTRAPS, MAX_LINK_CHARS, Invite, parse
from tests.routing.swarms import peer

INVITE = Invite(
    network="main",
    bootstraps=(
        f"/ip4/203.0.113.7/tcp/4001/p2p/{peer(1)}",
        f"/dns4/hive.example.org/tcp/443/wss/p2p/{peer(2)}",
        f"/ip6/2001:db8::1/tcp/4001/p2p/{peer(3)}/p2p-circuit/p2p/{peer(4)}",
    ),
)
LINK = INVITE.to_link()


def link_of(body: bytes) -> str:
    raw = body + hashlib.sha256(body).digest()[:4]
    return "swarm://" + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def link_of_fields(fields: object) -> str:
    return link_of(b"\x01" + msgpack.packb(fields))


NETWORKS = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,31}", fullmatch=True)
BOOTSTRAPS = st.lists(
    st.builds(
        lambda host, port, number: f"{host}/tcp/{port}/p2p/{peer(number)}",
        st.ip_addresses(v=4).filter(lambda ip: not ip.is_unspecified).map(lambda ip: f"/ip4/{ip}")
        | st.ip_addresses(v=6).filter(lambda ip: not ip.is_unspecified).map(lambda ip: f"/ip6/{ip}"),
        st.integers(1, 65535),
        st.integers(0, 20),
    ),
    min_size=1,
    max_size=MAX_BOOTSTRAPS,
)


@given(NETWORKS, BOOTSTRAPS)
def test_what_is_linked_is_what_is_read(network: str, bootstraps: list[str]) -> None:
    invite = Invite(network=network, bootstraps=tuple(bootstraps))
    read = parse(invite.to_link())
    assert read.network == network
    assert parse(read.to_link()) == read
    assert len(read.bootstraps) == len(bootstraps)


def test_names_relays_and_both_families_survive() -> None:
    assert parse(LINK) == INVITE


def test_a_link_is_compact_and_needs_no_escaping() -> None:
    one = Invite(network="main", bootstraps=INVITE.bootstraps[:1]).to_link()
    assert len(one) < 100
    assert set(LINK.removeprefix("swarm://")) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def test_spaces_around_a_pasted_link_and_a_final_slash_do_no_harm() -> None:
    assert parse(f"  {LINK}/\n") == INVITE


@given(st.integers(8, len(LINK) - 1), st.sampled_from("ABCXYZabcxyz0189-_ .="))
def test_a_mistyped_link_is_refused(position: int, character: str) -> None:
    if LINK[position] == character:
        return
    mistyped = LINK[:position] + character + LINK[position + 1 :]
    # The last character of base64 may carry bits that stand for nothing.
    if position < len(LINK) - 1:
        with pytest.raises(InvalidAddress):
            parse(mistyped)


@given(st.integers(0, len(LINK) - 1))
def test_a_link_that_was_cut_short_is_refused(length: int) -> None:
    with pytest.raises(InvalidAddress):
        parse(LINK[:length])


def test_fields_of_later_versions_are_ignored() -> None:
    fields = {
        "n": "main",
        "b": [b"\x04\x7f\x00\x00\x01\x06\x0f\xa1\xa5\x03\x26" + b"\x00\x24\x08\x01\x12\x20" + bytes(32)],
    }
    plain = parse(link_of_fields(fields))
    assert parse(link_of_fields(fields | {"rights": {"train": True}, "until": 1.5, "7": [1, None]})) == plain


def test_a_later_format_asks_for_an_update() -> None:
    with pytest.raises(InvalidAddress, match="format 2") as raised:
        parse(link_of(b"\x02rest"))
    assert "update" in raised.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        {},
        {"n": "main"},
        {"n": "main", "b": []},
        {"n": "main", "b": [b"junk"]},
        {"n": "main", "b": ["/ip4/203.0.113.7/tcp/1"]},
        {"n": "main", "b": [b"\x04\x7f\x00\x00\x01\x06\x0f\xa1"]},
        {"n": "Not A Name", "b": [b"\x04\x7f\x00\x00\x01\x06\x0f\xa1"]},
        {"n": 7, "b": []},
        {"n": "main", "b": [b""] * (MAX_BOOTSTRAPS + 1)},
    ],
)
def test_an_invite_with_unusable_fields_is_refused(fields: object) -> None:
    with pytest.raises(InvalidAddress):
        parse(link_of_fields(fields))


@given(st.text(max_size=200) | st.text(max_size=200).map(lambda text: "swarm://" + text))
def test_any_text_raises_invalid_address_only(text: str) -> None:
    with pytest.raises(InvalidAddress):
        parse(text)


@given(st.binary(max_size=200))
def test_any_bytes_with_a_true_checksum_raise_invalid_address_only(body: bytes) -> None:
    for candidate in (body, b"\x01" + body, b"\x01\x82\xa1n\xa4main\xa1b\x91\xc4" + bytes([len(body)]) + body):
        with pytest.raises(InvalidAddress):
            parse(link_of(candidate))


def test_a_mutated_address_raises_invalid_address_only() -> None:
    rng = random.Random(3)
    raw = bytes.fromhex("047f000001060fa1a50326002408011220") + bytes(32)
    for _ in range(2000):
        mutated = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        try:
            parse(link_of_fields({"n": "main", "b": [bytes(mutated)]}))
        except InvalidAddress:
            continue


def test_an_endless_link_is_refused() -> None:
    with pytest.raises(InvalidAddress):
        parse("swarm://" + "A" * MAX_LINK_CHARS)


def test_an_invite_that_cannot_be_used_cannot_exist() -> None:
    with pytest.raises(CallerError):
        Invite(network="main", bootstraps=())
    with pytest.raises(CallerError):
        Invite(network="No Name", bootstraps=INVITE.bootstraps)
    with pytest.raises(InvalidAddress):
        Invite(network="main", bootstraps=("/ip4/203.0.113.7/tcp/1",))
    with pytest.raises(CallerError):
        Invite(network="main", bootstraps=INVITE.bootstraps * 6)

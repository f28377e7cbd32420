from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import CallerError, InvalidAddress
from routing.identity import (
    SigningKey,
    identity_file_bytes,
    key_from_identity_file,
    peer_id_of,
    public_key_of,
    verify,
)

SEEDS = st.binary(min_size=32, max_size=32)


def test_an_identity_file_equals_the_vector_of_the_libp2p_specification() -> None:
    # libp2p specs, peer-ids/peer-ids.md, "Test vectors": the Ed25519 private key in its protobuf form.
    protobuf = bytes.fromhex(
        "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
        "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
    )
    key = key_from_identity_file(protobuf)
    assert identity_file_bytes(key) == protobuf
    assert key.public_key.hex() == "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
    assert key.peer_id.startswith("12D3Koo")


@given(SEEDS)
def test_a_peer_id_contains_its_public_key(seed: bytes) -> None:
    key = SigningKey.from_seed(seed)
    assert public_key_of(key.peer_id) == key.public_key
    assert peer_id_of(key.public_key) == key.peer_id
    assert key.public_key == Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


@given(SEEDS, st.binary(min_size=1, max_size=20), st.binary(max_size=100))
def test_a_signature_holds_for_its_own_peer_domain_and_message_only(seed: bytes, domain: bytes, message: bytes) -> None:
    key, other = SigningKey.from_seed(seed), SigningKey.from_seed(bytes(b ^ 1 for b in seed))
    signature = key.sign(domain, message)
    assert verify(key.peer_id, domain, message, signature)
    assert not verify(other.peer_id, domain, message, signature)
    assert not verify(key.peer_id, domain + b"x", message, signature)
    assert not verify(key.peer_id, domain, message + b"x", signature)


def test_bytes_cannot_move_between_domain_and_message() -> None:
    key = SigningKey.from_seed(b"\x01" * 32)
    assert not verify(key.peer_id, b"a", b"bc", key.sign(b"ab", b"c"))


@given(st.text(max_size=80), st.binary(max_size=80))
def test_verification_never_raises_on_what_strangers_send(peer_id: str, signature: bytes) -> None:
    assert not verify(peer_id, b"domain", b"message", signature)
    assert not verify(SigningKey.from_seed(b"\x01" * 32).peer_id, b"domain", b"message", signature)


@given(
    st.text(max_size=80)
    | st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", min_size=52, max_size=52)
)
def test_what_is_not_a_peer_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidAddress):
        public_key_of(text)


def test_an_id_has_one_spelling() -> None:
    peer_id = SigningKey.from_seed(b"\x01" * 32).peer_id
    for spelling in (peer_id + " ", " " + peer_id, peer_id[:-1] + " "):
        with pytest.raises(InvalidAddress):
            public_key_of(spelling)


@given(st.binary(max_size=100))
def test_an_identity_file_with_other_bytes_is_refused(data: bytes) -> None:
    with pytest.raises(CallerError):
        key_from_identity_file(data)


def test_an_identity_file_whose_halves_disagree_is_refused() -> None:
    data = bytearray(identity_file_bytes(SigningKey.from_seed(b"\x01" * 32)))
    data[-1] ^= 1
    with pytest.raises(CallerError, match="does not belong"):
        key_from_identity_file(bytes(data))


def test_the_seed_is_not_printed() -> None:
    key = SigningKey.from_seed(b"\x5a" * 32)
    assert "5a5a" not in repr(key)
    assert "ZZZZ" not in repr(key)


def test_seeds_keys_and_domains_of_other_lengths_are_the_callers_error() -> None:
    with pytest.raises(CallerError, match="seed"):
        SigningKey.from_seed(b"short")
    with pytest.raises(CallerError, match="public key"):
        peer_id_of(b"short")
    for domain in (b"", b"x" * 256):
        with pytest.raises(CallerError, match="domain"):
            SigningKey.from_seed(b"\x01" * 32).sign(domain, b"")

"""Ed25519 keys behind libp2p peer ids: what an id contains, how its owner signs, how anyone verifies.

The identity is the address: a `12D3Koo…` peer id *is* the public key, so a signature needs no key directory. Knows no
randomness (key generation lives in `peers`), no files and no network.
"""

from __future__ import annotations

import functools
from typing import Final

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from routing.errors import CallerError, InvalidAddress
from routing.ids import PeerId

SEED_BYTES: Final = 32
PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
PEER_ID_CHARS: Final = 52
"""Every Ed25519 peer id has this length: base58 of 38 bytes with a fixed prefix."""

# libp2p peer-id spec: identity multihash (0x00, length 0x24) of the protobuf PublicKey{1: Ed25519 = 1, 2: 32 bytes}.
_PEER_ID_PREFIX: Final = bytes.fromhex("002408011220")
# protobuf PrivateKey{1: Ed25519 = 1, 2: 64 bytes = seed ‖ public key}.
_IDENTITY_FILE_PREFIX: Final = bytes.fromhex("08011240")


class SigningKey:
    """A peer's transport key. The seed never appears in `repr`, and nothing here logs it."""

    __slots__ = ("_key", "peer_id", "public_key", "seed")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise CallerError(f"an Ed25519 seed has {SEED_BYTES} bytes, not {len(seed)}")
        self.seed: Final = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: Final = self._key.public_key().public_bytes_raw()
        self.peer_id: Final = peer_id_of(self.public_key)

    @classmethod
    def from_seed(cls, seed: bytes) -> SigningKey:
        """The same 32 bytes always give the same peer. Raises CallerError on another length."""
        return cls(seed)

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """64 bytes over the domain label and the message; a signature for one domain is worthless in another."""
        return self._key.sign(_labelled(domain, message))

    def __repr__(self) -> str:
        return f"SigningKey({self.peer_id})"


def peer_id_of(public_key: bytes) -> PeerId:
    """The libp2p peer id of a raw Ed25519 public key. Raises CallerError unless it has 32 bytes."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise CallerError(f"an Ed25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode("ascii"))


# One record asks several times about the same id, and base58 is slow in Python.
@functools.lru_cache(maxsize=16384)
def public_key_of(peer_id: str) -> bytes:
    """The Ed25519 public key inside a peer id. Raises InvalidAddress when there is none."""
    # The length first: base58 takes quadratic time, and these strings come from strangers.
    if len(peer_id) != PEER_ID_CHARS:
        raise InvalidAddress(_not_a_peer_id(peer_id))
    try:
        raw: bytes = base58.b58decode(peer_id)
    except ValueError as error:
        raise InvalidAddress(_not_a_peer_id(peer_id)) from error
    if not raw.startswith(_PEER_ID_PREFIX) or len(raw) != len(_PEER_ID_PREFIX) + PUBLIC_KEY_BYTES:
        raise InvalidAddress(_not_a_peer_id(peer_id))
    return raw[len(_PEER_ID_PREFIX) :]


def verify(peer_id: str, domain: bytes, message: bytes, signature: bytes) -> bool:
    """True when the owner of `peer_id` signed this message in this domain. Never raises on a stranger's input."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key_of(peer_id))
        key.verify(signature, _labelled(domain, message))
    except (InvalidAddress, InvalidSignature, ValueError):
        return False
    return True


def identity_file_bytes(key: SigningKey) -> bytes:
    """The content of the identity file that `p2pd` reads."""
    return _IDENTITY_FILE_PREFIX + key.seed + key.public_key


def key_from_identity_file(data: bytes) -> SigningKey:
    """Inverse of `identity_file_bytes`. Raises CallerError when the bytes are not an Ed25519 identity."""
    body = data[len(_IDENTITY_FILE_PREFIX) :]
    if not data.startswith(_IDENTITY_FILE_PREFIX) or len(body) != SEED_BYTES + PUBLIC_KEY_BYTES:
        raise CallerError("the identity file does not hold an Ed25519 key", hint="move it away to create a new one")
    key = SigningKey(body[:SEED_BYTES])
    if key.public_key != body[SEED_BYTES:]:
        raise CallerError("the identity file is damaged: its public key does not belong to its seed")
    return key


def _labelled(domain: bytes, message: bytes) -> bytes:
    # The length byte keeps (b"ab", b"c") and (b"a", b"bc") apart.
    if not 0 < len(domain) < 256:
        raise CallerError("a signature domain has 1 to 255 bytes")
    return bytes([len(domain)]) + domain + message


def _not_a_peer_id(text: str) -> str:
    return f"{text[:64]!r} is not an Ed25519 peer id (52 characters, starting with 12D3Koo)"

"""Peers and records for the transport's tests."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from peers.transport.base import Stream, Transport
from routing import records
from routing.identity import SigningKey
from routing.ids import BlockSpan, BlockSpans, ModelId, PeerId
from routing.records import Announcement, PeerState, model_key, sign_record
from routing.store import RecordStore, StoredRecord

NETWORK = "test"
MODEL = ModelId(b"m" * 32)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One peer, on whichever transport the test runs."""

    key: SigningKey
    transport: Transport
    store: RecordStore

    @property
    def peer_id(self) -> PeerId:
        return self.key.peer_id


@dataclass(frozen=True, kw_only=True)
class World:
    """Two connected nodes, a third that only dials, and what a test may do to them."""

    one: Node
    other: Node
    dialler: Node
    unreachable: Node
    forge_frame: Callable[[Stream, int], Awaitable[None]]
    """Announce a frame of so many bytes, whatever `send` would say."""


def signing_key(number: int) -> SigningKey:
    return SigningKey.from_seed(number.to_bytes(32, "big"))


def announcement(
    key: SigningKey, *, sequence: int = 1, expires_at_s: float | None = None, name: str = ""
) -> Announcement:
    return Announcement(
        peer_id=key.peer_id,
        model=MODEL,
        model_name="test-model",
        num_blocks=30,
        spans=BlockSpans.of(BlockSpan(0, 10)),
        state=PeerState.ONLINE,
        dtype="float32",
        version="0.1.0",
        protocol=1,
        name=name,
        addresses=(f"/ip4/192.0.2.1/tcp/4001/p2p/{key.peer_id}",),
        decode_s_per_block=0.001,
        prefill_s_per_token_block=0.0001,
        cache_tokens=1000,
        free_tokens=1000,
        sequence=sequence,
        expires_at_s=time.time() + 100 if expires_at_s is None else expires_at_s,
    )


def record(
    key: SigningKey,
    *,
    sequence: int = 1,
    expires_at_s: float | None = None,
    name: str = "",
    under: str | None = None,
) -> StoredRecord:
    """A record signed by `key`, by default under the key where this peer announces MODEL."""
    content = announcement(key, sequence=sequence, expires_at_s=expires_at_s, name=name)
    dht_key = under or model_key(NETWORK, MODEL, key.peer_id)
    return StoredRecord(
        key=dht_key,
        subkey=key.peer_id,
        value=sign_record(content, dht_key, key),
        expires_at_s=content.expires_at_s,
    )


def foreign_records(count: int, *, expires_at_s: float) -> Iterator[StoredRecord]:
    """Valid records of as many peers. All sign one body, which names no peer: half the time of building each."""
    body = records._encode(announcement(signing_key(1), expires_at_s=expires_at_s))
    for number in range(1000, 1000 + count):
        key = signing_key(number)
        under = model_key(NETWORK, MODEL, key.peer_id)
        signature = key.sign(records._DOMAIN, records._message(under, key.peer_id, body))
        value = bytes([records._FORMAT]) + signature + body
        yield StoredRecord(key=under, subkey=key.peer_id, value=value, expires_at_s=expires_at_s)

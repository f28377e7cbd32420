"""Announcements and keys for the tests of routing: valid by default, one field changed at a time."""

from __future__ import annotations

import functools
from typing import Any

from routing.identity import SigningKey, peer_id_of
from routing.ids import BlockSpan, BlockSpans, ModelId, PeerId
from routing.records import Announcement, PeerState

MODEL = ModelId(b"\x11" * 32)
OTHER_MODEL = ModelId(b"\x22" * 32)
NOW_S = 1_750_000_000.0


@functools.cache
def key(number: int) -> SigningKey:
    return SigningKey.from_seed(number.to_bytes(32, "big"))


@functools.cache
def peer(number: int) -> PeerId:
    """A peer id without a private key: cheap enough for thousands."""
    return peer_id_of(number.to_bytes(32, "big"))


def announcement(peer_id: PeerId, start: int = 0, end: int = 10, **changes: Any) -> Announcement:
    fields: dict[str, Any] = {
        "peer_id": peer_id,
        "model": MODEL,
        "model_name": "smollm2-135m-instruct",
        "num_blocks": 30,
        "spans": BlockSpans.of(BlockSpan(start, end)),
        "state": PeerState.ONLINE,
        "dtype": "float32",
        "version": "0.1.0",
        "protocol": 1,
        "addresses": (f"/ip4/203.0.113.7/tcp/4001/p2p/{peer_id}",),
        "decode_s_per_block": 0.001,
        "prefill_s_per_token_block": 0.0001,
        "cache_tokens": 8192,
        "free_tokens": 8192,
        "sequence": 1,
        "expires_at_s": NOW_S + 20.0,
    }
    return Announcement(**fields | changes)

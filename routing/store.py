"""The DHT as this project sees it: signed values under string keys, one per peer.

Owns the protocol and nothing else. Implementations live in `peers.transport`; they check every value with
`routing.records.verify_record` before they keep or return it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """One value as the DHT holds it: `subkey` is the announcing peer's id, `value` the exact signed bytes."""

    key: str
    subkey: str
    value: bytes
    expires_at_s: float
    """Seconds since the epoch; equals the expiry inside the signed value."""


class RecordStore(Protocol):
    """Where records are published and read. Answers are hints from strangers until verified."""

    async def put(self, record: StoredRecord) -> None:
        """Publish. Raises Unavailable, which says why, when no node accepted it."""
        ...

    async def get(self, keys: Sequence[str]) -> list[StoredRecord]:
        """Everything several nodes hold under these keys; an unreachable node or a bad record is left out."""
        ...

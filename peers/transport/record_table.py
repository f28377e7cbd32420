"""Which records a storing node keeps: the admission rule of the DHT, as a plain table.

Owns the order of the checks and the bounds on space; `routing.records.verify_record` owns what a valid record is.
Knows no network and no clock. One rule for every store: the memory twin and the libp2p node both keep this table.

Who may write: a record is accepted only from the very peer that it announces, over that peer's authenticated
connection. So nobody can overwrite, squat or replay another's record, even with bytes that were once valid, and a flood
costs one connection for each fake identity. Who stays when a key is full: those who are there already and renew in
time; a newcomer waits until one expires.

How long a record is kept: as long as it says, or, if it came later than its way may take, for one lifetime from then,
within the slack of unequal clocks. So whoever looks for the first time does not find who died before that, and if it
finds a record past its end, it knows that the clock of that peer is behind.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final

from routing.errors import InvalidRecord
from routing.records import (
    CLOCK_SLACK_S,
    MAX_EXPIRY_AHEAD_S,
    MAX_RECORD_BYTES,
    MAX_RECORDS_PER_KEY,
    RECORD_LIFETIME_S,
    verify_record,
)
from routing.store import StoredRecord

MAX_KEYS_PER_PEER: Final = 32
"""A peer announces each model under two keys: room for sixteen models."""
WAY_S: Final = 2.0
"""From the making of a record to its arrival. What looks older when it comes was made by a clock that is behind."""
MAX_RECORDS: Final = 32_768
"""About 40 MB in all, whatever keys strangers invent."""


@dataclass(frozen=True, slots=True)
class _Entry:
    record: StoredRecord
    sequence: int
    kept_until_s: float


class RecordTable:
    """Live records by key and subkey."""

    def __init__(
        self,
        *,
        max_records_per_key: int = MAX_RECORDS_PER_KEY,
        max_keys_per_peer: int = MAX_KEYS_PER_PEER,
        max_records: int = MAX_RECORDS,
    ) -> None:
        self._max_records_per_key = max_records_per_key
        self._max_keys_per_peer = max_keys_per_peer
        self._max_records = max_records
        self._entries: dict[str, dict[str, _Entry]] = {}
        self._keys_of: dict[str, set[str]] = {}
        # (kept until, key, subkey), earliest first; a renewed entry leaves its old one behind as a harmless ghost.
        self._expiries: list[tuple[float, str, str]] = []
        self._size = 0

    def __len__(self) -> int:
        """Records held, those that expired since the last call included."""
        return self._size

    def put(self, record: StoredRecord, *, sender: str, now_s: float) -> None:
        """Keep a record that `sender` hands over, or raise InvalidRecord with the reason.

        Handing over what is already held is allowed. Cheap checks come before the signature's.
        """
        if sender != record.subkey:
            raise InvalidRecord(f"peer {sender} may not store a record of {record.subkey}")
        if len(record.value) > MAX_RECORD_BYTES:
            raise InvalidRecord(f"the record has {len(record.value)} bytes, above {MAX_RECORD_BYTES}")
        if not -CLOCK_SLACK_S < record.expires_at_s - now_s <= MAX_EXPIRY_AHEAD_S:
            raise InvalidRecord(
                f"one of the two clocks is wrong: the record expires in {record.expires_at_s - now_s:.0f} s; "
                f"{-CLOCK_SLACK_S:.0f} to {MAX_EXPIRY_AHEAD_S:.0f} s are allowed",
                hint="clock skew? check the time synchronisation on both machines",
            )
        self._expire(now_s)
        held = self._entries.get(record.key, {}).get(record.subkey)
        if held is None:
            self._check_room(record)
        elif held.record == record:
            return
        announcement = verify_record(
            record.value, key=record.key, subkey=record.subkey, stored_expiry_s=record.expires_at_s, now_s=now_s
        )
        if held is not None and announcement.sequence <= held.sequence:
            raise InvalidRecord(
                f"the record's sequence {announcement.sequence} is not above {held.sequence}, which is held already"
            )
        self._size += held is None
        kept_until_s = record.expires_at_s
        if now_s + RECORD_LIFETIME_S - kept_until_s > WAY_S:
            kept_until_s = min(now_s + RECORD_LIFETIME_S, kept_until_s + CLOCK_SLACK_S)
        self._entries.setdefault(record.key, {})[record.subkey] = _Entry(record, announcement.sequence, kept_until_s)
        self._keys_of.setdefault(record.subkey, set()).add(record.key)
        heapq.heappush(self._expiries, (kept_until_s, record.key, record.subkey))

    def get(self, key: str, *, now_s: float) -> list[StoredRecord]:
        """Every live record under a key: at most `max_records_per_key`, each once verified."""
        self._expire(now_s)
        return [entry.record for entry in self._entries.get(key, {}).values()]

    def _check_room(self, record: StoredRecord) -> None:
        if len(self._entries.get(record.key, ())) >= self._max_records_per_key:
            raise InvalidRecord(f"the key {record.key} is full", hint="wait until a record under it expires")
        if len(self._keys_of.get(record.subkey, ())) >= self._max_keys_per_peer:
            raise InvalidRecord(f"peer {record.subkey} announces under {self._max_keys_per_peer} keys already")
        if self._size >= self._max_records:
            raise InvalidRecord("this node's record table is full", hint="wait until records expire")

    def _expire(self, now_s: float) -> None:
        while self._expiries and self._expiries[0][0] <= now_s:
            kept_until_s, key, subkey = heapq.heappop(self._expiries)
            entry = self._entries.get(key, {}).get(subkey)
            if entry is None or entry.kept_until_s != kept_until_s:
                continue  # a ghost: renewed since
            del self._entries[key][subkey]
            if not self._entries[key]:
                del self._entries[key]
            self._keys_of[subkey].discard(key)
            if not self._keys_of[subkey]:
                del self._keys_of[subkey]
            self._size -= 1

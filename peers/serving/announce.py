"""Keeps this peer's signed records in the DHT: renewed every few seconds, told at once when something changes.

Owns the sequence numbers and the two keys of an announcement (its model's, and the index of all models). Knows the
store only as a protocol.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from routing.identity import SigningKey
from routing.records import RECORD_LIFETIME_S, RECORD_RENEW_S, Announcement, index_key, model_key, sign_record
from routing.store import RecordStore, StoredRecord

logger = logging.getLogger(__name__)

PUT_TIMEOUT_S = 10.0

Describe = Callable[[int, float], Announcement]
"""The peer's present announcement, given its sequence number and expiry (Unix seconds)."""


class Announcer:
    """Announces what `describe` says until cancelled."""

    def __init__(
        self,
        store: RecordStore,
        key: SigningKey,
        *,
        network: str,
        describe: Describe,
        unheard: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`unheard` is called each time no node accepted the record, so that the host can look for the swarm again."""
        self._store = store
        self._key = key
        self._network = network
        self._describe = describe
        self._unheard = unheard
        self._clock = clock
        self._sequence = 0

    async def announce(self) -> bool:
        """Put the present state under both keys; False when no other node accepted it."""
        now_s = self._clock()
        # milliseconds grow over restarts without a file, and the larger of the two also while a clock is set back
        self._sequence = max(self._sequence + 1, int(now_s * 1000))
        announcement = self._describe(self._sequence, round(now_s + RECORD_LIFETIME_S, 3))
        keys = (
            model_key(self._network, announcement.model, announcement.peer_id),
            index_key(self._network, announcement.peer_id),
        )
        try:
            async with asyncio.timeout(PUT_TIMEOUT_S):
                accepted = await asyncio.gather(*(self._put(announcement, key) for key in keys))
        except TimeoutError:
            logger.warning("the DHT did not take this peer's record within %.0f s", PUT_TIMEOUT_S)
            return False
        return all(accepted)

    async def run(self) -> None:
        """Announce every RECORD_RENEW_S seconds until cancelled."""
        while True:
            if not await self.announce():
                self._unheard()
            await asyncio.sleep(RECORD_RENEW_S)

    async def _put(self, announcement: Announcement, key: str) -> bool:
        value = sign_record(announcement, key, self._key)
        return await self._store.put(
            StoredRecord(key=key, subkey=announcement.peer_id, value=value, expires_at_s=announcement.expires_at_s)
        )

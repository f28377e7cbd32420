"""Keeps this peer's signed records in the DHT: renewed every few seconds, told at once when something changes.

Owns the sequence numbers and the two keys of an announcement (its model's, and the index of all models). Knows the
store only as a protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from peers.transport.patience import Patience
from routing.errors import Unavailable
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
        outage: Callable[[Unavailable | None], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`outage` hears once why nobody takes this peer's record any more, and once (None) when that is over."""
        self._store = store
        self._key = key
        self._network = network
        self._describe = describe
        self._outage = outage
        self._problem: Unavailable | None = None
        """Why nobody took the record when `run` announced it last."""
        self._clock = clock
        self._sequence = 0
        self._changed = asyncio.Event()
        self.heard = asyncio.Event()
        """Set for good once other nodes have taken a record."""

    async def announce(self) -> None:
        """Put the present state under both keys. Raises Unavailable when no node took it."""
        now_s = self._clock()
        # milliseconds grow over restarts without a file, and the larger of the two also while a clock is set back
        self._sequence = max(self._sequence + 1, int(now_s * 1000))
        announcement = self._describe(self._sequence, round(now_s + RECORD_LIFETIME_S, 3))
        keys = (
            model_key(self._network, announcement.model, announcement.peer_id),
            index_key(self._network, announcement.peer_id),
        )
        try:
            async with Patience(PUT_TIMEOUT_S):
                outcomes = await asyncio.gather(*(self._put(announcement, key) for key in keys), return_exceptions=True)
        except TimeoutError as error:
            raise Unavailable(
                f"the DHT did not take this peer's record within {PUT_TIMEOUT_S:.0f} s",
                hint="check the network; it is tried again",
            ) from error
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        self._tell(None)
        self.heard.set()

    def soon(self) -> None:
        """What `describe` says has changed: `run` announces it at once."""
        self._changed.set()

    async def run(self) -> None:
        """Announce every RECORD_RENEW_S seconds, and when told that something changed, until cancelled."""
        while True:
            self._changed.clear()
            try:
                await self.announce()
            except Unavailable as error:
                logger.info("not announced: %s", error)
                self._tell(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECORD_RENEW_S):
                    await self._changed.wait()

    def _tell(self, problem: Unavailable | None) -> None:
        if (problem is None) != (self._problem is None):
            self._outage(problem)
        self._problem = problem

    async def _put(self, announcement: Announcement, key: str) -> None:
        value = sign_record(announcement, key, self._key)
        await self._store.put(
            StoredRecord(key=key, subkey=announcement.peer_id, value=value, expires_at_s=announcement.expires_at_s)
        )

"""What a peer says of itself in its records: the blocks that it serves, how fast it is, how much room there is now.

Owns the state that others see, and keeps it announced. How it comes to serve those blocks is the `server`'s affair.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from peers.serving.announce import Announcer
from routing.errors import Unavailable
from routing.identity import SigningKey
from routing.ids import BlockSpan, BlockSpans
from routing.records import Announcement, PeerState
from routing.store import RecordStore

logger = logging.getLogger(__name__)


class Presence:
    """The peer's present announcement, from `offer` on."""

    def __init__(
        self,
        store: RecordStore,
        key: SigningKey,
        *,
        network: str,
        momentary: Callable[[Announcement], Announcement],
        outage: Callable[[Unavailable | None], None] | None = None,
    ) -> None:
        """`momentary` fills in what is another number at every moment. `outage` is an `Announcer`'s; by default the log
        hears that."""
        self.state = PeerState.JOINING
        self._momentary = momentary
        self._offered: Announcement | None = None
        self._intent: BlockSpan | None = None
        self._announcer = Announcer(store, key, network=network, describe=self._describe, outage=outage or _log_outage)

    @property
    def heard(self) -> asyncio.Event:
        """Set for good once others have taken a record."""
        return self._announcer.heard

    def describe(self) -> Announcement:
        """What this peer would announce now."""
        assert self._offered is not None
        return self._describe(self._offered.sequence, self._offered.expires_at_s)

    def offer(self, announcement: Announcement) -> None:
        """What does not change while these blocks are served."""
        self._offered = announcement

    async def run(self) -> None:
        """Keep it announced until cancelled."""
        await self._announcer.run()

    def join(self, spans: BlockSpans) -> None:
        """These blocks will be served soon."""
        self.state, self._intent = PeerState.JOINING, None
        self._offered = replace(self.describe(), spans=spans)
        self._announcer.soon()

    def serve(self, *, paused: bool) -> None:
        """The blocks are served, or will be once the owner has the machine no longer."""
        self.state = PeerState.PAUSED if paused else PeerState.ONLINE
        self._announcer.soon()

    def changed(self) -> None:
        """What is another number at every moment became one that others should know at once."""
        self._announcer.soon()

    async def leave(self) -> None:
        """Nothing new is taken from now on."""
        self.state = PeerState.DRAINING
        await self._tell("that this peer leaves")

    async def intend(self, intent: BlockSpan | None) -> bool:
        """These blocks might be served next; None takes that back. Says whether others heard it."""
        self._intent = intent
        return await self._tell("what this peer intends")

    async def _tell(self, what: str) -> bool:
        try:
            await self._announcer.announce()
        except Unavailable as error:
            logger.info("nobody could be told %s: %s", what, error)
            return False
        return True

    def _describe(self, sequence: int, expires_at_s: float) -> Announcement:
        assert self._offered is not None
        return replace(
            self._momentary(self._offered),
            state=self.state,
            intent=self._intent,
            sequence=sequence,
            expires_at_s=expires_at_s,
        )


def _log_outage(problem: Unavailable | None) -> None:
    if problem is None:
        logger.warning("others hold this peer's record again")
    else:
        logger.warning("nobody takes this peer's record; trying on: %s", problem)

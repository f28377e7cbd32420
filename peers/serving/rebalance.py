"""Moves this peer to blocks that need it more: looks, says what it intends, looks again, moves.

Owns the rhythm and the announced intent. Whether and where to move, and whether that is still right, is
`routing.placement`'s to decide, how to serve other blocks the host's.

    look ── a move? ── announce the intent ── SETTLE_S ── still right? ── fetch; still right? ── drain, load, announce
                          └─ nobody hears it                └─ no            └─ fails, nobody answers (rest), or no
                             └──────────────── take it back ┴────────────────┘

The peer serves what it served until all that it needs is on its disk, and leaves blocks only to holders that answer it
then: a record says of who died that it serves, for as long as it lasts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable

from peers.discovery import Discovery
from routing.errors import SwarmError
from routing.ids import BlockSpan, PeerId
from routing.placement import (
    LOOK_S,
    MAX_PARTS,
    REST_S,
    SETTLE_S,
    Arrivals,
    Move,
    blocks_of,
    choose_move,
    stands,
    to_ask,
    usable,
)
from routing.records import Announcement

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 2.0
"""Of those to whom blocks are left; who says something else has more time (`Links.request`)."""
AGAIN_S = 60.0
"""After a move that failed: what stood in its way, a full disk say, is not over at the next look."""
UNANSWERED_S = 5.0
"""After one for which nobody answered who would hold what it leaves, before another that leaves blocks; each further
such rest is twice as long, up to AGAIN_S. All are up to half as long again, so that who rests for the same reason does
not come back at the same time."""


class Rebalance:
    """Looks until cancelled.

    `describe` says what this peer would announce now, `intend` announces an intent or takes it back and says whether
    others heard it, `fetch` brings what a move needs while everything goes on, `move` serves other blocks; when that
    raises SwarmError, the peer serves what it served before.
    """

    def __init__(
        self,
        discovery: Discovery,
        describe: Callable[[], Announcement],
        intend: Callable[[BlockSpan | None], Awaitable[bool]],
        fetch: Callable[[Move], Awaitable[None]],
        move: Callable[[Move], Awaitable[None]],
        *,
        rng: random.Random,
        max_parts: int = MAX_PARTS,
    ) -> None:
        self._discovery = discovery
        self._describe = describe
        self._intend = intend
        self._fetch = fetch
        self._move = move
        self._rng = rng
        self._max_parts = max_parts
        self._arrivals = Arrivals()
        self._moved_at_s = discovery.now_s()
        self._again_at_s = self._leave_at_s = -math.inf
        self._rest_s = UNANSWERED_S

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S * self._rng.uniform(0.5, 1.5))
            await self.look()

    async def look(self) -> bool:
        """Look once, and move if that is called for; True after a move."""
        now_s = self._discovery.now_s()
        alike = self._alike()
        late, open_for_s = self._late(alike, now_s), self._arrivals.open_for_s(now_s)
        me, max_parts = alike[0].peer_id, self._max_parts
        move = choose_move(alike, me, now_s, open_for_s=open_for_s, late=late, max_parts=max_parts)
        if move is None or now_s < self._again_at_s or (now_s < self._leave_at_s and self._left(move)):
            return False
        if not move.heals and now_s - self._moved_at_s < REST_S:
            return False
        if not await self._prepared(move):
            await self._intend(None)
            return False
        self._moved_at_s = now_s
        try:
            await self._move(move)
        except SwarmError as error:
            self._failed(error)
            return False
        return True

    async def _prepared(self, move: Move) -> bool:
        """Whether all heard of the move, all that it needs is here, and it is still right."""
        if not await self._intend(move.intent) and self._left(move):
            return False  # who gives up nothing does no harm, and may be the last who takes records
        await asyncio.sleep(SETTLE_S)
        if not await self._stands(move, ready=False):
            return False
        logger.info("fetching what blocks %s need that are not here yet", move.spans)
        fetching = asyncio.ensure_future(self._fetch(move))
        try:
            while True:
                done, _ = await asyncio.wait([fetching], timeout=LOOK_S)
                if done:
                    await fetching
                if not await self._stands(move, ready=True, answered=await self._answered(move) if done else None):
                    return False
                if done:
                    return True
        except SwarmError as error:
            self._failed(error)
            return False
        finally:
            fetching.cancel()
            await asyncio.wait([fetching])
            if not fetching.cancelled():
                fetching.exception()  # marked as seen: it may have failed when nobody wanted it any more

    def _left(self, move: Move) -> set[int]:
        return blocks_of(self._describe().spans) - blocks_of(move.spans)

    async def _answered(self, move: Move) -> set[PeerId]:
        alike = self._alike()
        return await self._discovery.answering(to_ask(move, alike, alike[0].peer_id), timeout_s=ANSWER_TIMEOUT_S)

    async def _stands(self, move: Move, *, ready: bool, answered: set[PeerId] | None = None) -> bool:
        await self._discovery.refresh()
        alike = self._alike()
        late = self._late(alike, self._discovery.now_s())
        me = alike[0].peer_id
        if stands(move, alike, me, late=late, ready=ready, answered=answered):
            return True
        if answered is not None and stands(move, alike, me, late=late, ready=ready):
            self._unanswered(move)
            return False
        logger.info("not going to blocks %s: another peer does, or this one is needed where it is", move.intent)
        return False

    def _failed(self, error: SwarmError) -> None:
        logger.warning("serving the blocks of before: %s", error)
        self._again_at_s = self._rested_at_s(AGAIN_S)

    def _unanswered(self, move: Move) -> None:
        if self._discovery.now_s() - self._leave_at_s > AGAIN_S:
            self._rest_s = UNANSWERED_S  # what was before has nothing to do with it
        logger.info("not going to blocks %s: nobody answers who holds what this peer would leave", move.intent)
        self._leave_at_s = self._rested_at_s(self._rest_s)
        self._rest_s = min(AGAIN_S, 2 * self._rest_s)

    def _rested_at_s(self, rest_s: float) -> float:
        return self._discovery.now_s() + rest_s * self._rng.uniform(1.0, 1.5)

    def _alike(self) -> list[Announcement]:
        """All announcements of this peer's model; first its own, as it is now, not as it was read."""
        mine = self._describe()
        known = self._discovery.router.snapshot(self._discovery.now_s()).of_model(mine.model)
        return [mine, *(a for a in known if a.peer_id != mine.peer_id)]

    def _late(self, alike: list[Announcement], now_s: float) -> frozenset[PeerId]:
        return self._arrivals.late(usable(alike, alike[0]), now_s)

"""Moves this peer to blocks that need it more: looks, says what it intends, looks again, moves.

Owns the rhythm and the announced intent. Whether and where to move is `routing.placement`'s to decide, how to serve
other blocks the host's.

    look ── a move? ── announce the intent ── SETTLE_S ── another's goes before? ── drain, load, announce
                                                          └─ yes: take it back
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import chain

from peers.discovery import Discovery
from routing.errors import SwarmError
from routing.ids import BlockSpan
from routing.path import gaps
from routing.placement import Move, choose_move, gives_way
from routing.records import Announcement, PeerState

logger = logging.getLogger(__name__)

LOOK_S = 4.0
"""On average; peers look at different times."""
SETTLE_S = 3.0
"""Long enough for intents announced at the same time to be read."""
REST_S = 600.0
"""Between moves that heal nothing: each costs sessions their cache, and this peer a load."""


class Rebalance:
    """Looks until cancelled.

    `describe` says what this peer would announce now, `intend` announces an intent or takes it back, `move` serves
    other blocks; when that raises SwarmError, the peer serves what it served before.
    """

    def __init__(
        self,
        discovery: Discovery,
        describe: Callable[[], Announcement],
        intend: Callable[[BlockSpan | None], Awaitable[None]],
        move: Callable[[Move], Awaitable[None]],
        *,
        rng: random.Random,
    ) -> None:
        self._discovery = discovery
        self._describe = describe
        self._intend = intend
        self._move = move
        self._rng = rng
        self._gap_since_s: float | None = None
        self._moved_at_s = discovery.now_s()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S * self._rng.uniform(0.5, 1.5))
            await self.look()

    async def look(self) -> bool:
        """Look once, and move if that is called for; True after a move."""
        now_s = self._discovery.now_s()
        alike = self._alike()
        move = choose_move(alike, self._describe().peer_id, now_s, open_for_s=self._open_for_s(alike, now_s))
        if move is None or (not move.heals and now_s - self._moved_at_s < REST_S):
            return False
        await self._intend(move.intent)
        await asyncio.sleep(SETTLE_S)
        await self._discovery.refresh()
        if not self._stands(move):
            logger.info("another peer goes to blocks %s", move.intent)
            await self._intend(None)
            return False
        self._moved_at_s = now_s
        try:
            await self._move(move)
        except SwarmError as error:
            logger.warning("serving the blocks of before: %s", error)
            return False
        self._gap_since_s = None
        return True

    def _alike(self) -> list[Announcement]:
        """All announcements of this peer's model; its own as it is now, not as it was read."""
        mine = self._describe()
        known = self._discovery.router.snapshot(self._discovery.now_s()).of_model(mine.model)
        return [mine, *(a for a in known if a.peer_id != mine.peer_id)]

    def _open_for_s(self, alike: list[Announcement], now_s: float) -> float:
        online = (a.spans for a in alike if a.state is PeerState.ONLINE and a.num_blocks == alike[0].num_blocks)
        if not gaps(chain.from_iterable(online), alike[0].num_blocks):
            self._gap_since_s = None
            return 0.0
        if self._gap_since_s is None:
            self._gap_since_s = now_s
        return now_s - self._gap_since_s

    def _stands(self, move: Move) -> bool:
        """Whether the move is still right, and nobody's with an overlapping intent goes before."""
        mine, *others = self._alike()
        if gives_way(others, mine.peer_id, move.intent):
            return False
        # who gives way to this peer does not go there, and whose turn it is was decided when the intent was announced
        rest = [replace(a, intent=None) if a.peer_id > mine.peer_id else a for a in others]
        again = choose_move([replace(mine, intent=None), *rest], mine.peer_id, self._discovery.now_s(), open_for_s=1e9)
        if not move.heals:
            return mine.state is PeerState.ONLINE
        return again is not None and again.spans == move.spans

"""A peer without its blocks: from when its owner wants the memory that they take until they are loaded again.

Owns what the owner wants, and the rhythm. When that is, `serving.comfort` decides; what to free and how to load it
again is the `server`'s to know.

    memory is wanted ── leave ── the machine is spared ── come back ── there
                          │          └─ AGAIN_S ── it cannot ─┤
                          │          └─ it is wanted again ───┘
                          └─ spared before anything was given up: there
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from routing.errors import SwarmError

logger = logging.getLogger(__name__)

AGAIN_S = 30.0
"""After blocks could not be loaded: whoever took the memory, or the disk, may have gone by then."""


class Wish:
    """What the owner wants of the machine now: nothing, the processors, or the memory as well."""

    def __init__(self) -> None:
        self.paused, self.spared, self.memory = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.spared.set()

    def pause(self, paused: bool) -> None:
        """Want the processors, or nothing any more."""
        if paused:
            self.paused.set()
            self.spared.clear()
        else:
            self.paused.clear()
            self.memory.clear()
            self.spared.set()

    def give_back(self) -> None:
        """Want the memory, too, until the pause ends; nothing where there is none."""
        if self.paused.is_set():
            self.memory.set()


class Absence:
    """Leaves and comes back until cancelled."""

    def __init__(
        self,
        wish: Wish,
        leave: Callable[[], Awaitable[bool]],
        come_back: Callable[[], Awaitable[None]],
        failed: Callable[[SwarmError], None],
    ) -> None:
        """`leave` gives the memory back, unless it is not wanted any more by then, and says whether it did. `come_back`
        takes it again, or raises SwarmError; once cancelled, it leaves nothing behind. `failed` hears of such an error,
        unless the one before it was of the same kind."""
        self._wish = wish
        self._leave = leave
        self._come_back = come_back
        self._failed = failed
        self._problem: type[SwarmError] | None = None
        """Of the last error, until blocks are loaded again."""

    async def run(self) -> None:
        while True:
            await self._wish.memory.wait()
            if await self._leave():
                while not await self._came_back():
                    pass

    async def _came_back(self) -> bool:
        """Once the machine is spared. False where it is wanted again before that is done, or it failed a while ago."""
        await self._wish.spared.wait()
        coming = asyncio.ensure_future(self._come_back())
        wanted = asyncio.ensure_future(self._wish.paused.wait())
        try:
            await asyncio.wait((coming, wanted), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (coming, wanted):
                task.cancel()
            await asyncio.wait((coming, wanted))
        if coming.cancelled():
            return False
        try:
            await coming
        except SwarmError as error:
            logger.info("the blocks are not loaded again: %s", error)
            if self._problem is not type(error):
                self._failed(error)
            self._problem = type(error)
            with suppress(TimeoutError):  # who wants the machine again need not wait to hear of the next failure
                async with asyncio.timeout(AGAIN_S):
                    await self._wish.paused.wait()
            return False
        self._problem = None
        return True

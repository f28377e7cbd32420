"""Holds frames back until `pace` lets them pass. Knows nothing of what is in them or where they go."""

from __future__ import annotations

import asyncio
from typing import Final

from peers.transport.pace import Pace

_TICK_S: Final = 1e-3
"""No shorter waits: what is not used meanwhile stays in the bucket."""


class Pacer:
    """One direction of one node, over all of its links."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s: Final = bytes_per_s
        self._pace = Pace(bytes_per_s)
        self._turns = {bulk: asyncio.Lock() for bulk in (False, True)}
        self._waiting_bytes = 0

    @property
    def backlog_s(self) -> float:
        """How long what waits now will take."""
        return self._waiting_bytes / self.bytes_per_s

    async def admit(self, size: int, *, bulk: bool) -> None:
        """Returns when a frame of `size` may pass: in order of calls among small ones and among bulk ones."""
        self._waiting_bytes += size
        try:
            async with self._turns[bulk]:
                while wait_s := self._wait_s(bulk):  # noqa: ASYNC110  # time is the event
                    await asyncio.sleep(max(wait_s, _TICK_S))
                self._pace.take(size, asyncio.get_running_loop().time(), bulk=bulk)
        finally:
            self._waiting_bytes -= size

    def _wait_s(self, bulk: bool) -> float:
        now_s = asyncio.get_running_loop().time()
        return self._pace.wait_s(now_s, bulk=bulk, bulk_waits=self._turns[True].locked())

"""How long a peer may keep silent, in the time that this node was there to hear it.

A deadline on the wall's clock blames peers for what this machine did: a process that gets no processor for two seconds
finds, when it runs again, every deadline over and every answer unread. So a deadline is cut into slices, and the event
loop has to wait out each in a turn of its own: however late it is, a slice counts once, and what has come is read
between any two. A loop that is in time ends it at the very second. Whoever is starved together with its peers, because
they share a machine, gives these more time by as much as it lacks itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final

SLICES: Final = 16
RENEWALS_MAX: Final = 3
"""A peer that says other things but never what it was asked for is given up after so many times its deadline more."""


class Patience:
    """`async with Patience(seconds):` raises TimeoutError inside, as `asyncio.timeout` does.

    `heard` says when the peer gave its last sign of life, in the loop's seconds: from each one on it has the whole time
    again, within RENEWALS_MAX.
    """

    __slots__ = ("_handle", "_heard", "_heard_at_s", "_left", "_left_in_all", "_slice_s", "_timeout")

    def __init__(self, seconds: float, heard: Callable[[], float] | None = None) -> None:
        self._slice_s = seconds / SLICES
        self._heard = heard
        self._left = SLICES
        self._left_in_all = SLICES * (1 + RENEWALS_MAX)

    async def __aenter__(self) -> None:
        self._heard_at_s = 0.0 if self._heard is None else self._heard()
        self._timeout = asyncio.timeout(None)
        await self._timeout.__aenter__()
        self._handle = asyncio.get_running_loop().call_later(self._slice_s, self._slice_ended)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def _slice_ended(self) -> None:
        self._left -= 1
        self._left_in_all -= 1
        if self._heard is not None and (heard_at_s := self._heard()) > self._heard_at_s:
            self._left, self._heard_at_s = SLICES, heard_at_s
        loop = asyncio.get_running_loop()
        if self._left > 0 and self._left_in_all > 0:
            self._handle = loop.call_later(self._slice_s, self._slice_ended)
        else:
            self._timeout.reschedule(loop.time())

"""Where calls of several threads leave together, so that they share frames on the way and forwards at peers.

Owns the calls that are ready, and the timer. Everything but `Callers` happens in the network's loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable

from swarm.session.callers import Callers


class Departures:
    """Makes calls at once, or when those who are about to ask for theirs have come; in order, each of them once."""

    def __init__(self, callers: Callers, gain_s: Callable[[], float]) -> None:
        """`gain_s`: what a call saves that leaves with others; so long the first one waits, at most."""
        self._callers = callers
        self._gain_s = gain_s
        self._ready: list[Callable[[], None]] = []
        self._until_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def leave(self, caller: Hashable, call: Callable[[], None]) -> None:
        """`call` is the next one of this caller."""
        now_s = time.perf_counter()
        self._callers.asked(caller, now_s)
        if not (self._ready or self._callers):
            call()
            return
        gain_s = self._gain_s()
        if not self._ready:
            self._until_s = now_s + gain_s
        self._ready.append(call)
        patience_s = self._callers.patience_s(len(self._ready), gain_s, now_s)
        wait_s = min(patience_s, self._until_s - now_s)
        if wait_s <= 0:
            self.flush()
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(wait_s, self.flush)

    def flush(self) -> None:
        """Make the calls that are ready."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            while self._ready:
                self._ready.pop(0)()
        finally:  # a mistake in one of them is not the others'
            if self._ready:
                asyncio.get_running_loop().call_soon(self.flush)

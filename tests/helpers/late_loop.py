"""An event loop on a virtual clock that may be late: what a machine does to a process that it has no time for."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Sleeps on the virtual clock."""

    loop: LateLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "nothing will ever happen"
            self.loop.now_s += timeout + (self.loop.late_s if timeout > 0 else 0.0)
        return events


class LateLoop(asyncio.SelectorEventLoop):
    """Each time that it sleeps it wakes up `late_s` too late; `miss(seconds)` keeps it from running at once."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now_s, self.late_s = 0.0, late_s
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s

    def miss(self, seconds: float) -> None:
        self.now_s += seconds


async def at_once(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """In place of `asyncio.to_thread`: a virtual clock would run on while a thread works."""
    return function(*args, **kwargs)


def run(work: Callable[[LateLoop], Coroutine[Any, Any, T]], *, late_s: float = 0.0) -> T:
    """The result of `work`, in a loop of its own."""
    loop = LateLoop(late_s)
    try:
        return loop.run_until_complete(work(loop))
    finally:
        loop.close()

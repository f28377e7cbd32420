"""Long jobs that an engine's thread runs piece by piece, in the gaps between its forwards.

Owns whose turn it is; knows neither what a job computes nor the engine's works. A job is a generator that yields after
every piece; one job at a time is under way, so that only one of them holds memory, and owners take turns.

- Forwards go first: a piece runs when none is to be run, or when GAP forwards have passed a waiting piece over. Where
  steps are late all the same (`scheduler.Tempo.late`), it waits for those forwards, or until no more steps come.
- Only works of the background stand below a job: its pieces go before them, GAP in a row at most.
- A job that nobody waits for any more ends at its next turn.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from routing.ids import PeerId

T = TypeVar("T")
Job = Callable[[int], Generator[None, None, T]]
"""Given how many positions a piece may have, the job as pieces; it returns its result."""

GAP = 8
"""So many forwards may go first, so that those who train are never starved by those who generate without pause."""


@dataclass(slots=True, eq=False)
class Errand(Generic[T]):
    """One job on its way."""

    owner: PeerId
    job: Job[T]
    future: asyncio.Future[tuple[T, float]]
    """Its result, and the seconds that its pieces took."""
    compute_s: float = 0.0
    dropped: bool = False
    """Nobody waits for it."""
    result: Any = None
    _pieces: Generator[None, None, T] | None = field(default=None, init=False)

    def advance(self, positions: int) -> bool:
        """Run the next piece; whether it was the last. Raises what the job raises."""
        if self._pieces is None:
            self._pieces = self.job(positions)
        try:
            next(self._pieces)
        except StopIteration as over:
            self.result = over.value
            return True
        return False

    def close(self) -> None:
        """End it, and let go of what its pieces hold; in the thread that runs them."""
        if self._pieces is not None:
            self._pieces.close()


class Errands:
    """The jobs of one engine. Not for several threads at once: the engine's lock stands around every call."""

    def __init__(self) -> None:
        self._lines: OrderedDict[PeerId, deque[Errand[Any]]] = OrderedDict()
        self._current: Errand[Any] | None = None
        self._passed_over = self._in_a_row = 0

    def __bool__(self) -> bool:
        return self._current is not None or bool(self._lines)

    def add(self, errand: Errand[Any]) -> None:
        self._lines.setdefault(errand.owner, deque()).append(errand)

    @property
    def due(self) -> bool:
        """Whether a piece has waited long enough to go before a forward."""
        return bool(self) and self._passed_over >= GAP

    @property
    def before_background(self) -> bool:
        """Whether a piece goes before a forward of works of the background alone."""
        return bool(self) and self._in_a_row < GAP

    def passed_over(self) -> None:
        """A forward goes first."""
        self._passed_over = self._passed_over + 1 if self else 0
        self._in_a_row = 0

    def next(self) -> Errand[Any] | None:
        """The job whose next piece is to be run; None when those that are left were dropped."""
        self._passed_over = 0
        self._in_a_row += 1
        while self._current is None or self._current.dropped:
            if self._current is not None:
                self._current.close()
            self._current = None
            if not self._lines:
                return None
            owner, line = self._lines.popitem(last=False)  # who waited longest; and then the end of the queue
            self._current = line.popleft()
            if line:
                self._lines[owner] = line
        return self._current

    def ended(self) -> None:
        """The job that `next` gave has."""
        self._current = None

    def clear(self) -> list[Errand[Any]]:
        """Drop and return all of them."""
        errands = [errand for line in self._lines.values() for errand in line]
        errands += [self._current] if self._current is not None else []
        self._lines.clear()
        for errand in errands:
            errand.dropped = True
        return errands

"""Threads of one process that generate at the same time: who of them waits for whom. Pure: the clock is the caller's.

Owns who was answered lately and has not asked for his next step. Callers that are answered together come to the head,
and from there to their next steps, one after another, as one thread at a time runs Python; whoever goes ahead costs
every peer a forward more, and the head a product. How long it pays to wait is known in advance: of `waiting` callers
each loses what they wait, and each that comes saves `gain_s`. `tests/simulation/test_callers.py` shows what it brings.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

SOON = 0.7
"""Of the usual time between an answer and the next step: then somebody may come."""
OVERDUE = 2.0
"""Of that time: who has not come by then writes to somebody who reads slowly, or will never come."""
GRACE_S = 0.005
GONE_S = 60.0
SMOOTHING = 0.2


@dataclass(slots=True)
class _Thinking:
    since_s: float
    at_head: bool = False


class Callers:
    """Who is between an answer and his next step. For any thread: a mark is one operation on a dictionary."""

    def __init__(self) -> None:
        self._thinking: dict[Hashable, _Thinking] = {}
        self._usual_s = 0.0
        """From an answer to the next step."""

    def __len__(self) -> int:
        return len(self._thinking)

    def answered(self, caller: Hashable, now_s: float) -> None:
        self._thinking[caller] = _Thinking(now_s)

    def came_to_head(self, caller: Hashable) -> None:
        if (thinking := self._thinking.get(caller)) is not None:
            thinking.at_head = True

    def asked(self, caller: Hashable, now_s: float) -> None:
        """For his next step."""
        if (thinking := self._thinking.pop(caller, None)) is not None:
            took_s = min(now_s - thinking.since_s, self._overdue_s)  # longer: a pause, or somebody who reads slowly
            self._usual_s += SMOOTHING * (took_s - self._usual_s)

    def left(self, caller: Hashable) -> None:
        """He may ask for no more."""
        self._thinking.pop(caller, None)

    def patience_s(self, waiting: int, gain_s: float, now_s: float, *, to_head: bool = False) -> float:
        """How long `waiting` callers, ready for their next steps or for the head, wait for the next one to come.

        As long as all of them together lose no more than what those who are on their way save, and not at all where
        these cannot be expected within that time. Never longer than `gain_s`.
        """
        overdue_s = self._overdue_s
        for caller, each in list(self._thinking.items()):
            if now_s - each.since_s > GONE_S:  # its thread may be no more
                self.left(caller)
        others = [each for each in list(self._thinking.values()) if not (to_head and each.at_head)]
        since_s = sorted(each.since_s for each in others if now_s < each.since_s + overdue_s)
        soon_s = 0.0 if to_head else SOON * self._usual_s
        worth_s = 0.0
        pays = False
        for coming, began_s in enumerate(since_s, 1):
            worth_s = gain_s * coming / (waiting + coming)
            pays |= began_s + soon_s <= now_s + worth_s
        return min(worth_s, since_s[-1] + overdue_s - now_s) if pays else 0.0

    @property
    def _overdue_s(self) -> float:
        return OVERDUE * self._usual_s + GRACE_S

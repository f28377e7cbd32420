"""The steps of one session in their order: which are not answered, and which of these are under way or wait. Pure.

Owns that order, and up to where it leaves the history as it is. To whom steps go and when is `core`'s to decide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from routing.ids import SessionId, StepId


class PendingStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step that is not answered yet."""

    step: StepId
    first: int
    count: int
    want_from: int
    replay: bool = False
    alone: bool = False
    """Nothing else of the session may be under way with it. So is the first step of a fork, and one that rolls back: if
    a hop missed it, the next step would seem to fit on what it should have removed."""
    parent: SessionId | None = None
    hop: int = 0
    """The first hop that runs it: the client sends it to hop 0; for any other, the hop before it has its journal."""
    until: int | None = None
    """No hop from this one on runs it, and the one before it answers; None: the last one."""

    def clashes(self, other: PendingStep) -> bool:
        """Some hop would run both, and they do not come to it by one way."""
        ends = [step.until for step in (self, other) if step.until is not None]
        return self.hop != other.hop and max(self.hop, other.hop) < min(ends, default=self.hop + other.hop + 1)

    def beyond(self, held: int) -> PendingStep:
        """Without the positions below `held`, of which no output is wanted."""
        cut = max(0, held - self.first)
        return replace(self, first=self.first + cut, count=self.count - cut, want_from=self.want_from - cut)


class Steps:
    """What was asked for and is not answered, and replays that come before it."""

    def __init__(self) -> None:
        self.pending: deque[PendingStep] = deque()
        """What was asked for."""
        self.sent: dict[StepId, PendingStep] = {}
        """What is under way."""
        self._unsent: deque[PendingStep] = deque()
        self._last_id = 0
        self.end = 0
        """Where the last step that was asked for ends."""

    @property
    def crowded(self) -> bool:
        """Several are under way or wait for it."""
        return len(self.sent) + len(self._unsent) > 1

    def new_id(self) -> StepId:
        self._last_id += 1
        return StepId(self._last_id)

    def ask(self, first: int, count: int, want_from: int) -> PendingStep:
        """One more is asked for; it is not to be sent yet."""
        alone, self.end = first < self.end, first + count
        step = PendingStep(step=self.new_id(), first=first, count=count, want_from=want_from, alone=alone)
        self.pending.append(step)
        return step

    def answered(self, step: StepId) -> None:
        """What was asked for is."""
        self.pending.remove(next(pending for pending in self.pending if pending.step == step))

    def settled_until(self) -> int:
        """Up to here the history holds what the pending steps send, and no later one of them undoes it."""
        end = self.pending[0].first
        for step in self.pending:
            if step.first < end:
                return min(step.first for step in self.pending)
            end = step.first + step.count
        return end

    def sure_until(self) -> int:
        """Up to here no pending step undoes what hops hold."""
        return min([self.settled_until(), *(step.first for step in self.pending if step.alone)])

    def answered_until(self) -> int:
        """Every hop has run these positions, and no pending step undoes them."""
        return min((step.first for step in self.pending), default=self.end)

    def skip(self, held: int) -> tuple[int, tuple[PendingStep, ...]]:
        """Take off the pending steps what every hop holds, which is `held` positions at most, and nobody wants to hear:
        how many positions that are, and the steps that it is all of."""
        wanted = (step.first + step.want_from for step in self.pending if step.want_from < step.count)
        held = min(held, self.settled_until(), *wanted)
        whole = tuple(step for step in self.pending if step.first + step.count <= held)
        self.pending = deque(step for step in self.pending if step not in whole)
        return held, whole

    def to_send(self, *steps: PendingStep) -> None:
        """These, behind what waits already."""
        self._unsent.extend(steps)

    def send(self, most: Callable[[PendingStep], int], parent: SessionId | None) -> list[PendingStep]:
        """Those that may be under way now, each with those before it at most `most` of it; as they are to be sent."""
        sending: list[PendingStep] = []
        while self._unsent and len(self.sent) < most(step := self._unsent[0]):
            if parent is not None:
                step = replace(step, parent=parent, alone=True)
            if any(step.alone or other.alone or step.clashes(other) for other in self.sent.values()):
                break
            self._unsent.popleft()
            self.sent[step.step] = step
            sending.append(step)
        return sending

    def send_again(self) -> None:
        """Nothing is under way: all of that waits to be sent once more."""
        self._unsent.extendleft(reversed(self.sent.values()))
        self.sent.clear()

    def withdraw(self) -> None:
        """Nothing more is to be sent. What is under way may still be answered."""
        self._unsent.clear()

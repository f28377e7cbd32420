"""When a peer steps back for its owner: outside the hours that the owner gave, and while other programs want the CPU.
And when it gives back what it holds of the memory, too.

Decides. What the clock says and how busy other programs are is told by `owner`, which also acts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from routing.errors import CallerError
from routing.estimates import Smoothed

PAUSE_AFTER_S: Final = 5.0
"""Other programs must be above the limit for this long: starting one is no reason to send everybody away."""
RESUME_AFTER_S: Final = 30.0
"""And, smoothed, clearly below it for this long: each return invites sessions that the next pause would move again."""
HALF_LIFE_S: Final = 15.0
"""Of the smoothing: a program that wakes up for a moment does not begin the wait anew."""
RESUME_SHARE: Final = 0.75
"""Of the limit; what lies between this and the limit changes nothing."""
GIVE_BACK_AFTER_S: Final = 120.0
"""So long a pause may last before the memory goes back as well: most that other programs want of the CPU is over by
then, and most disks give 20 GB of weights again in less."""
LONG_MINUTES: Final = 10
"""Hours that begin again no sooner are known to be worth it at once."""
DAY_MINUTES: Final = 24 * 60
_RANGE: Final = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)-(?:([01]?\d|2[0-3]):([0-5]\d)|24:00)", re.ASCII)


class Reason(StrEnum):
    """Why a peer has stepped back."""

    SCHEDULE = "schedule"
    LOAD = "load"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Ranges `[start, end)` in minutes after local midnight; one that ends before it starts passes midnight."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """`22:00-08:00`, several separated by commas. Raises CallerError."""
        ranges = []
        for part in text.split(","):
            match = _RANGE.fullmatch(part.strip())
            if match is None:
                raise CallerError(
                    f"{part.strip()[:32]!r} is no time of day",
                    hint="write for example 22:00-08:00 or 12:00-13:00,20:00-24:00",
                )
            start = 60 * int(match[1]) + int(match[2])
            end = DAY_MINUTES if match[3] is None else 60 * int(match[3]) + int(match[4])
            if start == end:
                raise CallerError(
                    f"{part.strip()} begins where it ends", hint="leave --schedule out to serve all day and night"
                )
            ranges.append((start, end))
        return cls(tuple(ranges))

    def __str__(self) -> str:
        return ",".join(f"{clock_time(start)}-{clock_time(end)}" for start, end in self.ranges)

    def is_open(self, minute: int) -> bool:
        """Whether that minute of the day lies in any range."""
        return any(
            start <= minute < end if start < end else minute >= start or minute < end for start, end in self.ranges
        )

    def opens_at(self, minute: int) -> int:
        """The minute of the day at which the next range begins, looking from `minute` on."""
        return min((start for start, _ in self.ranges), key=lambda start: (start - minute) % DAY_MINUTES)

    def closed_minutes(self, minute: int) -> int:
        """From `minute` on until the next range begins; 0 within one."""
        return 0 if self.is_open(minute) else (self.opens_at(minute) - minute) % DAY_MINUTES


class LoadGate:
    """Guards against flapping: turns only when the load has been on the other side for a while."""

    def __init__(self, limit_percent: float) -> None:
        self.limit_percent = limit_percent
        self.paused = False
        self._turning_since_s: float | None = None
        self._smoothed = Smoothed(half_life_s=HALF_LIFE_S)

    @property
    def resume_percent(self) -> float:
        """Below this other programs leave enough."""
        return RESUME_SHARE * self.limit_percent

    @property
    def turning(self) -> bool:
        """Whether the load is on the other side, though not for long enough yet."""
        return self._turning_since_s is not None

    def observe(self, load_percent: float, now_s: float) -> bool:
        """Whether to be paused now, given what other programs used since the last look."""
        self._smoothed.add(load_percent, now_s)
        if self.paused:
            turning = self._smoothed.value(load_percent, now_s) < self.resume_percent
        else:
            turning = load_percent >= self.limit_percent
        if not turning:
            self._turning_since_s = None
            return self.paused
        if self._turning_since_s is None:
            self._turning_since_s = now_s
        if now_s - self._turning_since_s >= (RESUME_AFTER_S if self.paused else PAUSE_AFTER_S):
            self.paused, self._turning_since_s = not self.paused, None
        return self.paused


class Comfort:
    """Whether the owner can spare the machine; without schedule and limit, always."""

    def __init__(self, schedule: Schedule | None = None, max_load_percent: float | None = None) -> None:
        self.schedule = schedule
        self.gate = None if max_load_percent is None else LoadGate(max_load_percent)
        self.wants_memory = False
        """Whether the owner should have the memory back, too, as of the last decision; once so, until there is no
        reason any more."""
        self._since_s: float | None = None
        """When there began to be a reason."""

    @property
    def watches(self) -> bool:
        """False where nothing can ever be a reason to pause."""
        return self.schedule is not None or self.gate is not None

    @property
    def undecided(self) -> bool:
        """Whether other programs are above the limit, or below it again, and it must be seen whether that lasts."""
        return self.gate is not None and self.gate.turning

    def decide(self, *, minute: int, load_percent: float, now_s: float) -> Reason | None:
        """The reason to be paused now. `minute`: of the local day; `load_percent`: of other programs since the last
        call; `now_s`: on a monotonic clock. Of two reasons the schedule is named."""
        busy = self.gate is not None and self.gate.observe(load_percent, now_s)
        closed_minutes = 0 if self.schedule is None else self.schedule.closed_minutes(minute)
        reason = Reason.SCHEDULE if closed_minutes else Reason.LOAD if busy else None
        if reason is None:
            self.wants_memory, self._since_s = False, None
            return None
        if self._since_s is None:
            self._since_s = now_s
        if closed_minutes >= LONG_MINUTES or now_s - self._since_s >= GIVE_BACK_AFTER_S:
            self.wants_memory = True
        return reason


def clock_time(minute: int) -> str:
    """A minute of the day as people write it."""
    return f"{minute // 60:02}:{minute % 60:02}"

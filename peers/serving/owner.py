"""The machine's owner, who comes first: asks clock, CPU and GPU what `comfort` decides by, and has the peer step back.

Owns the looks and the process's priority. Nothing here knows what stepping back is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from peers.serving.comfort import Comfort, Reason
from peers.serving.gpus import OtherGpuPrograms
from routing.errors import CallerError
from routing.records import MAX_BYTES_PER_S

LOOK_S = 2.0
NICE_MAX = 19
MIN_BYTES_PER_S = 250_000
"""A piece of a prompt has up to 4 MB, and clients take a step for lost that stays away for twenty seconds."""


def check(*, nice: int | None = None, load_percent: float | None = None, max_bytes_per_s: int | None = None) -> None:
    """Raises CallerError for what no peer can be asked."""
    if nice is not None and not 0 <= nice <= NICE_MAX:
        raise CallerError(f"a niceness of {nice} is not offered", hint=f"choose 0 (usual) to {NICE_MAX} (most polite)")
    if load_percent is not None and not 0 < load_percent <= 100:
        raise CallerError(f"{load_percent:g} % is no limit on a load", hint="choose more than 0, and at most 100")
    if max_bytes_per_s is not None and not MIN_BYTES_PER_S <= max_bytes_per_s <= MAX_BYTES_PER_S:
        raise CallerError(
            f"{max_bytes_per_s} bytes per second are not enough to serve anybody",
            hint=f"allow at least {MIN_BYTES_PER_S // 1000} kB/s",
        )


def be_nice(nice: int) -> None:
    """Give this process, and all that it starts from now on, a priority from 0 (usual) to 19 (only what others leave).

    Raises CallerError.
    """
    tasks = Path("/proc/self/task")  # Linux counts it by thread, and each one gives its own to those that it starts
    try:
        for thread in [int(task.name) for task in tasks.iterdir()] if tasks.is_dir() else [0]:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, thread, nice)
    except PermissionError as error:
        present = os.getpriority(os.PRIO_PROCESS, 0)
        raise CallerError(
            f"this process has a niceness of {present} and may not go down to {nice}", hint=f"give {present} or more"
        ) from error


class OtherPrograms:
    """What everybody but this process and its descendants uses of the machine's CPUs."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._at_s, self._used_s = self._read()

    def percent(self) -> float:
        """Since the last call, of all CPUs together: 0 to 100."""
        at_s, used_s = self._read()
        share = (used_s - self._used_s) / ((at_s - self._at_s or 1e-9) * (psutil.cpu_count() or 1))
        self._at_s, self._used_s = at_s, used_s
        return min(max(100 * share, 0.0), 100.0)

    def _read(self) -> tuple[float, float]:
        """The time, and CPU seconds used by others until then."""
        machine = psutil.cpu_times()
        used_s = machine.user + machine.nice + machine.system
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended: its parent's count has it now
                used_s -= sum(process.cpu_times()[:4])  # its own, and that of children that have ended
        return time.monotonic(), used_s


class Owner:
    """Looks every LOOK_S seconds and calls `pause` with the answer whenever it changes; and `give_back` when the peer
    is paused and its memory is wanted, too, which ends with the pause."""

    def __init__(
        self,
        comfort: Comfort,
        pause: Callable[[bool], None],
        give_back: Callable[[], None] = lambda: None,
        *,
        gpus: Sequence[str] = (),
    ) -> None:
        """`gpus`: on which the peer computes, as `serving.gpus` names them; the owner may want these, too."""
        self.comfort = comfort
        self.reason: Reason | None = None
        """Why the peer is paused now."""
        self.load_percent = 0.0
        """Of other programs, as seen last; always 0 where no limit makes it matter."""
        self.load_of = "the CPUs"
        """Or of a GPU, where they use more of that."""
        self._pause, self._give_back = pause, give_back
        self._others = None if comfort.gate is None else OtherPrograms()
        self._others_on_gpus = OtherGpuPrograms(gpus) if gpus and comfort.gate is not None else None

    @property
    def minute(self) -> int:
        """Of the local day."""
        now = time.localtime()
        return 60 * now.tm_hour + now.tm_min

    async def look(self) -> bool:
        """Look once; True when the reason is another one now."""
        if self._others is not None:
            self.load_percent, self.load_of = await asyncio.to_thread(self._load)  # it looks at every process there is
        before, memory_before = self.reason, self.comfort.wants_memory
        self.reason = self.comfort.decide(minute=self.minute, load_percent=self.load_percent, now_s=time.monotonic())
        if (self.reason is None) != (before is None):
            self._pause(self.reason is not None)
        if self.comfort.wants_memory and not memory_before:
            self._give_back()
        return self.reason is not before

    def _load(self) -> tuple[float, str]:
        assert self._others is not None
        load = self._others.percent(), "the CPUs"
        return load if self._others_on_gpus is None else max(load, (self._others_on_gpus.percent(), "a GPU"))

    async def spared(self, tell: Callable[[], None]) -> None:
        """Look until the machine can be spared; where other programs are above the limit, until it is known whether
        they stay there. `tell` is called for each reason to wait."""
        while True:
            if await self.look() and self.reason is not None:
                tell()
            if self.reason is None and not self.comfort.undecided:
                return
            await asyncio.sleep(LOOK_S)

    async def watch(self, tell: Callable[[], None]) -> None:
        """Look until cancelled. `tell` is called after each change, and at once where the first look found a reason."""
        if self.reason is not None:
            tell()
        while self.comfort.watches:
            await asyncio.sleep(LOOK_S)
            if await self.look():
                tell()

"""What is asked of the real system, and when a peer hears of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from peers.serving import owner as module
from peers.serving.comfort import GIVE_BACK_AFTER_S, PAUSE_AFTER_S, Comfort, Reason, Schedule
from peers.serving.owner import LOOK_S, MIN_BYTES_PER_S, NICE_MAX, OtherPrograms, Owner, check
from routing.errors import CallerError

BURN = "import sys,time\nwhile time.process_time() < 0.7: pass\nprint(flush=True)\nsys.stdin.read()"


@pytest.mark.parametrize(
    "wish",
    [
        {"nice": -1},
        {"nice": NICE_MAX + 1},
        {"load_percent": 0},
        {"load_percent": 101},
        {"load_percent": float("nan")},
        {"max_bytes_per_s": MIN_BYTES_PER_S - 1},
        {"max_bytes_per_s": 1 << 60},
    ],
    ids=str,
)
def test_a_wish_that_makes_no_sense_is_refused_with_a_hint(wish: dict[str, Any]) -> None:
    with pytest.raises(CallerError) as caught:
        check(**wish)
    assert caught.value.hint


def test_sensible_wishes_are_not_refused() -> None:
    check()
    check(nice=0, load_percent=100, max_bytes_per_s=MIN_BYTES_PER_S)
    check(nice=NICE_MAX, load_percent=0.5, max_bytes_per_s=10_000_000)


def test_a_nice_process_has_and_starts_nice_threads_and_children() -> None:
    probe = (
        "import os, subprocess, sys, threading\n"
        "from peers.serving.owner import be_nice\n"
        "asked, seen = threading.Event(), []\n"
        "def see(): asked.wait(); seen.append(os.getpriority(os.PRIO_PROCESS, 0))\n"
        "before = threading.Thread(target=see)\n"
        "before.start()\n"
        "be_nice(7)\n"
        "after = threading.Thread(target=see)\n"
        "after.start(), asked.set(), before.join(), after.join(), see()\n"
        "print(*seen, flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import os; print(os.getpriority(os.PRIO_PROCESS, 0))'], check=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["7"] * 4


def test_a_priority_that_the_system_refuses_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    with pytest.raises(CallerError, match="may not go down to 3") as caught:
        module.be_nice(3)
    assert "or more" in caught.value.hint


def test_what_this_process_and_its_children_use_is_nobody_elses_load() -> None:
    """On a machine that this test keeps busy as far as others let it: what is ours is not theirs."""
    cpus = psutil.cpu_count() or 1
    others = OtherPrograms()
    started = [psutil.cpu_times(), others._at_s]
    children = [
        subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(min(cpus, 4))
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
    ours_s = sum(sum(psutil.Process(child.pid).cpu_times()[:2]) for child in children)
    percent = others.percent()
    wall_s = others._at_s - float(started[1])  # type: ignore[arg-type]
    assert percent <= 100 * (1 - ours_s / (cpus * wall_s)) + 10
    for child in children:
        child.communicate(timeout=60)
    counted_s = others._read()[1] - others._used_s
    assert counted_s > -0.5, "time of children that have ended is still ours, and not given back to nobody"


# --- the driver ---


class Times(Owner):
    """An owner whose clock the test sets."""

    at = 12 * 60

    @property
    def minute(self) -> int:
        return self.at


@pytest.mark.looptime
async def test_the_peer_hears_of_every_change_and_people_at_once_of_the_first() -> None:
    heard: list[bool] = []
    told: list[Reason | None] = []
    owner = Times(Comfort(Schedule.parse("22:00-08:00")), heard.append)
    assert await owner.look()
    assert (heard, owner.reason) == ([True], Reason.SCHEDULE)
    watching = asyncio.create_task(owner.watch(lambda: told.append(owner.reason)))
    await asyncio.sleep(5 * LOOK_S)
    assert (heard, told) == ([True], [Reason.SCHEDULE])
    owner.at = 22 * 60
    await asyncio.sleep(1.5 * LOOK_S)
    assert (heard, told) == ([True, False], [Reason.SCHEDULE, None])
    owner.at = 8 * 60
    await asyncio.sleep(1.5 * LOOK_S)
    assert (heard, told) == ([True, False, True], [Reason.SCHEDULE, None, Reason.SCHEDULE])
    watching.cancel()
    await asyncio.wait([watching])


@pytest.mark.looptime
async def test_memory_is_wanted_once_in_each_pause_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=loop.time))
    heard: list[bool | str] = []
    owner = Times(Comfort(Schedule.parse("08:00-22:00"), 50.0), heard.append, lambda: heard.append("memory"))
    busy_percent = [10.0]
    monkeypatch.setattr(owner, "_others", SimpleNamespace(percent=lambda: busy_percent[0]))
    watching = asyncio.create_task(owner.watch(lambda: None))
    owner.at = 22 * 60
    await asyncio.sleep(5 * LOOK_S)
    assert heard == [True, "memory"]
    owner.at = 8 * 60
    await asyncio.sleep(5 * LOOK_S)
    assert heard == [True, "memory", False]
    busy_percent[0] = 90.0
    await asyncio.sleep(PAUSE_AFTER_S + GIVE_BACK_AFTER_S - LOOK_S)
    assert heard == [True, "memory", False, True]
    await asyncio.sleep(3 * LOOK_S)
    assert heard == [True, "memory", False, True, "memory"]
    watching.cancel()
    await asyncio.wait([watching])


@pytest.mark.looptime
async def test_who_waits_for_the_owner_hears_each_reason_and_goes_on_once_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=loop.time))
    told: list[Reason | None] = []
    busy_percent = [10.0]
    owner = Times(Comfort(Schedule.parse("22:00-08:00"), 50.0), lambda paused: None)
    monkeypatch.setattr(owner, "_others", SimpleNamespace(percent=lambda: busy_percent[0]))
    waiting = asyncio.create_task(owner.spared(lambda: told.append(owner.reason)))
    await asyncio.sleep(5 * LOOK_S)
    assert told == [Reason.SCHEDULE]
    busy_percent[0] = 90.0
    await asyncio.sleep(PAUSE_AFTER_S + 2 * LOOK_S)
    owner.at = 22 * 60
    await asyncio.sleep(2 * LOOK_S)
    assert told == [Reason.SCHEDULE, Reason.LOAD]
    busy_percent[0] = 10.0
    await asyncio.wait_for(waiting, 100)
    assert told == [Reason.SCHEDULE, Reason.LOAD]


@pytest.mark.looptime
@pytest.mark.parametrize("lasts", [False, True])
async def test_a_machine_that_is_busy_at_once_is_watched_until_it_is_known_whether_that_lasts(
    lasts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=loop.time))
    told: list[Reason | None] = []
    owner = Times(Comfort(max_load_percent=50.0), lambda paused: None)
    loads = itertools.chain([90.0], itertools.repeat(90.0 if lasts else 10.0))
    monkeypatch.setattr(owner, "_others", SimpleNamespace(percent=lambda: next(loads)))
    waiting = asyncio.create_task(owner.spared(lambda: told.append(owner.reason)))
    await asyncio.sleep(0.5 * LOOK_S)
    assert not waiting.done()
    await asyncio.sleep(PAUSE_AFTER_S + LOOK_S)
    assert (waiting.done(), told) == (not lasts, [Reason.LOAD] if lasts else [])
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_who_uses_a_gpu_on_which_the_peer_computes_is_another_program_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = Owner(Comfort(max_load_percent=50.0), lambda paused: None, gpus=["GPU-a"])
    loads = SimpleNamespace(cpu=10.0, gpu=80.0)
    monkeypatch.setattr(owner, "_others", SimpleNamespace(percent=lambda: loads.cpu))
    monkeypatch.setattr(owner, "_others_on_gpus", SimpleNamespace(percent=lambda: loads.gpu))
    await owner.look()
    assert (owner.load_percent, owner.load_of) == (80.0, "a GPU")
    loads.cpu = 90.0
    await owner.look()
    assert (owner.load_percent, owner.load_of) == (90.0, "the CPUs")


async def test_an_owner_without_wishes_is_not_watched() -> None:
    told: list[None] = []
    owner = Owner(Comfort(), lambda paused: None)
    assert not await owner.look()
    await owner.watch(lambda: told.append(None))
    assert told == []


async def test_a_limit_on_the_load_looks_at_the_machine() -> None:
    heard: list[bool] = []
    owner = Owner(Comfort(max_load_percent=50.0), heard.append)
    await owner.look()
    assert 0.0 <= owner.load_percent <= 100.0
    assert heard == [], "one look is no reason"

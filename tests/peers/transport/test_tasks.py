"""Background tasks: nothing runs unowned, no failure is lost."""

from __future__ import annotations

import asyncio
import logging

import pytest

from peers.transport.tasks import Tasks

pytestmark = pytest.mark.looptime


async def fail() -> None:
    raise KeyError("a bug")


async def test_a_failure_reaches_whoever_asks_before_or_after_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    for asks_first in (True, False):
        tasks = Tasks()
        asking = asyncio.create_task(tasks.failed())
        if asks_first:
            await asyncio.sleep(1)
        tasks.spawn(fail(), name="fails")
        tasks.spawn(fail(), name="fails too")
        with pytest.raises(KeyError):
            await asking
        with pytest.raises(KeyError):
            await tasks.failed()


async def test_one_who_stops_waiting_does_not_end_it_for_the_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    tasks = Tasks()
    impatient, patient = asyncio.create_task(tasks.failed()), asyncio.create_task(tasks.failed())
    await asyncio.sleep(1)
    impatient.cancel()
    await asyncio.sleep(1)
    assert not patient.done()
    tasks.spawn(fail(), name="fails")
    with pytest.raises(KeyError):
        await patient


async def test_a_failing_task_leaves_its_siblings_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    tasks = Tasks()
    sibling = tasks.spawn(asyncio.sleep(5), name="sibling")
    tasks.spawn(fail(), name="fails")
    await tasks.settled(timeout_s=10)
    assert sibling.done()
    assert not sibling.cancelled()


async def test_closing_ends_also_what_the_ending_tasks_begin() -> None:
    tasks = Tasks()
    begun: list[str] = []

    async def last_words() -> None:
        begun.append("last words")

    async def works() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            tasks.spawn(last_words(), name="last words")

    tasks.spawn(works(), name="works")
    await asyncio.sleep(1)
    await tasks.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    late = tasks.spawn(works(), name="late")
    await asyncio.wait([late])
    assert late.cancelled()
    assert begun == []
    await tasks.close()


async def test_a_task_may_close_its_own_owner() -> None:
    tasks = Tasks()
    other = tasks.spawn(asyncio.sleep(1000), name="other")
    closing = tasks.spawn(tasks.close(), name="closes")
    await asyncio.wait([closing])
    assert other.cancelled()
    assert not closing.cancelled()


async def test_settling_waits_no_longer_than_asked() -> None:
    tasks = Tasks()
    await tasks.settled(timeout_s=5)
    tasks.spawn(asyncio.sleep(1000), name="long")
    started_s = asyncio.get_running_loop().time()
    await tasks.settled(timeout_s=5)
    assert asyncio.get_running_loop().time() - started_s == pytest.approx(5)
    await tasks.close()

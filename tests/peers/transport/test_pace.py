"""The rule over drawn traffic on a virtual clock, and the waiting on a virtual loop."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers.transport.pace import BURST_S, SMALL_SHARE, Pace
from peers.transport.pacer import Pacer

RATE = 1000.0
FRAMES = st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(0, 3000), st.booleans()), max_size=60)
"""Seconds since the last frame was offered, its size, whether it is bulk."""


def passed(frames: list[tuple[float, int, bool]]) -> list[tuple[float, int, bool]]:
    """When each frame passes, in order within its class, each as soon as it may."""
    pace, now_s = Pace(RATE), 0.0
    offered: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
    at_s = 0.0
    for passed_s, size, bulk in frames:
        at_s += passed_s
        offered[bulk].append((at_s, size))
    result = []
    while any(offered.values()):
        waiting = {bulk: bool(queue and queue[0][0] <= now_s) for bulk, queue in offered.items()}
        next_s = [queue[0][0] for queue in offered.values() if queue and queue[0][0] > now_s]
        for bulk in (False, True):
            if not waiting[bulk]:
                continue
            if wait_s := pace.wait_s(now_s, bulk=bulk, bulk_waits=waiting[True]):
                next_s.append(now_s + max(wait_s, 1e-6))
                continue
            size = offered[bulk].pop(0)[1]
            pace.take(size, now_s, bulk=bulk)
            result.append((now_s, size, bulk))
            break
        else:
            now_s = min(next_s)
    return result


@given(FRAMES)
def test_no_stretch_of_time_carries_more_than_the_bound(frames: list[tuple[float, int, bool]]) -> None:
    sent = passed(frames)
    assert len(sent) == len(frames)
    largest = max((size for _, size, _ in sent), default=0)
    for first, last in itertools.combinations_with_replacement(range(len(sent)), 2):
        took_s = sent[last][0] - sent[first][0]
        total = sum(size for _, size, _ in sent[first : last + 1])
        assert total <= RATE * took_s + 2 * RATE * BURST_S + 2 * largest + 1


def test_a_small_frame_does_not_wait_for_a_bulk_one_to_be_paid() -> None:
    pace = Pace(RATE)
    pace.take(10_000, 0.0, bulk=True)
    assert pace.wait_s(0.0, bulk=True) > 9.0
    assert pace.wait_s(0.0, bulk=False) == 0.0
    pace.take(400, 0.0, bulk=False)
    assert 0 < pace.wait_s(0.0, bulk=False) < 0.5, "they too keep to their share"


def test_small_frames_alone_use_the_whole_rate_and_beside_bulk_leave_it_its_share() -> None:
    def carried(kinds: tuple[bool, ...]) -> dict[bool, int]:
        pace, total = Pace(RATE), dict.fromkeys(kinds, 0)
        for millisecond in range(100_000):
            for bulk in kinds:
                if pace.wait_s(millisecond / 1000, bulk=bulk, bulk_waits=True in kinds) == 0.0:
                    pace.take(500 if bulk else 50, millisecond / 1000, bulk=bulk)
                    total[bulk] += 500 if bulk else 50
        return total

    assert carried((False,))[False] == pytest.approx(100 * RATE, rel=0.02)
    both = carried((False, True))
    assert both[False] == pytest.approx(100 * RATE * SMALL_SHARE, rel=0.02)
    assert both[True] == pytest.approx(100 * RATE * (1 - SMALL_SHARE), rel=0.05)


def test_an_idle_time_is_no_credit_for_more_than_a_burst() -> None:
    pace = Pace(RATE)
    pace.take(0, 0.0, bulk=True)
    pace.take(int(RATE * BURST_S) + 100, 1e6, bulk=True)
    assert pace.wait_s(1e6, bulk=True) == pytest.approx(0.1)


@pytest.mark.looptime
async def test_frames_pass_in_order_and_a_cancelled_one_is_not_counted() -> None:
    pacer, order = Pacer(1000), []

    async def send(number: int, size: int) -> None:
        await pacer.admit(size, bulk=True)
        order.append(number)

    started_s = asyncio.get_running_loop().time()
    tasks = [asyncio.create_task(send(number, 1000)) for number in range(5)]
    await asyncio.sleep(0.1)
    assert pacer.backlog_s == pytest.approx(4.0)
    tasks[2].cancel()
    await asyncio.wait(tasks)
    assert order == [0, 1, 3, 4]
    assert pacer.backlog_s == 0.0
    assert asyncio.get_running_loop().time() - started_s == pytest.approx(3 - BURST_S, abs=0.01)

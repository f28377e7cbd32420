"""Calls leave at once, or together with those that are about to come; in order, each of them once."""

from __future__ import annotations

import asyncio

import pytest

from swarm.session.callers import Callers
from swarm.session.departures import Departures

LONG_S = 60.0


class Patient(Callers):
    """Waits as long as it is told to, for one who is thinking."""

    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self.wait_s = wait_s
        self.answered("other", 0.0)

    def patience_s(self, waiting: int, gain_s: float, now_s: float, *, to_head: bool = False) -> float:
        return self.wait_s if self else 0.0


def test_who_is_alone_leaves_at_once() -> None:
    left: list[str] = []
    Departures(Callers(), lambda: LONG_S).leave("one", lambda: left.append("one"))
    assert left == ["one"]


async def test_whoever_is_waited_for_leaves_with_those_who_waited() -> None:
    left: list[str] = []
    departures = Departures(Patient(LONG_S), lambda: LONG_S)
    departures.leave("one", lambda: left.append("one"))
    departures.leave("two", lambda: left.append("two"))
    assert not left
    departures.leave("other", lambda: left.append("other"))
    assert left == ["one", "two", "other"]
    departures.flush()
    assert len(left) == 3


@pytest.mark.parametrize(("wait_s", "gain_s"), [(0.001, LONG_S), (LONG_S, 0.001)])
async def test_nobody_waits_longer_than_his_callers_or_what_there_is_to_gain_allow(
    wait_s: float, gain_s: float
) -> None:
    left = asyncio.Event()
    departures = Departures(Patient(wait_s), lambda: gain_s)
    departures.leave("one", left.set)
    assert not left.is_set()
    await asyncio.wait_for(left.wait(), LONG_S / 2)


async def test_a_mistake_in_one_call_is_not_the_others() -> None:
    left = asyncio.Event()
    departures = Departures(Patient(LONG_S), lambda: LONG_S)

    def wrong() -> None:
        raise ValueError("wrong")

    departures.leave("one", wrong)
    departures.leave("two", left.set)
    with pytest.raises(ValueError, match="wrong"):
        departures.flush()
    await asyncio.wait_for(left.wait(), LONG_S / 2)

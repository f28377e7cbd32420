"""What a node says when something happens to it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from peers.host import events
from peers.host.events import Event
from routing.errors import Unavailable


def test_a_wrong_clock_is_named_as_the_reason() -> None:
    problem = Unavailable("no DHT node accepted the record")
    behind, right, unknown = (events.outage(problem, skew_s).fields for skew_s in (-60.0, 2.0, None))
    assert "60 s behind" in str(behind["reason"])
    assert "clock" in str(behind["hint"])
    assert right == unknown == {"reason": str(problem), "hint": problem.hint}
    assert events.outage(None, -60.0).kind == "announced"


@pytest.mark.looptime
async def test_a_clock_that_goes_wrong_is_told_once_and_again_when_it_is_right() -> None:
    links, said = SimpleNamespace(clock_skew_s=None), list[Event]()
    watching = asyncio.create_task(events.watch_clock(links, said.append))
    for skew_s in (None, 3.0, -300.0, -299.0, None, -298.0, 1.0, 0.0):
        links.clock_skew_s = skew_s
        await asyncio.sleep(5 * events.CLOCK_LOOK_S)
    watching.cancel()
    assert [event.kind for event in said] == ["clock_wrong", "clock_right"]
    assert said[0].fields["skew_s"] == -300.0

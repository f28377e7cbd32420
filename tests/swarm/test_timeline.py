from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.ids import BlockSpan, PeerId, SessionId, StepId
from routing.routes import Hop
from swarm.session.actions import SendStep
from swarm.session.steps import PendingStep
from swarm.session.timeline import Slice, Timeline, lay_out
from tests.helpers.traces import check_trace

SESSION = SessionId(bytes(16))
SECONDS = st.floats(0, 10) | st.floats(0, 1e9)
TIMINGS = st.lists(st.tuples(SECONDS, SECONDS), max_size=5)


def hops(count: int) -> list[Hop]:
    return [Hop(peer_id=PeerId(f"12D3KooWpeer{at}"), span=BlockSpan(at, at + 1), addresses=()) for at in range(count)]


@given(TIMINGS, st.floats(0, 1e5), st.floats(0, 100))
def test_parts_of_a_step_follow_each_other_and_fill_its_time(
    timings: list[tuple[float, float]], start_s: float, total_s: float
) -> None:
    end_s = start_s + total_s
    whole, parts = lay_out("decode", hops(len(timings)), timings, start_s, end_s)
    assert (whole.start_s, whole.end_s, len(whole.inner)) == (start_s, end_s, len(timings) + 1)
    sequence = [piece for way, part in zip(whole.inner, parts, strict=False) for piece in (way, *part.inner)]
    sequence.append(whole.inner[-1])
    assert (sequence[0].start_s, sequence[-1].end_s) == (start_s, end_s)
    for before, after in pairwise(sequence):
        assert before.start_s <= before.end_s == after.start_s <= after.end_s
    claimed_s = sum(map(sum, timings))
    if claimed_s < total_s:  # nobody is scaled down
        for part, (queue_s, compute_s) in zip(parts, timings, strict=True):
            for piece, seconds in zip(part.inner, (queue_s, compute_s), strict=True):
                assert piece.end_s - piece.start_s == pytest.approx(seconds, abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 5), TIMINGS), max_size=8))
def test_steps_that_overlap_are_shown_beside_each_other(
    steps: list[tuple[float, float, list[tuple[float, float]]]],
) -> None:
    timeline = Timeline()
    for number, (start_s, total_s, timings) in enumerate(steps):
        step = PendingStep(step=StepId(number), first=number, count=1, want_from=0)
        timeline.acted(SESSION, SendStep(step, 1), start_s)
        timeline.answered(SESSION, step, hops(len(timings)), timings, start_s + total_s)
    tracks = check_trace(timeline.as_json())
    shown = [event for name, slices in tracks.items() if name.startswith("steps") for event in slices]
    assert sum(event["name"] == "decode" for event in shown) == len(steps)


def test_what_is_too_much_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.session.timeline.MAX_SLICES", 2)
    timeline = Timeline()
    for at in range(5):
        timeline.client(Slice("forward", at, at + 1))
    assert timeline.as_json()["otherData"] == {"dropped": 3}

"""How `churn` finds a span whose holders it can kill, and what its rows say of the gap that this makes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from routing.ids import BlockSpan, BlockSpans
from tests.lab.experiments.churn import EXPERIMENTS, PROBER, outcomes, told_of_gaps, ways_to_strike
from tests.lab.notebook import Notebook


def answer(
    at_s: float, seconds: float, *, user: str = PROBER, gap: bool = False, first_s: float = 0.5
) -> dict[str, Any]:
    return {
        "kind": "answer", "user": user, "at_s": at_s, "seconds": seconds, "tokens": 0 if gap else 1,
        "first_s": math.inf if gap else first_s, "longest_wait_s": seconds, "identical": True, "retries": 0,
        "gap": gap, "error": "no route" if gap else "",
    }  # fmt: skip


def held(**spans: tuple[int, int]) -> dict[str, BlockSpans]:
    return {host: BlockSpans.of(BlockSpan(*ends)) for host, ends in spans.items()}


def strike(at_s: float) -> dict[str, Any]:
    return {"kind": "strike", "at_s": at_s, "victims": ["p1"], "missing": "10:20"}


def bars(*rows: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    book = Notebook("churn", 1, 1, True, say=lambda text: None)
    for row in rows:
        book.row(**row)
    (experiment,) = EXPERIMENTS
    assert experiment.report is not None
    experiment.report(book)
    return {bar.name: (bar.value, bar.met) for bar in book.bars}


def test_all_holders_of_a_block_are_struck_where_somebody_with_room_is_left() -> None:
    four = held(a1=(0, 10), a2=(0, 10), b=(10, 20), c=(20, 30))
    assert ways_to_strike(four, 30) == {BlockSpan(10, 20): ["b"], BlockSpan(20, 30): ["c"]}  # a1 or a2 can go there
    five = held(b2=(10, 20)) | four
    assert ways_to_strike(five, 30)[BlockSpan(0, 10)] == ["a1", "a2"]
    assert ways_to_strike(held(a=(0, 10), b=(10, 20), c=(20, 30)), 30) == {}  # each is needed where it is
    small = held(a1=(0, 5), a2=(0, 5), a3=(5, 10), b1=(10, 20), c1=(20, 30))
    assert set(ways_to_strike(small, 30)) == {BlockSpan(5, 10)}  # nobody has room for ten


def test_a_gap_lasts_from_its_first_naming_to_the_next_token_of_the_same_user() -> None:
    assert told_of_gaps([answer(0.0, 1.0), answer(1.0, 1.0)]) == []
    (gap,) = told_of_gaps(
        [
            answer(0.0, 4.0, gap=True),
            answer(5.0, 0.5, user="b"),
            answer(4.5, 4.5, gap=True),
            answer(9.5, 3.0, first_s=2.0),
        ]
    )
    assert (gap["user"], gap["at_s"], gap["named_s"], gap["healed_s"]) == (PROBER, 4.0, 4.5, 7.5)
    (open_still,) = told_of_gaps([answer(0.0, 4.0, gap=True), answer(4.5, 4.0, gap=True)])
    assert open_still["healed_s"] == math.inf
    one, other = told_of_gaps([answer(0, 4, gap=True), answer(5, 1), answer(20, 4, gap=True), answer(25, 1)])
    assert (one["at_s"], other["at_s"], other["healed_s"]) == (4, 24, 1.5)


def test_a_request_that_a_strike_met_waits_for_the_name_since_the_strike() -> None:
    rows = [answer(9.0, 5.0, gap=True), answer(15.0, 4.0, gap=True)]
    assert told_of_gaps(rows, [10.0])[0]["named_s"] == 4.0
    assert told_of_gaps(rows, [13.5, 17.0])[0]["named_s"] == 2.0
    assert told_of_gaps(rows, [50.0])[0]["named_s"] == 5.0


def test_a_strike_was_seen_if_a_new_request_was_told_of_it_before_the_next() -> None:
    reader = answer(5.0, 30.0, user="user0")
    late = answer(12.0, 3.0, user="user0", first_s=2.0)
    rows = [reader, late, answer(10.5, 4.0, gap=True), answer(15.0, 1.0)]
    gap, first, second = outcomes(rows, [strike(10.0), strike(40.0)])
    assert (gap["kind"], gap["at_s"], gap["healed_s"]) == ("gap", 14.5, 1.0)
    assert (first["told"], first["under_way"], first["waited_s"]) == (True, 1, 30.0)
    assert (second["told"], second["under_way"], second["waited_s"]) == (False, 0, 0.0)
    assert not outcomes([answer(10.5, 4.0, user="user0", gap=True)], [strike(10.0)])[-1]["told"]


@pytest.mark.parametrize("made", [[], [strike(math.inf)], [strike(10.0)]])
def test_a_run_without_a_gap_that_was_seen_meets_none_of_its_bars(made: list[dict[str, Any]]) -> None:
    rows = [answer(10.5, 1.0), answer(12.0, 1.0)]
    found = bars(*rows, *outcomes(rows, made))
    about = [met for name, (_, met) in found.items() if "gap" in name]
    assert about == [False] * 5


def test_nobody_need_be_told_of_a_gap_that_closes_at_once() -> None:
    for waited_s, met in ((4.0, True), (8.0, False)):
        rows = [answer(5.0, 30.0, user="user0"), answer(10.5, 4.0, gap=True), answer(15.0, 1.0)]
        rows.append(answer(50.0, 30.0, user="user0") | {"longest_wait_s": waited_s})
        found = bars(*rows, *outcomes(rows, [strike(10.0), strike(60.0)]))
        assert found["gaps made of which a new request was told"] == (1, True)
        assert found["… or that closed within 5 s, of all gaps made"] == (1 + met, met)


def test_a_gap_that_was_seen_and_healed_meets_its_bars() -> None:
    rows = [answer(5.0, 30.0, user="user0"), answer(10.5, 4.0, gap=True), answer(15.0, 1.0)]
    leave = {"kind": "leave", "killed": False, "served": True, "took_s": 2.0, "ended": "exit code 0"}
    found = bars(*rows, leave, *outcomes(rows, [strike(10.0)]))
    assert all(met for _, met in found.values()), found
    assert found["until a gap was healed, worst, s"] == (1.0, True)
    slow = {**leave, "took_s": 31.0, "ended": "p1 did not leave within 30 s"}
    found = bars(*rows, slow, *outcomes(rows, [strike(10.0)]))
    assert [name for name, (_, met) in found.items() if not met] == [
        "from SIGTERM to the end, worst, s",
        "peers that ended otherwise than in order",
    ]

"""How experiments count, apart from the machines that they run on."""

from __future__ import annotations

import json
import math

from tests.lab.experiments import EXPERIMENTS
from tests.lab.notebook import Notebook
from tests.lab.swarms import Answer


def notebook(seed: int = 1) -> Notebook:
    return Notebook("kill", seed, runs=1, short=True, say=lambda text: None)


def test_every_experiment_has_a_title_and_a_short_form() -> None:
    for name, experiment in EXPERIMENTS.items():
        assert experiment.name == name
        assert experiment.title.endswith(".")
        assert "\n" not in experiment.title
        assert 0 < experiment.runs_short <= experiment.runs


def test_a_seed_draws_the_same_prompts_again() -> None:
    assert notebook(1).prompt(20) == notebook(1).prompt(20) != notebook(2).prompt(20)


def test_a_series_in_parts_draws_what_it_draws_in_one() -> None:
    def drawn(first: int, runs: int) -> list[tuple[int, list[int]]]:
        book = Notebook("kill", 1, runs, True, say=lambda text: None)
        book.first = first
        return [(number, book.prompt(3)) for number in book.numbers()]

    whole = drawn(0, 6)
    assert drawn(0, 2) + drawn(2, 4) == whole
    assert len({tuple(prompt) for _, prompt in whole}) == 6


def test_no_run_begins_once_time_is_up_but_the_first() -> None:
    book = Notebook("kill", 1, 5, True, say=lambda text: None)
    book.allowed_s = 0.0
    assert [book.row(run=number, identical=True)["run"] for number in book.numbers()] == [0]


def test_bars_follow_from_the_rows_of_several_parts() -> None:
    book = notebook()
    kill = {"identical": True, "hops": [1], "rebuilds": 1, "uplink": 10, "into_healthy": 0, "anyway": 0}
    book.row(run=0, when="token", stall_s=1.0, **kill)
    book.row(run=1, when="token", stall_s=3.0, **kill)
    report = EXPERIMENTS["kill"].report
    assert report is not None
    report(book)
    assert {bar.name: bar.value for bar in book.bars}["median stall, s"] == 2.0


def test_a_bar_is_met_on_its_own_side_and_what_never_came_is_null() -> None:
    book = notebook()
    book.row(identical=True, stall_s=math.inf)
    book.all_identical()
    book.at_most("stall, s", math.inf, 5)
    assert [bar.met for bar in book.bars] == [True, False]
    assert "| stall, s | inf | ≤ 5 | NOT MET |" in book.table()
    written = json.loads(book.to_json())
    assert (written["seed"], written["rows"][0]["stall_s"], written["bars"][1]["met"]) == (1, None, False)


def test_a_wait_counts_from_the_trouble_on() -> None:
    answer = Answer(started_s=0.0, times_s=[4.0, 5.0, 8.0])
    assert answer.longest_gap_s(0.0) == 4.0
    assert answer.longest_gap_s(3.5) == 3.0
    assert answer.longest_gap_s(7.5) == 0.5
    assert answer.longest_gap_s(9.0) == 0.0


def test_a_peer_that_left_is_counted_from_its_end_and_somebody_must_have_looked() -> None:
    book = notebook()
    leave = {"ended": 2.0, "online": 1.5}
    book.row(signal="SIGTERM", who="user", any=20.0, **leave)
    book.row(signal="SIGTERM", who="later1", any=21.0, **leave)
    book.row(signal="SIGKILL", who="user", any=22.5, **leave)
    book.row(signal="SIGKILL", who="later1", any=0.0, **leave)
    report = EXPERIMENTS["leave"].report
    assert report is not None
    report(book)
    assert [(bar.value, bar.met) for bar in book.bars] == [
        (-0.5, True), (-0.5, True), (20.5, False), (-2.0, True), (0, False),
    ]  # fmt: skip

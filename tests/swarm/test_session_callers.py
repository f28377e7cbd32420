"""Threads that generate at the same time wait for each other as long as that pays, and for nobody who does not come."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.session.callers import GONE_S, GRACE_S, OVERDUE, SOON, Callers

GAIN_S = 0.01


def used_to(usual_s: float) -> Callers:
    """Callers who take so long from an answer to the next step."""
    callers = Callers()
    for number in range(60):
        callers.answered("a", number * 10.0)
        callers.asked("a", number * 10.0 + usual_s)
    return callers


def test_who_was_answered_is_waited_for_at_the_head_and_then_at_the_next_step() -> None:
    callers = Callers()
    callers.answered("a", 0.0)
    callers.answered("b", 0.0)
    for to_head in (False, True):
        assert callers.patience_s(1, GAIN_S, 0.0, to_head=to_head) == pytest.approx(min(GRACE_S, GAIN_S * 2 / 3))
    callers.came_to_head("a")
    callers.came_to_head("b")
    assert callers.patience_s(1, GAIN_S, 0.0, to_head=True) == 0.0
    callers.asked("a", 0.0)
    assert callers.patience_s(1, GAIN_S, 0.0) == pytest.approx(min(GRACE_S, GAIN_S / 2))
    callers.left("b")
    assert callers.patience_s(1, GAIN_S, 0.0) == 0.0
    assert not callers


@pytest.mark.parametrize("mark", [Callers.came_to_head, lambda callers, who: callers.asked(who, 1.0), Callers.left])
def test_strangers_come_and_go_unnoticed(mark: Callable[[Callers, str], None]) -> None:
    callers = Callers()
    mark(callers, "nobody")
    assert callers.patience_s(1, GAIN_S, 1.0) == 0.0


@given(usual_s=st.floats(0.001, 1.0))
def test_who_takes_much_longer_than_callers_do_is_not_expected_any_more(usual_s: float) -> None:
    callers = used_to(usual_s)
    callers.answered("reader", 1000.0)
    overdue_s = 1000.0 + OVERDUE * usual_s + GRACE_S
    assert callers.patience_s(1, GAIN_S, overdue_s - 0.1 * GRACE_S) <= 0.11 * GRACE_S
    assert callers.patience_s(1, GAIN_S, overdue_s + 0.1 * GRACE_S) == 0.0
    assert callers.patience_s(1, 1e9, 1000.0) <= OVERDUE * usual_s + 1.01 * GRACE_S, "whatever a peer claims"


@given(usual_s=st.floats(0.001, 1.0), pause_s=st.floats(1.0, 1e6))
def test_a_pause_is_not_what_callers_usually_take_and_who_is_gone_is_forgotten(usual_s: float, pause_s: float) -> None:
    callers = used_to(usual_s)
    callers.answered("reader", 1000.0)
    callers.asked("reader", 1000.0 + OVERDUE * usual_s + pause_s)
    callers.answered("reader", 1e7)
    assert callers.patience_s(1, 1e9, 1e7) <= OVERDUE * (1.2 * usual_s + GRACE_S) + 1.01 * GRACE_S
    assert callers.patience_s(1, 1e9, 1e7 + 2 * GONE_S) == 0.0
    assert not callers


@given(usual_s=st.floats(0.001, 1.0))
def test_who_was_answered_just_now_is_not_waited_for_where_the_way_is_longer_than_that_pays(usual_s: float) -> None:
    callers = used_to(usual_s)
    callers.answered("late", 1000.0)
    assert callers.patience_s(1, 1.9 * SOON * usual_s, 1000.0) == 0.0
    assert callers.patience_s(1, 2.1 * SOON * usual_s, 1000.0) > 0.0


@given(
    ages_s=st.lists(st.floats(0.0, 0.1), max_size=20),
    usual_s=st.floats(0.001, 0.1),
    waiting=st.integers(1, 20),
    gain_s=st.floats(0.0, 1.0),
    to_head=st.booleans(),
)
def test_all_who_wait_lose_no_more_than_those_who_come_save(
    ages_s: list[float], usual_s: float, waiting: int, gain_s: float, to_head: bool
) -> None:
    callers = used_to(usual_s)
    for number, age_s in enumerate(ages_s):
        callers.answered(number, 1000.0 - age_s)
    wait_s = callers.patience_s(waiting, gain_s, 1000.0, to_head=to_head)
    assert 0.0 <= wait_s <= gain_s
    assert waiting * wait_s <= len(ages_s) * (gain_s - wait_s) + 1e-9

"""Steps of one session keep their order, whatever is asked for, answered, sent again and skipped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from routing.ids import SessionId
from swarm.session.steps import PendingStep, Steps

PARENT = SessionId(b"p" * 16)


def nine(step: PendingStep) -> int:
    return 9


def asked(*counts: int, want_from: int = 0) -> Steps:
    """One step behind the other, all waiting to be sent."""
    steps = Steps()
    for count in counts:
        steps.to_send(steps.ask(steps.end, count, min(want_from, count)))
    return steps


def test_a_step_that_goes_back_travels_alone_and_settles_less_of_the_history() -> None:
    steps = asked(4, 4)
    assert (steps.settled_until(), steps.sure_until(), steps.answered_until()) == (8, 8, 0)
    back = steps.ask(6, 1, 0)
    steps.to_send(back)
    assert back.alone
    assert (steps.settled_until(), steps.sure_until(), steps.end) == (0, 0, 7)
    first, second = steps.send(nine, None)
    steps.sent.clear()
    assert (first.first, second.first) == (0, 4)
    assert steps.send(nine, None) == [back]
    assert steps.crowded is False


def test_the_first_step_of_a_fork_names_its_parent_and_travels_alone() -> None:
    (first,) = asked(1, 1).send(nine, PARENT)
    assert (first.parent, first.alone) == (PARENT, True)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4), st.data())
def test_all_steps_are_sent_in_order_within_the_window_however_often_they_are_sent_again(
    counts: list[int], window: int, data: st.DataObject
) -> None:
    steps, answered, again = asked(*counts), list[PendingStep](), 0
    while steps.pending:
        steps.send(lambda step: window, None)
        assert 0 < len(steps.sent) <= window
        if again < 5 and data.draw(st.booleans()):
            again += 1
            steps.send_again()
            assert not steps.sent
            continue
        step = next(iter(steps.sent.values()))
        del steps.sent[step.step]
        steps.answered(step.step)
        answered.append(step)
    assert [step.count for step in answered] == counts
    assert steps.answered_until() == steps.end == sum(counts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 9), st.integers(0, 99))
def test_nothing_that_somebody_wants_is_skipped(counts: list[int], want_from: int, held: int) -> None:
    steps = asked(*counts, want_from=want_from)
    before = list(steps.pending)
    skipped, whole = steps.skip(held)
    assert skipped <= held
    assert [*whole, *steps.pending] == before
    for step in before:
        assert step.want_from == step.count or step.first + step.want_from >= skipped
    assert all(step.first + step.count <= skipped for step in whole)
    assert not steps.pending or steps.pending[0].first + steps.pending[0].count > skipped

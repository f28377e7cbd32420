"""What must be sent again after a hop is lost, and from where; and when a silent peer is given up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarm.session.pace import SILENCE_S_MIN, Pace
from swarm.session.repair import Leg, begin_at, legs


def test_a_hop_between_two_healthy_ones_is_fed_from_the_journal_before_it_and_nobody_else_hears_of_it() -> None:
    begin = begin_at([501, 0, 500], [0, 0, 500], [(500, 501)])
    assert begin == [501, 0, 500]
    assert list(legs(begin, 0, 500)) == [Leg(0, 500, hop=1, until=2)]
    assert list(legs(begin, 500, 501)) == [Leg(500, 501, hop=1, until=3)], "hop 0 has computed it already"


def test_two_neighbours_are_rebuilt_in_one_go_and_two_others_apart() -> None:
    assert list(legs([9, 0, 0, 9], 0, 9)) == [Leg(0, 9, hop=1, until=3)]
    assert list(legs([0, 9, 0, 9], 0, 9)) == [Leg(0, 9, hop=0, until=1), Leg(0, 9, hop=2, until=3)]


def test_a_replacement_that_holds_a_prefix_hears_the_rest() -> None:
    assert list(legs([9, 6, 9], 0, 9)) == [Leg(6, 9, hop=1, until=2)]


def test_lost_journals_cascade_one_hop_up_each_and_in_the_end_to_the_client() -> None:
    assert begin_at([9, 9, 9, 0], [0, 0, 9, 0], []) == [9, 9, 0, 0]
    assert begin_at([9, 9, 9, 0], [9, 9, 9, 0], []) == [0, 0, 0, 0]
    assert begin_at([9, 9, 9, 6], [0, 0, 6, 0], []) == [9, 9, 9, 6], "it reaches back far enough"


def test_the_last_hop_answers_what_is_pending_and_a_step_is_run_whole() -> None:
    assert begin_at([9, 9, 9], [0, 0, 0], [(8, 9)]) == [9, 9, 8]
    assert begin_at([9, 7, 9], [0, 0, 0], [(5, 9)]) == [9, 5, 5]
    assert list(legs([9, 5, 5], 5, 9)) == [Leg(5, 9, hop=1, until=3)]


@given(
    hops=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5), count=st.integers(1, 4)
)
def test_every_hop_hears_what_it_lacks_once_and_in_order_from_somebody_who_has_it(
    hops: list[tuple[int, int]], count: int
) -> None:
    end = 12 + count
    held, journals = [held for held, _ in hops], [min(hop) for hop in hops]
    begin = begin_at(held, journals, [(12, end)])
    assert all(position <= known for position, known in zip(begin, held, strict=True))
    holds = list(begin)
    for first, last in ((0, 12), (12, end)):
        for leg in legs(begin, first, last):
            if leg.hop and leg.first < begin[leg.hop - 1]:
                assert journals[leg.hop - 1] <= leg.first
                assert leg.end <= held[leg.hop - 1]
            for hop in range(leg.hop, leg.until):
                assert holds[hop] == leg.first
                holds[hop] = leg.end
    assert all(position >= end for position in holds)


def test_steps_have_slowed_once_they_usually_take_three_times_their_best_and_not_after_one_that_took_twice() -> None:
    pace = Pace()
    assert not pace.slowed
    for _ in range(10):
        pace.answered(1, 0.1)
    pace.answered(1, 0.2)
    pace.answered(100, 9.0)
    assert not pace.slowed
    pace.answered(1, 60.0)
    assert not pace.slowed, "a pause of this very program's, perhaps: the hops are not to blame"
    pace.answered(1, 0.1)
    assert not pace.slowed
    for step_s in (1.0, 0.1, 1.0):
        pace.answered(1, step_s)
    assert pace.slowed, "every other one is no pause"
    for _ in range(20):
        pace.answered(1, 0.1)
    assert not pace.slowed


def test_a_silent_peer_is_given_up_after_three_times_what_is_usual_and_never_before_two_seconds() -> None:
    pace = Pace()
    assert pace.silence_s(500) == SILENCE_S_MIN
    pace.answered(1, 0.1)
    assert pace.silence_s(1) == SILENCE_S_MIN
    pace.answered(100, 2.0)
    assert pace.silence_s(1) == SILENCE_S_MIN
    assert pace.silence_s(500) == 3 * 500 * 0.02
    for _ in range(50):
        pace.answered(1, 2.0)
    assert pace.silence_s(1) == 6.0
    for _ in range(4):
        pace.answered(1, 60.0)
    assert pace.silence_s(1) == 6.0, "a few that took long say nothing of what is usual"

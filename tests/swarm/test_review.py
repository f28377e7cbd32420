from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.ids import PeerId
from routing.router import Router
from routing.routes import RouteRequest
from swarm.session.pace import Pace
from swarm.session.review import ANSWER_STEPS, hop_to_leave, next_review_s, usual_saving, usual_tokens
from tests.routing.swarms import MODEL, NOW_S, announcement, peer

REQUEST = RouteRequest(model=MODEL, num_blocks=30, bytes_per_token=1152)


def test_a_route_is_planned_for_the_mean_step_of_its_session() -> None:
    assert usual_tokens([]) == usual_tokens([1]) == 1
    assert usual_tokens([256] * 16) == round((4096 + ANSWER_STEPS) / (16 + ANSWER_STEPS))
    assert usual_tokens([30]) == 1, "a short prompt decides nothing"


def test_positions_that_are_held_somewhere_are_counted_per_step_as_the_others_are() -> None:
    assert usual_saving([512], 448) == 448 / (1 + ANSWER_STEPS)
    assert usual_saving([64, 64], 1000) == 128 / (2 + ANSWER_STEPS), "no more than what is to be sent"


def test_a_review_plans_nothing_where_the_other_hops_alone_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()
    router.on_announcements(
        [announcement(peer(n), 15 * n, 15 * n + 15, decode_s_per_block=0.01 * (1 + 4 * n)) for n in range(2)]
        + [announcement(peer(2), 15, 30)],
        NOW_S,
    )
    request = replace(REQUEST, previous=router.plan(replace(REQUEST, avoid=frozenset({peer(2)})), NOW_S))

    def left(step_s: float) -> PeerId | None:
        return hop_to_leave(router, request, {peer(0): 0.15, peer(1): 0.2}, NOW_S, step_s=step_s, slowed=slowed)

    slowed = False
    assert left(1.0) == peer(1)
    monkeypatch.setattr(router, "plan", None)
    assert left(0.3) is None, "the first hop takes 0.15 of them, and its way"
    slowed = True
    assert left(0.65) is None, "two thirds of it pass without the hop"


def test_looks_at_a_route_become_rarer() -> None:
    assert [next_review_s(age_s) for age_s in (0.0, 12.0, 1000.0)] == [5.0, 12.0, 60.0]


@pytest.mark.parametrize(("step_s", "slowed", "leaves"), [(2.0, True, True), (2.0, False, True), (0.15, True, False)])
def test_a_slow_hop_is_left_only_where_steps_are_clearly_faster_with_others(
    step_s: float, slowed: bool, leaves: bool
) -> None:
    router = Router()
    slow, fast = announcement(peer(1), 0, 30, decode_s_per_block=0.05), announcement(peer(2), 0, 30)
    router.on_announcements([slow], NOW_S)
    request = replace(REQUEST, previous=router.plan(REQUEST, NOW_S))

    def left(others_s: float) -> PeerId | None:
        took_s = {peer(1): step_s - others_s} | {peer(number): others_s / 3 for number in (3, 4, 5)}
        return hop_to_leave(router, request, took_s, NOW_S, step_s=step_s, slowed=slowed)

    assert left(0.0) is None, "nobody else is there"
    router.on_announcements([fast], NOW_S)
    assert left(0.0) == (peer(1) if leaves else None)
    assert left(0.55 * step_s) == (peer(1) if leaves and slowed else None), "the others alone take more than half"
    assert left(0.7 * step_s) is None, "the others alone take most of it"


def test_what_steps_take_beside_a_hop_that_became_slow_is_known_and_not_estimated() -> None:
    """Pings between busy peers make ways look longer than they are: 36 ms for all of these, which take 12."""
    router = Router()
    places = [(1, 0, 15, 0.02), (2, 15, 30, 0.0005), (3, 0, 15, 0.0005)]
    router.on_announcements([announcement(peer(n), a, b, decode_s_per_block=s) for n, a, b, s in places], NOW_S)
    request = replace(REQUEST, previous=router.plan(replace(REQUEST, avoid=frozenset({peer(3)})), NOW_S))
    for number, _, _, _ in places:
        router.on_rtt(peer(number), 0.024, NOW_S)
    took_s = {peer(1): 0.08, peer(2): 0.008}
    assert router.plan(REQUEST, NOW_S).cost_s > 0.1 / 2
    assert hop_to_leave(router, request, took_s, NOW_S, step_s=0.1, slowed=True) == peer(1)
    assert hop_to_leave(router, request, took_s, NOW_S, step_s=0.1, slowed=False) is None


def test_a_hop_to_which_the_way_became_long_is_left_once_that_was_measured() -> None:
    router = Router()
    router.on_announcements([announcement(peer(n), 15 * (n % 2), 15 * (n % 2) + 15) for n in range(4)], NOW_S)
    request = replace(REQUEST, previous=router.plan(REQUEST, NOW_S))
    assert request.previous is not None
    near, far = (hop.peer_id for hop in request.previous.hops)
    took_s = {near: 0.01, far: 0.01}

    def left(slowed: bool) -> PeerId | None:
        return hop_to_leave(router, request, took_s, NOW_S, step_s=0.6, slowed=slowed)

    for number in range(4):
        router.on_rtt(peer(number), 0.01, NOW_S)
    assert left(slowed=True) is None, "nothing says by which way"
    for _ in range(5):
        router.on_rtt(far, 0.5, NOW_S)
    assert left(slowed=True) == far
    assert left(slowed=False) is None, "nothing was quicker before"
    for _ in range(5):
        for number in range(4):
            router.on_rtt(peer(number), 0.5, NOW_S)
    assert left(slowed=True) is None, "it is this node's own way"


@pytest.mark.parametrize("far", [0, 1])
def test_a_hop_whose_way_became_long_is_left_also_beside_one_that_alone_has_its_blocks(far: int) -> None:
    router = Router()
    spans = [(0, 15), (15, 30)]
    router.on_announcements(
        [announcement(peer(n), *spans[n]) for n in range(2)] + [announcement(peer(2), *spans[far])], NOW_S
    )
    request = replace(REQUEST, previous=router.plan(replace(REQUEST, avoid=frozenset({peer(2)})), NOW_S))
    for number in range(3):
        router.on_rtt(peer(number), 0.01, NOW_S)
    for _ in range(5):
        router.on_rtt(peer(far), 0.5, NOW_S)
    took_s = {peer(0): 0.01, peer(1): 0.01}
    assert hop_to_leave(router, request, took_s, NOW_S, step_s=0.6, slowed=True) == peer(far)


def test_what_passed_at_hops_is_the_mean_of_the_last_steps_and_prompts_do_not_count() -> None:
    pace = Pace()
    pace.answered(1, 0.1)
    assert pace.hops_s == {}, "they did not say"
    for seconds in (9.0, 0.1, 0.2, 0.6):
        pace.answered(1, 1.0, [(peer(1), seconds), (peer(2), 0.1), (peer(1), 0.1)])
    pace.answered(256, 1.0, [(peer(1), 5.0)])
    assert pace.hops_s == pytest.approx({peer(1): 0.4, peer(2): 0.1})


@given(st.lists(st.sampled_from([0.1, 0.19, 0.5]), min_size=4, max_size=40))
def test_steps_have_slowed_where_most_of_the_last_took_twice_the_best(steps_s: list[float]) -> None:
    pace = Pace()
    for step_s in (0.1, *steps_s):
        pace.answered(1, step_s)
    lately_s = steps_s[-3:]
    assert pace.slowed <= (lately_s.count(0.5) >= 2), "a pause is not a habit"
    if steps_s[-4:] == [0.5] * 4:
        assert pace.slowed

from __future__ import annotations

from dataclasses import replace

import pytest

from routing.router import Router
from routing.routes import RouteRequest
from swarm.session.review import ANSWER_STEPS, next_review_s, usual_saving, usual_tokens, worth_leaving
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
        [announcement(peer(n), 15 * n, 15 * n + 15, decode_s_per_block=0.01 * (1 + n)) for n in range(2)]
        + [announcement(peer(2), 15, 30)],
        NOW_S,
    )
    request = replace(REQUEST, previous=router.plan(replace(REQUEST, avoid=frozenset({peer(2)})), NOW_S))

    def left(step_s: float) -> bool:
        return worth_leaving(router, request, peer(1), NOW_S, step_s=step_s, others_s=0.0, slowed=True)

    assert left(1.0)
    monkeypatch.setattr(router, "plan", None)
    assert not left(0.3), "the first hop takes 0.15 of them, and its way"


def test_looks_at_a_route_become_rarer() -> None:
    assert [next_review_s(age_s) for age_s in (0.0, 12.0, 1000.0)] == [5.0, 12.0, 60.0]


@pytest.mark.parametrize(("step_s", "slowed", "leaves"), [(2.0, True, True), (2.0, False, True), (0.2, True, False)])
def test_a_slow_hop_is_left_only_where_others_halve_the_step(step_s: float, slowed: bool, leaves: bool) -> None:
    router = Router()
    slow, fast = announcement(peer(1), 0, 30, decode_s_per_block=0.05), announcement(peer(2), 0, 30)
    router.on_announcements([slow], NOW_S)
    request = replace(REQUEST, previous=router.plan(REQUEST, NOW_S))

    def left(others_s: float) -> bool:
        return worth_leaving(router, request, peer(1), NOW_S, step_s=step_s, others_s=others_s, slowed=slowed)

    assert not left(0.0), "nobody else is there"
    router.on_announcements([fast], NOW_S)
    assert left(0.0) == leaves
    assert not left(step_s / 2), "the others alone take half"

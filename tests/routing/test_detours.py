from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.detours import HALF_LIFE_S, HERE, NO_MATTER_S, Detours
from routing.ids import PeerId
from tests.routing.swarms import NOW_S, peer

PEERS = [peer(number) for number in range(1, 5)]
ROUTES = [(a, b) for a in PEERS for b in PEERS if a != b] + [(a,) for a in PEERS]


def learned(true_s: dict[tuple[PeerId, PeerId], float], common_s: float, rng: random.Random) -> Detours:
    """From steps over routes drawn at random."""
    detours = Detours()
    for _ in range(20_000):
        route = rng.choice(ROUTES)
        ways = list(pairwise((HERE, *route, HERE)))
        detours.on_route(route, sum(true_s.get(way, 0.0) for way in ways) + common_s * len(ways), NOW_S)
    return detours


def around(detours: Detours, route: tuple[PeerId, ...]) -> float:
    return sum(detours.learnt_s(*way, NOW_S) for way in pairwise((HERE, *route, HERE)))


@pytest.mark.parametrize("seed", range(2))
def test_what_decides_between_routes_is_found_whatever_each_way_alone_takes(seed: int) -> None:
    rng = random.Random(seed)
    nodes = [HERE, *PEERS]
    true_s = {(a, b): rng.uniform(-0.05, 0.05) for a in nodes for b in nodes if a != b}
    for a, b in list(true_s):  # a round trip was measured and halved: what one way takes more, the other takes less
        true_s[b, a] = -true_s[a, b]
    detours = learned(true_s, 0.004, rng)
    beyond = {route: sum(true_s[way] for way in pairwise((HERE, *route, HERE))) for route in ROUTES}
    for one, other in pairwise(ROUTES):
        if len(one) == len(other):
            found_s = around(detours, one) - around(detours, other)
            assert found_s == pytest.approx(beyond[one] - beyond[other], abs=4e-3)


def test_a_node_that_is_near_to_one_way_and_far_the_other_changes_nothing() -> None:
    """As a clock that is wrong would: no sum around a closed way shows it, and none needs it."""
    true_s = {(HERE, PEERS[0]): 1.0, (PEERS[0], HERE): -1.0}
    for other in PEERS[1:]:
        true_s |= {(other, PEERS[0]): 1.0, (PEERS[0], other): -1.0}
    detours = learned(true_s, 0.0, random.Random(1))
    assert all(abs(around(detours, route)) < 1e-6 for route in ROUTES)


def test_what_every_way_takes_is_nobodys_detour_and_detours_fade() -> None:
    detours = Detours()
    for _ in range(100):
        detours.on_route(PEERS[:2], 0.3, NOW_S)
    assert detours.of(HERE, PEERS[0], NOW_S) == 0.0
    for _ in range(100):
        detours.on_route(PEERS[2:], 0.9, NOW_S)
    far_s = detours.of(HERE, PEERS[2], NOW_S)
    assert far_s == detours.learnt_s(HERE, PEERS[2], NOW_S) - NO_MATTER_S > 0.0
    assert detours.learnt_s(HERE, PEERS[2], NOW_S + HALF_LIFE_S) == pytest.approx((far_s + NO_MATTER_S) / 2)
    assert detours.of(HERE, PEERS[1], NOW_S) == 0.0, "no route has it"


@given(st.lists(st.tuples(st.sampled_from(ROUTES), st.floats()), max_size=30))
def test_no_history_leaves_anything_but_bounded_numbers(steps: list[tuple[tuple[PeerId, ...], float]]) -> None:
    detours = Detours(max_ways=5)
    for route, beyond_s in steps:
        detours.on_route(route, beyond_s, NOW_S)
    assert len(detours) <= 5
    assert all(math.isfinite(detours.of(a, b, NOW_S)) for a, b in pairwise((HERE, *PEERS, HERE)))

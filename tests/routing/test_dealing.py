from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.dealing import ROOMY, SESSIONS_MIN, Dealing, phase, price_s
from routing.flow import GOLDEN
from routing.ids import PeerId
from routing.router import Router
from routing.routes import RouteRequest
from tests.routing.swarms import MODEL, NOW_S, announcement, peer

REQUEST = RouteRequest(model=MODEL, num_blocks=30, bytes_per_token=1152)
DEALS = st.tuples(st.integers(0, 5), st.lists(st.integers(0, 3), min_size=0, max_size=3))


@given(st.lists(DEALS, max_size=40))
def test_what_is_counted_is_what_the_sessions_that_were_dealt_last_need(deals: list[tuple[int, list[int]]]) -> None:
    """An empty list of peers ends the session."""
    dealing, live = Dealing(max_sessions=4), dict[int, list[int]]()
    for session, peers in deals:
        live.pop(session, None)
        if not peers:
            dealing.end(session)
            continue
        if len(live) == 4:
            del live[next(iter(live))]
        live[session] = peers
        dealing.deal(session, [(peer(n), 0.5) for n in peers])
    for n in range(4):
        held = sum(peers.count(n) for peers in live.values())
        assert dealing.part(peer(n), 0.0, 2.0) == pytest.approx(held / SESSIONS_MIN)
        assert held / SESSIONS_MIN <= dealing.part(peer(n), 0.5, 2.0) < (held + 1) / SESSIONS_MIN
    assert all((session in dealing) == (session in live) for session in range(6))


def test_a_peer_with_room_costs_nothing_and_one_without_costs_more_the_more_it_has() -> None:
    assert price_s(1.0, turn_s=ROOMY * 0.5, cycle_s=0.5) == 0
    assert 0 < price_s(1.0, turn_s=0.5, cycle_s=0.5) < price_s(1.2, turn_s=0.5, cycle_s=0.5)


@pytest.mark.parametrize("prompt", [1, 200])
def test_in_a_crowded_swarm_a_node_shares_its_sessions_out_by_what_peers_can_carry(prompt: int) -> None:
    speeds = (0.002, 0.002, 0.004)
    router = Router()
    router.on_announcements(
        [
            announcement(peer(n), 0, 30, decode_s_per_block=d, prefill_s_per_token_block=d / 4, sessions=200)
            for n, d in enumerate(speeds)
        ],
        NOW_S,
    )
    uses = Counter[PeerId]()
    for session in range(120):
        route = router.plan(replace(REQUEST, tokens=prompt, spread=session / 120, session=session), NOW_S)
        uses[route.hops[0].peer_id] += 1
    assert [uses[peer(n)] for n in range(3)] == pytest.approx([48, 48, 24], abs=4)


def test_many_nodes_with_few_sessions_give_small_peers_their_part_all_together_though_none_can_by_itself() -> None:
    """A third of a session of each node, to everyone of the small ones: where each rounds alike, it is one, or none."""
    nodes, sessions, small = 40, 36, range(10, 20)
    swarm = [
        announcement(peer(n), 0, 30, decode_s_per_block=d, prefill_s_per_token_block=d / 4, sessions=200)
        for n, d in [*((n, 0.002) for n in range(10)), *((n, 0.018) for n in small)]
    ]
    uses = Counter[PeerId]()
    for node in range(nodes):
        router = Router(turn=phase(peer(1000 + node)))
        router.on_announcements(swarm, NOW_S)
        for session in range(sessions):
            request = replace(REQUEST, spread=(node + session * GOLDEN) % 1.0, session=session)
            uses[router.plan(request, NOW_S).hops[0].peer_id] += 1
    fair = nodes * sessions / (10 * 9 + 10)
    assert sum(uses[peer(n)] for n in small) == pytest.approx(10 * fair, rel=0.25)
    assert max(uses[peer(n)] for n in small) <= 1.6 * fair


def test_phases_lie_evenly() -> None:
    counts = Counter(int(10 * phase(peer(n))) for n in range(5000))
    assert [counts[tenth] for tenth in range(10)] == pytest.approx([500] * 10, rel=0.15)


def test_sessions_that_lost_one_peer_are_shared_out_to_those_that_can_take_its_place() -> None:
    router = Router()
    router.on_announcements([announcement(peer(n), start, 30 - 15 * n) for n, start in ((0, 15), (1, 0))], NOW_S)
    routes = [router.plan(replace(REQUEST, spread=n / 40, session=n), NOW_S) for n in range(40)]
    router.on_announcements(
        [announcement(peer(n), 15, 30, decode_s_per_block=0.001 + 1e-6 * n, sessions=200) for n in range(2, 6)], NOW_S
    )
    uses = Counter[PeerId]()
    for session, route in enumerate(routes):
        request = replace(REQUEST, avoid=frozenset({peer(0)}), previous=route, keep=route.hops[:1])
        uses[router.plan(replace(request, spread=session / 40, session=session), NOW_S).hops[1].peer_id] += 1
    assert [uses[peer(n)] for n in range(2, 6)] == pytest.approx([10] * 4, abs=2)


def test_while_there_is_room_sessions_that_end_leave_the_fastest_peer_the_best() -> None:
    router = Router()
    router.on_announcements([announcement(peer(0), 0, 30), announcement(peer(1), 0, 30)], NOW_S)
    fast = replace(announcement(peer(1), 0, 30, sequence=2), decode_s_per_block=1e-4)
    for session in range(60):
        router.on_announcements([replace(fast, sequence=2 + session)], NOW_S)
        route = router.plan(replace(REQUEST, spread=session / 60, session=session), NOW_S)
        assert route.hops[0].peer_id == peer(1)
        router.on_ended(session)


def test_a_session_that_stays_where_another_was_is_counted_once() -> None:
    router = Router()
    router.on_announcements([announcement(peer(0), 0, 30)], NOW_S)
    first = router.plan(replace(REQUEST, spread=0.1, session="a"), NOW_S)
    for _ in range(3):
        router.plan(replace(REQUEST, spread=0.2, session="b", previous=first), NOW_S)
    counted = router._estimates._dealing.part(peer(0), 0.0, 1.0)
    router.on_ended("b")
    router.on_ended("b")
    assert router._estimates._dealing.part(peer(0), 0.0, 1.0) == pytest.approx(counted / 2)

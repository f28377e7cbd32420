from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.coordinates import Coordinate
from routing.cost import hop_cost
from routing.errors import NoRoute
from routing.estimates import Estimates
from routing.health import coverage
from routing.ids import BlockSpan, BlockSpans, PeerId
from routing.path import Candidate, cheapest_path
from routing.placement import choose_span
from routing.records import Announcement, PeerState
from routing.router import Router
from routing.routes import Hop, Kept, Route, RouteRequest
from routing.view import HYSTERESIS
from tests.routing.swarms import MODEL, NOW_S, OTHER_MODEL, announcement, peer

REQUEST = RouteRequest(model=MODEL, num_blocks=30, bytes_per_token=1152)
THREE = (announcement(peer(0), 0, 10), announcement(peer(1), 10, 20), announcement(peer(2), 20, 30))


def router_with(*announcements: Announcement) -> Router:
    router = Router()
    router.on_announcements(announcements, NOW_S)
    return router


def peers_of(route: Route) -> list[str]:
    return [hop.peer_id for hop in route.hops]


def test_three_peers_of_ten_blocks_make_a_route_with_their_addresses() -> None:
    route = router_with(*THREE).plan(REQUEST, NOW_S)
    assert route.hops == tuple(
        Hop(peer_id=a.peer_id, span=a.spans.parts[0], addresses=a.addresses, dtype=a.dtype, quantization=a.quantization)
        for a in THREE
    )
    assert route.cost_s > 0


def test_the_nearer_peer_is_taken_and_a_failed_one_replaced() -> None:
    router = router_with(*THREE, announcement(peer(3), 10, 20))
    router.on_rtt(peer(1), 0.010, NOW_S)
    router.on_rtt(peer(3), 0.050, NOW_S)
    assert peers_of(router.plan(REQUEST, NOW_S))[1] == peer(1)
    router.on_failure(peer(1), NOW_S, "stream closed")
    assert peers_of(router.plan(REQUEST, NOW_S))[1] == peer(3)
    assert peers_of(router.plan(REQUEST, NOW_S + 10))[1] == peer(1)


def test_peers_of_another_protocol_are_left_out_and_both_versions_named() -> None:
    router = router_with(THREE[0], replace(THREE[1], protocol=7), THREE[2])
    assert len(router.plan(REQUEST, NOW_S).hops) == 3
    with pytest.raises(NoRoute, match="speaks protocol 7, this node speaks 1") as raised:
        router.plan(replace(REQUEST, protocol=1), NOW_S)
    assert raised.value.missing == ((10, 20),)


def test_a_success_ends_the_back_off() -> None:
    router = router_with(*THREE)
    router.on_failure(peer(1), NOW_S, "stream closed")
    router.on_success(peer(1), NOW_S)
    assert len(router.plan(REQUEST, NOW_S).hops) == 3


def test_a_peer_that_failed_again_and_again_or_was_slow_is_used_again_in_time() -> None:
    def middle_at(router: Router, now_s: float) -> str:
        """After everybody renewed its announcement."""
        records = (*THREE, announcement(peer(3), 10, 20, decode_s_per_block=0.01))
        router.on_announcements([replace(a, sequence=int(now_s), expires_at_s=now_s + 20) for a in records], now_s)
        return peers_of(router.plan(REQUEST, now_s))[1]

    failed, slow = Router(), Router()
    assert middle_at(failed, NOW_S) == middle_at(slow, NOW_S) == peer(1)
    for second in (0, 5, 15):
        failed.on_failure(peer(1), NOW_S + second, "stream closed")
    assert [middle_at(failed, NOW_S + 15 + age_s) for age_s in (1, 12)] == [peer(3), peer(1)]
    for _ in range(20):
        slow.on_step(peer(1), 10, 1, 1.0, 0.0, NOW_S)
    assert [middle_at(slow, NOW_S + age_s) for age_s in (1, 300, 1800)] == [peer(3), peer(3), peer(1)]


def test_a_measured_slow_peer_loses_to_one_that_promised_less() -> None:
    boaster = announcement(peer(1), 10, 20, decode_s_per_block=0.0)
    honest = announcement(peer(3), 10, 20, decode_s_per_block=0.005)
    router = router_with(THREE[0], boaster, honest, THREE[2])
    assert peers_of(router.plan(REQUEST, NOW_S))[1] == peer(1)
    router.on_step(peer(1), blocks=10, tokens=1, compute_s=0.5, queue_s=0.0, now_s=NOW_S)
    assert peers_of(router.plan(REQUEST, NOW_S))[1] == peer(3)


def test_a_long_prompt_takes_fewer_hops() -> None:
    slow = announcement(peer(3), 0, 30, decode_s_per_block=0.01, prefill_s_per_token_block=0.0001)
    router = router_with(*THREE, slow)
    for number in range(4):
        router.on_rtt(peer(number), 0.020, NOW_S)
    assert len(router.plan(REQUEST, NOW_S).hops) == 3
    assert peers_of(router.plan(replace(REQUEST, tokens=512, bytes_per_token=8192), NOW_S)) == [peer(3)]
    assert len(router.plan(replace(REQUEST, tokens=512, bytes_per_token=1), NOW_S).hops) == 3


def test_avoided_peers_are_not_used() -> None:
    router = router_with(*THREE, announcement(peer(3), 10, 20))
    for avoided in (peer(1), peer(3)):
        assert avoided not in peers_of(router.plan(replace(REQUEST, avoid=frozenset({avoided})), NOW_S))


def test_a_gap_is_named() -> None:
    with pytest.raises(NoRoute, match="10:20") as raised:
        router_with(THREE[0], THREE[2]).plan(REQUEST, NOW_S)
    assert raised.value.missing == ((10, 20),)
    assert "nobody holds 10:20" in str(raised.value)
    assert "cannot be used" not in str(raised.value)
    assert raised.value.hint


def test_a_swarm_without_the_model_says_so() -> None:
    with pytest.raises(NoRoute, match="no peer serves") as raised:
        router_with(announcement(peer(1), model=OTHER_MODEL)).plan(REQUEST, NOW_S)
    assert raised.value.missing == ((0, 30),)


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (PeerState.DRAINING, "draining"),
        (PeerState.JOINING, "joining"),
        (PeerState.PAUSED, "paused"),
        (PeerState.ONLINE, "avoided"),
    ],
)
def test_blocks_that_only_unusable_peers_hold_are_told_from_blocks_that_nobody_holds(
    state: PeerState, word: str
) -> None:
    held = announcement(peer(1), 10, 20, state=state, name="attic")
    request = replace(REQUEST, avoid=frozenset({peer(1)}) if state is PeerState.ONLINE else frozenset())
    with pytest.raises(NoRoute) as raised:
        router_with(THREE[0], held).plan(request, NOW_S)
    assert raised.value.missing == ((10, 30),)
    assert "nobody holds 20:30" in str(raised.value)
    assert f"attic (10:20, {word})" in str(raised.value)


def test_a_backed_off_holder_is_named_with_the_reason() -> None:
    router = router_with(*THREE)
    router.on_failure(peer(1), NOW_S, "connection refused")
    with pytest.raises(NoRoute, match=r"backed off for 2 s after: connection refused") as raised:
        router.plan(REQUEST, NOW_S)
    assert raised.value.missing == ((10, 20),)
    assert "nobody" not in str(raised.value)


def test_a_missing_route_tells_whether_peers_that_may_only_be_late_would_make_it_whole() -> None:
    def late(gone: int | None = None, *, avoid: frozenset[PeerId] = frozenset()) -> bool:
        router = router_with(*THREE)
        for number in (0, 1):
            router.on_failure(peer(number), NOW_S, "no answer", unreachable=True, late=number != gone)
        with pytest.raises(NoRoute) as raised:
            router.plan(replace(REQUEST, avoid=avoid), NOW_S)
        return raised.value.late

    assert late()
    assert not late(gone=1)
    assert not late(avoid=frozenset({peer(0)}))


def test_a_peer_that_says_it_paused_is_left_alone_until_it_announces_that_it_is_back() -> None:
    router = router_with(*THREE)
    assert peers_of(router.plan(REQUEST, NOW_S))[1] == peer(1)
    router.on_paused(peer(1))
    router.on_paused(peer(9))  # who is not known
    router.on_announcements([THREE[1]], NOW_S)  # the record of before, read again
    with pytest.raises(NoRoute, match=r"\(10:20, paused\)"):
        router.plan(REQUEST, NOW_S)
    router.on_announcements([replace(THREE[1], sequence=2)], NOW_S)
    assert peers_of(router.plan(REQUEST, NOW_S))[1] == peer(1)


def test_of_two_peers_with_equal_claims_the_one_with_less_bandwidth_gets_no_prompt() -> None:
    capped = replace(THREE[1], max_bytes_per_s=200_000)
    spare = announcement(peer(3), 10, 20, decode_s_per_block=0.0015)
    router = router_with(THREE[0], capped, THREE[2], spare)
    prompt = replace(REQUEST, tokens=256, bytes_per_token=2304)
    assert peers_of(router.plan(prompt, NOW_S))[1] == peer(3)
    assert peers_of(router.plan(replace(REQUEST, bytes_per_token=10), NOW_S))[1] == peer(1)


def test_a_peer_with_a_slow_uplink_gets_no_prompt_to_push_on_and_is_used_for_single_positions() -> None:
    slow = replace(THREE[1], uplink_bytes_per_s=2**18)
    spare = announcement(peer(3), 10, 20, decode_s_per_block=0.0015)
    router = router_with(THREE[0], slow, THREE[2], spare)
    prompt = replace(REQUEST, tokens=256, back_tokens=1, bytes_per_token=2304)
    assert peers_of(router.plan(prompt, NOW_S))[1] == peer(3)
    assert peers_of(router.plan(replace(REQUEST, bytes_per_token=10), NOW_S))[1] == peer(1)
    (_, middle, _) = router.explain(prompt, NOW_S).options
    assert [one.uplink_bytes_per_s for one in middle] == [0, 2**18]
    assert middle[1].trip_s - middle[0].trip_s == pytest.approx(256 * 2304 * (1 / 2**18 - 1 / 12.5e6))


def test_a_slow_uplink_does_not_matter_at_the_last_hop_unless_everything_comes_back() -> None:
    slow = replace(THREE[2], uplink_bytes_per_s=2**18)
    spare = announcement(peer(3), 20, 30, decode_s_per_block=0.0015)
    router = router_with(*THREE[:2], slow, spare)
    prompt = replace(REQUEST, tokens=256, back_tokens=1, bytes_per_token=230)
    assert peers_of(router.plan(prompt, NOW_S))[2] == peer(2)
    assert peers_of(router.plan(replace(prompt, back_tokens=None), NOW_S))[2] == peer(3)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 10), st.integers(1, 5), st.integers(0, 24)),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 11),
    st.integers(1, 24),
    st.sampled_from([None, 1]),
)
def test_more_uplink_makes_no_route_dearer(
    sayings: list[tuple[int, int, int, int]], index: int, steps: int, back_tokens: int | None
) -> None:
    said = [
        announcement(
            peer(n), start, min(10, start + length), num_blocks=10, decode_s_per_block=decode_s / 100,
            uplink_bytes_per_s=2**uplink if uplink else 0,
        )
        for n, (start, length, decode_s, uplink) in enumerate(sayings)
    ]  # fmt: skip
    request = replace(REQUEST, num_blocks=10, tokens=100, back_tokens=back_tokens, bytes_per_token=1000)
    index %= len(said)
    uplink = said[index].uplink_bytes_per_s
    wider = [*said[:index], replace(said[index], uplink_bytes_per_s=2**steps * uplink), *said[index + 1 :]]
    routers = router_with(*said), router_with(*wider)
    for router in routers:  # of strangers that are alike only the fastest over all of its blocks is looked at
        for n in range(len(said)):
            router.on_rtt(peer(n), 0.02, NOW_S)
    try:
        dearer_s = routers[0].plan(request, NOW_S).cost_s
    except NoRoute:
        return
    assert routers[1].plan(request, NOW_S).cost_s <= dearer_s * (1 + 1e-9)


def test_the_message_stays_short_however_many_peers_are_unusable() -> None:
    many = [announcement(peer(n), state=PeerState.JOINING) for n in range(500)]
    with pytest.raises(NoRoute) as raised:
        router_with(*many).plan(REQUEST, NOW_S)
    assert len(str(raised.value)) < 500


def test_a_peer_without_an_address_is_not_used() -> None:
    with pytest.raises(NoRoute, match="without an address"):
        router_with(THREE[0], announcement(peer(1), 10, 20, addresses=()), THREE[2]).plan(REQUEST, NOW_S)


def test_a_peer_that_claims_another_number_of_blocks_is_ignored() -> None:
    with pytest.raises(NoRoute, match="nobody holds 10:20"):
        router_with(THREE[0], announcement(peer(1), 10, 20, num_blocks=31), THREE[2]).plan(REQUEST, NOW_S)


def test_busy_peers_serve_only_where_nobody_else_does() -> None:
    router = router_with(*THREE, announcement(peer(3), 10, 20, decode_s_per_block=1.0))
    router.on_busy(peer(1), 2.0, NOW_S)
    assert peers_of(router.plan(REQUEST, NOW_S))[1] == peer(3)
    assert peers_of(router.plan(REQUEST, NOW_S + 2))[1] == peer(1)
    router.on_busy(peer(0), 2.0, NOW_S)
    route = router.plan(REQUEST, NOW_S)
    assert peers_of(route)[0] == peer(0)
    assert route.cost_s < 100


def test_a_route_enters_as_few_peers_without_room_for_the_session_as_it_can() -> None:
    cramped = announcement(peer(1), 10, 20, free_tokens=100)
    slow = announcement(peer(3), 12, 20, decode_s_per_block=1.0)
    router = router_with(THREE[0], cramped, slow, THREE[2])
    needs_room = replace(REQUEST, cache_tokens=101)
    # Blocks 10 and 11 are nowhere else: once entered, the cramped peer may as well serve its whole span.
    assert peers_of(router.plan(needs_room, NOW_S)) == [peer(0), peer(1), peer(2)]
    router.on_announcements([announcement(peer(4), 10, 12, decode_s_per_block=1.0)], NOW_S)
    assert peers_of(router.plan(needs_room, NOW_S)) == [peer(0), peer(4), peer(3), peer(2)]
    assert peers_of(router.plan(replace(REQUEST, cache_tokens=100), NOW_S)) == [peer(0), peer(1), peer(2)]


def test_peers_that_can_hold_what_a_session_may_come_to_need_are_preferred_and_else_those_that_can_now() -> None:
    small = announcement(peer(1), 10, 20, free_tokens=10, decode_s_per_block=0.0001)
    middle = announcement(peer(3), 10, 20, free_tokens=100)
    large = announcement(peer(4), 10, 20, free_tokens=4010, decode_s_per_block=1.0)
    router = router_with(THREE[0], small, middle, large, THREE[2])
    for now, later, best in ((10, 0, 1), (10, 50, 3), (10, 4010, 4), (10, 9000, 1), (50, 9000, 3), (101, 9000, 4)):
        request = replace(REQUEST, cache_tokens=now, expected_tokens=later)
        assert peers_of(router.plan(request, NOW_S))[1] == peer(best), (now, later)


def test_where_nobody_has_room_for_what_may_come_the_fastest_are_taken_and_not_the_fewest() -> None:
    fast = [replace(a, free_tokens=500) for a in THREE]
    whole = announcement(peer(5), 0, 30, free_tokens=500, decode_s_per_block=1.0)
    router = router_with(*fast, whole)
    request = replace(REQUEST, cache_tokens=100, expected_tokens=4000)
    assert peers_of(router.plan(request, NOW_S)) == [peer(0), peer(1), peer(2)]
    spread = replace(request, spread=0.5, session="one")
    assert peers_of(router.plan(spread, NOW_S)) == peers_of(router.plan(replace(spread, expected_tokens=0), NOW_S))


def test_who_can_be_replaced_is_told_by_peers_that_have_room_and_time() -> None:
    second = announcement(peer(4), 10, 20)
    router = router_with(*THREE, second)
    request = replace(REQUEST, cache_tokens=100)
    request = replace(request, previous=router.plan(replace(request, avoid=frozenset({peer(4)})), NOW_S))
    assert router.replaceable(request, {peer(1)}, NOW_S)
    assert not router.replaceable(request, {peer(0)}, NOW_S)
    router.on_busy(peer(4), 10.0, NOW_S)
    assert not router.replaceable(request, {peer(1)}, NOW_S)
    router.on_announcements([replace(second, free_tokens=99, sequence=second.sequence + 1)], NOW_S + 11)
    assert not router.replaceable(request, {peer(1)}, NOW_S + 11)


def test_a_session_does_not_leave_a_peer_because_its_own_cache_filled_it() -> None:
    router = router_with(
        THREE[0], announcement(peer(1), 10, 20, free_tokens=0), announcement(peer(3), 10, 20), THREE[2]
    )
    request = replace(REQUEST, cache_tokens=100)
    previous = Route(
        hops=tuple(Hop(peer_id=peer(n), span=THREE[n].spans.parts[0], addresses=THREE[n].addresses) for n in range(3)),
        cost_s=1.0,
    )
    assert peers_of(router.plan(request, NOW_S))[1] == peer(3)
    assert peers_of(router.plan(replace(request, previous=previous), NOW_S))[1] == peer(1)


def test_the_previous_route_stays_unless_another_is_clearly_better() -> None:
    router = router_with(announcement(peer(1), 0, 30), announcement(peer(2), 0, 30))
    router.on_rtt(peer(1), 0.100, NOW_S)
    router.on_rtt(peer(2), 0.200, NOW_S)
    first = router.plan(REQUEST, NOW_S)
    assert peers_of(first) == [peer(1)]

    router.on_rtt(peer(2), 0.0, NOW_S)
    for _ in range(100):
        held = router.plan(replace(REQUEST, previous=first), NOW_S)
        fresh = router.plan(REQUEST, NOW_S)
        if held.hops != first.hops:
            break
        assert fresh.cost_s > (1 - HYSTERESIS) * first.cost_s
        router.on_rtt(peer(2), 0.0, NOW_S)
    assert held.hops == fresh.hops != first.hops
    assert fresh.cost_s <= (1 - HYSTERESIS) * first.cost_s


def test_a_kept_route_carries_fresh_addresses_and_cost() -> None:
    router = router_with(*THREE)
    previous = router.plan(REQUEST, NOW_S)
    moved = replace(THREE[1], sequence=2, addresses=(f"/ip4/198.51.100.9/tcp/9/p2p/{peer(1)}",))
    router.on_announcements([moved], NOW_S)
    router.on_rtt(peer(0), 0.001, NOW_S)
    kept = router.plan(replace(REQUEST, previous=previous), NOW_S)
    assert kept.hops[1].addresses == moved.addresses
    assert kept.cost_s < previous.cost_s


@pytest.mark.parametrize("loss", ["draining", "paused", "shrunk", "expired", "failed", "avoided"])
def test_a_previous_route_that_lost_a_hop_is_not_kept(loss: str) -> None:
    spare = announcement(peer(3), 10, 20, decode_s_per_block=1.0)
    router = router_with(*THREE, spare)
    previous = router.plan(REQUEST, NOW_S)
    assert peers_of(previous)[1] == peer(1)
    request, now_s = replace(REQUEST, previous=previous), NOW_S
    if loss == "draining":
        router.on_announcements([replace(THREE[1], sequence=2, state=PeerState.DRAINING)], NOW_S)
    elif loss == "paused":
        router.on_announcements([replace(THREE[1], sequence=2, state=PeerState.PAUSED)], NOW_S)
    elif loss == "shrunk":
        router.on_announcements([announcement(peer(1), 12, 20, sequence=2)], NOW_S)
        request = replace(request, avoid=frozenset({peer(0)}))
        router.on_announcements([announcement(peer(4), 0, 10)], NOW_S)
    elif loss == "expired":
        now_s += 21
        renewed = [replace(a, sequence=2, expires_at_s=now_s + 20) for a in (THREE[0], THREE[2], spare)]
        router.on_announcements(renewed, now_s)
    elif loss == "failed":
        router.on_failure(peer(1), NOW_S, "died")
    else:
        request = replace(request, avoid=frozenset({peer(1)}))
    route = router.plan(request, now_s)
    assert route.hops != previous.hops
    assert peer(3) in peers_of(route)


def test_where_a_route_lost_a_hop_its_other_peers_stay_unless_others_are_clearly_better() -> None:
    spares = [announcement(peer(n), start, start + 10) for n, start in ((3, 0), (4, 10), (5, 20))]
    router = router_with(*THREE, *spares)
    for number in range(6):
        router.on_rtt(peer(number), 0.100 if number < 3 else 0.110, NOW_S)
    previous = router.plan(REQUEST, NOW_S)
    assert peers_of(previous) == [peer(0), peer(1), peer(2)]
    for number in (3, 5):
        for _ in range(100):
            router.on_rtt(peer(number), 0.090, NOW_S)
    router.on_failure(peer(1), NOW_S, "died")
    request = replace(REQUEST, previous=previous)
    assert peers_of(router.plan(REQUEST, NOW_S)) == [peer(3), peer(4), peer(5)]
    kept = router.plan(request, NOW_S)
    assert peers_of(kept) == [peer(0), peer(4), peer(2)]
    assert kept.cost_s > router.plan(REQUEST, NOW_S).cost_s, "the true cost, not the one that was compared"
    for _ in range(100):
        router.on_rtt(peer(3), 0.010, NOW_S)
    assert peers_of(router.plan(request, NOW_S)) == [peer(3), peer(4), peer(2)]


SAYINGS = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 9), st.integers(1, 10), st.sampled_from(PeerState), st.integers(0, 3)),
    max_size=25,
)
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["rtt", "step", "failure", "busy", "paused", "success"]), st.integers(0, 8), st.floats(0, 2)
    ),
    max_size=25,
)


@given(SAYINGS, EVENTS, st.frozensets(st.integers(0, 8), max_size=4), st.randoms(use_true_random=False))
def test_whatever_happens_a_plan_covers_each_block_once_with_usable_peers_or_names_what_is_missing(
    sayings: list[tuple[int, int, int, PeerState, int]],
    events: list[tuple[str, int, float]],
    avoided: frozenset[int],
    rng: random.Random,
) -> None:
    said = [
        announcement(peer(n), start, min(10, start + length), num_blocks=10, state=state, sequence=i, free_tokens=room)
        for i, (n, start, length, state, room) in enumerate(sayings)
    ]

    def build(announcements: list[Announcement]) -> Router:
        router = router_with(*announcements)
        for event, number, amount in events:
            if event == "rtt":
                router.on_rtt(peer(number), amount, NOW_S)
            elif event == "step":
                router.on_step(peer(number), 3, 1, amount, amount / 3, NOW_S)
            elif event == "failure":
                router.on_failure(peer(number), NOW_S, "died")
            elif event == "busy":
                router.on_busy(peer(number), amount, NOW_S)
            elif event == "paused":
                router.on_paused(peer(number))
            else:
                router.on_success(peer(number), NOW_S)
        return router

    request = replace(REQUEST, num_blocks=10, cache_tokens=2, avoid=frozenset(map(peer, avoided)))
    live = {a.peer_id: a for a in said}
    paused = {peer(number) for event, number, _ in events if event == "paused"}
    try:
        route = build(said).plan(request, NOW_S)
    except NoRoute:
        with pytest.raises(NoRoute) as raised:
            build(rng.sample(said, len(said))).plan(request, NOW_S)
        missing = {block for start, end in raised.value.missing for block in range(start, end)}
        assert missing
        online = [a for a in live.values() if a.state is PeerState.ONLINE]
        assert missing >= {block for block in range(10) if not any(block in span for a in online for span in a.spans)}
        return
    assert [block for hop in route.hops for block in hop.span] == list(range(10))
    for hop in route.hops:
        assert live[hop.peer_id].spans.covers(hop.span)
        assert live[hop.peer_id].state is PeerState.ONLINE
        assert hop.peer_id not in request.avoid | paused
    # The same events in another order of announcements give the same route, and the route survives its own hysteresis.
    assert build(rng.sample(said, len(said))).plan(request, NOW_S) == route
    assert build(said).plan(replace(request, previous=route), NOW_S).hops == route.hops


@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.integers(1, 10),
            st.integers(0, 5),
            st.integers(0, 2),
            st.sampled_from([0, 500, 10**9]),
        ),
        min_size=1,
        max_size=25,
    ),
    st.integers(1, 3),
)
def test_strangers_that_are_not_priced_would_not_have_made_a_route_cheaper(
    sayings: list[tuple[int, int, int, int, int]], tokens: int
) -> None:
    said = [
        announcement(
            peer(n), start, min(10, start + length), num_blocks=10,
            decode_s_per_block=float(decode_s), prefill_s_per_token_block=float(prefill_s), max_bytes_per_s=cap,
        )
        for n, (start, length, decode_s, prefill_s, cap) in enumerate(sayings)
    ]  # fmt: skip
    nobody_measured = Estimates()
    priced = [
        Candidate(a.peer_id, span, hop_cost(estimate, tokens=tokens, bytes_per_token=1000, back_tokens=1))
        for a, estimate in ((a, nobody_measured.of(a, NOW_S)) for a in said)
        for span in a.spans
    ]
    cheapest = cheapest_path(priced, 10)
    request = replace(REQUEST, num_blocks=10, tokens=tokens, back_tokens=1, bytes_per_token=1000)
    if cheapest is None:
        with pytest.raises(NoRoute):
            router_with(*said).plan(request, NOW_S)
    else:
        assert router_with(*said).plan(request, NOW_S).cost_s == pytest.approx(cheapest.cost_s)


def calls(run: Callable[[], object]) -> int:
    """Of any function, those of C included."""
    count = 0

    def note(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_a_plan_does_next_to_nothing_for_each_of_ten_thousand_unlike_peers_by_itself() -> None:
    rng = random.Random(0)
    router = Router()
    starts = [rng.randrange(80) for _ in range(10_000)]
    router.on_announcements(
        [
            announcement(
                peer(n), start, rng.randint(start + 1, 80), num_blocks=80,
                decode_s_per_block=rng.uniform(0.5e-3, 5e-3), sessions=rng.randrange(9), queue_s=rng.uniform(0, 0.05),
                uplink_bytes_per_s=2 ** rng.randrange(17, 24),
                place=Coordinate(rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), 0.002, 0.2),
            )
            for n, start in enumerate(starts)
        ],
        NOW_S,
    )  # fmt: skip
    for n in range(50):
        router.on_rtt(peer(n), rng.uniform(0.01, 0.2), NOW_S)
    request = replace(REQUEST, num_blocks=80, spread=0.3)
    # One by one they would take 387,000 and 201,000.
    assert calls(lambda: router.plan(request, NOW_S)) < 80_000
    assert calls(lambda: router.plan(replace(request, spread=0.8), NOW_S)) < 50_000


def test_the_snapshot_and_the_measured_round_trip_are_there_for_status() -> None:
    router = router_with(*THREE)
    router.on_rtt(peer(1), 0.02, NOW_S)
    assert len(router.snapshot(NOW_S).of_model(MODEL)) == 3
    assert router.rtt_s(peer(1), NOW_S) == pytest.approx(0.02)
    assert router.rtt_s(peer(2), NOW_S) is None


def placed(number: int, start: int, end: int, x_s: float, **changes: Any) -> Announcement:
    return announcement(peer(number), start, end, place=Coordinate(x_s, 0.0, 0.001, 0.1), **changes)


def test_peers_that_are_close_to_each_other_are_entered_once_however_far_they_are_together() -> None:
    far = [placed(n, 10 * n, 10 * n + 10, 0.2) for n in range(3)]
    near = placed(3, 10, 20, 0.02)
    router = router_with(*far, near)
    for a in (*far, near):
        for _ in range(100):
            router.on_rtt(a.peer_id, 0.02 if a is near else 0.2, NOW_S)
    route = router.plan(REQUEST, NOW_S)
    assert peers_of(route) == [peer(0), peer(1), peer(2)]
    assert route.cost_s < 0.25, "once there and once back, not once for each"
    router.on_announcements([replace(a, sequence=2, place=None) for a in (*far, near)], NOW_S)
    assert peers_of(router.plan(REQUEST, NOW_S)) == [peer(0), peer(3), peer(2)], "as if every trip began here"


def test_a_peer_that_was_never_measured_is_as_far_as_its_place_says() -> None:
    router = router_with(placed(0, 0, 30, 0.30), placed(1, 0, 30, 0.02), placed(2, 0, 30, 0.0))
    for _ in range(100):
        router.on_rtt(peer(2), 0.004, NOW_S)
    assert router.here.usable
    router.on_failure(peer(2), NOW_S, "died")
    assert peers_of(router.plan(REQUEST, NOW_S)) == [peer(1)]


def test_a_claimed_place_cannot_undo_what_round_trips_rule_out() -> None:
    liar = placed(1, 15, 30, 0.1)
    router = router_with(placed(0, 0, 15, 0.1), liar, placed(2, 15, 30, 0.13))
    for number, rtt_s in ((0, 0.02), (1, 0.4), (2, 0.04)):
        router.on_rtt(peer(number), rtt_s, NOW_S)
    assert peers_of(router.plan(REQUEST, NOW_S)) == [peer(0), peer(2)]


def test_sessions_of_many_clients_spread_over_equal_strangers_in_proportion_to_what_they_carry() -> None:
    peers = [announcement(peer(n), 0, 30, prefill_s_per_token_block=0.001 * (1 if n < 5 else 3)) for n in range(10)]
    strangers = [router_with(*peers) for _ in range(200)]
    uses = Counter(
        router.plan(replace(REQUEST, spread=n / 200), NOW_S).hops[0].peer_id for n, router in enumerate(strangers)
    )
    fast, slow = ([uses[peer(n)] for n in span] for span in (range(5), range(5, 10)))
    assert max(fast) - min(fast) <= 2
    assert max(slow) - min(slow) <= 2
    assert sum(fast) == pytest.approx(200 * 22 / 30, abs=2)


def test_a_client_counts_its_own_sessions_before_any_record_does() -> None:
    quick = announcement(peer(1), 0, 30)
    slower = announcement(peer(2), 0, 30, decode_s_per_block=0.003)
    router = router_with(quick, slower)
    used = [router.plan(replace(REQUEST, spread=n / 30), NOW_S).hops[0].peer_id for n in range(150)]
    assert used[0] == peer(1)
    assert peer(2) in used, "the queue at the quick one outweighs its speed"
    router.on_announcements([replace(quick, sequence=2)], NOW_S)
    assert router.plan(REQUEST, NOW_S).hops[0].peer_id == peer(1), "a newer record has counted them"


def test_spreading_neither_leaves_the_previous_route_nor_enters_a_full_peer() -> None:
    full = announcement(peer(1), 0, 30, free_tokens=0)
    router = router_with(announcement(peer(0), 0, 30), full, announcement(peer(2), 0, 30))
    uses = {router.plan(replace(REQUEST, spread=n / 50, cache_tokens=9), NOW_S).hops[0].peer_id for n in range(50)}
    assert uses == {peer(0), peer(2)}
    for first in (router.plan(replace(REQUEST, spread=at), NOW_S) for at in (0.1, 0.9)):
        for n in range(10):
            assert router.plan(replace(REQUEST, spread=n / 10, previous=first), NOW_S).hops == first.hops


@pytest.mark.parametrize(("slower", "saves", "returns"), [(1.2, 3.5, True), (1.5, 3.5, False), (1.2, 1.0, False)])
@pytest.mark.parametrize("spread", [None, 0.3])
def test_a_prompt_returns_to_a_slower_route_that_holds_its_beginning_where_that_saves_more_than_it_costs(
    slower: float, saves: float, returns: bool, spread: float | None
) -> None:
    """Each position saved per step is 0.0001 s in each of 30 blocks, and the way for 1,152 bytes twice."""
    slow = announcement(peer(1), 0, 30, decode_s_per_block=0.001 * slower)
    router = router_with(announcement(peer(0), 0, 30), slow)
    there = router.plan(replace(REQUEST, avoid=frozenset({peer(0)})), NOW_S)
    request = replace(REQUEST, tokens=5, kept=Kept(hops=there.hops, saves=saves), spread=spread)
    assert peers_of(router.plan(request, NOW_S)) == [peer(1 if returns else 0)]
    first = router.plan(REQUEST, NOW_S)
    assert router.plan(replace(request, previous=first), NOW_S).hops == first.hops, "it is somewhere already"


def test_a_route_that_holds_a_prompt_counts_for_nothing_without_one_of_its_peers_or_where_that_has_no_room() -> None:
    router = router_with(announcement(peer(0), 0, 30), *THREE[1:], announcement(peer(3), 0, 10))
    there = router.plan(replace(REQUEST, avoid=frozenset({peer(0)})), NOW_S)
    assert len(there.hops) == 3
    request = replace(REQUEST, tokens=500, cache_tokens=600, kept=Kept(hops=there.hops, saves=490.0))
    assert router.plan(request, NOW_S).hops == there.hops
    assert peers_of(router.plan(replace(request, avoid=frozenset({peer(2)})), NOW_S)) == [peer(0)]
    router.on_announcements([replace(THREE[1], free_tokens=500, sequence=2)], NOW_S)
    assert peers_of(router.plan(request, NOW_S)) == [peer(0)]


def test_an_explanation_prices_the_route_with_each_peer_and_says_why_others_are_left_out() -> None:
    slow = announcement(peer(3), 5, 25, decode_s_per_block=0.5, name="slow")
    gone = announcement(peer(4), 10, 20, state=PeerState.DRAINING, name="gone")
    full = announcement(peer(5), 10, 20, free_tokens=0)
    router = router_with(*THREE, slow, gone, full)
    router.on_rtt(peer(1), 0.02, NOW_S)
    said = router.explain(replace(REQUEST, cache_tokens=5), NOW_S)
    assert said.route == router.plan(replace(REQUEST, cache_tokens=5), NOW_S)
    middle = said.options[1]
    assert [option.peer_id for option in middle] == [peer(1), peer(3), peer(5)]
    assert [option.chosen for option in middle] == [True, False, False]
    assert [option.measured for option in middle] == [True, False, False]
    assert middle[0].route_s == pytest.approx(said.route.cost_s)
    assert middle[1].compute_s == pytest.approx(10 * 0.5)
    assert middle[2].note == "no room for the session"
    assert said.left_out == (("gone", BlockSpans.of(BlockSpan(10, 20)), "draining"),)
    whole = sum(o.trip_s + o.queue_s + o.compute_s for hop in said.options for o in hop if o.chosen)
    assert whole == pytest.approx(said.route.cost_s)
    first, second, third = said.without
    assert (first, third) == (None, None)
    assert second is not None
    hops = (peer(0), "", BlockSpan(0, 10)), (peer(3), "slow", BlockSpan(10, 20)), (peer(2), "", BlockSpan(20, 30))
    assert second.hops == hops
    assert second.cost_s == pytest.approx(middle[1].route_s)


def test_an_explanation_names_who_holds_a_part_of_a_hop_and_what_the_route_would_take_with_it() -> None:
    late = announcement(peer(3), 18, 25, decode_s_per_block=0.5, name="late")
    inside = announcement(peer(4), 12, 15, free_tokens=0)
    gone = announcement(peer(5), 12, 15, state=PeerState.DRAINING)
    wide = replace(THREE[2], spans=BlockSpans.parse("15:30"), decode_s_per_block=0.002)
    router = router_with(*THREE[:2], wide, late, inside, gone)
    said = router.explain(replace(REQUEST, cache_tokens=5), NOW_S)
    whole = said.route.cost_s
    assert [str(hop.span) for hop in said.route.hops] == ["0:10", "10:20", "20:30"]
    first, middle, last = said.parts
    assert first == ()
    assert [(one.peer_id, str(one.covers), one.note) for one in middle] == [
        (peer(2), "15:20", ""),
        (peer(3), "18:20", ""),
        (peer(4), "12:15", "no room for the session"),
    ]
    speeds = [a.decode_s_per_block for a in (THREE[1], wide)]
    assert middle[0].route_s == pytest.approx(whole + 5 * (speeds[1] - speeds[0])), "no hop more"
    assert middle[1].route_s > whole + 2 * (0.5 - speeds[0]), "a hop more"
    assert [(one.name, str(one.covers), str(one.spans)) for one in last] == [("late", "20:25", "18:25")]


def test_a_peer_with_two_spans_is_passed_twice_and_counts_for_every_block_it_holds() -> None:
    two = announcement(peer(1), num_blocks=12, spans=BlockSpans.parse("0:4,8:12"))
    middle = announcement(peer(2), 4, 8, num_blocks=12)
    request = replace(REQUEST, num_blocks=12)
    route = router_with(two, middle).plan(request, NOW_S)
    assert [(hop.peer_id, str(hop.span)) for hop in route.hops] == [
        (peer(1), "0:4"),
        (peer(2), "4:8"),
        (peer(1), "8:12"),
    ]
    assert router_with(two, middle).plan(replace(request, previous=route), NOW_S).hops == route.hops
    with pytest.raises(NoRoute, match="4:8 are missing; nobody holds 4:8"):
        router_with(two).plan(request, NOW_S)
    with pytest.raises(NoRoute, match=r"held only by peers that cannot be used now: .* \(0:4,8:12, avoided\)"):
        router_with(two, middle).plan(replace(request, avoid=frozenset({peer(1)})), NOW_S)
    health = coverage(router_with(two, middle).snapshot(NOW_S), MODEL)
    assert health is not None
    assert health.healthy
    assert health.holders[0] == health.holders[11] == (peer(1),)
    assert str(choose_span([two], 12, 4, NOW_S)) == "4:8"


def test_a_peer_with_a_long_way_that_round_trips_do_not_show_is_gone_round() -> None:
    router = router_with(*THREE, announcement(peer(3), 10, 20))
    for number in range(4):
        router.on_rtt(peer(number), 0.200, NOW_S)
    first = router.plan(REQUEST, NOW_S)
    other = replace(first, hops=(first.hops[0], replace(first.hops[1], peer_id=peer(3)), first.hops[2]))
    assert peers_of(first)[1] == peer(1)
    for _ in range(200):
        router.on_trips(first.hops, 0.400 + 0.080, NOW_S)
        router.on_trips(other.hops, 0.400, NOW_S)
    better = router.plan(REQUEST, NOW_S)
    assert peers_of(better)[1] == peer(3)
    (_, middle, _) = router.explain(REQUEST, NOW_S).options
    assert middle[1].route_s - middle[0].route_s == pytest.approx(0.080, rel=0.3)


def test_a_large_send_tells_how_fast_the_way_is_and_the_explanation_shows_it() -> None:
    router = router_with(*THREE, announcement(peer(3), 0, 10))
    for number in range(4):
        router.on_rtt(peer(number), 0.010, NOW_S)
    router.on_transfer(peer(0), 1_000_000, 8.01, NOW_S)
    router.on_transfer(peer(3), 1_000_000, 0.09, NOW_S)
    prompt = replace(REQUEST, tokens=500)
    assert peers_of(router.plan(prompt, NOW_S))[0] == peer(3)
    (first, _, _) = router.explain(prompt, NOW_S).options
    assert [(round(one.bytes_per_s), one.bytes_measured) for one in first] == [(12_500_000, True), (125_000, True)]
    (_, _, last) = router.explain(prompt, NOW_S).options
    assert not last[0].bytes_measured

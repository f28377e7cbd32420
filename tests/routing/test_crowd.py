"""What plans share changes no plan: everything is compared with looking at everybody each time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.coordinates import Coordinate
from routing.crowd import Crowd
from routing.errors import NoRoute
from routing.ids import BlockSpan, BlockSpans
from routing.records import Announcement, PeerState
from routing.router import Router
from routing.routes import Route, RouteRequest
from tests.routing.swarms import MODEL, NOW_S, announcement, peer

BLOCKS = 6


@st.composite
def announcements(draw: st.DrawFn) -> list[Announcement]:
    said = []
    for number in range(draw(st.integers(1, 14))):
        start = draw(st.integers(0, BLOCKS - 1))
        spans = [BlockSpan(start, draw(st.integers(start + 1, BLOCKS)))]
        if start >= 2 and draw(st.booleans()):
            spans.append(BlockSpan(0, 1))
        said.append(
            announcement(
                peer(number),
                num_blocks=BLOCKS,
                spans=BlockSpans.of(*spans),
                state=draw(st.sampled_from([PeerState.ONLINE, PeerState.ONLINE, PeerState.DRAINING])),
                protocol=draw(st.sampled_from([1, 1, 2])),
                dtype=draw(st.sampled_from(["float32", "float32", "bfloat16"])),
                decode_s_per_block=draw(st.sampled_from([0.01, 0.02, 0.5])),
                prefill_s_per_token_block=draw(st.sampled_from([0.001, 0.01])),
                free_tokens=draw(st.sampled_from([0, 50, 8192])),
                sessions=draw(st.integers(0, 3)),
                queue_s=draw(st.sampled_from([0.0, 0.1])),
                max_bytes_per_s=draw(st.sampled_from([0, 1000])),
                uplink_bytes_per_s=draw(st.sampled_from([0, 2**20])),
                place=draw(
                    st.sampled_from(
                        [None, Coordinate(), Coordinate(0.0, 0.0, 0.001, 0.1), Coordinate(0.05, 0.03, 0.001, 0.1)]
                    )
                ),
            )
        )
    return said


@settings(max_examples=60)
@given(announcements(), st.integers(0, 14))
def test_who_can_be_used_is_sorted_once_and_all_who_hold_blocks_are_found(said: list[Announcement], first: int) -> None:
    crowd = Crowd(said, BLOCKS, 1, "float32")
    able = [a for a in said if (a.state, a.protocol, a.dtype) == (PeerState.ONLINE, 1, "float32")]
    assert list(crowd.able) == able
    for span in (BlockSpan(0, 1), BlockSpan(2, 5)):
        around = [*able[first:], *able[:first]]
        assert list(crowd.holders(span, first)) == [a for a in around if a.spans.covers(span)]


@settings(max_examples=60)
@given(
    announcements(),
    st.lists(st.tuples(st.integers(0, 13), st.sampled_from([0.01, 0.3]), st.booleans(), st.booleans()), max_size=8),
)
def test_plans_that_follow_each_other_are_those_of_a_router_that_looks_at_everybody_anew(
    said: list[Announcement], events: list[tuple[int, float, bool, bool]]
) -> None:
    remembering, forgetting = Router(), Router()
    routes: list[Route | None] = [None, None]
    for router in (remembering, forgetting):
        router.on_announcements(said, NOW_S)
    for number, (measured, seconds, fails, renewed) in enumerate(events):
        request = RouteRequest(
            model=MODEL, num_blocks=BLOCKS, bytes_per_token=100, cache_tokens=10, spread=number / 8, session=number
        )
        forgetting._crowds._snapshot = forgetting._spreading._known = None
        for index, router in enumerate((remembering, forgetting)):
            router.on_rtt(peer(measured), seconds, NOW_S)
            if fails:
                router.on_failure(peer(measured), NOW_S, "died")
            if renewed and measured < len(said):
                router.on_announcements([replace(said[measured], sequence=2 + number, sessions=9)], NOW_S)
            try:
                routes[index] = router.plan(replace(request, previous=routes[index]), NOW_S)
            except NoRoute:
                routes[index] = None
        assert routes[0] == routes[1]


@settings(max_examples=60)
@given(announcements(), st.integers(0, 5))
def test_the_part_of_a_route_that_another_peer_changes_is_what_it_changes(said: list[Announcement], which: int) -> None:
    router = Router()
    router.on_announcements(said, NOW_S)
    for number in range(0, 14, 2):
        router.on_rtt(peer(number), 0.01 * number, NOW_S)
    request = RouteRequest(model=MODEL, num_blocks=BLOCKS, bytes_per_token=100)
    try:
        hops = tuple((hop.peer_id, hop.span) for hop in router.plan(request, NOW_S).hops)
    except NoRoute:
        return
    view, index = router._view(request, NOW_S), which % len(hops)
    span = hops[index][1]
    for a in view.holders(span):
        other = (*hops[:index], (a.peer_id, span), *hops[index + 1 :])
        difference_s = view.compared_route_s(other) - view.compared_route_s(hops)
        part_s = view.compared_part_s(hops, index)
        assert part_s(a.peer_id) - part_s(hops[index][0]) == pytest.approx(difference_s)


@settings(max_examples=60)
@given(announcements(), st.integers(1, 3), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_what_strangers_cost_is_what_each_of_them_would_by_itself(
    said: list[Announcement], tokens: int, back_tokens: int | None, sends: bool, detoured: bool
) -> None:
    router = Router()
    router.on_announcements(said, NOW_S)
    for number in range(0, 14, 3):
        router.on_rtt(peer(number), 0.01 * number, NOW_S)
    if sends:
        router.on_transfer(peer(0), 10**6, 2.0, NOW_S)
    request = RouteRequest(
        model=MODEL,
        num_blocks=BLOCKS,
        bytes_per_token=100,
        tokens=tokens,
        back_tokens=back_tokens,
        cache_tokens=10,
        expected_tokens=100,
    )
    view = router._view(request, NOW_S)
    view.detoured = detoured
    found = view.candidates()
    candidates = [found[row] for row in range(len(found))]
    everybody = sorted((a.peer_id, a.spans) for a in view.crowd.able)
    assert [(c.peer_id, c.span) for c in candidates] == [(peer, span) for peer, spans in everybody for span in spans]
    assert [c.cost for c in candidates] == [view.compared(c.peer_id) for c in candidates]
    said_places = [view.by_peer[c.peer_id].place for c in candidates]
    places = [place if place is not None and place.usable else None for place in said_places]
    for place, cell in zip(places, found.cells, strict=True):
        assert [cell == other for other in found.cells] == [place == other for other in places]

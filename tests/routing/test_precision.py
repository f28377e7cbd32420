"""A route that demands a least precision enters nobody below it, and a gap that this makes is named so."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import CallerError, NoRoute
from routing.precision import PRECISIONS, check_precision, is_at_least, precision
from routing.records import Announcement
from routing.routes import Route, RouteRequest
from tests.routing.swarms import MODEL, NOW_S, announcement, peer
from tests.routing.test_router import router_with

BLOCKS = 6
REQUEST = RouteRequest(model=MODEL, num_blocks=BLOCKS, bytes_per_token=1152)
FORMATS = st.tuples(
    st.sampled_from(["float32", "bfloat16", "float16", "float8"]),
    st.sampled_from(["none", "int8", "int4", "nf4", "int2"]),
)


def holder(number: int, start: int, end: int, dtype: str = "float32", quantization: str = "none") -> Announcement:
    return announcement(peer(number), start, end, num_blocks=BLOCKS, dtype=dtype, quantization=quantization)


@st.composite
def holders(draw: st.DrawFn) -> list[Announcement]:
    spans = draw(st.lists(st.sampled_from(list(combinations(range(BLOCKS + 1), 2))), max_size=12))
    return [holder(number, *span, *draw(FORMATS)) for number, span in enumerate(spans)]


def planned(swarm: list[Announcement], request: RouteRequest) -> Route | NoRoute:
    try:
        return router_with(*swarm).plan(request, NOW_S)
    except NoRoute as error:
        return error


@given(holders(), st.sampled_from(PRECISIONS))
def test_a_route_is_that_of_a_swarm_without_the_imprecise(swarm: list[Announcement], least: str) -> None:
    demanding = replace(REQUEST, min_precision=least)
    found = planned(swarm, demanding)
    expected = planned([a for a in swarm if is_at_least(a.dtype, a.quantization, least)], REQUEST)
    if isinstance(expected, NoRoute):
        assert isinstance(found, NoRoute)
        assert found.missing == expected.missing
        missing = {block for start, end in found.missing for block in range(start, end)}
        held = {block for a in swarm for span in a.spans for block in span}
        assert ("below the demanded precision" in str(found)) == bool(missing & held)
    else:
        assert found == expected
        later = router_with(*swarm).plan(replace(demanding, previous=router_with(*swarm).plan(REQUEST, NOW_S)), NOW_S)
        assert all(is_at_least(hop.dtype, hop.quantization, least) for hop in later.hops)


def test_a_block_that_only_an_imprecise_peer_serves_is_named() -> None:
    router = router_with(holder(1, 0, 3), holder(2, 3, 4, quantization="int4"), holder(3, 4, 6))
    with pytest.raises(NoRoute, match="block 3 is served only below the demanded precision, int8") as raised:
        router.plan(replace(REQUEST, min_precision="int8"), NOW_S)
    assert raised.value.missing == ((3, 4),)
    assert "(3:4, computes in int4)" in str(raised.value)
    assert "--min-precision" in raised.value.hint
    assert "nobody holds" not in str(raised.value)
    assert len(router.plan(replace(REQUEST, min_precision="int4"), NOW_S).hops) == 3


def test_what_nobody_holds_is_told_from_what_is_held_imprecisely() -> None:
    router = router_with(holder(1, 0, 2, "bfloat16"), holder(2, 2, 4))
    with pytest.raises(NoRoute) as raised:
        router.plan(replace(REQUEST, min_precision="float32"), NOW_S)
    assert raised.value.missing == ((0, 2), (4, 6))
    assert "nobody holds 4:6" in str(raised.value)
    assert "blocks 0:2 are served only below" in str(raised.value)


@given(FORMATS, FORMATS)
def test_precisions_are_in_one_order(a: tuple[str, str], b: tuple[str, str]) -> None:
    known = [name for name in (precision(*a), precision(*b)) if name in PRECISIONS]
    for least in PRECISIONS:
        assert is_at_least(*a, None)
        if len(known) == 2 and PRECISIONS.index(known[0]) <= PRECISIONS.index(known[1]) and is_at_least(*a, least):
            assert is_at_least(*b, least)
    assert is_at_least(*a, "nf4") == (precision(*a) in PRECISIONS)


def test_quantized_weights_are_what_limits_a_peer() -> None:
    assert not is_at_least("float32", "int8", "bfloat16")
    assert is_at_least("bfloat16", "int8", "int8")
    assert is_at_least("bfloat16", "none", "int8")


def test_a_precision_that_nobody_knows_is_refused() -> None:
    with pytest.raises(CallerError, match="int3") as caught:
        check_precision("int3")
    assert "nf4, int4, int8" in caught.value.hint

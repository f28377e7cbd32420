from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from peers.runtime.sizing import SESSIONS_MAX, TOKENS_MIN, USEFUL_TOKENS, Request, Share, Sizes, divide

GIB = 1 << 30
SIZES = st.builds(
    Sizes,
    block_bytes=st.integers(1, 4 * GIB),
    token_bytes=st.integers(1, 1 << 20),
    process_bytes=st.integers(0, GIB),
    forward_bytes=st.integers(0, 4 * GIB),
)
REQUESTS = st.builds(
    Request,
    limits_bytes=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=3).map(tuple),
    sizes=SIZES,
    num_blocks=st.integers(1, 200),
    max_positions=st.integers(16, 1 << 30),
    blocks=st.none() | st.integers(1, 200),
    cache_tokens=st.none() | st.integers(16, 1 << 20),
).map(lambda request: replace(request, blocks=request.blocks and min(request.blocks, request.num_blocks)))


def most_of(request: Request) -> int:
    return request.cache_tokens or SESSIONS_MAX * request.max_positions


@given(REQUESTS)
def test_a_share_is_within_the_limits_or_the_least_that_was_asked_for(request: Request) -> None:
    share, most = divide(request), most_of(request)
    blocks = sum(share.blocks)
    assert len(share.blocks) == len(request.limits_bytes)
    assert 1 <= blocks <= request.num_blocks
    assert request.blocks in (None, blocks)
    assert request.cache_tokens in (None, share.cache_tokens)
    least = request.cache_tokens or min(TOKENS_MIN, most)
    assert least <= share.cache_tokens <= most
    assert share.fits(request) or (blocks, share.cache_tokens) == (request.blocks or 1, least)


@given(REQUESTS)
def test_nothing_useful_is_left_over(request: Request) -> None:
    share, most = divide(request), most_of(request)
    if not share.fits(request):
        return
    if share.cache_tokens < most:  # not one more position would fit
        assert not replace(share, cache_tokens=share.cache_tokens + 1).fits(request)
    if request.blocks is None and sum(share.blocks) < request.num_blocks:  # nor one more block with a useful cache
        useful = request.cache_tokens or min(USEFUL_TOKENS, most)
        for device in range(len(share.blocks)):
            more = tuple(count + (index == device) for index, count in enumerate(share.blocks))
            assert not Share(blocks=more, cache_tokens=useful).fits(request)


@given(REQUESTS, st.data())
def test_no_block_on_another_device_would_leave_more_cache(request: Request, data: st.DataObject) -> None:
    share = divide(request)
    source, target = (data.draw(st.integers(0, len(share.blocks) - 1)) for _ in range(2))
    if share.fits(request) and share.blocks[source] and share.cache_tokens < most_of(request):
        moved = tuple(count + (index == target) - (index == source) for index, count in enumerate(share.blocks))
        assert not Share(blocks=moved, cache_tokens=share.cache_tokens + 1).fits(request)


@given(REQUESTS, st.integers(0, 1 << 40))
def test_with_more_memory_a_peer_never_takes_fewer_blocks(request: Request, more_bytes: int) -> None:
    roomier = replace(request, limits_bytes=tuple(limit + more_bytes for limit in request.limits_bytes))
    assert sum(divide(roomier).blocks) >= sum(divide(request).blocks)

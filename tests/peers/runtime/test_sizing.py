from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from peers.runtime.sizing import SESSIONS_MAX, TOKENS_MIN, Request, Share, Sizes, divide

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
    windows=st.lists(st.none() | st.integers(1, 5000), min_size=1, max_size=6).map(tuple),
    blocks=st.none() | st.integers(1, 200),
    cache_tokens=st.none() | st.integers(16, 1 << 20),
).map(lambda request: replace(request, blocks=request.blocks and min(request.blocks, request.num_blocks)))


def most_of(request: Request) -> int:
    return request.cache_tokens or SESSIONS_MAX * request.weight(request.max_positions)


@given(REQUESTS)
def test_a_share_is_within_the_limits_or_the_least_that_was_asked_for(request: Request) -> None:
    share, most = divide(request), most_of(request)
    blocks = sum(share.blocks)
    assert len(share.blocks) == len(request.limits_bytes)
    assert 1 <= blocks <= request.num_blocks
    assert request.blocks in (None, blocks)
    assert request.cache_tokens in (None, share.cache_tokens)
    least = request.cache_tokens or min(request.weight(TOKENS_MIN), most)
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
        useful = request.cache_tokens or min(8 * request.weight(TOKENS_MIN), most)
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


def test_a_session_weighs_what_its_blocks_keep_of_it() -> None:
    def weight(windows: tuple[int | None, ...], tokens: int, shares: tuple[int, ...] = ()) -> int:
        sizes = Sizes(block_bytes=1, token_bytes=1, process_bytes=0, forward_bytes=0)
        request = Request(limits_bytes=(1,), sizes=sizes, num_blocks=6, max_positions=1, windows=windows, shares=shares)
        return request.weight(tokens)

    assert weight((None,) * 6, 5000) == 5000
    assert weight((128,) * 6, 5000) == 448
    assert weight((128,) * 6, 100) == 100
    assert weight((512, 512, 512, 512, 512, None), 5000) == (5 * 832 + 5000 + 5) // 6
    assert weight((512, None), 5000, shares=(2, 1)) == (2 * 832 + 5000 + 2) // 3, "one of them stores twice as much"

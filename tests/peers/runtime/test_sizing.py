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
    limit_bytes=st.integers(0, 1 << 40),
    sizes=SIZES,
    num_blocks=st.integers(1, 200),
    max_positions=st.integers(16, 1 << 30),
    blocks=st.none() | st.integers(1, 200),
    cache_tokens=st.none() | st.integers(16, 1 << 20),
).map(lambda request: replace(request, blocks=request.blocks and min(request.blocks, request.num_blocks)))


def most_of(request: Request) -> int:
    return request.cache_tokens or SESSIONS_MAX * request.max_positions


@given(REQUESTS)
def test_a_share_is_within_the_limit_or_the_least_that_was_asked_for(request: Request) -> None:
    share, most = divide(request), most_of(request)
    assert 1 <= share.blocks <= request.num_blocks
    assert request.blocks in (None, share.blocks)
    assert request.cache_tokens in (None, share.cache_tokens)
    least = request.cache_tokens or min(TOKENS_MIN, most)
    assert least <= share.cache_tokens <= most
    fits = share.num_bytes(request.sizes) <= request.limit_bytes
    assert fits or (share.blocks, share.cache_tokens) == (request.blocks or 1, least)


@given(REQUESTS)
def test_nothing_useful_is_left_over(request: Request) -> None:
    share, most = divide(request), most_of(request)
    if share.num_bytes(request.sizes) > request.limit_bytes:
        return
    if share.cache_tokens < most:  # not one more position would fit
        more = replace(share, cache_tokens=share.cache_tokens + 1)
        assert more.num_bytes(request.sizes) > request.limit_bytes
    if request.blocks is None and share.blocks < request.num_blocks:  # nor one more block with a cache worth having
        more = Share(blocks=share.blocks + 1, cache_tokens=request.cache_tokens or min(USEFUL_TOKENS, most))
        assert more.num_bytes(request.sizes) > request.limit_bytes


@given(REQUESTS, st.integers(0, 1 << 40))
def test_with_more_memory_a_peer_never_takes_fewer_blocks(request: Request, more_bytes: int) -> None:
    roomier = replace(request, limit_bytes=request.limit_bytes + more_bytes)
    assert divide(roomier).blocks >= divide(request).blocks

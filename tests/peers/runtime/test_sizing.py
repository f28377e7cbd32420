from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peers.runtime.sizing import SESSIONS_MAX, TOKENS_MIN, USEFUL_TOKENS, Share, Sizes, divide

GIB = 1 << 30
SIZES = st.builds(
    Sizes,
    block_bytes=st.integers(1, 4 * GIB),
    token_bytes=st.integers(1, 1 << 20),
    headroom_bytes=st.integers(0, 4 * GIB),
)
MODEL = {"num_blocks": st.integers(1, 200), "max_positions": st.integers(16, 1 << 30)}
ASKED = {
    "blocks": st.none() | st.integers(1, 200),
    "cache_tokens": st.none() | st.integers(16, 1 << 20),
}


@given(limit=st.integers(0, 1 << 40), sizes=SIZES, **MODEL, **ASKED)
def test_a_share_is_within_the_limit_or_the_least_that_was_asked_for(
    limit: int, sizes: Sizes, num_blocks: int, max_positions: int, blocks: int | None, cache_tokens: int | None
) -> None:
    blocks = blocks and min(blocks, num_blocks)
    share = divide(
        limit, sizes, num_blocks=num_blocks, max_positions=max_positions, blocks=blocks, cache_tokens=cache_tokens
    )
    assert 1 <= share.blocks <= num_blocks
    assert blocks in (None, share.blocks)
    assert cache_tokens in (None, share.cache_tokens)
    least = cache_tokens or min(TOKENS_MIN, SESSIONS_MAX * max_positions)
    assert least <= share.cache_tokens <= (cache_tokens or SESSIONS_MAX * max_positions)
    fits = share.num_bytes(sizes) <= limit
    assert fits or (share.blocks, share.cache_tokens) == (blocks or 1, least)


@given(limit=st.integers(0, 1 << 40), sizes=SIZES, **MODEL, **ASKED)
def test_nothing_useful_is_left_over(
    limit: int, sizes: Sizes, num_blocks: int, max_positions: int, blocks: int | None, cache_tokens: int | None
) -> None:
    blocks = blocks and min(blocks, num_blocks)
    share = divide(
        limit, sizes, num_blocks=num_blocks, max_positions=max_positions, blocks=blocks, cache_tokens=cache_tokens
    )
    if share.num_bytes(sizes) > limit:
        return
    most = cache_tokens or SESSIONS_MAX * max_positions
    if share.cache_tokens < most:  # not one more position would fit
        assert Share(blocks=share.blocks, cache_tokens=share.cache_tokens + 1).num_bytes(sizes) > limit
    if blocks is None and share.blocks < num_blocks:  # nor one more block with a cache worth having
        useful = cache_tokens or min(USEFUL_TOKENS, most)
        assert Share(blocks=share.blocks + 1, cache_tokens=useful).num_bytes(sizes) > limit

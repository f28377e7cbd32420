from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from peers.runtime.sizing import SESSIONS_MAX, TOKENS_MIN, Request, Share, Sizes, divide
from routing.ids import MAX_SPANS, BlockSpan, BlockSpans

GIB = 1 << 30


def spans_of(blocks: Iterable[int]) -> BlockSpans:
    return BlockSpans.of(*(BlockSpan(block, block + 1) for block in blocks))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    kinds = st.tuples(st.integers(1, 1 << 20), st.none() | st.integers(1, 5000))
    blocks = draw(st.lists(st.sampled_from(draw(st.lists(kinds, min_size=1, max_size=3))), min_size=1, max_size=60))
    first, count = draw(st.integers(0, len(blocks) - 1)), draw(st.integers(1, len(blocks)))
    some = BlockSpan(first, min(len(blocks), first + count))
    asked: list[BlockSpans | int | None] = [None, count, BlockSpans.of(some), spans_of([*some][::2][:MAX_SPANS])]
    return Request(
        limits_bytes=tuple(draw(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=3))),
        sizes=Sizes(
            block_bytes=draw(st.integers(1, 4 * GIB)),
            token_bytes=tuple(token_bytes for token_bytes, _ in blocks),
            process_bytes=draw(st.integers(0, GIB)),
            forward_bytes=draw(st.integers(0, 4 * GIB)),
        ),
        max_positions=draw(st.integers(16, 1 << 30)),
        windows=tuple(window for _, window in blocks),
        blocks=draw(st.sampled_from(asked)),
        cache_tokens=draw(st.none() | st.integers(16, 1 << 20)),
    )


REQUESTS = requests()


def asked_of(request: Request) -> int | None:
    return request.blocks.num_blocks if isinstance(request.blocks, BlockSpans) else request.blocks


def most_of(request: Request) -> int:
    return request.cache_tokens or SESSIONS_MAX * request.weight(request.max_positions)


@given(REQUESTS)
def test_a_share_is_within_the_limits_or_the_least_that_was_asked_for(request: Request) -> None:
    share, most = divide(request), most_of(request)
    blocks = sum(share.blocks)
    assert len(share.blocks) == len(request.limits_bytes)
    assert 1 <= blocks <= len(request.windows)
    assert asked_of(request) in (None, blocks)
    assert request.cache_tokens in (None, share.cache_tokens)
    least = request.cache_tokens or min(request.weight(TOKENS_MIN), most)
    assert least <= share.cache_tokens <= most
    assert share.fits(request) or (blocks, share.cache_tokens) == (asked_of(request) or 1, least)


@given(REQUESTS)
def test_nothing_useful_is_left_over(request: Request) -> None:
    share, most = divide(request), most_of(request)
    if not share.fits(request):
        return
    if share.cache_tokens < most:  # not one more position would fit
        assert not replace(share, cache_tokens=share.cache_tokens + 1).fits(request)
    if request.blocks is None and sum(share.blocks) < len(request.windows):  # nor one more block with a useful cache
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


@given(REQUESTS, st.data())
def test_what_fits_whichever_blocks_it_will_be_fits_when_it_is_known_and_leaves_as_much_cache_or_more(
    request: Request, data: st.DataObject
) -> None:
    share = divide(request)
    if isinstance(request.blocks, BlockSpans) or not share.fits(request):
        return
    count = sum(share.blocks)
    start = data.draw(st.integers(0, len(request.windows) - count))
    known = divide(replace(request, blocks=BlockSpans.of(BlockSpan(start, start + count))))
    assert sum(known.blocks) == count
    assert known.cache_tokens >= share.cache_tokens


def request_of(token_bytes: tuple[int, ...], windows: tuple[int | None, ...], **options: Any) -> Request:
    sizes = Sizes(block_bytes=0, token_bytes=token_bytes, process_bytes=0, forward_bytes=0)
    return Request(limits_bytes=(60_000,), sizes=sizes, max_positions=1 << 20, windows=windows, **options)


def test_a_session_weighs_what_its_blocks_keep_of_it() -> None:
    def weight(windows: tuple[int | None, ...], tokens: int, token_bytes: tuple[int, ...] = (1,) * 6) -> int:
        return request_of(token_bytes, windows).weight(tokens)

    assert weight((None,) * 6, 5000) == 5000
    assert weight((128,) * 6, 5000) == 448
    assert weight((128,) * 6, 100) == 100
    assert weight((512, 512, 512, 512, 512, None), 5000) == (5 * 832 + 5000 + 5) // 6
    assert weight((512, None), 5000, (2, 1)) == (2 * 832 + 5000 + 2) // 3, "one of them stores twice as much"


def test_blocks_that_store_little_leave_more_cache_than_those_that_store_much() -> None:
    def cache_tokens(blocks: BlockSpans | int) -> int:
        return divide(request_of((1, 1, 8, 1, 1, 8), (None,) * 6, blocks=blocks)).cache_tokens

    assert cache_tokens(BlockSpans.parse("0:2")) == 30_000
    assert cache_tokens(BlockSpans.parse("1:3")) == cache_tokens(2) == 60_000 // 9
    assert cache_tokens(BlockSpans.parse("2:3,5:6")) == 60_000 // 16
    assert cache_tokens(6) == 3000

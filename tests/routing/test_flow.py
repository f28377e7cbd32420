from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.flow import GOLDEN, by_span, capacity, max_flow, pick, shares
from routing.ids import BlockSpan

BLOCKS = 6
SERVERS = st.lists(
    st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS), st.integers(1, 20)), min_size=1, max_size=8
).map(lambda raw: by_span((BlockSpan(start, min(BLOCKS, start + n)), float(amount)) for start, n, amount in raw))


def cut(capacities: dict[BlockSpan, float]) -> float:
    """The smallest cut: some blocks, and everybody who could serve any of them."""
    choices = itertools.chain.from_iterable(itertools.combinations(range(BLOCKS), n) for n in range(1, BLOCKS + 1))
    return min(
        sum(amount for span, amount in capacities.items() if any(block in span for block in blocks)) / len(blocks)
        for blocks in choices
    )


@given(SERVERS)
def test_the_maximum_flow_equals_the_minimum_cut(capacities: dict[BlockSpan, float]) -> None:
    assert max_flow(capacities, BLOCKS) == pytest.approx(cut(capacities), rel=1e-5, abs=1e-9)


@given(SERVERS)
def test_shares_spend_every_capacity_once_and_come_close_to_the_maximum_flow(
    capacities: dict[BlockSpan, float],
) -> None:
    flow = shares(capacities, BLOCKS)
    arriving = Counter[int]()
    for span, amount in capacities.items():
        given_away = [flow.of(span, amount, BlockSpan(block, block + 1)) for block in span]
        assert sum(given_away) == pytest.approx(amount, rel=1e-3)
        assert flow.of(span, amount, span) == pytest.approx(amount / len(span))
        for block, part in zip(span, given_away, strict=True):
            arriving[block] += part
    best = max_flow(capacities, BLOCKS)
    if best > 0:
        assert 0.8 * best <= min(arriving.values()) <= best * (1 + 1e-3)
        assert flow.tokens_per_s == pytest.approx(min(arriving.values()), rel=1e-3)


def test_a_peer_that_holds_scarce_blocks_too_is_spared_the_abundant_ones() -> None:
    capacities = {BlockSpan(0, 1): 90.0, BlockSpan(0, 2): 30.0}
    flow = shares(capacities, 2)
    first, second = BlockSpan(0, 1), BlockSpan(1, 2)
    assert flow.of(BlockSpan(0, 2), 30.0, second) > 25 > 5 > flow.of(BlockSpan(0, 2), 30.0, first)


def test_a_gap_carries_nothing_and_disturbs_nobody() -> None:
    assert max_flow({BlockSpan(0, 1): 5.0}, 2) == 0
    assert max_flow({}, 2) == 0
    assert shares({BlockSpan(0, 1): 5.0}, 2).of(BlockSpan(0, 1), 5.0, BlockSpan(0, 1)) == 5


def test_sessions_in_turn_are_dealt_in_proportion_and_interleaved() -> None:
    weights = {"a": 5.0, "b": 1.0, "c": 2.0}
    turns = [pick(weights, 0.3 + n * GOLDEN) for n in range(80)]
    assert {key: abs(count - 10 * weights[key]) <= 2 for key, count in Counter(turns).items()} == dict.fromkeys(
        "abc", True
    )
    assert max(len(list(run)) for key, run in itertools.groupby(turns) if key != "a") == 1


def test_a_batch_is_worth_more_than_its_tokens_one_by_one() -> None:
    assert capacity(0.008, 0.001) == pytest.approx(8 / 0.015)
    assert capacity(0.0, 0.0) > 0

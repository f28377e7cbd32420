from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from peers.runtime.cost import CLEARLY, LATELY, ForwardCost, Lately, Sample, fit, token_pasts

PARTS = st.floats(1e-4, 1e-1) | st.just(0.0)
COSTS = st.builds(ForwardCost, base_s=PARTS, per_token_s=PARTS, per_token_past_s=PARTS)
CHUNKS = [(0, 1), (512, 1), (0, 64), (0, 256), (256, 64), (256, 256)]
SAMPLES = st.lists(
    st.builds(
        Sample,
        tokens=st.integers(1, 512),
        token_pasts=st.integers(0, 1 << 20),
        seconds=st.floats(1e-4, 100),
    ),
    min_size=1,
    max_size=12,
)


def sample(cost: ForwardCost, start: int, tokens: int) -> Sample:
    pasts = token_pasts(start, tokens)
    return Sample(tokens=tokens, token_pasts=pasts, seconds=cost.seconds(tokens, pasts))


@given(COSTS)
def test_what_lies_in_a_plane_is_found_again(cost: ForwardCost) -> None:
    assume(cost.seconds(1) > 0)
    found = fit([sample(cost, start, tokens) for start, tokens in CHUNKS])
    for start, tokens in [*CHUNKS, (1000, 100)]:
        pasts = token_pasts(start, tokens)
        assert found.seconds(tokens, pasts) == pytest.approx(cost.seconds(tokens, pasts), rel=1e-5)


@given(SAMPLES)
def test_no_part_is_negative_whatever_was_measured(samples: list[Sample]) -> None:
    found = fit(samples)
    assert min(found.base_s, found.per_token_s, found.per_token_past_s) >= 0
    assert found.seconds(1, 1) > 0


@given(SAMPLES, st.floats(0.5, 2.0))
def test_no_simpler_fit_is_nearer(samples: list[Sample], factor: float) -> None:
    def error(cost: ForwardCost) -> float:
        return sum((cost.seconds(s.tokens, s.token_pasts) / s.seconds - 1) ** 2 for s in samples)

    found = fit(samples)
    mean_s = sum(s.seconds / s.tokens for s in samples) / len(samples)
    assert error(found) <= error(ForwardCost(base_s=0, per_token_s=factor * mean_s, per_token_past_s=0)) + 1e-6


def test_one_forward_alone_says_what_a_token_takes() -> None:
    assert fit([Sample(tokens=1, token_pasts=0, seconds=2.0)]) == ForwardCost(
        base_s=0, per_token_s=pytest.approx(2.0), per_token_past_s=0
    )


@given(COSTS, st.floats(0, 10), st.integers(0, 4096), st.integers(0, 512))
def test_the_longest_chunk_within_a_time_is_just_that(
    cost: ForwardCost, within_s: float, start: int, most: int
) -> None:
    tokens = cost.tokens_within(within_s, start=start, most=most)
    assert 0 <= tokens <= most
    assert tokens == 0 or cost.seconds(tokens, token_pasts(start, tokens)) <= within_s
    assert tokens == most or cost.seconds(tokens + 1, token_pasts(start, tokens + 1)) > within_s


@given(st.integers(0, 100), st.integers(1, 100))
def test_pasts_are_what_lies_before_each_token(start: int, tokens: int) -> None:
    assert token_pasts(start, tokens) == sum(range(start, start + tokens))


TIMES = st.floats(0.01, 100.0)


@given(COSTS, st.lists(TIMES, min_size=LATELY, max_size=3 * LATELY), st.sampled_from(CHUNKS))
def test_a_peer_is_slower_by_what_the_quickest_of_its_last_forwards_takes_longer(
    cost: ForwardCost, times: list[float], chunk: tuple[int, int]
) -> None:
    assume(cost.seconds(1) > 0 and sample(cost, *chunk).seconds > 0)
    lately = Lately()
    for number, one in enumerate(times):
        if number < LATELY:
            assert lately.slower_than(cost) == 1.0, "too few to tell"
        lately.add(replace(sample(cost, *chunk), seconds=one * sample(cost, *chunk).seconds))
    quickest = min(times[-LATELY:])
    slower = lately.slower_than(cost)
    assert slower == 1.0 if quickest < 0.999 * CLEARLY else slower == pytest.approx(quickest, rel=0.13)
    assert lately.slower_than(cost.part(0.5)) >= slower


def test_a_peer_of_which_no_cost_is_known_is_not_slower() -> None:
    lately = Lately()
    for _ in range(LATELY):
        lately.add(Sample(tokens=1, token_pasts=0, seconds=1.0))
    assert lately.slower_than(ForwardCost(base_s=0.0, per_token_s=0.0, per_token_past_s=0.0)) == 1.0

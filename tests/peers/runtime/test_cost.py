from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from peers.runtime.cost import (
    CLEARLY,
    LATELY,
    PASTS_MAX,
    SLOWER_MAX,
    SPACING_S,
    ForwardCost,
    Lately,
    Sample,
    fit,
    slower,
    token_pasts,
)

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


TIMES = st.floats(0.01, 1000.0)


@given(COSTS, st.lists(TIMES, min_size=LATELY, max_size=3 * LATELY), st.sampled_from(CHUNKS))
def test_a_peer_is_slower_by_what_the_quickest_of_its_last_forwards_takes_longer(
    cost: ForwardCost, times: list[float], chunk: tuple[int, int]
) -> None:
    assume(cost.seconds(1) > 0)
    lately, usual = Lately(), sample(cost, *chunk)
    for number, one in enumerate(times):
        assert (lately.times(cost) is None) == (number < LATELY), "too few to tell"
        forward = replace(usual, seconds=one * usual.seconds)
        lately.add(forward, SPACING_S * number)
        lately.add(replace(forward, seconds=0.0), SPACING_S * (number + 0.5))  # within a burst
    found = lately.times(cost)
    assert found == pytest.approx(min(times[-LATELY:]))
    lately.forget()
    assert lately.times(cost) is None


@given(st.none() | TIMES)
def test_only_what_is_clear_is_told_and_only_so_much(times: float | None) -> None:
    if times is None or times < CLEARLY:
        assert slower(times) == 1.0
    else:
        assert slower(times) == pytest.approx(min(times, SLOWER_MAX), rel=0.13)


def test_forwards_behind_more_than_was_measured_say_nothing() -> None:
    lately = Lately()
    for number in range(2 * LATELY):
        forward = Sample(tokens=2, token_pasts=2 * (PASTS_MAX + 1), seconds=1.0)
        lately.add(forward, SPACING_S * number)
    assert lately.times(ForwardCost(base_s=1.0, per_token_s=0.0, per_token_past_s=0.0)) is None


def test_a_peer_of_which_no_cost_is_known_is_not_slower() -> None:
    lately = Lately()
    for number in range(LATELY):
        lately.add(Sample(tokens=1, token_pasts=0, seconds=1.0), SPACING_S * number)
    assert slower(lately.times(ForwardCost(base_s=0.0, per_token_s=0.0, per_token_past_s=0.0))) == 1.0

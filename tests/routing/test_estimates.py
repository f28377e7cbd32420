from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from routing.coordinates import Coordinate
from routing.cost import HopCost, hop_cost
from routing.estimates import (
    BANDWIDTH_BYTES_PER_S,
    DEFAULT_RTT_S,
    DOUBT_AFTER_S,
    HALF_LIFE_S,
    SMOOTHING,
    Estimates,
    Load,
    PeerEstimate,
    Smoothed,
    announced_uplink,
)
from routing.records import Announcement
from tests.routing.swarms import NOW_S, announcement, peer

SAID = announcement(peer(1), decode_s_per_block=0.002, prefill_s_per_token_block=0.0002)


def test_without_measurements_the_announcement_and_the_defaults_count() -> None:
    assert Estimates().of(SAID, NOW_S) == PeerEstimate(
        rtt_s=DEFAULT_RTT_S,
        queue_s=0.0,
        decode_s_per_block=0.002,
        prefill_s_per_token_block=0.0002,
    )


def test_the_first_sample_counts_in_full_and_later_ones_by_an_eighth() -> None:
    estimates = Estimates()
    estimates.on_rtt(peer(1), 0.010, NOW_S)
    assert estimates.rtt_s(peer(1), NOW_S) == pytest.approx(0.010)
    estimates.on_rtt(peer(1), 0.090, NOW_S)
    assert estimates.rtt_s(peer(1), NOW_S) == pytest.approx(0.010 + SMOOTHING * 0.080)


def test_measurements_outrank_claims_and_fade_back_to_them() -> None:
    estimates = Estimates()
    estimates.on_step(peer(1), blocks=10, tokens=1, compute_s=0.1, queue_s=0.0, now_s=NOW_S)
    assert estimates.of(SAID, NOW_S).decode_s_per_block == pytest.approx(0.01)
    assert estimates.of(SAID, NOW_S + HALF_LIFE_S).decode_s_per_block == pytest.approx(0.006)
    assert estimates.of(SAID, NOW_S + 1e9).decode_s_per_block == pytest.approx(0.002)


def test_a_sample_after_a_long_silence_replaces_what_was_known() -> None:
    smoothed = Smoothed()
    smoothed.add(1.0, NOW_S)
    smoothed.add(5.0, NOW_S + 100 * HALF_LIFE_S)
    assert smoothed.value(0.0, NOW_S + 100 * HALF_LIFE_S) == pytest.approx(5.0)


def test_prefill_is_what_a_block_takes_beyond_its_first_token() -> None:
    estimates = Estimates()
    estimates.on_step(peer(1), blocks=10, tokens=1, compute_s=0.05, queue_s=0.0, now_s=NOW_S)
    estimates.on_step(peer(1), blocks=10, tokens=101, compute_s=0.05 + 100 * 10 * 0.0003, queue_s=0.0, now_s=NOW_S)
    estimate = estimates.of(SAID, NOW_S)
    assert estimate.decode_s_per_block == pytest.approx(0.005)
    assert estimate.prefill_s_per_token_block == pytest.approx(0.0003)


def test_a_queue_is_forgotten_within_a_minute() -> None:
    estimates = Estimates()
    estimates.on_step(peer(1), blocks=10, tokens=1, compute_s=0.1, queue_s=3.0, now_s=NOW_S)
    assert estimates.of(SAID, NOW_S).queue_s == pytest.approx(3.0)
    assert estimates.of(SAID, NOW_S + 60).queue_s < 0.05


@given(st.lists(st.tuples(st.floats(), st.floats(0, 1e6)), max_size=20), st.floats(0, 10))
def test_no_sequence_of_samples_leaves_the_range_of_sane_ones(samples: list[tuple[float, float]], prior: float) -> None:
    smoothed = Smoothed()
    for sample, after_s in samples:
        smoothed.add(sample, NOW_S + after_s)
    sane = [s for s, _ in samples if 0 <= s < float("inf")]
    value = smoothed.value(prior, NOW_S + 1e6)
    slack = 1e-9 * max([prior, *sane])
    assert min([prior, *sane]) - slack <= value <= max([prior, *sane]) + slack


def test_the_peer_measured_longest_ago_is_forgotten_first() -> None:
    estimates = Estimates(max_peers=2)
    for number in (1, 2, 1, 3):
        estimates.on_rtt(peer(number), 0.01, NOW_S)
    assert [estimates.rtt_s(peer(n), NOW_S) is None for n in (1, 2, 3)] == [False, True, False]


def test_a_hop_costs_latency_plus_bytes_over_bandwidth_plus_queue_plus_blocks() -> None:
    estimate = PeerEstimate(
        rtt_s=0.04,
        queue_s=0.003,
        decode_s_per_block=0.002,
        prefill_s_per_token_block=0.0001,
    )
    one = hop_cost(estimate, tokens=1, bytes_per_token=12_500)
    assert structs.astuple(one) == pytest.approx((0.02 + 0.001 + 0.003, 0.002, 0.021))
    many = hop_cost(estimate, tokens=101, bytes_per_token=12_500)
    assert structs.astuple(many) == pytest.approx((0.02 + 0.101 + 6 * 0.003, 0.002 + 0.01, 0.121)), (
        "it waits as much longer as it takes longer"
    )


def test_a_cap_below_the_assumed_bandwidth_is_paid_on_the_way_in_and_on_the_way_out() -> None:
    estimate = Estimates().of(SAID, NOW_S)
    free = hop_cost(estimate, tokens=1, bytes_per_token=12_500)
    capped = hop_cost(structs.replace(estimate, max_bytes_per_s=1_250_000), tokens=1, bytes_per_token=12_500)
    assert capped.enter_s - free.enter_s == pytest.approx(2 * (0.010 - 0.001))
    assert (capped.per_block_s, capped.leave_s) == (free.per_block_s, free.leave_s)
    assert hop_cost(structs.replace(estimate, max_bytes_per_s=10**9), tokens=1, bytes_per_token=12_500) == free


def test_a_slow_uplink_is_paid_on_the_way_on_and_for_what_comes_back_from_the_last_hop() -> None:
    estimate = Estimates().of(SAID, NOW_S)
    free = hop_cost(estimate, tokens=100, bytes_per_token=12_500, back_tokens=1)
    narrow = structs.replace(estimate, uplink_bytes_per_s=1_250_000)
    slow = hop_cost(narrow, tokens=100, bytes_per_token=12_500, back_tokens=1)
    assert slow.enter_s - free.enter_s == pytest.approx(100 * (0.010 - 0.001))
    assert slow.enter_s + slow.leave_s - free.enter_s - free.leave_s == pytest.approx(0.010 - 0.001)
    whole = hop_cost(structs.replace(estimate, uplink_bytes_per_s=1_250_000), tokens=100, bytes_per_token=12_500)
    assert whole.enter_s + whole.leave_s - free.enter_s - free.leave_s == pytest.approx(1.0 - 0.001)


@given(
    st.integers(0, 10**8),
    st.integers(0, 10**8),
    st.sampled_from([0, 10**5, 10**7, 10**9]),
    st.floats(1, 4096),
    st.none() | st.floats(0, 4096),
    st.floats(1e4, 1e9),
)
@example(some=2, more=10546, cap=0, tokens=1402.7397404750752, back_tokens=0.0, in_bytes_per_s=112003790.05174056)
def test_more_uplink_makes_no_hop_dearer_and_an_unknown_one_is_the_assumed_one(
    some: int, more: int, cap: int, tokens: float, back_tokens: float | None, in_bytes_per_s: float
) -> None:
    estimate = structs.replace(Estimates().of(SAID, NOW_S), max_bytes_per_s=cap, bytes_per_s=in_bytes_per_s)
    back = None if back_tokens is None else min(tokens, back_tokens)

    def cost(uplink: int) -> HopCost:
        there = structs.replace(estimate, uplink_bytes_per_s=uplink)
        return hop_cost(there, tokens=tokens, bytes_per_token=4096, back_tokens=back)

    least, most = sorted((some or 1, more or 1))
    slow, fast, unknown = cost(least), cost(most), cost(0)
    assert slow.enter_s >= fast.enter_s * (1 - 1e-9)
    rounding_s = 4 * math.ulp(slow.enter_s)  # of what is added there and taken back in `leave_s`
    assert slow.enter_s + slow.leave_s >= (fast.enter_s + fast.leave_s) * (1 - 1e-9) - rounding_s
    assert slow.enter_s + slow.leave_s >= 0
    assert unknown == cost(int(BANDWIDTH_BYTES_PER_S))


def test_large_sends_tell_how_fast_this_node_sends_and_what_it_announces_is_coarse() -> None:
    estimates = Estimates()
    for number, seconds in ((1, 10.1), (2, 1.1), (3, 5.1)):
        estimates.on_transfer(peer(number), 1_000_000, seconds, NOW_S)
    assert estimates.uplink_bytes_per_s(NOW_S) == 0, "how much of that was the way is not known"
    for number, seconds in ((1, 10.1), (2, 1.1), (3, 5.1)):
        estimates.on_rtt(peer(number), 0.1, NOW_S)
        assert estimates.uplink_bytes_per_s(NOW_S) == 0
        estimates.on_transfer(peer(number), 1_000_000, seconds, NOW_S)
    assert estimates.uplink_bytes_per_s(NOW_S) == 2**20
    assert estimates.uplink_bytes_per_s(NOW_S + HALF_LIFE_S + 1) == 0


@given(st.floats(0, 1e12))
def test_an_announced_uplink_is_a_power_of_two_below_what_is_assumed_and_close(bytes_per_s: float) -> None:
    said = announced_uplink(bytes_per_s)
    if said:
        assert said.bit_count() == 1
        assert said < BANDWIDTH_BYTES_PER_S
        assert bytes_per_s <= 1 or said / 1.4143 <= bytes_per_s <= said * 1.4143
    else:
        assert bytes_per_s == 0 or bytes_per_s > BANDWIDTH_BYTES_PER_S / 1.4143


def test_round_trips_are_told_the_latest_first_with_their_age() -> None:
    estimates = Estimates()
    for number in (1, 2, 3):
        estimates.on_rtt(peer(number), number / 100, NOW_S + number)
    estimates.on_step(peer(4), 1, 1, 0.1, 0.0, NOW_S + 4)
    trips = estimates.round_trips(NOW_S + 3, 3)
    assert [(trip.peer_id, trip.age_s) for trip in trips] == [(peer(3), 0.0), (peer(2), 1.0)]
    assert [trip.rtt_s for trip in trips] == pytest.approx([0.03, 0.02], rel=0.01)


def test_a_mean_is_lately_until_its_half_life_has_passed() -> None:
    smoothed = Smoothed()
    assert smoothed.lately(NOW_S) is None
    smoothed.add(2.0, NOW_S)
    assert smoothed.lately(NOW_S + HALF_LIFE_S - 1) == 2.0
    assert smoothed.lately(NOW_S + HALF_LIFE_S) is None


def test_a_peer_measured_to_be_slow_is_doubted_until_a_trial_says_how_fast_it_is_now() -> None:
    estimates = Estimates()
    for _ in range(50):
        estimates.on_step(peer(1), blocks=10, tokens=1, compute_s=0.2, queue_s=0.0, now_s=NOW_S)
    assert not estimates.doubted_for_s(SAID, NOW_S), "it is being used"
    later_s = NOW_S + DOUBT_AFTER_S
    assert estimates.doubted_for_s(SAID, later_s) == DOUBT_AFTER_S
    estimates.on_trial(peer(1), blocks=10, compute_s=0.19, now_s=later_s)
    assert estimates.of(SAID, later_s).decode_s_per_block == pytest.approx(0.019)
    assert estimates.doubted_for_s(SAID, later_s + DOUBT_AFTER_S)
    estimates.on_trial(peer(1), blocks=10, compute_s=0.021, now_s=later_s)
    assert estimates.of(SAID, later_s).decode_s_per_block == pytest.approx(0.0021)
    assert not estimates.doubted_for_s(SAID, later_s + DOUBT_AFTER_S)


def test_nobody_is_doubted_who_was_never_measured_or_says_nothing() -> None:
    estimates = Estimates()
    assert not estimates.doubted_for_s(SAID, NOW_S)
    silent = announcement(peer(2), decode_s_per_block=0.0)
    estimates.on_step(peer(2), blocks=1, tokens=1, compute_s=5.0, queue_s=0.0, now_s=NOW_S)
    assert not estimates.doubted_for_s(silent, NOW_S + DOUBT_AFTER_S)


def test_bytes_take_as_long_as_they_did_beyond_the_round_trip() -> None:
    estimates = Estimates()
    estimates.on_rtt(peer(1), 0.1, NOW_S)
    estimates.on_transfer(peer(1), 1_000_000, 1.1, NOW_S)
    assert estimates.of(SAID, NOW_S).bytes_per_s == pytest.approx(1e6)
    cost = hop_cost(estimates.of(SAID, NOW_S), tokens=1000, bytes_per_token=1000)
    assert cost.enter_s == pytest.approx(0.05 + 1.0)


def test_strangers_are_reached_no_faster_than_the_fastest_peer_was_and_never_faster_than_assumed() -> None:
    estimates, stranger = Estimates(), announcement(peer(2))
    assert estimates.of(stranger, NOW_S).bytes_per_s == BANDWIDTH_BYTES_PER_S
    estimates.on_transfer(peer(1), 1_000_000, 1.0, NOW_S)
    estimates.on_transfer(peer(3), 1_000_000, 0.5, NOW_S)
    assert estimates.of(stranger, NOW_S).bytes_per_s == pytest.approx(2e6)
    estimates.on_transfer(peer(4), 1_000_000, 1e-3, NOW_S)
    assert estimates.of(stranger, NOW_S).bytes_per_s == BANDWIDTH_BYTES_PER_S
    assert estimates.of(announcement(peer(4)), NOW_S).bytes_per_s > BANDWIDTH_BYTES_PER_S


@given(st.floats(0, 1e12), st.floats(0, 1e6), st.floats(0, 10))
def test_a_transfer_of_any_length_gives_a_bandwidth(size: float, seconds: float, rtt_s: float) -> None:
    estimates = Estimates()
    estimates.on_rtt(peer(1), rtt_s, NOW_S)
    estimates.on_transfer(peer(1), int(size), seconds, NOW_S)
    assert 0 < estimates.of(SAID, NOW_S).bytes_per_s < float("inf")


def test_what_a_prompt_waited_counts_as_what_a_step_of_one_position_would_have_waited() -> None:
    estimates = Estimates()
    estimates.on_trial(peer(1), 10, 0.01, NOW_S)
    estimates.on_step(peer(1), 10, 91, 0.1, 2.0, NOW_S)
    assert estimates.of(announcement(peer(1)), NOW_S).queue_s == pytest.approx(0.2)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_told_twice_is_what_would_be_found_again(seed: int) -> None:
    rng, now_s = random.Random(seed), NOW_S
    estimates = Estimates(max_peers=4)
    said = [announcement(peer(n), sessions=n, place=Coordinate(n / 100, 0.0, 0.01, 0.1)) for n in range(6)]
    events: list[Callable[[Announcement], object]] = [
        lambda a: estimates.on_rtt(a.peer_id, rng.uniform(0.01, 0.2), now_s, a.place),
        lambda a: estimates.on_step(a.peer_id, 4, rng.choice((1, 9)), rng.random(), rng.random(), now_s),
        lambda a: estimates.on_transfer(a.peer_id, 10**6, rng.uniform(0.1, 9.0), now_s),
        lambda a: estimates.on_trial(a.peer_id, 4, rng.random(), now_s),
        lambda a: estimates.on_planned(rng.randrange(9), [(a, 3)], rng.uniform(0.1, 3.0), now_s),
        lambda a: estimates.on_ended(rng.randrange(9)),
        lambda a: setattr(estimates, "load", Load(tokens_per_s=rng.uniform(1, 99), turn_s=rng.uniform(0, 9))),
        lambda a: said.__setitem__(said.index(a), replace(a, sequence=a.sequence + 1, sessions=rng.randrange(30))),
    ]
    for _ in range(200):
        rng.choice(events)(rng.choice(said))
        now_s += rng.choice((0.0, 0.0, 0.0, 1.0))
        for a in said:
            assert estimates.of(a, now_s) == estimates._of(a, now_s)

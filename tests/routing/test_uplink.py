from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from routing.uplink import LATENCY_SHARE_MAX, SENDS_MIN, WINDOW_S, Uplink
from tests.routing.swarms import NOW_S


def test_the_fastest_of_several_sends_counts_and_fades() -> None:
    uplink = Uplink()
    for seconds in (4.0, 1.0, 8.0):
        assert uplink.bytes_per_s(NOW_S) == 0.0
        uplink.add(10**6, seconds, 0.0, NOW_S)
    assert uplink.bytes_per_s(NOW_S + WINDOW_S) == 1e6
    assert uplink.bytes_per_s(NOW_S + WINDOW_S + 1) == 0.0


def test_a_send_that_the_round_trip_explains_tells_nothing() -> None:
    uplink = Uplink()
    for _ in range(SENDS_MIN):
        uplink.add(10**6, 1.0, LATENCY_SHARE_MAX + 0.01, NOW_S)
    assert uplink.bytes_per_s(NOW_S) == 0.0
    for _ in range(SENDS_MIN):
        uplink.add(10**6, 1.0, LATENCY_SHARE_MAX, NOW_S)
    assert uplink.bytes_per_s(NOW_S) == 10**6 / (1 - LATENCY_SHARE_MAX)


@given(st.lists(st.tuples(st.floats(0, WINDOW_S / 2), st.integers(1, 10**9)), max_size=30))
def test_it_is_the_maximum_over_the_window(sends: list[tuple[float, int]]) -> None:
    uplink, now_s, made = Uplink(), 0.0, list[tuple[float, int]]()
    for after_s, size in sends:
        now_s += after_s
        uplink.add(size, 1.0, 0.0, now_s)
        made.append((now_s, size))
        recent = [size for at_s, size in made if now_s - at_s <= WINDOW_S]
        assert uplink.bytes_per_s(now_s) == (max(recent) if len(recent) >= SENDS_MIN else 0.0)


def test_however_many_sends_are_kept_in_bounds_and_the_fastest_stays() -> None:
    uplink = Uplink()
    for number in range(10_000):
        uplink.add(20_000 - number, 1.0, 0.0, NOW_S)
    assert uplink.bytes_per_s(NOW_S) == 20_000
    assert len(uplink._fastest) <= 32


@given(st.lists(st.floats(-1000, 1000), min_size=3, max_size=9))
def test_a_clock_that_is_set_back_breaks_nothing(times_s: list[float]) -> None:
    uplink = Uplink()
    for at_s in times_s:
        uplink.add(1, 1.0, 0.0, at_s)
        assert uplink.bytes_per_s(max(times_s)) in (0.0, 1.0)

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers.serving.comfort import (
    DAY_MINUTES,
    GIVE_BACK_AFTER_S,
    LONG_MINUTES,
    PAUSE_AFTER_S,
    RESUME_AFTER_S,
    Comfort,
    LoadGate,
    Reason,
    Schedule,
    clock_time,
)
from routing.errors import CallerError

MINUTES = st.integers(0, DAY_MINUTES - 1)
SCHEDULES = st.lists(
    st.tuples(MINUTES, st.integers(0, DAY_MINUTES)).filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=4
).map(lambda ranges: Schedule(tuple(ranges)))


# --- schedules ---


@pytest.mark.parametrize(
    ("text", "opens", "closed"),
    [
        ("22:00-08:00", ["22:00", "23:59", "00:00", "07:59"], ["08:00", "12:00", "21:59"]),
        ("9:30-17:00", ["09:30", "16:59"], ["09:29", "17:00", "00:00"]),
        ("00:00-24:00", ["00:00", "12:00", "23:59"], []),
        ("18:00-24:00, 12:00-13:00", ["18:00", "23:59", "12:30"], ["00:00", "13:00", "17:59"]),
        ("23:00-00:00", ["23:00", "23:59"], ["00:00", "22:59"]),
    ],
)
def test_a_schedule_is_open_within_its_ranges_also_past_midnight(
    text: str, opens: list[str], closed: list[str]
) -> None:
    schedule = Schedule.parse(text)
    for time in opens + closed:
        hour, _, minute = time.partition(":")
        assert schedule.is_open(60 * int(hour) + int(minute)) == (time in opens), time


@pytest.mark.parametrize(
    "text", ["", "22:00", "22-08", "22:00-08:60", "24:00-08:00", "22:00-25:00", "a-b", "22:00-08:00,", "8:00–9:00"]
)
def test_what_is_no_schedule_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(CallerError, match="no time of day") as caught:
        Schedule.parse(text)
    assert "22:00-08:00" in caught.value.hint


def test_a_range_that_begins_where_it_ends_is_refused() -> None:
    with pytest.raises(CallerError, match="begins where it ends"):
        Schedule.parse("12:00-13:00,08:00-08:00")


@given(SCHEDULES)
def test_a_schedule_reads_what_it_writes(schedule: Schedule) -> None:
    assert Schedule.parse(str(schedule)) == schedule


@given(SCHEDULES, MINUTES)
def test_it_opens_when_it_says_and_not_before(schedule: Schedule, minute: int) -> None:
    at = schedule.opens_at(minute)
    assert schedule.is_open(at)
    assert schedule.closed_minutes(minute) == (0 if schedule.is_open(minute) else (at - minute) % DAY_MINUTES)
    if not schedule.is_open(minute):
        before = range((at - minute) % DAY_MINUTES)
        assert not any(schedule.is_open((minute + passed) % DAY_MINUTES) for passed in before)


@given(st.tuples(MINUTES, MINUTES).filter(lambda pair: pair[0] != pair[1]), MINUTES)
def test_a_range_and_its_reverse_are_never_open_together_and_always_one_of_them(
    ends: tuple[int, int], minute: int
) -> None:
    start, end = ends
    assert Schedule(((start, end),)).is_open(minute) != Schedule(((end, start),)).is_open(minute)


# --- load ---

LOOKS = st.lists(st.tuples(st.floats(0.1, 30.0), st.floats(0.0, 100.0)), max_size=80)


@given(LOOKS, st.floats(1.0, 100.0))
def test_the_gate_turns_only_after_the_load_has_stayed_on_the_other_side(
    looks: list[tuple[float, float]], limit_percent: float
) -> None:
    gate, now_s = LoadGate(limit_percent), 0.0
    seen: list[tuple[float, float]] = []
    turned_at_s = 0.0
    for passed_s, load_percent in looks:
        before, now_s = gate.paused, now_s + passed_s
        seen.append((now_s, load_percent))
        if gate.observe(load_percent, now_s) == before:
            continue
        wanted_s = RESUME_AFTER_S if before else PAUSE_AFTER_S
        assert now_s - turned_at_s >= wanted_s, "it does not flap"
        lately = [load for at_s, load in seen if now_s - at_s <= wanted_s]
        if not before:
            assert all(load >= limit_percent for load in lately)
        turned_at_s = now_s


@given(LOOKS, st.booleans())
def test_a_load_that_stays_settles_the_matter(looks: list[tuple[float, float]], high: bool) -> None:
    gate, now_s = LoadGate(50.0), 0.0
    for passed_s, load_percent in looks:
        now_s += passed_s
        gate.observe(load_percent, now_s)
    for look in range(60):
        gate.observe(80.0 if high else 20.0, now_s + 2.0 * (look + 1))
    assert gate.paused == high


def test_what_lies_between_both_limits_changes_nothing() -> None:
    gate = LoadGate(40.0)
    assert not any(gate.observe(39.0, float(s)) for s in range(100))
    assert [gate.observe(41.0, 100.0 + s) for s in range(6)] == [False] * 5 + [True]
    assert all(gate.observe(31.0, 200.0 + s) for s in range(100))


def test_a_spike_of_a_moment_delays_no_return() -> None:
    gate = LoadGate(40.0)
    for second in range(10):
        gate.observe(90.0, float(second))
    assert gate.paused
    loads = {second: 95.0 if second % 20 == 0 else 5.0 for second in range(10, 100, 2)}
    turned = [second for second, load in loads.items() if not gate.observe(load, float(second))]
    assert 10 + RESUME_AFTER_S <= turned[0] < 90


# --- both ---


def test_without_wishes_there_is_no_reason_to_pause() -> None:
    comfort = Comfort()
    assert not comfort.watches
    assert comfort.decide(minute=0, load_percent=100.0, now_s=0.0) is None


def test_the_schedule_is_named_first_and_the_load_is_watched_meanwhile() -> None:
    comfort = Comfort(Schedule.parse("22:00-08:00"), 50.0)
    noon, night = 12 * 60, 23 * 60
    assert comfort.watches
    reasons = [comfort.decide(minute=noon, load_percent=90.0, now_s=float(s)) for s in range(10)]
    assert reasons == [Reason.SCHEDULE] * 10
    assert comfort.decide(minute=night, load_percent=90.0, now_s=10.0) is Reason.LOAD
    later = [comfort.decide(minute=night, load_percent=10.0, now_s=11.0 + s) for s in range(80)]
    assert later[0] is Reason.LOAD
    assert later[-1] is None


@given(
    SCHEDULES,
    MINUTES,
    st.lists(st.tuples(st.floats(0.1, 60.0), st.booleans()), max_size=40),
)
def test_memory_is_wanted_in_a_pause_that_is_or_will_be_long_until_it_ends(
    schedule: Schedule, minute: int, looks: list[tuple[float, bool]]
) -> None:
    comfort, now_s = Comfort(schedule, 50.0), 0.0
    since_s: float | None = None
    wanted = False
    for passed_s, busy in looks:
        now_s += passed_s
        at = (minute + int(now_s / 60)) % DAY_MINUTES
        reason = comfort.decide(minute=at, load_percent=90.0 if busy else 10.0, now_s=now_s)
        since_s = None if reason is None else now_s if since_s is None else since_s
        long = since_s is not None and now_s - since_s >= GIVE_BACK_AFTER_S
        known = schedule.closed_minutes(at) >= LONG_MINUTES
        wanted = reason is not None and (wanted or long or known)
        assert comfort.wants_memory == wanted


def test_hours_that_begin_again_soon_and_a_load_that_is_soon_over_cost_no_memory() -> None:
    comfort = Comfort(Schedule.parse("08:00-12:00,12:05-20:00"))
    noon = 12 * 60
    for minute, reason in ((noon - 1, None), (noon, Reason.SCHEDULE), (noon + 1, Reason.SCHEDULE), (noon + 5, None)):
        assert comfort.decide(minute=minute, load_percent=0.0, now_s=60.0 * minute) is reason
        assert not comfort.wants_memory
    comfort.decide(minute=20 * 60, load_percent=0.0, now_s=60.0 * 20 * 60)
    assert comfort.wants_memory, "it is known to be closed for twelve hours"


def test_a_time_of_day_is_written_with_two_digits() -> None:
    assert [clock_time(minute) for minute in (0, 65, DAY_MINUTES)] == ["00:00", "01:05", "24:00"]

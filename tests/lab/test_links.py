"""What holds of every link, whatever is sent and however its profile is changed meanwhile."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab.links import PROFILES, Link, LinkProfile

profiles = st.builds(
    LinkProfile,
    delay_s=st.floats(0.1, 0.5),
    jitter_s=st.floats(0, 0.1),
    loss=st.sampled_from([0.0, 0.02, 0.5]),
    bytes_per_s=st.sampled_from([1e4, 1e6, math.inf]),
    queue_s=st.floats(0, 0.5),
)
packets = st.lists(st.tuples(st.floats(0, 0.1), st.integers(40, 1500)), max_size=60)
"""(seconds since the one before, size)."""


def sent(link: Link, packets: list[tuple[float, int]]) -> list[tuple[float, int, float | None]]:
    """(sent at, size, arrives at) of each packet."""
    times_s = itertools.accumulate(pause_s for pause_s, _ in packets)
    return [(now_s, size, link.offer(now_s, size)) for now_s, (_, size) in zip(times_s, packets, strict=True)]


@given(profiles, profiles, packets, packets, st.integers())
def test_every_packet_is_counted_once_and_none_overtakes_another(
    first: LinkProfile, second: LinkProfile, before: list, after: list, seed: int
) -> None:
    link = Link(first, random.Random(seed))
    arrivals = [due_s for _, _, due_s in sent(link, before)]
    link.profile = second
    start_s = sum(pause_s for pause_s, _ in before)
    arrivals += [due_s for _, _, due_s in sent(link, [(start_s, 40), *after])]
    arrived = [due_s for due_s in arrivals if due_s is not None]
    assert arrived == sorted(arrived)
    counts = link.counts
    assert counts.carried == len(arrived)
    assert counts.carried + counts.lost + counts.overflowed == len(before) + 1 + len(after)


@given(profiles, packets, st.integers())
def test_nothing_arrives_before_its_delay_or_faster_than_the_rate(
    profile: LinkProfile, packets: list, seed: int
) -> None:
    journeys = [journey for journey in sent(Link(profile, random.Random(seed)), packets) if journey[2] is not None]
    least_s = profile.delay_s - profile.jitter_s
    for sent_s, size, due_s in journeys:
        assert due_s >= sent_s + size / profile.bytes_per_s + least_s - 1e-9
    # all that was sent since one packet has to pass the rate behind it
    for index, (sent_s, _, _) in enumerate(journeys):
        passed = 0
        for _, size, due_s in journeys[index:]:
            passed += size
            assert due_s >= sent_s + passed / profile.bytes_per_s + least_s - 1e-9


@given(profiles, packets, st.integers())
def test_nobody_waits_longer_than_the_queue_is(profile: LinkProfile, packets: list, seed: int) -> None:
    held_s = 0.0  # jitter can hold a packet behind the one before it
    for sent_s, size, due_s in sent(Link(profile, random.Random(seed)), packets):
        if due_s is not None:
            longest_s = profile.queue_s + size / profile.bytes_per_s + profile.delay_s + profile.jitter_s
            assert due_s <= max(sent_s + longest_s, held_s) + 1e-9
            held_s = due_s


def test_the_same_seed_gives_the_same_journeys() -> None:
    load = [(0.001, 1000)] * 200
    journeys = [sent(Link(PROFILES["wifi-bad"], random.Random(seed)), load) for seed in (1, 1, 2)]
    assert journeys[0] == journeys[1] != journeys[2]


def test_a_saturated_link_carries_its_rate() -> None:
    link = Link(LinkProfile(delay_s=0.05, bytes_per_s=1e6), random.Random(0))
    journeys = sent(link, [(0.0001, 1000)] * 20_000)  # ten times too much, for two seconds
    within = sum(size for _, size, due_s in journeys if due_s is not None and due_s <= 2.05)
    assert within == pytest.approx(2e6, rel=0.01)
    assert link.counts.overflowed > 15_000


@pytest.mark.parametrize(
    "wrong",
    [{"delay_s": -1.0}, {"jitter_s": 0.1}, {"loss": 1.5}, {"bytes_per_s": 0.0}, {"delay_s": math.nan}],
)
def test_what_no_link_can_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"jitter_s|out of range"):
        LinkProfile(**wrong)

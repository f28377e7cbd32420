from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import CallerError
from routing.ids import BlockSpan
from routing.path import gaps
from routing.placement import choose_span
from routing.records import CLOCK_SLACK_S, Announcement, PeerState
from tests.routing.swarms import NOW_S, announcement, peer


def choose(peers: list[Announcement], max_blocks: int) -> str:
    return str(choose_span(peers, 30, max_blocks, NOW_S))


def test_three_peers_of_ten_blocks_fill_an_empty_swarm() -> None:
    peers: list[Announcement] = []
    for number in range(3):
        span = choose_span(peers, 30, 10, NOW_S)
        peers.append(announcement(peer(number), span.start, span.end, state=PeerState.JOINING))
    assert [str(a.spans) for a in peers] == ["0:10", "10:20", "20:30"]


def test_a_gap_is_filled_before_anything_is_doubled() -> None:
    assert choose([announcement(peer(1), 0, 12), announcement(peer(2), 18, 30)], 6) == "12:18"
    assert choose([announcement(peer(1), 0, 12), announcement(peer(2), 18, 30)], 10) == "8:18"


def test_the_rarest_blocks_go_first_when_all_are_held() -> None:
    everywhere = [announcement(peer(n), 0, 30) for n in range(2)]
    assert choose([*everywhere, announcement(peer(7), 0, 14), announcement(peer(8), 16, 30)], 2) == "14:16"


def test_peers_that_leave_pause_are_expired_or_claim_another_size_do_not_count() -> None:
    held = announcement(peer(9), 10, 30)
    pausing = announcement(peer(4), 0, 10, state=PeerState.PAUSED)
    leaving = announcement(peer(1), 0, 10, state=PeerState.DRAINING)
    expired = announcement(peer(2), 0, 10, expires_at_s=NOW_S - CLOCK_SLACK_S)
    other_size = announcement(peer(3), 0, 10, num_blocks=31)
    assert choose([held, pausing, leaving, expired, other_size], 10) == "0:10"


def test_a_peer_with_room_to_spare_takes_the_whole_model() -> None:
    assert choose([], 1000) == "0:30"


def test_a_peer_too_small_for_one_block_is_told_so() -> None:
    with pytest.raises(CallerError, match="not even one block"):
        choose([], 0)


SPANS = st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)), max_size=6)


@given(SPANS, st.integers(1, 14), st.randoms(use_true_random=False))
def test_no_other_span_holds_rarer_blocks_and_the_order_of_peers_does_not_matter(
    raw: list[tuple[int, int]], max_blocks: int, rng: random.Random
) -> None:
    peers = [
        announcement(peer(n), start, min(start + length, 12), num_blocks=12) for n, (start, length) in enumerate(raw)
    ]
    chosen = choose_span(peers, 12, max_blocks, NOW_S)
    length = min(max_blocks, 12)

    def rarity(span: BlockSpan) -> list[int]:
        return sorted(sum(block in span for a in peers for span in a.spans) for block in span)

    windows = [BlockSpan(start, start + length) for start in range(12 - length + 1)]
    assert chosen == min(windows, key=lambda span: (rarity(span), span.start))
    assert chosen == choose_span(rng.sample(peers, len(peers)), 12, max_blocks, NOW_S)


@given(st.integers(1, 40), st.lists(st.integers(1, 12), min_size=40, max_size=40))
def test_peers_that_join_one_by_one_cover_the_model_as_soon_as_their_sizes_add_up_twice(
    num_blocks: int, sizes: list[int]
) -> None:
    peers: list[Announcement] = []
    for number, size in enumerate(sizes):
        span = choose_span(peers, num_blocks, size, NOW_S)
        peers.append(announcement(peer(number), span.start, span.end, num_blocks=num_blocks))
        if sum(a.spans.num_blocks for a in peers) >= 2 * num_blocks:
            break
    if sum(a.spans.num_blocks for a in peers) >= 2 * num_blocks:
        assert gaps([span for a in peers for span in a.spans], num_blocks) == ()

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import CallerError
from routing.flow import capacities_of
from routing.ids import BlockSpan
from routing.path import gaps
from routing.placement import MOVE_GAIN, TURN_S, choose_move, choose_span, gives_way
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

    def carried(window: BlockSpan) -> float:
        given = (amount / len(span) for a in peers for span, amount in capacities_of(a) for b in window if b in span)
        return round(sum(given), 3)

    assert chosen == min(windows, key=lambda span: (rarity(span), carried(span), span.start))
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


def test_of_equally_replicated_spans_the_one_with_less_throughput_wins() -> None:
    fast, slow = announcement(peer(1), 0, 15), announcement(peer(2), 15, 30, decode_s_per_block=0.01)
    assert choose([fast, slow], 15) == "15:30"


def test_a_slow_peer_takes_no_more_than_a_fair_hop_unless_blocks_are_missing() -> None:
    thirds = [announcement(peer(n), 10 * n, 10 * n + 10) for n in range(3)]
    assert len(choose_span(thirds, 30, 30, NOW_S, decode_s_per_block=0.004)) == 5
    assert len(choose_span(thirds, 30, 30, NOW_S, decode_s_per_block=9.0)) == 1
    assert str(choose_span(thirds[:2], 30, 30, NOW_S, decode_s_per_block=9.0)) == "20:30"


def moved(peers: list[Announcement], number: int, open_for_s: float = 0.0) -> str | None:
    move = choose_move(peers, peer(number), NOW_S, open_for_s=open_for_s)
    return None if move is None else str(move.spans)


def test_a_gap_is_closed_by_whoever_is_spare_and_by_nobody_else() -> None:
    fixed, spare = announcement(peer(1), 0, 20), announcement(peer(2), 0, 10, max_blocks=10)
    assert moved([fixed, spare], 2) == "20:30"
    assert moved([fixed, spare], 1) is None, "its blocks were chosen for it"
    assert moved([replace(fixed, state=PeerState.DRAINING), spare], 2) is None, "it is the last holder"
    assert moved([replace(fixed, intent=BlockSpan(20, 30)), spare], 2) is None, "somebody is on the way already"
    assert moved([fixed, spare, announcement(peer(3), 20, 30, state=PeerState.JOINING)], 2) is None


def test_a_last_holder_with_room_adds_the_missing_blocks_to_its_own() -> None:
    peers = [announcement(peer(1), 0, 10, max_blocks=16), announcement(peer(2), 10, 20)]
    assert moved(peers, 1) == "0:10,20:26"


def test_a_gap_that_stays_open_calls_one_peer_after_the_other() -> None:
    peers = [announcement(peer(1), 0, 20), *(announcement(peer(n), 0, 10, max_blocks=10) for n in range(2, 6))]
    for waited, called in ((0, 1), (9, 1), (10, 2), (25, 3), (1000, 4)):
        assert sum(moved(peers, n, waited) is not None for n in range(1, 6)) == called


def test_of_two_peers_with_one_intent_the_smaller_id_goes_on() -> None:
    both = [announcement(peer(n), 0, 10, intent=BlockSpan(20 + n, 30)) for n in (1, 2)]
    first, second = sorted(a.peer_id for a in both)
    assert not gives_way(both, first, BlockSpan(20, 30))
    assert gives_way(both, second, BlockSpan(20, 30))
    assert not gives_way(both, second, BlockSpan(10, 20))


MOVABLE = st.lists(
    st.tuples(st.integers(0, 11), st.integers(1, 12), st.integers(0, 12), st.sampled_from([0.001, 0.002, 0.01, 0.1])),
    min_size=1,
    max_size=8,
)


def swarm_of(raw: list[tuple[int, int, int, float]]) -> list[Announcement]:
    return [
        announcement(
            peer(n), start, min(start + length, 12), num_blocks=12, max_blocks=most and max(most, length),
            decode_s_per_block=speed, prefill_s_per_token_block=speed / 10,
        )
        for n, (start, length, most, speed) in enumerate(raw)
        if start + length <= 12 or not most
    ]  # fmt: skip


def held(peers: list[Announcement]) -> set[int]:
    return {block for a in peers for span in a.spans for block in span}


def scarcest(peers: list[Announcement]) -> float:
    amounts = [0.0] * 12
    for a in peers:
        for span, amount in capacities_of(a):
            for block in span:
                amounts[block] += amount / len(span)
    return min(amounts)


@given(MOVABLE)
def test_moves_uncover_nothing_no_two_peers_make_the_same_and_they_come_to_an_end(
    raw: list[tuple[int, int, int, float]],
) -> None:
    peers = swarm_of(raw)
    now_s, quiet = NOW_S, 0
    moves = 0
    while quiet < 12:
        found = [(a, move) for a in peers if (move := choose_move(peers, a.peer_id, now_s)) is not None]
        healing = [move.intent for _, move in found if move.heals]
        assert len(healing) <= 1
        now_s += TURN_S
        peers = [replace(a, expires_at_s=now_s + 20) for a in peers]
        if not found:
            quiet += 1
            continue
        quiet, moves = 0, moves + 1
        assert moves <= 40, "ping-pong"
        (who, move), before = min(found, key=lambda pair: pair[0].peer_id), peers
        peers = [replace(a, spans=move.spans) if a.peer_id == who.peer_id else a for a in peers]
        assert held(before) <= held(peers)
        assert move.spans.num_blocks <= who.max_blocks
        if move.heals:
            assert len(held(peers)) > len(held(before))
        else:
            assert scarcest(peers) >= MOVE_GAIN * scarcest(before) * 0.999

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.errors import CallerError
from routing.flow import capacities_of
from routing.ids import BlockSpan, BlockSpans
from routing.path import gaps
from routing.placement import (
    ARRIVE_S,
    GAP_S,
    MAX_PARTS,
    MOVE_GAIN,
    SETTLE_S,
    TURN_S,
    Arrivals,
    Move,
    choose_move,
    choose_span,
    gives_way,
    shorten,
    stands,
    to_ask,
)
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


def test_peers_that_leave_pause_are_expired_nowhere_or_claim_another_size_do_not_count() -> None:
    held = announcement(peer(9), 10, 30)
    nowhere = announcement(peer(5), 0, 10, addresses=())
    pausing = announcement(peer(4), 0, 10, state=PeerState.PAUSED)
    leaving = announcement(peer(1), 0, 10, state=PeerState.DRAINING)
    expired = announcement(peer(2), 0, 10, expires_at_s=NOW_S - CLOCK_SLACK_S)
    other_size = announcement(peer(3), 0, 10, num_blocks=31)
    assert choose([held, pausing, leaving, expired, other_size, nowhere], 10) == "0:10"


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


@pytest.mark.parametrize(("other", "chosen"), [(2.0, "15:30"), (0.5, "0:15")])
def test_who_does_not_say_how_fast_it_is_counts_as_the_usual_one(other: float, chosen: str) -> None:
    speeds = {"decode_s_per_block": 0.001, "prefill_s_per_token_block": 0.0}
    halves = [announcement(peer(n), 15 * n, 15 * n + 15, **speeds) for n in range(2)]
    third = announcement(peer(2), 15, 30, **speeds | {"decode_s_per_block": other * 0.001})
    joiner = announcement(peer(3), 0, 15, state=PeerState.JOINING, **speeds | {"decode_s_per_block": 0.0})
    assert choose([*halves, third, joiner], 15) == chosen


def test_a_slow_peer_takes_no_more_than_a_fair_hop_unless_blocks_are_missing() -> None:
    thirds = [announcement(peer(n), 10 * n, 10 * n + 10) for n in range(3)]
    assert len(choose_span(thirds, 30, 30, NOW_S, decode_s_per_block=0.004)) == 5
    assert len(choose_span(thirds, 30, 30, NOW_S, decode_s_per_block=9.0)) == 1
    assert str(choose_span(thirds[:2], 30, 30, NOW_S, decode_s_per_block=9.0)) == "20:30"


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12), st.booleans(), st.floats(0.001, 0.1)), max_size=8))
def test_who_took_too_many_blocks_keeps_a_fair_part_and_what_nobody_else_has(
    others: list[tuple[int, int, bool, float]],
) -> None:
    mine = announcement(peer(4), 1, 11, num_blocks=12, state=PeerState.JOINING)
    peers = [
        announcement(
            peer(number if number < 4 else number + 1),
            start,
            min(12, start + length),
            num_blocks=12,
            decode_s_per_block=decode_s,
            state=PeerState.ONLINE if online else PeerState.JOINING,
        )
        for number, (start, length, online, decode_s) in enumerate(others)
    ]
    shorter = shorten(peers, mine, NOW_S, 0.02)
    assert shorter.start >= 1
    assert shorter.end <= 11
    sure = {
        block for a in peers if a.state is PeerState.ONLINE or a.peer_id < mine.peer_id for block in a.spans.parts[0]
    }
    assert set(range(1, 11)) - sure <= set(shorter)
    assert len(shorter) == 10 or len(shorter) <= 8, "it is worth loading again"
    assert len(shorter) == 10 or len(shorter) >= max(1, len(set(range(1, 11)) - sure))


def test_who_only_intends_to_hold_blocks_or_has_not_settled_holds_nothing() -> None:
    mine = announcement(peer(4), 0, 12, num_blocks=12, state=PeerState.JOINING)
    online = [
        announcement(peer(1), 6, 7, num_blocks=12, intent=BlockSpan(2, 11)),
        announcement(peer(2), 0, 9, num_blocks=12, intent=BlockSpan(2, 11)),
        announcement(peer(3), 11, 12, num_blocks=12),
    ]
    assert set(shorten(online, mine, NOW_S, 9.0)) >= {9, 10}
    smaller = peer(0)
    assert smaller < mine.peer_id
    for intent, held in ((None, True), (BlockSpan(0, 12), False)):
        joining = announcement(smaller, 0, 12, num_blocks=12, state=PeerState.JOINING, intent=intent)
        assert (len(shorten([online[2], joining], mine, NOW_S, 9.0)) < 11) == held


def test_of_two_that_joined_together_one_keeps_what_both_could_leave() -> None:
    online = [announcement(peer(n), 0, 6, num_blocks=12, decode_s_per_block=1e-6) for n in range(2)]
    first, second = sorted(
        (announcement(peer(n), 0, 12, num_blocks=12, state=PeerState.JOINING) for n in (2, 3)), key=lambda a: a.peer_id
    )
    assert str(shorten([*online, second], first, NOW_S, 1.0)) == "6:12"
    assert len(shorten([*online, first], second, NOW_S, 1.0)) == 1


def test_a_part_that_is_nearly_as_long_is_not_worth_loading_again() -> None:
    usual = [announcement(peer(n), 0, 10, num_blocks=10, decode_s_per_block=0.001) for n in range(2)]
    mine = announcement(peer(3), 0, 10, num_blocks=10, state=PeerState.JOINING)
    for fair, length in ((20, 10), (9, 10), (8, 8), (3, 3), (0.5, 1)):
        assert len(shorten(usual, mine, NOW_S, 0.02 / (fair + 0.001))) == length
    assert shorten([], mine, NOW_S, 9.0) == mine.spans.parts[0], "there is no usual hop"


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


def test_a_gap_is_closed_beside_what_is_served_and_nothing_else_is_downloaded() -> None:
    others = [announcement(peer(1), 0, 12), announcement(peer(2), 14, 30)]
    room = announcement(peer(3), 0, 8, max_blocks=10)
    assert moved([*others, room], 3) == "0:8,12:14", "it has room, and nobody loses a holder"
    full = replace(room, max_blocks=8)
    assert moved([*others, full], 3) == "0:6,12:14", "two blocks make room for two"
    one = choose_move([*others, full], peer(3), NOW_S, max_parts=1)
    assert one == healing("12:14", "12:14"), "where memory has room for one engine only"
    assert moved([*others, replace(full, spans=BlockSpans.of(BlockSpan(4, 12)))], 3) == "6:14", "one span, where it can"
    assert moved([others[1], announcement(peer(3), 4, 12, max_blocks=8), announcement(peer(4), 0, 6)], 3) == "6:14"


def test_a_peer_with_room_goes_before_one_that_gives_up_blocks_but_not_where_it_is_too_slow() -> None:
    others = [announcement(peer(1), 0, 12), announcement(peer(2), 14, 30)]
    room, full = announcement(peer(3), 0, 8, max_blocks=10), announcement(peer(4), 0, 8, max_blocks=8)
    assert [moved([*others, room, full], n) for n in (3, 4)] == ["0:8,12:14", None]
    slow = replace(room, decode_s_per_block=1.0)
    assert [moved([*others, slow, full], n) for n in (3, 4)] == [None, "0:6,12:14"]


def test_a_peer_of_two_spans_closes_a_gap_where_it_keeps_two() -> None:
    two = announcement(peer(1), 0, 10, max_blocks=16, spans=BlockSpans.parse("0:5,20:25"))
    rest = [announcement(peer(2), 5, 20), announcement(peer(3), 28, 30)]
    assert moved([two, *rest], 1) == "0:5,20:28", "beside one of them"
    apart = [announcement(peer(2), 5, 20), announcement(peer(3), 25, 28)]
    assert moved([two, *apart], 1) is None
    assert moved([two, *apart, announcement(peer(4), 20, 25)], 1) == "0:5,28:30", "instead of one that others hold"


def test_holders_whom_no_client_can_use_are_none() -> None:
    rest, spare = announcement(peer(1), 0, 20), announcement(peer(2), 0, 10, max_blocks=10)
    for useless in ({"addresses": ()}, {"protocol": 2}):
        lost = announcement(peer(3), 20, 30, **useless)
        assert moved([rest, spare, lost], 2) == "20:30"
        assert moved([rest, spare, replace(lost, state=PeerState.JOINING)], 2) == "20:30"
        beside = announcement(peer(3), 0, 10, **useless)
        only = announcement(peer(4), 10, 20)
        assert moved([only, spare, beside], 2) is None, "it would leave blocks to nobody"
        assert moved([rest, replace(spare, **useless), lost], 2) is None, "nobody could use it there either"


def test_who_is_on_the_way_for_too_long_hides_a_gap_no_more() -> None:
    rest, spare = announcement(peer(1), 0, 20), announcement(peer(2), 0, 10, max_blocks=10)
    loading = announcement(peer(3), 20, 30, state=PeerState.JOINING)
    fetching = announcement(peer(4), 0, 10, intent=BlockSpan(20, 30))
    for slow in (loading, fetching):
        peers, arrivals = [rest, spare, slow], Arrivals()
        for waited_s in (0.0, GAP_S - 1):
            assert arrivals.late(peers, NOW_S + waited_s) == set()
            assert arrivals.open_for_s(NOW_S + waited_s) == waited_s
        assert moved(peers, 2) is None
        late = arrivals.late([replace(a, sequence=2) for a in peers], NOW_S + GAP_S)
        assert late == {slow.peer_id}
        assert choose_move(peers, peer(2), NOW_S, late=late) == healing("20:30", "20:30")
        assert stands(healing("20:30", "20:30"), peers, peer(2), late=late)
        assert not stands(healing("20:30", "20:30"), peers, peer(2)) or slow is fetching
    further = replace(fetching, state=PeerState.JOINING, intent=None, spans=BlockSpans.parse("20:30"))
    assert arrivals.late([rest, spare, further], NOW_S + GAP_S) == set(), "it gets on"
    another = announcement(peer(5), 25, 30, state=PeerState.JOINING)
    assert arrivals.late([rest, spare, another], NOW_S + GAP_S) == {another.peer_id}, (
        "one after the other would hide it"
    )
    there = announcement(peer(6), 20, 30)
    assert arrivals.late([rest, spare, there, another], NOW_S + GAP_S) == set()
    assert arrivals.open_for_s(NOW_S + GAP_S) == 0.0


def test_to_a_block_that_is_missing_for_long_each_further_one_goes_after_twice_the_time() -> None:
    """As who is on the way counts for half of that: where fetching takes minutes, few fetch at once."""
    peers, arrivals, went = [announcement(peer(1), 0, 20)], Arrivals(), []
    for waited_s in range(641):
        if len(arrivals.late(peers, NOW_S + waited_s)) == len(went):
            went.append(waited_s)
            peers.append(announcement(peer(1 + len(went)), 0, 10, intent=BlockSpan(20, 30)))
            assert peers[-1].peer_id not in arrivals.late(peers, NOW_S + waited_s)
    assert went == [0, *(GAP_S * 2**n for n in range(6))]


def test_who_changes_what_it_says_and_never_arrives_hides_a_gap_for_no_longer_than_any_other() -> None:
    rest, spare = announcement(peer(1), 0, 20), announcement(peer(2), 0, 10, max_blocks=20)
    says = [announcement(peer(3), 0, end, intent=BlockSpan(20, 30)) for end in (9, 10)]
    arrivals, hidden = Arrivals(), []
    for waited_s in range(1200):
        peers = [rest, spare, says[waited_s // 15 % 2]]
        late = arrivals.late(peers, NOW_S + waited_s)
        if choose_move(peers, peer(2), NOW_S, open_for_s=waited_s, late=late) is None:
            hidden.append(waited_s)
    assert hidden == [*range(int(ARRIVE_S))]


def test_where_nothing_is_missing_who_is_on_the_way_counts_for_longer() -> None:
    peers, arrivals = [announcement(peer(1), 0, 30), announcement(peer(2), 0, 10, intent=BlockSpan(20, 30))], Arrivals()
    for waited_s, late in ((0.0, set()), (ARRIVE_S - 1, set()), (ARRIVE_S, {peer(2)})):
        assert arrivals.late(peers, NOW_S + waited_s) == late


def healing(spans: str, intent: str) -> Move:
    return Move(spans=BlockSpans.parse(spans), intent=BlockSpan.parse(intent), heals=True)


def test_a_move_stands_only_while_everything_that_it_leaves_has_another_holder() -> None:
    mine, other = (announcement(peer(n), 0, 10, max_blocks=10) for n in (1, 2))
    rest = announcement(peer(3), 10, 30)
    balance = Move(spans=BlockSpans.parse("20:30"), intent=BlockSpan(20, 30), heals=False)
    for ready in (False, True):
        assert stands(balance, [mine, other, rest], mine.peer_id, ready=ready)
        for lost in (
            replace(other, state=PeerState.DRAINING), replace(other, state=PeerState.JOINING),
            replace(other, state=PeerState.PAUSED), replace(other, addresses=()), replace(other, protocol=2),
            replace(other, spans=BlockSpans.parse("0:9")),
        ):  # fmt: skip
            assert not stands(balance, [mine, lost, rest], mine.peer_id, ready=ready)
        assert not stands(balance, [replace(mine, state=PeerState.PAUSED), other, rest], mine.peer_id, ready=ready)
    both = [replace(a, intent=BlockSpan(n, n + 5)) for a, n in ((mine, 10), (other, 20))]
    for others, leaves in (([other, rest], True), ([rest], False), ([], False)):
        answered = {a.peer_id for a in others}
        assert stands(balance, [mine, other, rest], mine.peer_id, ready=True, answered=answered) is leaves
    going = [stands(balance, [*both, rest], a.peer_id, ready=True) for a in sorted(both, key=lambda a: a.peer_id)]
    assert going == [True, False], "who would leave the same blocks, the smaller id goes"


def test_before_it_leaves_a_peer_asks_two_of_those_that_stay_of_each_block_and_as_few_as_hold_them() -> None:
    smaller, me = sorted((peer(6), peer(7)))
    mine = announcement(me, 0, 10, max_blocks=10)
    half, later_half = (announcement(peer(n), 0, 5, expires_at_s=NOW_S + 5 * n) for n in (2, 3))
    whole, other = announcement(peer(4), 0, 10), announcement(peer(5), 5, 12)
    none = (
        announcement(smaller, 0, 10, intent=BlockSpan(20, 30)), announcement(peer(60), 0, 10, state=PeerState.JOINING),
        announcement(peer(61), 0, 10, addresses=()), announcement(peer(62), 10, 30),
    )  # fmt: skip

    def asked(spans: str, *others: Announcement) -> list[Announcement]:
        return to_ask(healing(spans, "20:30"), [mine, *others, *none], me)

    assert asked("20:30", half, later_half, other, whole) == [whole, other, later_half]
    assert asked("5:10,20:25", half, later_half, other, whole) == [whole, later_half]
    assert asked("0:10,20:30", half, whole) == [], "it leaves nothing"
    assert asked("20:30", half) == [half], "and will not go"


def test_on_the_internet_a_peer_of_somebodys_own_network_is_no_holder() -> None:
    own, far, name = "/ip4/192.168.1.7", "/ip4/193.99.144.80", "/dns4/bees.example"

    def at(host: str, number: int, start: int, end: int, max_blocks: int = 0) -> Announcement:
        address = f"{host}/tcp/4001/p2p/{peer(number)}"
        return announcement(peer(number), start, end, addresses=(address,), max_blocks=max_blocks)

    holders = [(far, own, True), (far, far, False), (far, name, False)]
    for mine, holder, heals in (*holders, (own, own, False), (own, far, False), (name, own, False)):
        alike = [at(mine, 1, 0, 20, 20), at(mine, 2, 0, 20), at(holder, 3, 20, 30)]
        assert (choose_move(alike, peer(1), NOW_S) is not None) == heals


def test_a_heal_stands_only_while_its_blocks_are_missing_and_who_is_ready_waits_for_nobody() -> None:
    first, second = sorted((announcement(peer(n), 0, 10, max_blocks=10) for n in (1, 2)), key=lambda a: a.peer_id)
    rest, gap = announcement(peer(3), 0, 20), BlockSpan(20, 30)
    move = healing("20:30", "20:30")
    both = [replace(first, intent=gap), replace(second, intent=gap), rest]
    assert [stands(move, both, a.peer_id) for a in (first, second)] == [True, False]
    assert stands(move, both, second.peer_id, ready=True)
    for state in (PeerState.ONLINE, PeerState.JOINING):
        there = announcement(peer(4), 25, 30, state=state)
        assert not stands(move, [*both, there], first.peer_id, ready=True)


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
CROWDED = st.lists(
    st.tuples(st.sampled_from([0, 0, 4, 8]), st.just(4), st.sampled_from([0, 4, 6]), st.sampled_from([0.001, 0.01])),
    min_size=6,
    max_size=12,
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


class Mover:
    """A peer that looks, announces, settles, fetches, drains and loads, as `peers.serving.rebalance` has it."""

    def __init__(self, said: Announcement, put_s: int, fetch_s: int, look_s: int) -> None:
        self.said = [(-100, said)]
        """What it announced, and from when on everybody reads it."""
        self.put_s, self.fetch_s, self.look_s = put_s, fetch_s, look_s
        self.move: Move | None = None
        self.at_s, self.step = look_s, "look"
        self.keeps = held([said])
        self.unread_from = math.inf
        """After a death: from this second on its record is over."""

    @property
    def now(self) -> Announcement:
        return self.said[-1][1]

    def say(self, second: int, **changes: object) -> None:
        said = replace(self.now, sequence=self.now.sequence + 1, expires_at_s=NOW_S + second + 1000, **changes)
        self.said.append((second + self.put_s, said))

    def act(self, second: int, movers: list[Mover]) -> None:
        me = self.now.peer_id
        read = [self.now, *(m.said_at(second) for m in movers if m is not self and second < m.unread_from)]
        if self.step == "look":
            self.at_s += self.look_s
            if move := choose_move(read, me, NOW_S + second, open_for_s=1e9):
                self.move, self.step, self.at_s = move, "settle", second + int(SETTLE_S)
                self.say(second, intent=move.intent)
            return
        assert self.move is not None
        if self.step in ("settle", "fetch"):
            answered = None
            if self.step == "fetch":
                alive = {m.now.peer_id for m in movers if m.unread_from == math.inf}
                answered = {a.peer_id for a in to_ask(self.move, read, me)} & alive
            if not stands(self.move, read, me, ready=answered is not None, answered=answered):
                self.step, self.at_s = "look", second + self.look_s
                self.say(second, intent=None)
            elif self.step == "settle":
                self.step, self.at_s = "fetch", second + self.fetch_s
            else:
                self.step, self.at_s = "drain", second + 5
                self.keeps &= held([replace(self.now, spans=self.move.spans)])
                self.say(second, state=PeerState.DRAINING)
        elif self.step == "drain":
            self.step, self.at_s = "load", second + 4
            self.say(second, state=PeerState.JOINING, spans=self.move.spans, intent=None)
        else:
            self.step, self.at_s = "look", second + self.look_s
            self.say(second, state=PeerState.ONLINE)
            self.keeps = held([self.now])

    def said_at(self, second: int) -> Announcement:
        return next(said for from_s, said in reversed(self.said) if from_s <= second)


@settings(max_examples=60)
@given(CROWDED, st.integers(0, 2**32))
def test_no_block_loses_its_last_holder_while_many_peers_move_at_once_by_records_of_some_seconds_ago(
    raw: list[tuple[int, int, int, float]], seed: int
) -> None:
    """A second is the grain of this clock; records take up to two, and whoever settles waits for three. Half of them
    die, each when somebody is about to leave."""
    rng = random.Random(seed)
    movers = [Mover(a, rng.randint(0, 2), rng.randint(0, 40), rng.randint(2, 6)) for a in swarm_of(raw)]
    leaving = {rng.randint(0, 30): mover for mover in movers if not mover.now.max_blocks}
    dying = rng.sample(movers, len(movers) // 2)
    for second in range(120):
        if mover := leaving.get(second):
            mover.say(second, state=PeerState.DRAINING)
        if mover := leaving.get(second - 3):  # everybody has read it
            mover.keeps = set()
        if dying and any(m.step == "fetch" and m.at_s - second < 8 for m in movers):  # without a word
            mover = dying.pop()
            mover.keeps, mover.unread_from = set(), second + rng.randint(14, 20)
        before = kept(movers)
        for mover in rng.sample(movers, len(movers)):
            if second >= mover.at_s and mover.unread_from == math.inf:
                mover.act(second, movers)
                assert before <= kept(movers), f"second {second}, {mover.now.spans}"
                assert len(mover.now.spans.parts) <= MAX_PARTS


def kept(movers: list[Mover]) -> set[int]:
    return set().union(*(mover.keeps for mover in movers))

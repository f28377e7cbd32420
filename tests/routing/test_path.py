from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.cost import HopCost
from routing.ids import BlockSpan, PeerId
from routing.path import Candidate, Path, bridge, cheapest_path, gaps, path_cost_s
from tests.routing.swarms import peer


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[Candidate], int]:
    num_blocks = draw(st.integers(1, 6))
    # Small whole numbers: sums are exact, and ties are common.
    terms = st.integers(0, 5).map(float)
    candidates = []
    for number in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, num_blocks - 1))
        span = BlockSpan(start, draw(st.integers(start + 1, num_blocks)))
        enter_s = draw(terms)
        leave_s = float(draw(st.integers(-int(enter_s), 5)))
        candidates.append(Candidate(peer(number), span, HopCost(enter_s, draw(terms), leave_s)))
    return candidates, num_blocks


def all_walks(candidates: list[Candidate], num_blocks: int, at: int = 0) -> list[list[tuple[Candidate, BlockSpan]]]:
    """Every way from boundary `at` to the end, by brute force; consecutive hops are at different peers."""
    if at == num_blocks:
        return [[]]
    walks = []
    for candidate in candidates:
        if at in candidate.span:
            for end in range(at + 1, candidate.span.end + 1):
                walks += [
                    [(candidate, BlockSpan(at, end)), *rest]
                    for rest in all_walks(candidates, num_blocks, end)
                    if not rest or rest[0][0] is not candidate
                ]
    return walks


def walk_cost_s(walk: list[tuple[Candidate, BlockSpan]]) -> float:
    return path_cost_s([(candidate.cost, len(span)) for candidate, span in walk])


def check_is_route(path: Path, candidates: list[Candidate], num_blocks: int) -> None:
    by_peer = {candidate.peer_id: candidate for candidate in candidates}
    assert [block for _, span in path.hops for block in span] == list(range(num_blocks))
    assert all(by_peer[peer_id].span.covers(span) for peer_id, span in path.hops)
    assert all(before[0] != after[0] for before, after in pairwise(path.hops))
    assert path.cost_s == pytest.approx(path_cost_s([(by_peer[p].cost, len(span)) for p, span in path.hops]))


@settings(max_examples=300)
@given(swarms())
def test_a_path_covers_each_block_once_and_none_is_cheaper(swarm: tuple[list[Candidate], int]) -> None:
    candidates, num_blocks = swarm
    path = cheapest_path(candidates, num_blocks)
    walks = all_walks(candidates, num_blocks)
    assert (path is None) == (not walks)
    assert (path is None) == bool(gaps([c.span for c in candidates], num_blocks))
    if path is None:
        return
    check_is_route(path, candidates, num_blocks)
    assert path.cost_s == min(map(walk_cost_s, walks))


def cheapest_walk(candidates: list[Candidate], num_blocks: int) -> list[tuple[Candidate, BlockSpan]]:
    """The cheapest way without any pruning, quadratic in the blocks."""
    ways: list[list[tuple[Candidate, BlockSpan]]] = [[]]
    for end in range(1, num_blocks + 1):
        arrivals = [
            [*ways[start], (candidate, BlockSpan(start, end))]
            for candidate in candidates
            for start in range(candidate.span.start, min(end, candidate.span.end))
            if end <= candidate.span.end
        ]
        back = [way[-1][0].cost.leave_s if end < num_blocks else 0.0 for way in arrivals]
        ways.append(min(zip(arrivals, back, strict=True), key=lambda pair: walk_cost_s(pair[0]) - pair[1])[0])
    return ways[-1]


@pytest.mark.parametrize("seed", range(60))
def test_leaving_out_far_and_beaten_peers_makes_no_path_dearer(seed: int) -> None:
    rng = random.Random(seed)
    candidates = []
    for number in range(50):
        start = rng.randint(0, 4)
        span = BlockSpan(start, rng.randint(start + 1, 6)) if number else BlockSpan(0, 6)
        candidates.append(
            Candidate(peer(number), span, HopCost(rng.uniform(0.1, 1), rng.uniform(0, 0.1), rng.uniform(-0.1, 0.5)))
        )
    best = cheapest_walk(candidates, 6)
    path = cheapest_path(candidates, 6)
    assert path is not None
    check_is_route(path, candidates, 6)
    assert path.cost_s == pytest.approx(walk_cost_s(best))


@given(swarms(), st.randoms(use_true_random=False))
def test_the_path_does_not_depend_on_the_order_of_the_candidates(
    swarm: tuple[list[Candidate], int], rng: random.Random
) -> None:
    candidates, num_blocks = swarm
    shuffled = rng.sample(candidates, len(candidates))
    assert cheapest_path(candidates, num_blocks) == cheapest_path(shuffled, num_blocks)


def path_of(*candidates: Candidate, num_blocks: int) -> list[tuple[PeerId, str]]:
    path = cheapest_path(candidates, num_blocks)
    assert path is not None
    return [(peer_id, str(span)) for peer_id, span in path.hops]


def test_a_hop_may_be_part_of_a_span() -> None:
    slow = Candidate(peer(1), BlockSpan(0, 20), HopCost(0.01, 0.010, 0.01))
    fast = Candidate(peer(2), BlockSpan(5, 30), HopCost(0.01, 0.001, 0.01))
    assert path_of(slow, fast, num_blocks=30) == [(peer(1), "0:5"), (peer(2), "5:30")]
    assert path_of(slow, Candidate(fast.peer_id, fast.span, slow.cost), num_blocks=30) in (
        [(peer(1), f"0:{b}"), (peer(2), f"{b}:30")] for b in range(5, 21)
    )


def test_few_far_hops_lose_against_many_near_ones_and_the_reverse() -> None:
    whole = Candidate(peer(1), BlockSpan(0, 30), HopCost(0.100, 0.001, 0.100))
    thirds = [Candidate(peer(2 + i), BlockSpan(10 * i, 10 * i + 10), HopCost(0.01, 0.001, 0.01)) for i in range(3)]
    assert len(path_of(whole, *thirds, num_blocks=30)) == 3
    near = Candidate(peer(1), BlockSpan(0, 30), HopCost(0.015, 0.001, 0.01))
    assert len(path_of(near, *thirds, num_blocks=30)) == 1


def test_the_way_back_counts_for_the_last_hop_only() -> None:
    first = Candidate(peer(1), BlockSpan(0, 1), HopCost(1.0, 1.0, 100.0))
    last_far = Candidate(peer(2), BlockSpan(1, 2), HopCost(1.0, 1.0, 50.0))
    last_near = Candidate(peer(3), BlockSpan(1, 2), HopCost(10.0, 1.0, 1.0))
    path = cheapest_path([first, last_far, last_near], 2)
    assert path is not None
    assert path.hops[-1][0] == peer(3)
    assert path.cost_s == 1 + 1 + 10 + 1 + 1


def test_a_far_entry_is_looked_at_where_the_way_back_makes_up_for_it() -> None:
    near = [Candidate(peer(n), BlockSpan(0, 3), HopCost(1.0, 1.0, 1.0)) for n in range(8)]
    slow_uplink = Candidate(peer(9), BlockSpan(0, 3), HopCost(9.0, 1.0, -8.5))
    assert path_of(*near, slow_uplink, num_blocks=3) == [(peer(9), "0:3")]


def test_a_bridge_to_a_kept_hop_counts_on_no_shorter_way_back() -> None:
    kept = ((peer(0), BlockSpan(0, 1)), (peer(1), BlockSpan(2, 3)))
    slow_uplink = Candidate(peer(2), BlockSpan(1, 2), HopCost(2.0, 1.0, -1.9))
    other = Candidate(peer(3), BlockSpan(1, 2), HopCost(1.0, 1.0, 0.1))
    assert bridge(kept, [slow_uplink, other], 3) == (kept[0], (peer(3), BlockSpan(1, 2)), kept[1])
    end = [Candidate(c.peer_id, BlockSpan(2, 3), c.cost) for c in (slow_uplink, other)]
    assert bridge((kept[0], (peer(1), BlockSpan(1, 2))), end, 3) == (
        kept[0],
        (peer(1), BlockSpan(1, 2)),
        (peer(2), BlockSpan(2, 3)),
    )


def test_a_path_returns_to_a_peer_where_that_is_cheaper() -> None:
    slow_everywhere = Candidate(peer(1), BlockSpan(0, 30), HopCost(0.01, 0.100, 0.01))
    fast_in_the_middle = Candidate(peer(2), BlockSpan(10, 20), HopCost(0.01, 0.001, 0.01))
    assert path_of(slow_everywhere, fast_in_the_middle, num_blocks=30) == [
        (peer(1), "0:10"),
        (peer(2), "10:20"),
        (peer(1), "20:30"),
    ]


def test_of_equal_peers_the_smallest_id_is_taken() -> None:
    equals = [Candidate(peer(n), BlockSpan(0, 3), HopCost(1.0, 1.0, 1.0)) for n in range(20)]
    smallest = min(c.peer_id for c in equals)
    assert path_of(*equals, num_blocks=3) == path_of(*equals[::-1], num_blocks=3) == [(smallest, "0:3")]


def test_gaps_are_the_maximal_uncovered_runs() -> None:
    spans = [BlockSpan(3, 5), BlockSpan(4, 8), BlockSpan(12, 40), BlockSpan(50, 60)]
    assert [str(gap) for gap in gaps(spans, 45)] == ["0:3", "8:12", "40:45"]
    assert gaps([BlockSpan(0, 99)], 45) == ()
    assert [str(gap) for gap in gaps([], 2)] == ["0:2"]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), max_size=6), st.integers(1, 15))
def test_gaps_and_spans_partition_the_blocks(raw: list[tuple[int, int]], num_blocks: int) -> None:
    spans = [BlockSpan(start, start + length) for start, length in raw]
    missing = [block for gap in gaps(spans, num_blocks) for block in gap]
    assert missing == [block for block in range(num_blocks) if not any(block in span for span in spans)]


@pytest.mark.parametrize("width", [10, 40, 80])
def test_ten_thousand_peers_cost_few_relaxations(width: int) -> None:
    rng = random.Random(width)
    candidates = []
    for number in range(10_000):
        length = rng.randint(1, width)
        start = rng.randint(0, 80 - length)
        cost = HopCost(rng.uniform(0.001, 0.1), rng.uniform(0.0001, 0.01), rng.uniform(0.001, 0.1))
        candidates.append(Candidate(PeerId(f"peer-{number:05}"), BlockSpan(start, start + length), cost))
    path = cheapest_path(candidates, 80)
    assert path is not None
    # One edge per block of every span would be the sum below; a quadratic search would look at many times that.
    assert path.relaxed < sum(len(candidate.span) for candidate in candidates) / 1.2
    assert path.relaxed < 250_000


def test_peers_with_one_span_and_one_distance_cost_one_relaxation_per_block_together() -> None:
    rng = random.Random(1)
    candidates = [
        Candidate(PeerId(f"peer-{number:05}"), BlockSpan(0, 80), HopCost(0.05, rng.uniform(0.0001, 0.01), 0.05))
        for number in range(10_000)
    ]
    path = cheapest_path(candidates, 80)
    assert path is not None
    assert path.relaxed == 80

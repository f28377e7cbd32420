from __future__ import annotations

import itertools
import math
import random

import pytest

from routing.chain import MAX_SHORTLIST, Hops, cheapest_chain, shortlist
from routing.cost import HopCost
from routing.ids import BlockSpan, PeerId
from routing.path import Candidate, Candidates
from tests.routing.test_path import all_walks


@pytest.mark.parametrize("seed", range(40))
def test_no_chain_is_cheaper_when_every_pair_of_peers_has_its_own_price(seed: int) -> None:
    rng = random.Random(seed)
    blocks = rng.randint(1, 4)
    candidates = []
    for number in range(rng.randint(1, 5)):
        start = rng.randint(0, blocks - 1)
        cost = HopCost(rng.uniform(0.5, 1.5), rng.uniform(0, 0.3), rng.uniform(-0.5, 1))
        candidates.append(Candidate(PeerId(f"p{number}"), BlockSpan(start, rng.randint(start + 1, blocks)), cost))
    links = {(a.peer_id, b.peer_id): rng.uniform(0.5, 1.5) for a in candidates for b in candidates}
    costs = {candidate.peer_id: candidate.cost for candidate in candidates}

    def cost_s(hops: list[tuple[PeerId, BlockSpan]]) -> float:
        total = costs[hops[0][0]].enter_s + costs[hops[-1][0]].leave_s
        total += sum(len(span) * costs[peer].per_block_s for peer, span in hops)
        return total + sum(links[a, b] for (a, _), (b, _) in itertools.pairwise(hops))

    chain = cheapest_chain(candidates, blocks, lambda a, b: links[a, b])
    walks = all_walks(candidates, blocks)
    if not chain:
        assert not walks
        return
    assert [block for _, span in chain for block in span] == list(range(blocks))
    best = min(cost_s([(candidate.peer_id, span) for candidate, span in walk]) for walk in walks)
    assert cost_s(list(chain)) == pytest.approx(best)

    def least_s(peer: PeerId) -> float:
        return min(seconds for (_, b), seconds in links.items() if b == peer)

    def within(seconds: float) -> Hops:
        return cheapest_chain(candidates, blocks, lambda a, b: links[a, b], least_s=least_s, at_most_s=seconds)

    assert within(math.inf) == within(best) == within(1.3 * best) == chain
    assert within(0.999 * best) == ()


def test_a_shortlist_holds_the_best_of_every_place_and_whoever_must_stay() -> None:
    rng = random.Random(1)
    candidates = [
        Candidate(PeerId(f"p{n}"), BlockSpan(n % 3, n % 3 + 1), HopCost(rng.uniform(0, 1), 0.1, 0.1))
        for n in range(900)
    ]
    place = {c.peer_id: (n % 5, 0, 0) for n, c in enumerate(candidates)}
    worst = max(candidates, key=lambda c: c.cost.enter_s).peer_id
    few = shortlist(Candidates.of(candidates, lambda peer: float(place[peer][0])), [worst])
    assert {(place[c.peer_id], c.span) for c in few} == {
        ((n, 0, 0), BlockSpan(s, s + 1)) for n in range(5) for s in range(3)
    }
    assert worst in {c.peer_id for c in few}
    assert len(few) == 16 <= MAX_SHORTLIST

"""A plan is cheap enough to make one for every session, also in a large swarm.

From signed records, each verified once when it arrives (a fifth of a millisecond, in a thread of its own), as
`peers.discovery` does; what is timed is everything behind that, with places, measurements and spreading. CPU time,
the best of several runs: what else the machine does only adds, up to twice as much (ten thousand peers take 30 to 50
ms).
"""

from __future__ import annotations

import random
import time

import pytest

from routing.coordinates import Coordinate
from routing.records import Announcement, model_key, sign_record, verify_record
from routing.router import Router, RouteRequest
from tests.routing.swarms import MODEL, NOW_S, announcement, key

REQUEST = RouteRequest(model=MODEL, num_blocks=30, bytes_per_token=1152, cache_tokens=100, spread=0.3)


def swarm_of(count: int) -> list[Announcement]:
    """What so many signed records say, once they are verified."""
    rng = random.Random(0)
    peers = []
    for number in range(count):
        start = rng.randrange(0, 30, 5)
        end = min(30, start + rng.choice((5, 10, 15)))
        owner, speed = key(number), rng.uniform(0.5e-3, 5e-3)
        place = Coordinate(rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), 0.002, 0.2)
        said = announcement(owner.peer_id, start, end, decode_s_per_block=speed, place=place)
        under = model_key("main", MODEL, owner.peer_id)
        value = sign_record(said, under, owner)
        peers.append(
            verify_record(value, key=under, subkey=owner.peer_id, stored_expiry_s=said.expires_at_s, now_s=NOW_S)
        )
    return peers


@pytest.mark.parametrize(("count", "limit_s"), [(50, 0.005), (10_000, 0.1)])
def test_the_records_of_a_swarm_become_a_route_in_time(count: int, limit_s: float) -> None:
    announcements = swarm_of(count)
    rng, best_s = random.Random(1), float("inf")
    for _ in range(5):
        router = Router()
        for a in announcements[:50]:
            router.on_rtt(a.peer_id, rng.uniform(0.01, 0.2), NOW_S)
        started_s = time.process_time()
        router.on_announcements(announcements, NOW_S)
        route = router.plan(REQUEST, NOW_S)
        best_s = min(best_s, time.process_time() - started_s)
        assert route.hops[0].span.start == 0
        assert route.hops[-1].span.end == 30
    assert best_s < limit_s

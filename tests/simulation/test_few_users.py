"""What eight users can get of six peers, on a virtual clock: the arithmetic behind the lab's `users`.

Two chains of three peers, one half as fast as the other. A peer takes whatever waits as one batch, and a batch of b
tokens takes A + C·b: what ten layers of the small model take in float32 with one thread, paced to a share of a core.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Sequence

A_S, C_S = 0.0102, 0.00173
SHARES = (0.3, 0.15)
CLIENT_S = 0.010
USERS, STAGES = 8, 3
FAST, SLOW = (0, 0, 0), (1, 1, 1)


def tokens_per_s(routes: Sequence[tuple[int, ...]], length_s: float = 30.0) -> float:
    """Of all users together, each of which stays on its route: at every stage, which of the two peers."""
    order, done = itertools.count(), 0
    waiting: dict[tuple[int, int], list[int]] = {(stage, chain): [] for stage in range(STAGES) for chain in (0, 1)}
    busy: set[tuple[int, int]] = set()
    events: list[tuple[float, int, int, tuple[int, int], list[int]]] = []

    def arrive(at_s: float, user: int, stage: int) -> None:
        heapq.heappush(events, (at_s, next(order), 0, (stage, routes[user][stage]), [user]))

    for user in range(len(routes)):
        arrive(0.013 * user, user, 0)
    while events[0][0] < length_s:
        now_s, _, ended, peer, users = heapq.heappop(events)
        if ended:
            busy.remove(peer)
            for user in users:
                last = peer[0] == STAGES - 1
                done += last
                arrive(now_s + (CLIENT_S if last else 0.0005), user, 0 if last else peer[0] + 1)
        else:
            waiting[peer] += users
        if waiting[peer] and peer not in busy:
            busy.add(peer)
            batch, waiting[peer] = waiting[peer], []
            takes_s = (A_S + C_S * len(batch)) / SHARES[peer[1]]
            heapq.heappush(events, (now_s + takes_s, next(order), 1, peer, batch))
    return done / length_s


def test_eight_users_cannot_fill_two_chains_that_were_measured_with_eight_users_each() -> None:
    """So the lab compares with fixed routes, too: whoever deals cannot reach the sum of both."""
    bound = tokens_per_s([FAST] * USERS) + tokens_per_s([SLOW] * USERS)
    fixed = [tokens_per_s([FAST] * fast + [SLOW] * (USERS - fast)) for fast in range(USERS + 1)]
    rng = random.Random(0)
    mixed = [tokens_per_s([tuple(rng.choice((0, 0, 1)) for _ in range(3)) for _ in range(USERS)]) for _ in range(20)]
    assert 0.6 * bound < max(fixed + mixed) < 0.7 * bound
    assert max(fixed[4:6]) > 0.9 * max(fixed + mixed), "in proportion to speed is about as good as any"
    many = [FAST] * 22 + [SLOW] * 11
    assert tokens_per_s(many) > 0.95 * (tokens_per_s([FAST] * 22) + tokens_per_s([SLOW] * 11))

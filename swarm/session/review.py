"""For which steps a session plans its route, and when it leaves a hop that works for another one. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from routing.errors import NoRoute
from routing.ids import PeerId
from routing.router import Router
from routing.routes import RouteRequest

REVIEW_S_MIN: Final = 5.0
REVIEW_S_MAX: Final = 60.0
"""Between two looks at a session, which may have been slow from the start."""
CLEAR_GAIN: Final = 2.0
"""How much faster another route promises to be than the present one is, to be worth a replay."""
ANSWER_STEPS: Final = 128
"""Of one position, that are expected to follow whatever is to be sent now."""


def usual_tokens(counts: Sequence[int]) -> int:
    """Positions per step for which to plan, where steps over `counts` positions are to be sent: the mean over the
    session, as costs are linear in them. A route outlives its prompt, and chosen for that alone it would go through
    the peers that everybody's prompts go through."""
    return max(1, round((sum(counts) + ANSWER_STEPS) / (len(counts) + ANSWER_STEPS)))


def usual_saving(counts: Sequence[int], held: int) -> float:
    """By how many positions per step `usual_tokens` is too many where the first `held` need not be sent."""
    return min(held, sum(counts)) / (len(counts) + ANSWER_STEPS)


def next_review_s(age_s: float) -> float:
    """Seconds until a route that is so old is looked at again: always after about as long as before."""
    return min(REVIEW_S_MAX, max(REVIEW_S_MIN, age_s))


def worth_leaving(
    router: Router,
    request: RouteRequest,
    slowest: PeerId,
    now_s: float,
    *,
    step_s: float,
    others_s: float,
    slowed: bool,
) -> bool:
    """Whether `request.previous`, on which steps take `step_s`, would take less than half with another peer in place of
    `slowest`; `others_s` of it are waits and computation at the others, and would stay. `slowed`: steps took much less
    before; else other things take time as well, with any peers, and only what the route is estimated to take counts."""
    assert request.previous is not None
    if others_s * CLEAR_GAIN >= step_s:
        return False
    others = tuple(hop for hop in request.previous.hops if hop.peer_id != slowest)
    if not slowed:
        step_s = min(step_s, router.route_s(request, now_s) or math.inf)
    # Most routes would not gain enough by a peer that takes no time at all, and need no plan to know it.
    rest = replace(request, previous=replace(request.previous, hops=others))
    if (router.route_s(rest, now_s) or 0.0) * CLEAR_GAIN >= step_s:
        return False
    request = replace(request, keep=others)
    try:
        better = router.plan(request, now_s)
    except NoRoute:  # the records of the others ran out
        return False
    return better.cost_s * CLEAR_GAIN < step_s and all(hop.peer_id != slowest for hop in better.hops)

"""For which steps a session plans its route, and when it leaves a hop that works for another one. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
"""How much faster another route promises to be than the present one is, to be worth a replay,"""
SLOWED_GAIN: Final = 1.5
"""and where steps took less before, so that most of what they will take is known."""
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


def hop_to_leave(
    router: Router, request: RouteRequest, took_s: Mapping[PeerId, float], now_s: float, *, step_s: float, slowed: bool
) -> PeerId | None:
    """A hop of `request.previous`, if a step would take clearly less with another peer in its place; steps take
    `step_s`, of that `took_s` waits and computation at each peer. It is the one where most of that passes, or, where
    steps have `slowed` and most of it passes nowhere, the one without which ways are shortest.

    `slowed`: steps took half or less before, so what they take now beside the slowest hop is known, estimates of ways
    and all, and stays; of the other peer only what it adds is estimated. Else estimates are compared with estimates:
    other things take time as well, with any peers, and what steps take says nothing of these.
    """
    if slowed and 2 * sum(took_s.values()) < step_s:
        return _lies_far(router, request, now_s, step_s=step_s)
    return _computes_long(router, request, took_s, now_s, step_s=step_s, slowed=slowed)


def _computes_long(
    router: Router, request: RouteRequest, took_s: Mapping[PeerId, float], now_s: float, *, step_s: float, slowed: bool
) -> PeerId | None:
    assert request.previous is not None
    gain = SLOWED_GAIN if slowed else CLEAR_GAIN
    if (total_s := sum(took_s.values())) > step_s:  # of one step, which took longer than they usually do
        took_s = {peer: one_s * step_s / total_s for peer, one_s in took_s.items()}
    slowest = max(took_s, key=took_s.__getitem__)
    others_s = sum(took_s.values()) - took_s[slowest]
    if others_s * gain >= step_s:
        return None
    others = tuple(hop for hop in request.previous.hops if hop.peer_id != slowest)
    rest_s = router.route_s(replace(request, previous=replace(request.previous, hops=others)), now_s) or 0.0
    if slowed:
        stays_s = max(others_s, step_s - took_s[slowest])
    else:
        stays_s, step_s = rest_s, min(step_s, router.route_s(request, now_s) or math.inf)
    if stays_s * gain >= step_s:
        return None  # most routes: they need no plan to know it
    try:
        better = router.plan(replace(request, keep=others), now_s)
    except NoRoute:  # the records of the others ran out
        return None
    expected_s = stays_s + max(0.0, better.cost_s - rest_s)
    if expected_s * gain >= step_s or any(hop.peer_id == slowest for hop in better.hops):
        return None
    return slowest


def _lies_far(router: Router, request: RouteRequest, now_s: float, *, step_s: float) -> PeerId | None:
    """Which way became long is not what steps tell: estimates, which hear of round trips, are compared."""
    assert request.previous is not None
    if (now_takes_s := router.route_s(request, now_s)) is None:
        return None
    enough_s = min(step_s, now_takes_s) / SLOWED_GAIN
    best: PeerId | None = None
    try:
        if router.plan(replace(request, previous=None), now_s).cost_s >= enough_s:
            return None  # whatever was left
    except NoRoute:
        return None
    for leaving in request.previous.hops:
        others = tuple(hop for hop in request.previous.hops if hop != leaving)
        try:
            better = router.plan(replace(request, keep=others, avoid=request.avoid | {leaving.peer_id}), now_s)
        except NoRoute:  # it alone has its blocks
            continue
        if better.cost_s < enough_s:
            best, enough_s = leaving.peer_id, better.cost_s
    return best

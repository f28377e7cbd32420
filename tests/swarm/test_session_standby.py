"""The rows of the standbys' table, one by one; `test_session_core` drives them through everything else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from routing.ids import BlockSpan, PeerId, StepId
from routing.routes import Hop
from swarm.session.actions import Feed, NeedRoute, NeedStandbys, OpenHops, OpenStandby, Release
from swarm.session.core import STANDBY_FED_EVERY_S, SessionConfig, SessionCore
from tests.swarm.test_session_core import LOST, SESSION, P, Q, R, kinds, opened, route, sent

S = PeerId("S")
CONFIG = SessionConfig(standby=True, standby_lag=4, standby_rest=2, chunk_positions=8)
FIRST, SECOND = (Hop(peer_id=peer, span=BlockSpan(at, at + 1), addresses=()) for at, peer in enumerate((S, R)))


def standing(*, positions: int = 6, fed: bool = True) -> SessionCore:
    """On a route over P and Q, with R to stand by for Q."""
    core = SessionCore(SESSION, CONFIG)
    core.submit(0, positions, 0)
    core.route_ready(route(P, Q))
    opened(core)
    assert kinds(core.result(StepId(1), 1))[-1] is NeedStandbys
    assert core.standbys_found(1, [SECOND]) == [OpenStandby(SECOND, 1, keep=0)]
    (feed,) = core.opened(R, 1, 1)
    assert isinstance(feed, Feed)
    assert (feed.to, feed.step.first, feed.step.count, feed.step.hop, feed.step.until) == (SECOND, 0, positions, 1, 2)
    if fed:
        assert core.fed(R, feed.step.step, 1) == []
    return core


def step(core: SessionCore, first: int, count: int = 1) -> list[type]:
    number, _ = core.submit(first, count, 0)
    return kinds(core.result(number, core.epoch))[1:]


def test_a_standby_takes_the_place_of_its_hop_and_lacks_only_what_it_lagged_behind() -> None:
    core = standing()
    assert step(core, 6, 2) == []
    core.submit(8, 1, 0)
    released, need = core.hop_lost(Q, LOST)
    assert (released, need) == (
        Release(route(P, Q).hops[1:]),
        NeedRoute(frozenset(), (route(P).hops[0], SECOND), SessionConfig().gap_patience_s),
    )
    (opening,) = core.route_ready(route(P, R))
    assert isinstance(opening, OpenHops)
    assert opening.keep == (9, 6)
    core.opened(P, 0, 2, 8, 0)
    (replay,) = sent(core.opened(R, 1, 2, 6, 0))
    assert (replay.first, replay.count, replay.hop, replay.until) == (6, 2, 1, None)
    (pending,) = sent(core.result(replay.step, 2))
    assert (pending.first, pending.hop) == (8, 0)
    assert core.standby_hops == ()


def test_a_standby_hears_the_next_positions_when_it_lags_and_nothing_while_it_works() -> None:
    core = standing(fed=False)
    assert step(core, 6, 6) == []
    (feed,) = core.fed(R, StepId(2), 1)
    assert isinstance(feed, Feed)
    assert (feed.step.first, feed.step.count) == (6, 6)
    assert core.fed(R, StepId(2), 1) == core.fed(Q, feed.step.step, 1) == core.fed(R, feed.step.step, 1) == []


def test_a_standby_of_slow_steps_lags_by_fewer_so_that_it_does_not_forget() -> None:
    core = standing()
    for step_s in (0.0, 0.1):
        core.paced(step_s)
        assert Feed not in step(core, core._steps.end), "four may lack"
    core.paced(STANDBY_FED_EVERY_S)
    assert Feed in step(core, core._steps.end), "a single one may"


def test_what_a_step_undoes_does_not_count_though_it_was_on_its_way_to_the_standby() -> None:
    core = standing(fed=False)
    back, _ = core.submit(2, 1, 0)
    assert core.fed(R, StepId(2), 1) == []
    core.result(back, 1)
    (feed,) = [a for a in core.result(core.submit(3, 3, 0)[0], 1) if isinstance(a, Feed)]
    assert (feed.step.first, feed.step.count) == (2, 4)


@pytest.mark.parametrize("heard", [False, True])
def test_a_standby_may_hold_what_was_undone_until_it_says_that_it_heard_what_came_after(heard: bool) -> None:
    core = standing()
    back, _ = core.submit(2, 5, 0)
    (feed,) = [action for action in core.result(back, 1) if isinstance(action, Feed)]
    assert (feed.step.first, feed.step.count) == (2, 5)
    if heard:
        core.fed(R, feed.step.step, 1)
    core.submit(7, 1, 0)
    core.hop_lost(Q, LOST)
    (opening,) = (a for a in core.route_ready(route(P, R)) if isinstance(a, OpenHops))
    assert opening.keep == (8, 7 if heard else 2)


def test_what_is_undone_while_a_standby_opens_is_not_believed_of_it() -> None:
    core = standing()
    core.submit(6, 1, 0)
    core.stalled(LOST)
    opening, again = core.route_ready(route(P, Q))
    assert again == OpenStandby(SECOND, 2, keep=6)
    core.opened(P, 0, 2, 7, 0)
    core.opened(Q, 1, 2, 7, 0)
    core.result(core.pending[0].step, 2)
    back, _ = core.submit(3, 2, 0)
    core.opened(R, 1, 2, 6)
    core.result(back, 2)
    core.submit(5, 1, 0)
    core.hop_lost(Q, LOST)
    (opening,) = (a for a in core.route_ready(route(P, R)) if isinstance(a, OpenHops))
    assert opening.keep == (6, 3)


def test_a_standby_that_fails_is_let_go_of_and_looked_for_again_later_and_later() -> None:
    core = standing()
    assert core.standby_lost(R, 0) == [], "of an older epoch"
    assert core.standby_lost(R, 1) == [Release((SECOND,))]
    assert [step(core, 6 + at) for at in range(4)] == [[], [], [], [NeedStandbys]]
    assert core.standbys_found(1, []) == []
    assert [step(core, 10 + at) for at in range(8)] == [*[[]] * 7, [NeedStandbys]]


def test_a_busy_predecessor_is_asked_again_and_a_journal_that_is_gone_ends_the_standby() -> None:
    core = standing(fed=False)
    assert core.feed_failed(StepId(2), 1, busy=True) == []
    assert step(core, 6) == [Feed]
    assert core.feed_failed(StepId(4), 1, busy=False) == [Release((SECOND,))]


def test_standbys_go_with_the_route_and_stay_with_the_span() -> None:
    core = standing()
    core.submit(6, 1, 0)
    core.hop_lost(P, LOST)
    actions = core.route_ready(route(PeerId("T"), Q))
    assert kinds(actions) == [OpenHops, OpenStandby]
    assert actions[1] == OpenStandby(SECOND, 2, keep=6)
    core = standing()
    core.submit(6, 1, 0)
    core.hop_lost(P, LOST)
    whole = replace(route(P), hops=(Hop(peer_id=S, span=BlockSpan(0, 2), addresses=()),))
    assert kinds(core.route_ready(whole)) == [Release, OpenHops]
    assert core.standby_hops == ()
    assert standing().close() == [Release((*route(P, Q).hops, SECOND))]


def test_a_standby_that_leaves_or_dies_disturbs_nobody() -> None:
    core = standing()
    core.submit(6, 1, 0)
    assert core.hop_leaves(R, 1, LOST, answers=True) == [Release((SECOND,))]
    core = standing()
    core.submit(6, 1, 0)
    assert core.hop_lost(R, LOST) == [Release((SECOND,))]
    assert core.outstanding

"""A small swarm on a virtual clock: deterministic, covered, and within what its peers can do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swarm.simulation.run import Simulation, simulate
from swarm.simulation.world import SimulationConfig
from tests.simulation.optimum import most_tokens_per_s


class Closed(Simulation):
    """Nobody joins after the start."""

    def _join(self, *, ready: bool = False) -> None:
        if ready:
            super()._join(ready=True)


SMALL = SimulationConfig(peers=40, users=40, clients=3, minutes=1, new_tokens=60, blocks=16, churn_per_hour=2.0)


def test_a_seed_decides_everything_and_the_swarm_stays_covered_within_its_bounds() -> None:
    report = simulate(SMALL)
    assert simulate(SMALL) == report
    assert simulate(replace(SMALL, seed=1, minutes=0.2)).samples[0] != report.samples[0]
    assert report.coverage >= 0.99
    assert 0 < report.tokens_per_s <= report.bound_tokens_per_s * 1.01
    assert 0 < report.fairness <= 1
    assert report.moves <= report.joins
    assert report.rebuilt_routes > 0, "peers died and left under sessions"
    assert report.failed_sessions == 0
    page = report.page()
    assert page.count("<polyline") == 3
    assert "http" not in page.replace("http://www.w3.org", "")
    assert report.as_plain()["of_bound"] == report.of_bound
    bars = [line.split()[-1] for line in report.lines() if "bar: " in line]
    assert bars == ["met" if met else "missed" for met in report.met.values()]
    assert len(bars) == 4
    assert report.met["coverage"] is (report.coverage >= 0.999)


def test_a_gap_is_healed_by_peers_that_can_be_spared_and_by_nobody_else() -> None:
    simulation = Closed(replace(SMALL, users=3, churn_per_hour=0.0, minutes=3))
    block = 3
    for peer in list(simulation.peers.values()):
        if any(block in span for span in peer.spans):
            peer.dies_at_s = 130.0
    report = simulation.run()
    assert report.moves == report.heals >= 1
    assert report.healed_s_max <= 120, "most of it downloads"
    assert report.samples[-1].covered


def test_nobody_could_give_few_users_the_maximum_flow_and_a_good_dealer_could_give_it_to_many() -> None:
    """So what a simulation lacks at six users per peer is not for want of users."""
    simulation = Simulation(replace(SMALL, churn_per_hour=0.0))
    flow = simulation._bound()
    assert 5 < most_tokens_per_s(simulation, 6) / 6 < 12, "tokens per second of one user who never waits"
    assert most_tokens_per_s(simulation, 2 * SMALL.peers) < 0.9 * flow
    assert 0.99 * flow < most_tokens_per_s(simulation, 6 * SMALL.peers) < 1.001 * flow


@pytest.mark.parametrize(
    "wrong", [{"peers": 0}, {"users": 1, "clients": 2}, {"minutes": 0}, {"churn_per_hour": -1}, {"new_tokens": 0}]
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        replace(SMALL, **wrong)

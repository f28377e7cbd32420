from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.coordinates import Coordinate, check_coordinate, distance_s, moved
from routing.errors import CallerError

POINTS = st.builds(Coordinate, st.floats(-10, 10), st.floats(-10, 10), st.floats(0, 10), st.floats(0, 1))


def test_nodes_that_measure_a_few_others_learn_to_predict_the_rest() -> None:
    """Three continents, access links of 1 to 15 ms, a tenth of noise: the median prediction is a tenth off at most."""
    rng = random.Random(0)
    where = [(rng.choice([(0, 0), (0.09, 0), (0.05, 0.14)]), rng.uniform(0.001, 0.015)) for _ in range(60)]

    def rtt_s(a: int, b: int) -> float:
        return math.dist(where[a][0], where[b][0]) + where[a][1] + where[b][1]

    points = [Coordinate() for _ in where]
    for _ in range(60):
        for node in range(len(points)):
            other = rng.choice([n for n in range(len(points)) if n != node])
            sample_s = rtt_s(node, other) * rng.uniform(0.95, 1.05)
            points[node] = moved(points[node], points[other], sample_s, salt=str(other))
    wrong = [abs(distance_s(points[a], points[b]) - rtt_s(a, b)) / rtt_s(a, b) for a in range(60) for b in range(a)]
    assert statistics.median(wrong) < 0.1
    assert sum(point.usable for point in points) > 48


@given(POINTS, POINTS, st.floats(), st.text(max_size=5))
def test_no_sample_and_no_claim_moves_a_point_out_of_bounds(
    mine: Coordinate, theirs: Coordinate, rtt_s: float, salt: str
) -> None:
    point = moved(mine, theirs, rtt_s, salt=salt)
    assert check_coordinate(point) == point
    assert distance_s(point, theirs) == pytest.approx(distance_s(theirs, point))
    assert distance_s(point, theirs) >= 0


@pytest.mark.parametrize("point", [(math.nan, 0, 0, 0), (0, math.nan, 0, 0), (0, 0, -1, 0), (0, 0, 0, math.inf)])
def test_a_point_that_no_record_can_carry_is_refused(point: tuple[float, float, float, float]) -> None:
    with pytest.raises(CallerError):
        check_coordinate(Coordinate(*point))

"""How long the answers of one route usually take, and so after which silence a peer is given up. Pure.

Steps of a few positions are timed as they are, and prompts by position; time is counted from one sign of life to the
next, because so is silence.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable
from statistics import median_low

from peers.tally import STEP_POSITIONS
from routing.ids import PeerId, SessionId

SILENCE_S_MIN = 2.0
PATIENCE = 3.0
"""Times the usual time."""
HUNG = 20.0
"""Times the usual, after which a hop that only says that it computes is taken for hung where others have its blocks."""
SLOW = 2.0
"""Times the best that steps took, from which on another route is thought of."""
_SMOOTHING = 0.3
_FORGETS = 1 + 1 / 256
"""Times what the best was, after each step: a session whose context grows takes longer with any peer."""
LATELY = 3
"""Steps: one that takes long is a pause of somebody's, most of these are a habit."""
_REMEMBERED = 9
"""Steps; silence is measured by their median, so that one which took long does not let a dead peer be waited for."""


class Pace:
    """Measurements of one route."""

    def __init__(self) -> None:
        self._steps_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._step_s = 0.0
        self._best_step_s = math.inf
        self._position_s = 0.0
        self._hops_s: deque[tuple[tuple[PeerId, float], ...]] = deque(maxlen=LATELY)

    def answered(self, positions: int, seconds: float, hops_s: Iterable[tuple[PeerId, float]] = ()) -> None:
        """A step over so many positions was answered, so long after the last sign of life; of that it waited and was
        computed so long at each hop, where they all say so."""
        if positions <= STEP_POSITIONS:
            self._steps_s.append(seconds)
            if hops_s := tuple(hops_s):
                self._hops_s.append(hops_s)
            self._step_s = _smoothed(self._step_s, seconds)
            self._best_step_s = min(_FORGETS * self._best_step_s, self._step_s)
        else:
            self._position_s = _smoothed(self._position_s, seconds / positions)

    def usual_s(self, positions: int) -> float:
        """0 while nothing like it was measured."""
        return self._step_s if positions <= STEP_POSITIONS else max(self._step_s, positions * self._position_s)

    @property
    def hops_s(self) -> dict[PeerId, float]:
        """What of a step passed at each hop, on average of the last ones; empty while nothing is known."""
        means_s: defaultdict[PeerId, float] = defaultdict(float)
        for peer, hop_s in (hop for hops_s in self._hops_s for hop in hops_s):
            means_s[peer] += hop_s / len(self._hops_s)
        return dict(means_s)

    @property
    def slowed(self) -> bool:
        """Steps have come to take much longer than they did."""
        lately_s = median_low(tuple(self._steps_s)[-LATELY:] or (0.0,))
        return min(self._step_s, lately_s) > SLOW * self._best_step_s

    def silence_s(self, positions: int) -> float:
        """A peer that neither answers a step over so many positions nor a ping for this long is given up."""
        usual_s = median_low(self._steps_s) if self._steps_s else 0.0
        if positions > STEP_POSITIONS:
            usual_s = max(usual_s, positions * self._position_s)
        return max(SILENCE_S_MIN, PATIENCE * usual_s)


def hung_after_s(usual_s: float, least_s: float, session: SessionId) -> float:
    """For how long a hop is believed that it computes a step which usually takes `usual_s`. Another time for each
    session, up to twice as long: where a peer is not hung but has too much to do, not all of its users leave at once,
    and those who stay are served once the others are gone."""
    return max(least_s, HUNG * usual_s) * (1.0 + session.raw[0] / 255)


def _smoothed(known_s: float, new_s: float) -> float:
    return known_s + _SMOOTHING * (new_s - known_s) if known_s else new_s

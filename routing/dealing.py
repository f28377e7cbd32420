"""Which of this node's own sessions are where: weighted round robin over hops, as a price.

Owns the count. Records tell what everybody's sessions do with seconds of delay, and nodes that choose by them choose
alike; of its own sessions a node knows at once. Where every node gives each peer its part of the maximum flow, so do
all of them together, and none has to hear of the others. Knows neither time nor routes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence, Set
from typing import Final

from routing.ids import PeerId

MAX_SESSIONS: Final = 20_000
SESSIONS_MIN: Final = 32
"""With fewer of its own, a node counts as if it had so many: one session more or less says nothing then."""
ROOMY: Final = 0.8
"""Up to this part of what it can carry a peer has room: nobody is asked to take a slower way for others."""
GAIN: Final = 30.0
"""Cycles that a route gets dearer by when all of its peers are used by a whole of what they can carry beyond that."""


class Dealing:
    """Guards the sessions that were dealt and have not ended; of more than MAX_SESSIONS, the first are forgotten."""

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._max_sessions = max_sessions
        self._sessions: dict[Hashable, tuple[tuple[PeerId, float], ...]] = {}
        self._asked_s: defaultdict[PeerId, float] = defaultdict(float)

    def __contains__(self, session: Hashable) -> bool:
        return session in self._sessions

    @property
    def peers(self) -> Set[PeerId]:
        """Who has any; a live view."""
        return self._asked_s.keys()

    def deal(self, session: Hashable, hops: Sequence[tuple[PeerId, float]]) -> None:
        """The session is at these peers, and at none where it was before; each needs so many seconds for a token."""
        self.end(session)
        if len(self._sessions) >= self._max_sessions:
            self.end(next(iter(self._sessions)))
        self._sessions[session] = tuple(hops)
        for peer, seconds in hops:
            self._asked_s[peer] += seconds

    def end(self, session: Hashable) -> None:
        """It is nowhere any more. Idempotent."""
        for peer, seconds in self._sessions.pop(session, ()):
            self._asked_s[peer] -= seconds
            if self._asked_s[peer] < 1e-12:
                del self._asked_s[peer]

    def part(self, peer: PeerId, tokens_per_s: float) -> float:
        """What the peer has of this node's sessions, as a multiple of its part in a flow of `tokens_per_s`."""
        asked_s = self._asked_s.get(peer, 0.0)
        return asked_s * tokens_per_s / max(SESSIONS_MIN, len(self._sessions)) if asked_s else 0.0


def price_s(part: float, turn_s: float, cycle_s: float) -> float:
    """By how much a whole route through peers that got `part` is made dearer.

    `turn_s` passes between two tokens of a session where all sessions are shared out in proportion and nobody idles,
    `cycle_s` where nobody waits: a peer with a part of 1 is used to turn_s / cycle_s. It costs nothing below ROOMY, as
    then the fastest way is best for all. A hop pays by its blocks, as it takes of the peer by them (so the prices are
    the dual of the maximum flow).
    """
    return GAIN * cycle_s * max(0.0, part * turn_s / cycle_s - ROOMY)

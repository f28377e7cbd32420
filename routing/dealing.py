"""Which of this node's own sessions are where: weighted round robin over hops, as a price.

Owns the count. Records tell what everybody's sessions do with seconds of delay, and nodes that choose by them choose
alike; of its own sessions a node knows at once. Where every node gives each peer its part of the maximum flow, so do
all of them together, and none has to hear of the others. Knows neither time nor routes.

Sessions are whole: if every one of forty nodes gave one to a small peer that has none of its own yet, that would be
forty, where eight are its part of them all. So every node counts at every peer as if a fraction of a session were there
already, another one at each: then one of five gives it one, and all together round to what they should (dithering; the
fractions of two nodes differ by a rotation, Cranley and Patterson 1976).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable, Sequence, Set
from typing import Final

from routing.flow import GOLDEN
from routing.ids import PeerId

MAX_SESSIONS: Final = 20_000
SESSIONS_MIN: Final = 8
"""With fewer of its own, a node counts as if it had so many: where one session goes, others' parts decide little."""
ROOMY: Final = 0.8
"""Up to this part of what it can carry a peer has room: nobody is asked to take a slower way for others."""
PHASE_CHARS: Final = 4
"""Of a peer id, the last ones: of a hash or a key."""
GAIN: Final = 30.0
"""Cycles that a route gets dearer by when all of its peers are used by a whole of what they can carry beyond that."""


class Dealing:
    """Guards the sessions that were dealt and have not ended; of more than MAX_SESSIONS, the first are forgotten."""

    def __init__(self, turn: float = 0.0, max_sessions: int = MAX_SESSIONS) -> None:
        """`turn`: in [0, 1), another one for each node."""
        self.turn = turn
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

    def part(self, peer: PeerId, one_s: float, tokens_per_s: float) -> float:
        """What the peer has of this node's sessions, as a multiple of its part in a flow of `tokens_per_s`; with the
        fraction of one that takes `one_s` of it for a token."""
        asked_s = self._asked_s.get(peer, 0.0) + (phase(peer) + self.turn) % 1.0 * one_s
        return asked_s * self.per_s(tokens_per_s)

    def per_s(self, tokens_per_s: float) -> float:
        """The part that a peer has for each second of which it is asked for a token."""
        return tokens_per_s / max(SESSIONS_MIN, len(self._sessions))


@functools.lru_cache(maxsize=MAX_SESSIONS)
def phase(peer: PeerId) -> float:
    """In [0, 1), and evenly so over peers."""
    return int.from_bytes(peer[-PHASE_CHARS:].encode("ascii"), "big") * GOLDEN % 1.0


def price_s(part: float, turn_s: float, cycle_s: float) -> float:
    """By how much a whole route through peers that got `part` is made dearer.

    `turn_s` passes between two tokens of a session where all sessions are shared out in proportion and nobody idles,
    `cycle_s` where nobody waits: a peer with a part of 1 is used to turn_s / cycle_s. It costs nothing below ROOMY, as
    then the fastest way is best for all. A hop pays by its blocks, as it takes of the peer by them (so the prices are
    the dual of the maximum flow).
    """
    return GAIN * cycle_s * max(0.0, part * turn_s / cycle_s - ROOMY)

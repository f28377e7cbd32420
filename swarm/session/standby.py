"""Second peers for the hops of a session, kept filled while the first ones work. Pure.

Owns which hop has one, what it holds and what it should hear next; opening, feeding and using it is `core`'s. A
standby hears what its hop heard, in the background, from the hop before it, and lags behind by a few positions at most.

    state     event                            next
    lacking   a step is answered, rested       asked      NeedStandbys
    asked     nobody found for some hop        lacking    rests
    asked     found                            opening    OpenStandby
    opening   opened                           filling    Feed, if it lags
    filling   fed, or a step is answered       filling    Feed, if it lags and none is under way
    filling   the hop before it is busy        filling    the same again, with the next answer
    filling   a step rolls back                filling    what lies behind counts no more
    filling   another epoch                    opening    OpenStandby: it keeps what counts
    any       lost, busy, leaves, refuses      lacking    Release; rests, twice as long each time
    any       its hop is lost, leaves          on route   NeedRoute keeps it in that hop's place
    any       the session lets go of its route lacking    Release

So a standby never holds anything up: whatever goes wrong with it, it is let go of. It is told no keys of what it will
hear: the hop before it sends what the session is by then, which may have gone back meanwhile, and it would keep that
under keys of what was undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

from routing.ids import PeerId, StepId
from routing.routes import Hop

REST_DOUBLINGS = 6


@dataclass(slots=True, kw_only=True, eq=False)
class Standby:
    """One second peer."""

    hop: Hop
    open: bool = False
    """Under the present epoch."""
    held: int = 0
    """Positions that it is known to hold."""
    reach: int = 0
    """Up to here, what it holds, if it does, is what the session's history says."""
    keep: int = 0
    """What it was told to keep when it was opened, without what was undone since then."""
    feed: StepId | None = None
    """What it hears now."""
    feed_end: int = 0
    steady: bool = True
    """Nothing was undone since it was asked to hear that."""
    undone: bool = False
    """Past `reach` it may hold what the session has undone: so until it says that it heard what came after."""


class Standbys:
    """Those of one session, at most one for each hop."""

    def __init__(self, rest_steps: int) -> None:
        """`rest_steps`: answered steps between a loss and the next search, the first time."""
        self._asked = 0
        """For so many hops."""
        self._rest_steps = rest_steps
        self._by_start: dict[int, Standby] = {}
        self._rest = 0
        self._losses = 0

    def __iter__(self) -> Iterator[Standby]:
        return iter(self._by_start.values())

    def at(self, peer: PeerId, start: int) -> Standby | None:
        found = self._by_start.get(start)
        return found if found is not None and found.hop.peer_id == peer else None

    def fed_by(self, step: StepId) -> Standby | None:
        """The one that hears `step`."""
        return next((standby for standby in self if standby.feed == step), None)

    def uses(self, peer: PeerId) -> bool:
        return any(standby.hop.peer_id == peer for standby in self)

    def lacking(self, hops: Iterable[Hop]) -> tuple[Hop, ...]:
        """Those of `hops` for which somebody is to be asked for now."""
        if self._asked or self._rest:
            return ()
        lacking = tuple(hop for hop in hops if hop.span.start not in self._by_start)
        self._asked = len(lacking)
        return lacking

    def found(self, hops: Iterable[Hop]) -> list[Standby]:
        """The answer to what was asked: new standbys."""
        asked, self._asked = self._asked, 0
        new = [Standby(hop=hop) for hop in hops if hop.span.start not in self._by_start]
        self._by_start |= {standby.hop.span.start: standby for standby in new}
        if len(new) < asked:
            self.rest()
        return new

    def rest(self) -> None:
        """Ask for nobody for some steps, more of them each time."""
        self._rest = self._rest_steps << self._losses
        self._losses = min(self._losses + 1, REST_DOUBLINGS)

    def answered(self) -> None:
        """The session came a step further."""
        self._rest = max(0, self._rest - 1)

    def rolled_back(self, position: int) -> None:
        for standby in self:
            if position < max(standby.reach, standby.feed_end, standby.keep):
                standby.undone, standby.steady = True, False
            standby.held, standby.reach = min(standby.held, position), min(standby.reach, position)
            standby.feed_end, standby.keep = min(standby.feed_end, position), min(standby.keep, position)

    def opens(self, standby: Standby, keep: int) -> None:
        """It begins anew, with so many positions of the session as it now is at most."""
        standby.open, standby.feed, standby.feed_end = False, None, 0
        standby.keep, standby.undone = keep, False

    def opened(self, standby: Standby, held: int) -> None:
        standby.open = True
        standby.held = min(held, standby.keep)
        standby.reach = max(standby.reach, standby.held)

    def feeds(self, standby: Standby, step: StepId, end: int) -> None:
        standby.feed, standby.feed_end, standby.steady = step, end, True
        if not standby.undone:
            standby.reach = max(standby.reach, end)

    def fed(self, standby: Standby) -> None:
        standby.feed = None
        if standby.steady:
            standby.undone, standby.reach = False, max(standby.reach, standby.feed_end)
        standby.held = min(standby.feed_end, standby.reach)

    def take(self, hop: Hop) -> Standby | None:
        """The one that is `hop` itself, which is on the route from now on."""
        found = self.at(hop.peer_id, hop.span.start)
        return self._by_start.pop(hop.span.start) if found is not None and found.hop.span == hop.span else None

    def forget(self, hop: Hop) -> None:
        self._by_start.pop(hop.span.start, None)

    def drop(self, peers: Set[PeerId]) -> None:
        """These hold nothing any more."""
        self._by_start = {start: s for start, s in self._by_start.items() if s.hop.peer_id not in peers}

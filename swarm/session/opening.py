"""A route that is opened: what its hops say they hold, and what they must hear because of that. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from msgspec.structs import replace

from routing.ids import PeerId, StepId
from routing.routes import Hop
from swarm.session import repair
from swarm.session.steps import PendingStep


class Opening:
    """Of one route under one epoch."""

    def __init__(self, hops: Sequence[Hop] = (), offer: int = 0, keep: tuple[int, ...] = ()) -> None:
        """`offer`: positions that hops were asked for. `keep`: those that each was told to keep."""
        self.keep = keep
        self.held = 0
        """Positions that every hop holds, once it is `complete`; fewer where some of them are not gone by."""
        self._hops = hops
        self._offer = offer
        self._at = {(hop.peer_id, hop.span.start): index for index, hop in enumerate(hops)}
        self._missing = set(self._at)
        """Hops that are not open yet, each by its peer and first block."""
        self._holds = [0] * len(hops)
        """Positions that each hop held when it was opened."""
        self._journals = [0] * len(hops)
        """The lowest position from which each hop could then send again what it sent."""

    @property
    def complete(self) -> bool:
        """Every hop is open."""
        return not self._missing

    @property
    def held_any(self) -> bool:
        """Some hop is taken to hold something."""
        return any(self._holds)

    def opened(self, peer: PeerId, start: int, held: int, journal: int | None) -> bool:
        """The hop at `peer` that begins with block `start` is open; `journal`: None where that is not believed.
        False where nobody waits for it."""
        if (peer, start) not in self._missing:
            return False
        self._missing.discard((peer, start))
        index = self._at[peer, start]
        self._holds[index] = min(held, max(self._offer, self.keep[index]))
        self._journals[index] = self._holds[index] if journal is None else journal
        self.held = min(self._holds)
        return True

    def steps(
        self,
        pending: Sequence[PendingStep],
        cuts: Callable[[int], Sequence[int]],
        chunk: Callable[[int, Callable[[], Sequence[Hop]]], int],
        new_id: Callable[[], StepId],
    ) -> Iterator[PendingStep]:
        """The pending steps without what every hop holds, and before each of them a replay of what some hop lacks by
        then: in pieces of `chunk(count, hops)` positions, for those that run them, which begin anew at `cuts(end)`."""
        steps = [step.beyond(self.held) for step in pending]
        begin = repair.begin_at(self._holds, self._journals, [(step.first, step.first + step.count) for step in steps])

        def replay(leg: repair.Leg) -> Iterator[PendingStep]:
            size = chunk(leg.end - leg.first, lambda: self._hops[leg.hop : leg.until])
            until = None if leg.until == len(begin) else leg.until
            for first in range(leg.first, leg.end, size):
                count = min(size, leg.end - first)
                yield PendingStep(
                    step=new_id(), first=first, count=count, want_from=count, replay=True, hop=leg.hop, until=until
                )

        held = self.held
        for step in steps:
            # a later step may have been answered before an earlier one: there the pending steps leave a hole
            bounds = [held, *(cut for cut in cuts(step.first) if cut > held), step.first]
            for start, end in pairwise(bounds):
                for leg in repair.legs(begin, start, end):
                    yield from replay(leg)
            alone = self.held <= step.first < held
            for leg in repair.legs(begin, step.first, step.first + step.count):
                if leg.until == len(begin):
                    yield replace(step, alone=alone, hop=leg.hop)
                else:
                    yield from replay(leg)
            held = step.first + step.count

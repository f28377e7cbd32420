"""What one plan sees of the peers that it may use, and what each of them costs.

Owns prices: made when they are asked for, once, of announcements, measurements, and how this node's sessions stand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from routing.chain import Hops
from routing.coordinates import Coordinate, half_trip_s
from routing.cost import HopCost, hop_cost, longer, waits_s
from routing.crowd import Crowd
from routing.detours import HERE
from routing.estimates import Estimates, PeerEstimate
from routing.ids import BlockSpan, PeerId
from routing.path import Candidates
from routing.records import Announcement
from routing.routes import RouteRequest

HYSTERESIS: Final = 0.2
"""A new route must save this share of the previous one's cost, or the previous one stays; and where one of its hops is
lost, whoever takes the place of another must save it of that one's."""

_LAST_RESORT_S: Final = 1e6
"""Added to the entry of a peer that should serve only where nobody else can; no honest cost comes near."""
_SHORT_S: Final = 1e3
"""The same for one whose room may not last: better than a last resort, and dearer than any route."""


class _Known(msgspec.Struct, frozen=True, gc=False):
    """What one plan found out about a peer."""

    peer_id: PeerId
    estimate: PeerEstimate
    cost: HopCost
    compared: HopCost
    """What it is compared by: dearer for last resorts, cheaper for peers of the route that was."""
    price_s_per_block: float
    """The part of `compared.per_block_s` that is there for this node's other sessions."""
    beside_trip_s: float
    """`cost.enter_s` without the way from this node to the peer."""
    compared_beside_trip_s: float
    """The same of `compared.enter_s`."""
    scale: float
    """What a second of a trip counts in `compared`."""
    place: Coordinate | None
    """Where that says anything."""


@dataclass(slots=True, kw_only=True)
class View:
    """Good for one request at one moment."""

    request: RouteRequest
    estimates: Estimates
    now_s: float
    announcements: Sequence[Announcement]
    crowd: Crowd
    excluded: dict[PeerId, str]
    """Who of the crowd is not to be entered, and why."""
    busy: Set[PeerId]
    settled: Set[PeerId]
    previous: Hops
    whole: bool
    """Whether `previous` can still be used as it is."""
    kept: Hops
    """The hops of `request.kept`, where all of them can be used."""
    detoured: bool
    """Whether any way is known to take something else than half a round trip."""
    _known: dict[PeerId, _Known] = field(default_factory=dict)

    def usable(self, peer: PeerId) -> bool:
        """Whether it may be entered."""
        return peer in self.crowd.by_peer and peer not in self.excluded

    def candidates(self, within: Sequence[BlockSpan] = ()) -> Candidates:
        """Whoever may serve any of these blocks; without any, everybody."""
        request, estimates, columns = self.request, self.estimates, self.crowd.columns
        step_bytes = request.tokens * request.bytes_per_token
        back_bytes = step_bytes if request.back_tokens is None else request.back_tokens * request.bytes_per_token
        # Most of a large swarm are strangers: nothing was ever measured of them, of the ways to them neither.
        enter_s, per_block_s, leave_s = columns.costs(
            estimates.here,
            estimates.turn_s,
            estimates.assumed_bytes_per_s(self.now_s),
            tokens=request.tokens,
            step_bytes=step_bytes,
            back_bytes=back_bytes,
        )
        if request.spread is not None:
            per_block_s += columns.prices_s_per_block(
                estimates.dealt, num_blocks=request.num_blocks, tokens=request.tokens
            )
        full, short = (columns.free_tokens < room for room in (request.cache_tokens, request.expected_tokens))
        enter_s += np.where(full, _LAST_RESORT_S, np.where(short, _SHORT_S, 0.0))
        kept = (hop.peer_id for hop in request.keep)
        for peer in {*estimates.measured, *estimates.used, *self.busy, *self.settled, *kept}:
            if self.usable(peer):
                cost, rows = self.compared(peer), columns.rows(peer)
                enter_s[rows], per_block_s[rows], leave_s[rows] = cost.enter_s, cost.per_block_s, cost.leave_s
        wanted = np.ones(len(enter_s), dtype=np.bool_)
        if within:
            wanted = np.any([(columns.starts < gap.end) & (gap.start < columns.ends) for gap in within], axis=0)
        for peer in self.excluded:
            wanted[columns.rows(peer)] = False
        candidates = Candidates(
            peers=columns.peers,
            starts=columns.starts,
            ends=columns.ends,
            enter_s=enter_s,
            per_block_s=per_block_s,
            leave_s=leave_s,
            cells=columns.cells,
        )
        return candidates if wanted.all() else candidates.take(wanted)

    @property
    def by_peer(self) -> dict[PeerId, Announcement]:
        return self.crowd.by_peer

    def holders(self, span: BlockSpan, first: int = 0) -> Iterator[Announcement]:
        """All that may be entered for these blocks, from a place in the crowd on."""
        return (a for a in self.crowd.holders(span, first) if a.peer_id not in self.excluded)

    def cost(self, peer: PeerId) -> HopCost:
        return self._of(peer).cost

    def compared(self, peer: PeerId) -> HopCost:
        return self._of(peer).compared

    def estimate(self, peer: PeerId) -> PeerEstimate:
        return self._of(peer).estimate

    def entry_s(self, before: PeerId, peer: PeerId) -> float:
        """What `peer` costs to enter from `before` instead of from this node."""
        known = self._of(peer)
        return known.beside_trip_s + self._trip_s(self._of(before), known)

    def compared_entry_s(self, before: PeerId, peer: PeerId) -> float:
        known = self._of(peer)
        return known.compared_beside_trip_s + known.scale * self._trip_s(self._of(before), known)

    def least_entry_s(self, peer: PeerId) -> float:
        """No less is `compared_entry_s`, from wherever."""
        known, least_s = self._of(peer), 0.0
        if not self.detoured:
            height_s = math.inf if known.place is None else known.place.height_s
            least_s = min(height_s, known.estimate.rtt_s) / 2
        return known.compared_beside_trip_s + known.scale * least_s

    def route_s(self, hops: Hops) -> float:
        """What one step takes from the first frame out to the last answer back."""
        total_s = self.cost(hops[0][0]).enter_s + self.cost(hops[-1][0]).leave_s
        total_s += sum(len(span) * self.cost(peer).per_block_s for peer, span in hops)
        return total_s + sum(self.entry_s(a, b) for (a, _), (b, _) in itertools.pairwise(hops))

    def idle_s(self, hops: Hops) -> float:
        """What one step of one position takes where nobody waits."""
        total_s = self.route_s(hops)
        for peer, span in hops:
            estimate = self.estimate(peer)
            longer_s = self.cost(peer).per_block_s - estimate.decode_s_per_block
            total_s -= waits_s(estimate, self.request.tokens) + len(span) * longer_s
        return total_s

    def compared_route_s(self, hops: Hops) -> float:
        total_s = self.compared(hops[0][0]).enter_s + self.compared(hops[-1][0]).leave_s
        total_s += sum(len(span) * self.compared(peer).per_block_s for peer, span in hops)
        return total_s + sum(self.compared_entry_s(a, b) for (a, _), (b, _) in itertools.pairwise(hops))

    def compared_part_s(self, hops: Hops, index: int) -> Callable[[PeerId], float]:
        """The part of `compared_route_s` that another peer at this hop changes, with that peer there."""
        blocks = len(hops[index][1])
        before = hops[index - 1][0] if index else None
        after = hops[index + 1][0] if index + 1 < len(hops) else None

        def part_s(peer: PeerId) -> float:
            cost = self._of(peer).compared
            part_s = blocks * cost.per_block_s
            part_s += cost.enter_s if before is None else self.compared_entry_s(before, peer)
            return part_s + (cost.leave_s if after is None else self.compared_entry_s(peer, after))

        return part_s

    def saved_s(self) -> float:
        """What a step over `kept` takes less because of what is held there: its computation, its part of the wait, and
        the bytes on all ways."""
        request, saved_s = self.request, 0.0
        assert request.kept is not None
        less = max(1.0, request.tokens - request.kept.saves)
        for index, (peer, span) in enumerate(self.kept):
            estimate = self.estimate(peer)
            whole, rest = (
                hop_cost(
                    estimate,
                    tokens=tokens,
                    bytes_per_token=request.bytes_per_token,
                    back_tokens=None if request.back_tokens is None else min(tokens, request.back_tokens),
                )
                for tokens in (request.tokens, less)
            )
            saved_s += whole.enter_s - rest.enter_s + len(span) * (whole.per_block_s - rest.per_block_s)
            saved_s += whole.leave_s - rest.leave_s if index == len(self.kept) - 1 else 0.0
        return saved_s

    def priced_route_s(self, hops: Hops) -> float:
        """`route_s`, and what its peers are made dearer by for this node's other sessions."""
        return self.route_s(hops) + sum(len(span) * self._of(peer).price_s_per_block for peer, span in hops)

    def last_resort(self, announcement: Announcement) -> str:
        """Why a peer is entered only where nobody else can be; empty for the others."""
        if announcement.peer_id in self.busy:
            return "busy"
        if announcement.free_tokens < self.request.cache_tokens and announcement.peer_id not in self.settled:
            return "no room for the session"
        return ""

    def short(self, hops: Hops) -> bool:
        """Whether some of them may not have room until the session's end, as far as that is expected."""
        return any(self._is_short(self.by_peer[peer]) for peer, _ in hops)

    def _is_short(self, announcement: Announcement) -> bool:
        return announcement.free_tokens < self.request.expected_tokens and announcement.peer_id not in self.settled

    def _of(self, peer: PeerId) -> _Known:
        known = self._known.get(peer)
        if known is None:
            known = self._known[peer] = self._price(peer, self.crowd.by_peer[peer])
        return known

    def _hop_cost(self, estimate: PeerEstimate) -> HopCost:
        request = self.request
        return hop_cost(
            estimate,
            tokens=request.tokens,
            bytes_per_token=request.bytes_per_token,
            back_tokens=request.back_tokens,
        )

    def _price(self, peer: PeerId, announcement: Announcement) -> _Known:
        request, estimates = self.request, self.estimates
        estimate = estimates.of(announcement, self.now_s)
        cost = self._hop_cost(estimate)
        half_s = trip_s = way_s = estimate.rtt_s / 2
        if self.detoured:
            out_s = max(-half_s, estimates.detours.of(HERE, peer, self.now_s))
            back_s = max(-half_s, estimates.detours.of(peer, HERE, self.now_s))
            trip_s = way_s = half_s + out_s
            cost = HopCost(cost.enter_s + out_s, cost.per_block_s, cost.leave_s + back_s)
        compared = cost
        if peer in self.settled and not self.whole:
            less = 1 - HYSTERESIS
            compared = HopCost(cost.enter_s * less, cost.per_block_s * less, cost.leave_s * less)
            trip_s *= less
        price_s = estimates.price_s_per_block(announcement) if request.spread is not None else 0.0
        if price_s:
            price_s *= longer(estimate.decode_s_per_block, estimate.prefill_s_per_token_block, request.tokens)
            compared = HopCost(compared.enter_s, compared.per_block_s + price_s, compared.leave_s)
        free_tokens = announcement.free_tokens
        if free_tokens < request.cache_tokens or free_tokens < request.expected_tokens or peer in self.busy:
            dearer_s = 0.0
            if self.last_resort(announcement):
                dearer_s = _LAST_RESORT_S
            elif self._is_short(announcement):
                dearer_s = _SHORT_S
            compared = HopCost(compared.enter_s + dearer_s, compared.per_block_s, compared.leave_s)
        return _Known(
            peer,
            estimate,
            cost,
            compared,
            price_s,
            cost.enter_s - way_s,
            compared.enter_s - trip_s,
            trip_s / way_s if way_s else 1.0,
            announcement.place if announcement.place is not None and announcement.place.usable else None,
        )

    def _trip_s(self, from_: _Known, to: _Known) -> float:
        """One way between two peers: by their places, within what this node's own round trips to both allow.

        Where a place is not known, as far as from this node to the second one.
        """
        half_s = half_trip_s(from_.estimate.rtt_s, from_.place, to.estimate.rtt_s, to.place)
        if self.detoured:
            half_s += max(-half_s, self.estimates.detours.of(from_.peer_id, to.peer_id, self.now_s))
        return half_s

"""Who of about equals serves a session: they are used in proportion to what the swarm's maximum flow gives them.

Owns the flow of the records that were looked at last.
"""

from __future__ import annotations

import itertools
from typing import Final

from routing.chain import Hops
from routing.directory import Snapshot
from routing.estimates import Estimates, Load
from routing.flow import Shares, by_span, capacities_of, pick, shares
from routing.ids import BlockSpan, ModelId
from routing.records import Announcement, PeerState
from routing.routes import RouteRequest
from routing.view import View

SPREAD: Final = 0.1
"""A peer may serve a hop in place of the best one where that costs no more than this share of the whole route."""
MAX_ALTERNATIVES: Final = 128
"""Looked at per hop, beginning at another one for each session."""
FLOW_SAMPLE: Final = 2000
"""Peers from which the shares of all are computed: of more, every second one, every third one, and so on."""


class Spreading:
    """Remembers one flow."""

    def __init__(self, estimates: Estimates) -> None:
        self._estimates = estimates
        self._known: tuple[Snapshot, ModelId, int, Shares] | None = None

    def flow(self, snapshot: Snapshot, request: RouteRequest) -> Shares:
        """Everybody's shares; `estimates` is told how much they carry, and how much of it is asked of them."""
        known, model, num_blocks = self._known, request.model, request.num_blocks
        if known is None or known[:3] != (snapshot, model, num_blocks):
            everybody = snapshot.of_model(model)
            every = 1 + len(everybody) // FLOW_SAMPLE
            online = [
                a
                for a in everybody[::every]
                if a.state is PeerState.ONLINE and a.addresses and a.num_blocks == num_blocks
            ]
            parts = [part for a in online for part in capacities_of(a)]
            flow = shares(by_span(parts), num_blocks)
            asked = sum(a.sessions * a.spans.num_blocks for a in online if a.sessions)
            self._estimates.load = Load(
                tokens_per_s=every * flow.tokens_per_s,
                turn_s=asked / max(1e-9, sum(amount for _, amount in parts)),
            )
            known = self._known = (snapshot, model, num_blocks, flow)
        return known[3]


def spread(view: View, hops: Hops, flow: Shares, at: float) -> Hops:
    """One hop after the other, whoever of about equals the session's number falls to."""
    count = len(view.crowd.able)
    first, turn = (int(at * count), at * count % 1) if count > MAX_ALTERNATIVES else (0, at)
    within_s = view.compared_route_s(hops) + SPREAD * view.route_s(hops)
    for index, (peer, span) in enumerate(hops):
        others = {other for other, _ in hops if other != peer}
        able = (a for a in view.holders(span, first) if a.peer_id not in others)
        part_s = view.compared_part_s(hops, index)
        most_s = part_s(peer) + within_s - view.compared_route_s(hops)
        weights = {
            a.peer_id: _share(flow, a, span)
            for a in itertools.islice(able, MAX_ALTERNATIVES)
            if part_s(a.peer_id) <= most_s
        }
        weights.setdefault(peer, _share(flow, view.by_peer[peer], span))
        hops = (*hops[:index], (pick(weights, turn), span), *hops[index + 1 :])
    return hops


def _share(flow: Shares, announcement: Announcement, hop: BlockSpan) -> float:
    return next(flow.of(span, amount, hop) for span, amount in capacities_of(announcement) if span.covers(hop))

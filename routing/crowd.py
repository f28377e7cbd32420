"""What all plans share while nobody's record changes: who may serve, and which strangers differ in nothing but speed.

Owns what follows from announcements alone. Knows no measurement, no failure and no session of this node: of peers about
which a node knows more than they say, the router decides for itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import Final

from routing.chain import Cell, cell_of
from routing.cost import block_s, longer
from routing.directory import Snapshot
from routing.estimates import queued_s
from routing.ids import BlockSpan, ModelId, PeerId
from routing.precision import is_at_least
from routing.records import Announcement, PeerState
from routing.routes import RouteRequest

MAX_CROWDS: Final = 8
"""Kinds of requests for which peers are sorted beforehand."""
_Ranked = list[tuple[float, PeerId, Announcement]]
MAX_RANKINGS: Final = 4
"""Kept at a time, one for each length of a step and each load of the swarm."""


class Crowd:
    """The peers of one model that a node can use at all, at one snapshot. Never changes but for what it remembers."""

    def __init__(
        self,
        announcements: Iterable[Announcement],
        num_blocks: int,
        protocol: int | None,
        min_precision: str | None,
        adapter: bytes | None = None,
    ) -> None:
        """Left out are peers of another number of blocks or another protocol, not online, without an address or the
        adapter of that digest, or less precise. `announcements` are of one model; None: any protocol, any precision,
        with any adapters."""
        online = PeerState.ONLINE
        self.by_peer = {
            a.peer_id: a
            for a in announcements
            if a.num_blocks == num_blocks
            and a.state is online
            and a.addresses
            and (protocol is None or a.protocol == protocol)
            and (min_precision is None or is_at_least(a.dtype, a.quantization, min_precision))
            and (adapter is None or a.hosts(adapter))
        }
        self.able: Sequence[Announcement] = tuple(self.by_peer.values())
        self._at: dict[tuple[int, int], list[int]] = {}
        """The places in `able` of peers with one span, by its ends."""
        self._at_several: dict[tuple[BlockSpan, ...], list[int]] = {}
        """Of those with several."""
        alike: dict[tuple[tuple[object, ...], int, Cell], list[Announcement]] = {}
        for at, a in enumerate(self.able):
            parts = a.spans.parts
            ends: tuple[object, ...] = parts
            if len(parts) == 1:  # thousands are hashed
                ends = one = (parts[0].start, parts[0].end)
                places = self._at.setdefault(one, [])
            else:
                places = self._at_several.setdefault(parts, [])
            places.append(at)
            kind = (ends, a.max_bytes_per_s, cell_of(a.place))
            if kind in alike:
                alike[kind].append(a)
            else:
                alike[kind] = [a]
        self._alike = tuple(alike.values())
        self._rankings: dict[tuple[int, float], list[_Ranked]] = {}

    def holders(self, span: BlockSpan, first: int) -> Iterator[Announcement]:
        """Everybody who holds these blocks, in the order of `able` from its place `first` on, and around."""
        start, end = span.start, span.end
        alike = [places for ends, places in self._at.items() if ends[0] <= start and end <= ends[1]]
        alike += [places for spans, places in self._at_several.items() if any(part.covers(span) for part in spans)]
        places = sorted(chain.from_iterable(alike))
        begin = bisect_left(places, first)
        return (self.able[at] for at in chain(places[begin:], places[:begin]))

    def fastest(
        self, tokens: int, cache_tokens: int, turn_s: float, without: Container[PeerId]
    ) -> Iterator[Announcement]:
        """Of peers alike in spans, cap and place the one that claims the least time for a step of so many tokens, its
        queue included: of those that are not in `without`, and if possible of those with room for so long a session.

        Everything else that is assumed of strangers is the same for all of them. In a large swarm most are strangers,
        and who is not told here need not be priced. `turn_s` as in `queued_s`.
        """
        for ranked in self._ranking(tokens, turn_s):
            full: Announcement | None = None
            for _, peer, a in ranked:
                if peer in without:
                    continue
                if a.free_tokens >= cache_tokens:
                    yield a
                    break
                full = full or a
            else:
                if full is not None:
                    yield full

    def _ranking(self, tokens: int, turn_s: float) -> list[_Ranked]:
        ranking = self._rankings.get((tokens, turn_s))
        if ranking is None:
            if len(self._rankings) >= MAX_RANKINGS:
                del self._rankings[next(iter(self._rankings))]
            ranking = self._rankings[tokens, turn_s] = []
            for alike in self._alike:
                if len(alike) == 1:
                    ranking.append([(0.0, alike[0].peer_id, alike[0])])
                    continue
                first = alike[0].spans.parts[0]
                blocks = first.end - first.start
                ranked = [
                    (
                        blocks * block_s(a.decode_s_per_block, a.prefill_s_per_token_block, tokens)
                        + (_waits_s(a, tokens, turn_s) if a.sessions or a.queue_s else 0.0),
                        a.peer_id,
                        a,
                    )
                    for a in alike
                ]
                ranked.sort(key=_time_and_peer)
                ranking.append(ranked)
        return ranking


class Crowds:
    """Those of the snapshot that was looked at last, one for each kind of request."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._by_kind: dict[tuple[ModelId, int, int | None, str | None, bytes | None], Crowd] = {}

    def of(self, snapshot: Snapshot, request: RouteRequest) -> Crowd:
        if self._snapshot is not snapshot or len(self._by_kind) >= MAX_CROWDS:
            self._snapshot, self._by_kind = snapshot, {}
        adapter = None if request.adapter is None else request.adapter.digest
        kind = (request.model, request.num_blocks, request.protocol, request.min_precision, adapter)
        if (crowd := self._by_kind.get(kind)) is None:
            announcements = snapshot.of_model(request.model)
            crowd = Crowd(announcements, request.num_blocks, request.protocol, request.min_precision, adapter)
            self._by_kind[kind] = crowd
        return crowd


def _waits_s(a: Announcement, tokens: int, turn_s: float) -> float:
    return queued_s(a, a.sessions, turn_s) * longer(a.decode_s_per_block, a.prefill_s_per_token_block, tokens)


_time_and_peer: Final = itemgetter(0, 1)

"""What all plans share while nobody's record changes: who may serve, and which strangers differ in nothing but speed.

Owns what follows from announcements alone. Knows no measurement, no failure and no session of this node: of peers about
which a node knows more than they say, the router decides for itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Final

from routing.cost import block_s, longer
from routing.directory import Snapshot
from routing.estimates import BANDWIDTH_BYTES_PER_S, queued_s
from routing.ids import BlockSpan, ModelId, PeerId
from routing.precision import is_at_least
from routing.records import Announcement, Kind, PeerState
from routing.routes import RouteRequest

MAX_CROWDS: Final = 8
"""Kinds of requests for which peers are sorted beforehand."""
_Step = tuple[int, float, int, int]
"""Its positions, the turn of the swarm, bytes that are pushed on and bytes that go back."""
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
        self.able: Sequence[Announcement] = [
            a
            for a in announcements
            if a.num_blocks == num_blocks
            and a.state is online
            and a.addresses
            and (protocol is None or a.protocol == protocol)
            and (min_precision is None or is_at_least(a.dtype, a.quantization, min_precision))
            and (adapter is None or a.hosts(adapter))
        ]
        self.by_peer: dict[PeerId, Announcement] = {a.peer_id: a for a in self.able}
        self._num_blocks = num_blocks
        self._rankings: dict[_Step, _Ranking] = {}

    def holders(self, span: BlockSpan, first: int) -> Iterator[Announcement]:
        """Everybody who holds these blocks, in the order of `able` from its place `first` on, and around."""
        alike = [places for ends, places in self._places.items() if _cover(ends, span)]
        places = sorted(chain.from_iterable(alike))
        begin = bisect_left(places, first)
        return (self.able[at] for at in chain(places[begin:], places[:begin]))

    @cached_property
    def _places(self) -> dict[tuple[int, ...], list[int]]:
        """Those in `able` of peers with the same spans, by their ends."""
        found = defaultdict[tuple[int, ...], list[int]](list)
        for at, ends in enumerate([a.kind.ends for a in self.able]):
            found[ends].append(at)
        return found

    def fastest(
        self,
        tokens: int,
        rooms: Sequence[int],
        turn_s: float,
        without: Container[PeerId],
        *,
        step_bytes: int = 0,
        back_bytes: int = 0,
    ) -> Iterator[Announcement]:
        """Of peers alike in spans, cap and place the one that claims the least time for a step of so many tokens over
        all of its blocks, queue and uplink included: of those that are not in `without`, and if possible of those with
        room for a session as long as the first of `rooms`, else as the second.

        Everything else that is assumed of strangers is the same for all of them. In a large swarm most are strangers,
        and who is not told here need not be priced. `turn_s` as in `queued_s`. Peers push `step_bytes` on, but those
        that hold the last block send `back_bytes` back.
        """
        step, enough = (tokens, turn_s, step_bytes, back_bytes), max(rooms)
        if (ranking := self._rankings.get(step)) is None:
            if len(self._rankings) >= MAX_RANKINGS:
                del self._rankings[next(iter(self._rankings))]
            ranking = self._rankings[step] = _Ranking(self.able, step, self._num_blocks)
        unfit = []
        for kind, first in ranking.first.items():
            if first.free_tokens >= enough and first.peer_id not in without:
                yield first
            else:
                unfit.append(kind)
        in_order = ranking.in_order(unfit)
        for kind in unfit:
            chosen: Announcement | None = None
            held = -1
            for a in in_order[kind]:
                if a.peer_id not in without:
                    holds = sum(a.free_tokens >= room for room in rooms)
                    if holds > held:
                        chosen, held = a, holds
                        if holds == len(rooms):
                            break
            if chosen is not None:
                yield chosen


_UNKNOWN_S: Final = -1.0
"""Not computed yet: many are the only ones of their kind."""


class _Ranking:
    """Who of these is the fastest of its kind at one step."""

    def __init__(self, announcements: Sequence[Announcement], step: _Step, num_blocks: int) -> None:
        self._announcements, self._step, self._num_blocks = announcements, step, num_blocks
        self.first: dict[Kind, Announcement] = {}
        self._in_order: dict[Kind, list[Announcement]] = {}
        """Of kinds of which that was asked for: hardly ever does the second one matter."""
        least_s: dict[Kind, float] = {}
        tokens = step[0]
        # In the order in which the records lie in memory: one kind after the other takes twice as long.
        for a in announcements:
            kind = a.kind
            if (known_s := least_s.get(kind)) is None:
                self.first[kind], least_s[kind] = a, _UNKNOWN_S
                continue
            if known_s == _UNKNOWN_S:
                known_s = least_s[kind] = self._takes_s(self.first[kind])
            if a.sessions or a.queue_s or a.uplink_bytes_per_s:
                takes_s = self._takes_s(a)
            else:  # the same
                takes_s = kind.blocks * block_s(a.decode_s_per_block, a.prefill_s_per_token_block, tokens)
            if takes_s < known_s or (takes_s == known_s and a.peer_id < self.first[kind].peer_id):
                least_s[kind], self.first[kind] = takes_s, a

    def in_order(self, kinds: Iterable[Kind]) -> dict[Kind, list[Announcement]]:
        """All of at least these kinds, the fastest first."""
        missing: dict[Kind, list[Announcement]] = {kind: [] for kind in kinds if kind not in self._in_order}
        for a in self._announcements if missing else ():
            if (alike := missing.get(a.kind)) is not None:
                alike.append(a)
        for kind, alike in missing.items():
            self._in_order[kind] = sorted(alike, key=lambda a: (self._takes_s(a), a.peer_id))
        return self._in_order

    def _takes_s(self, a: Announcement) -> float:
        """What a step takes there, in so far as peers of a kind differ."""
        tokens, turn_s, step_bytes, back_bytes = self._step
        takes_s = a.kind.blocks * block_s(a.decode_s_per_block, a.prefill_s_per_token_block, tokens)
        if a.sessions or a.queue_s:
            takes_s += _waits_s(a, tokens, turn_s)
        if a.uplink_bytes_per_s:
            takes_s += _sends_s(a, back_bytes if a.kind.ends[-1] == self._num_blocks else step_bytes)
        return takes_s


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


def _sends_s(a: Announcement, size: int) -> float:
    """What its uplink adds to what is assumed, or to what its cap does."""
    else_s = size / min(a.max_bytes_per_s or BANDWIDTH_BYTES_PER_S, BANDWIDTH_BYTES_PER_S)
    return max(0.0, size / a.uplink_bytes_per_s - else_s)


def _cover(ends: tuple[int, ...], span: BlockSpan) -> bool:
    return any(ends[at] <= span.start and span.end <= ends[at + 1] for at in range(0, len(ends), 2))

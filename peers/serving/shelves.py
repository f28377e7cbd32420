"""What a peer holds for those who train through it: what backwards need, and sums of what they gave. Bounded in bytes
and seconds.

Owns the table, and who gives way: one client alone may use all of it, and of several each has a part as large as
everybody else's, which who holds more gives back as others need it. Knows neither computation nor messages' order. All
of it may be dropped at any time: whoever needs it is told, and sends it again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from peers.runtime.gradients import Graph, Passage
from peers.transport.links import Link
from peers.wire.messages import MAX_SUMMED
from routing.ids import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLimits:
    """What training may take of a peer. Raises ValueError."""

    max_bytes: int = 256 << 20
    """For graphs and inputs that wait for a backward; 0: this peer trains nobody."""
    max_bytes_per_peer: int = 256 << 20
    """Of these one client's, at most, though nobody else wants them."""
    max_tokens: int = 32_768
    """Positions that wait or are computed, of all clients together."""
    max_tokens_per_peer: int = 16_384
    lease_s: float = 120.0
    """What waits for a backward is dropped after that."""

    def __post_init__(self) -> None:
        if self.max_bytes < 0 or min(self.max_tokens, self.max_tokens_per_peer) < 1 or self.lease_s <= 0:
            raise ValueError("bytes are not negative, tokens at least 1, a lease longer than 0 s")


_Key = tuple[PeerId, bytes, int]
"""Client, work, and the block with which a part of it begins."""


@dataclass(slots=True, eq=False)
class _Kept:
    link: Link
    passage: Passage
    graph: Graph | None
    num_bytes: int
    expires_at_s: float


@dataclass(slots=True)
class _Of:
    """What is kept for one client, what came last at the end."""

    inputs: OrderedDict[_Key, None] = field(default_factory=OrderedDict)
    graphs: OrderedDict[_Key, None] = field(default_factory=OrderedDict)


@dataclass(slots=True, eq=False)
class _Sum:
    link: Link
    works: dict[bytes, None]
    total: Tensor
    expires_at_s: float


class Shelf:
    """What waits for backwards, within bounds; what nobody needs the room of stays for its lease. Knows no network."""

    def __init__(self, limits: TrainingLimits) -> None:
        self.limits = limits
        self.num_bytes = 0
        self._kept: dict[_Key, _Kept] = {}
        self._of: defaultdict[PeerId, _Of] = defaultdict(_Of)
        self._sums: dict[tuple[PeerId, bytes], _Sum] = {}
        self._bytes_of: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return len(self._kept) + len(self._sums)

    def room(self, owner: PeerId) -> int:
        """Bytes that this client may still put here: what is free, or what its part is short of."""
        limits, mine = self.limits, self._bytes_of.get(owner, 0)
        return min(max(limits.max_bytes - self.num_bytes, self._part(owner) - mine), limits.max_bytes_per_peer - mine)

    def put(self, key: _Key, link: Link, passage: Passage, graph: Graph | None, now_s: float) -> bool:
        """Keep the input and, if it fits too, the graph. Returns whether that is kept."""
        self.drop(key)
        num_bytes = passage.input_TH.nbytes + (graph.num_bytes if graph is not None else 0)
        if graph is not None and num_bytes > self.room(key[0]):
            graph, num_bytes = None, passage.input_TH.nbytes
        if num_bytes > self.room(key[0]) or not self._make_room(key[0], num_bytes):
            return False
        self._kept[key] = _Kept(link, passage, graph, num_bytes, now_s + self.limits.lease_s)
        self._of[key[0]].inputs[key] = None
        if graph is not None:
            self._of[key[0]].graphs[key] = None
        self._add(key[0], num_bytes)
        return graph is not None

    def take(self, key: _Key) -> tuple[Passage, Graph | None] | None:
        """What is kept of a work; its graph leaves the shelf, its input stays."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        graph, kept.graph = kept.graph, None
        if graph is not None:
            del self._of[key[0]].graphs[key]
            self._add(key[0], -graph.num_bytes)
            kept.num_bytes -= graph.num_bytes
        return kept.passage, graph

    def add(self, key: tuple[PeerId, bytes], link: Link, work: bytes, gradient: Tensor, now_s: float) -> bool:
        """Add a work's gradient to a sum of this client's, once. Returns whether there was room."""
        known = self._sums.get(key)
        if known is None:
            if gradient.nbytes > min(self.room(key[0]), self.limits.max_bytes - self.num_bytes):
                return False  # nothing gives way to a sum, which can be sent instead
            known = self._sums[key] = _Sum(link, {}, gradient.new_zeros(gradient.shape), now_s)
            self._add(key[0], gradient.nbytes)
        if work not in known.works:
            if len(known.works) == MAX_SUMMED or known.total.shape != gradient.shape:
                return False
            known.works[work] = None
            known.total += gradient
        known.expires_at_s = now_s + self.limits.lease_s
        return True

    def collect(self, key: tuple[PeerId, bytes]) -> tuple[tuple[bytes, ...], Tensor] | None:
        """A sum and the works in it; it leaves the shelf."""
        if (known := self._sums.pop(key, None)) is None:
            return None
        self._add(key[0], -known.total.nbytes)
        return tuple(known.works), known.total

    def drop(self, key: _Key) -> None:
        if (kept := self._kept.pop(key, None)) is not None:
            mine = self._of[key[0]]
            del mine.inputs[key]
            mine.graphs.pop(key, None)
            if not mine.inputs:
                del self._of[key[0]]
            self._add(key[0], -kept.num_bytes)

    def drop_works(self, owner: PeerId, works: set[bytes]) -> None:
        self._drop_where(lambda key, _: key[0] == owner and key[1] in works)
        for work in works:  # or the name of a sum
            self.collect((owner, work))

    def drop_link(self, link: Link) -> None:
        self._drop_where(lambda _, kept: kept.link is link)
        self._drop_sums(lambda known: known.link is link)

    def expire(self, now_s: float) -> None:
        self._drop_where(lambda _, kept: kept.expires_at_s <= now_s)
        self._drop_sums(lambda known: known.expires_at_s <= now_s)

    def clear(self) -> None:
        self._drop_where(lambda *_: True)
        self._drop_sums(lambda _: True)

    def links(self) -> Iterator[Link]:
        for kept in self._kept.values():
            yield kept.link
        for known in self._sums.values():
            yield known.link

    def _part(self, owner: PeerId) -> int:
        """Of the whole, what is this client's while all others want theirs."""
        return self.limits.max_bytes // len(self._bytes_of.keys() | {owner})

    def _make_room(self, owner: PeerId, num_bytes: int) -> bool:
        """Of who holds most, what came last goes, and of that the graph before the input. False: there was nothing."""
        while self.num_bytes + num_bytes > self.limits.max_bytes:
            others = self._of.keys() - {owner}
            if not others:
                return False
            theirs = self._of[max(others, key=lambda other: (self._bytes_of[other], other))]
            if theirs.graphs:
                self.take(next(reversed(theirs.graphs)))
            else:
                self.drop(next(reversed(theirs.inputs)))
        return True

    def _drop_where(self, condition: Callable[[_Key, _Kept], bool]) -> None:
        for key in [key for key, kept in self._kept.items() if condition(key, kept)]:
            self.drop(key)

    def _drop_sums(self, condition: Callable[[_Sum], bool]) -> None:
        for key in [key for key, known in self._sums.items() if condition(known)]:
            self.collect(key)

    def _add(self, owner: PeerId, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._bytes_of[owner] += num_bytes
        if not self._bytes_of[owner]:
            del self._bytes_of[owner]

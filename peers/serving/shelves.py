"""What a peer holds for those who train through it: what backwards need, and adapters. Bounded in bytes and seconds.

Owns two tables, and who gives way; knows neither computation nor messages' order. All of it may be dropped at any time:
whoever needs it is told, and sends it again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from msgspec import structs

from peers.errors import Busy, ProtocolError, Refused
from peers.model.adapters import WIDTH, Adapter, num_rows, of_rows
from peers.runtime.gradients import Graph, Passage
from peers.transport.links import Link
from peers.wire import parts
from peers.wire.messages import Adapter as AdapterMessage
from peers.wire.messages import Code
from routing.ids import BlockSpan, PeerId

RETRY_S = 5.0
"""When there may be room again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLimits:
    """What training may take of a peer. Raises ValueError."""

    max_bytes: int = 256 << 20
    """For graphs and inputs that wait for a backward; 0: this peer trains nobody."""
    max_bytes_per_peer: int = 128 << 20
    max_tokens: int = 32_768
    """Positions that wait or are computed, of all clients together."""
    max_tokens_per_peer: int = 16_384
    max_adapter_bytes: int = 256 << 20
    """Of all clients' adapters together."""
    max_adapter_bytes_per_peer: int = 64 << 20
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


class Shelf:
    """What waits for backwards, within bounds; whoever came first may stay for its lease. Knows no network."""

    def __init__(self, limits: TrainingLimits) -> None:
        self.limits = limits
        self.num_bytes = 0
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._bytes_of: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def room(self, owner: PeerId) -> int:
        """Bytes that this client may still put here."""
        limits = self.limits
        return min(limits.max_bytes - self.num_bytes, limits.max_bytes_per_peer - self._bytes_of[owner])

    def put(self, key: _Key, link: Link, passage: Passage, graph: Graph | None, now_s: float) -> bool:
        """Keep the input and, if it fits too, the graph. Returns whether that is kept."""
        self.drop(key)
        num_bytes = passage.input_TH.nbytes + (graph.num_bytes if graph is not None else 0)
        if graph is not None and num_bytes > self.room(key[0]):
            graph, num_bytes = None, passage.input_TH.nbytes
        if num_bytes > self.room(key[0]):
            return False
        self._kept[key] = _Kept(link, passage, graph, num_bytes, now_s + self.limits.lease_s)
        self._add(key[0], num_bytes)
        return graph is not None

    def take(self, key: _Key) -> tuple[Passage, Graph | None] | None:
        """What is kept of a work; its graph leaves the shelf, its input stays."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        graph, kept.graph = kept.graph, None
        if graph is not None:
            self._add(key[0], -graph.num_bytes)
            kept.num_bytes -= graph.num_bytes
        return kept.passage, graph

    def drop(self, key: _Key) -> None:
        if (kept := self._kept.pop(key, None)) is not None:
            self._add(key[0], -kept.num_bytes)

    def drop_works(self, owner: PeerId, works: set[bytes]) -> None:
        self._drop_where(lambda key, _: key[0] == owner and key[1] in works)

    def drop_link(self, link: Link) -> None:
        self._drop_where(lambda _, kept: kept.link is link)

    def expire(self, now_s: float) -> None:
        self._drop_where(lambda _, kept: kept.expires_at_s <= now_s)

    def clear(self) -> None:
        self._drop_where(lambda *_: True)

    def links(self) -> Iterator[Link]:
        for kept in self._kept.values():
            yield kept.link

    def _drop_where(self, condition: Callable[[_Key, _Kept], bool]) -> None:
        for key in [key for key, kept in self._kept.items() if condition(key, kept)]:
            self.drop(key)

    def _add(self, owner: PeerId, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._bytes_of[owner] += num_bytes
        if not self._bytes_of[owner]:
            del self._bytes_of[owner]


@dataclass(slots=True, eq=False)
class _Owned:
    """An adapter, whole or on its way."""

    link: Link
    head: AdapterMessage
    gathering: parts.Gathering
    expires_at_s: float
    whole: Adapter | None = None


class Wardrobe:
    """Clients' adapters, each for its owner alone; of one owner's, the one used longest ago gives way."""

    def __init__(self, limits: TrainingLimits) -> None:
        self._limits = limits
        self._owned: OrderedDict[tuple[PeerId, bytes], _Owned] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owned)

    def num_bytes(self, owner: PeerId | None = None) -> int:
        """Of this owner's, or of everybody's."""
        return sum(one.gathering.rows.nbytes for key, one in self._owned.items() if owner in (None, key[0]))

    def begin(self, link: Link, head: AdapterMessage, now_s: float) -> None:
        """Raises Refused, Busy."""
        key, needed = (link.remote, head.adapter), num_rows(head.targets) * WIDTH * 4
        self._owned.pop(key, None)
        if needed > self._limits.max_adapter_bytes_per_peer:
            raise Refused(
                f"an adapter of {needed >> 20} MiB, this peer takes {self._limits.max_adapter_bytes_per_peer >> 20}",
                code=Code.TOO_LONG,
            )
        while self.num_bytes(link.remote) + needed > self._limits.max_adapter_bytes_per_peer:
            del self._owned[next(known for known in self._owned if known[0] == link.remote)]
        if self.num_bytes() + needed > self._limits.max_adapter_bytes:
            raise Busy("no room for another adapter here", retry_after_s=RETRY_S)
        gathering = parts.Gathering(num_rows(head.targets), WIDTH, "float32")
        self._owned[key] = _Owned(link, head, gathering, now_s + self._limits.lease_s)

    def add(self, link: Link, message: AdapterMessage, payload: memoryview) -> None:
        """Raises ProtocolError for what does not follow, is not finite, or is not what its name says."""
        key = (link.remote, message.adapter)
        owned = self._owned.get(key)
        if owned is None or owned.whole is not None:
            return  # it was declined, or is known
        try:
            if structs.replace(message, first=0, count=0) != structs.replace(owned.head, first=0, count=0):
                raise ProtocolError("parts of one adapter that do not agree on it")
            if owned.gathering.add(message.first, message.count, "float32", payload):
                adapter = Adapter(message.targets, of_rows(message.targets, owned.gathering.rows))
                if adapter.name != message.adapter:
                    raise ProtocolError("an adapter that is not what its name says")
                owned.whole = adapter
        except ProtocolError:
            del self._owned[key]
            raise

    def take(self, owner: PeerId, name: bytes, now_s: float) -> tuple[Adapter, BlockSpan]:
        """And for which blocks. Raises Refused."""
        owned = self._owned.get((owner, name))
        if owned is None or owned.whole is None:
            raise Refused("an adapter that is not here", code=Code.UNKNOWN_ADAPTER)
        self._owned.move_to_end((owner, name))
        owned.expires_at_s = now_s + self._limits.lease_s
        return owned.whole, BlockSpan(owned.head.start, owned.head.end)

    def drop_where(self, condition: Callable[[_Owned], bool]) -> None:
        for key in [key for key, owned in self._owned.items() if condition(owned)]:
            del self._owned[key]

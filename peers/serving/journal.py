"""What this peer sent downstream, kept so that a successor that dies can be rebuilt from here.

Owns the outputs of each session by position, in the bytes in which they travelled, and who pays for them. Knows no
tensors, no steps and no network. A session's journal is one run of positions, `[start, end)`:

    append at `end`                 grows
    append below `end`              forgets what reached further first: so does a rollback
    append behind `end`             there is a hole: only what comes from here on counts
    fork                            shares the chunks; nothing is copied
    a prefix that hops keep         shares them too, under the keys with which the session was opened
    too many bytes                  whole sessions go, of whoever has most, those used longest ago first; to disk, where
                                    the peer lends some, and else for good

A chunk is paid for once, by the client whose session brought it, for as long as anybody shares it.
"""

from __future__ import annotations

import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import msgspec

from peers.wire.messages import PREFIX_POSITIONS
from routing.ids import PeerId, Place

Settle = Callable[[list[memoryview] | None], None]
Spill = Callable[[Sequence[memoryview], Settle], bool]
"""Begins to move payloads out of memory; False when there is no room. Later, and in order, it settles them: with the
same bytes, readable from elsewhere, which take room until nobody refers to them, or with None where that has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalLimits:
    """Bounds on host memory."""

    max_bytes: int = 256 << 20
    max_bytes_per_peer: int = 128 << 20

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.max_bytes_per_peer) < 0:
            raise ValueError("a journal has no negative size")


@dataclass(slots=True, eq=False)
class _Chunk:
    """The output of one step."""

    owner: PeerId
    first: int
    row_bytes: int
    payload: memoryview
    users: int = 0
    in_memory: bool = True
    """And paid for: neither on disk nor on the way there."""


class _Part(msgspec.Struct, frozen=True):
    """Positions `[first, end)` of a chunk."""

    chunk: _Chunk
    first: int
    end: int

    @property
    def payload(self) -> memoryview:
        chunk = self.chunk
        return chunk.payload[(self.first - chunk.first) * chunk.row_bytes : (self.end - chunk.first) * chunk.row_bytes]


_Key = tuple[Hashable, bytes]


@dataclass(slots=True, kw_only=True, eq=False)
class _Record:
    """One session's."""

    owner: PeerId
    dtype: str = ""
    start: int = 0
    end: int = 0
    parts: list[_Part] = field(default_factory=list)
    keys: tuple[_Key, ...] = ()
    """Of the blocks that the client described; none from where it sent something else."""
    kept: int = 0
    """The first so many blocks are kept under their keys, or never will be."""
    sent: int = 0
    """Where the last step ended."""


class Journal:
    """See the module."""

    def __init__(self, limits: JournalLimits, spill: Spill | None = None) -> None:
        self.limits = limits
        self.memory_bytes: Counter[PeerId] = Counter()
        """By client: what is kept for it in memory."""
        self.evictions = 0
        """Sessions and prefixes that were dropped for want of room."""
        self._spill = spill
        self._records: OrderedDict[Place, _Record] = OrderedDict()
        self._blocks: OrderedDict[_Key, tuple[str, list[_Part]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def open(self, session: Place, owner: PeerId, scope: Hashable, keys: Sequence[bytes], held: int) -> None:
        """A session begins with the first `held` of the positions that `keys` name within `scope`, one for each
        PREFIX_POSITIONS; whoever it is that computed them."""
        self.release(session)
        record = self._records[session] = _Record(owner=owner, keys=tuple((scope, key) for key in keys))
        blocks = [self._blocks.get(key) for key in record.keys[: held // PREFIX_POSITIONS]]
        known = [block for block in blocks if block is not None]
        if len(known) == len(blocks) and len({dtype for dtype, _ in known}) == 1:
            record.dtype = known[0][0]
            for key, (_, parts) in zip(record.keys, known, strict=False):
                self._share(record.parts, parts)
                self._blocks.move_to_end(key)
        else:
            record.start = held
        record.end, record.kept = held, len(blocks)

    def append(self, session: Place, first: int, count: int, dtype: str, payload: memoryview) -> None:
        """`payload` was sent downstream for `count` positions from `first` on. Unknown sessions are ignored."""
        record = self._records.get(session)
        if record is None or not count:
            return
        if first < record.sent:  # the first step may begin below a prefix, where it says the same again
            record.keys = record.keys[: first // PREFIX_POSITIONS]
        record.sent = first + count
        self._truncate(record, first)
        if first > record.end or first < record.start or dtype != record.dtype:
            self._truncate(record, record.start)
            record.start, record.dtype = first, dtype
        chunk = _Chunk(record.owner, first, len(payload) // count, payload)
        self.memory_bytes[record.owner] += len(payload)
        record.end = first + count
        self._share(record.parts, [_Part(chunk, first, record.end)])
        self._records.move_to_end(session)
        self._keep_blocks(record)
        self._make_room(record.owner)

    def start(self, session: Place, end: int) -> int:
        """The journal has everything from here up to `end`, which it returns when it has nothing."""
        record = self._records.get(session)
        return end if record is None or record.end < end else min(record.start, end)

    def read(self, session: Place, first: int, end: int) -> tuple[str, memoryview] | None:
        """The dtype and bytes of positions `[first, end)`; None unless all of them are there."""
        record = self._records.get(session)
        if record is None or not record.start <= first < end <= record.end:
            return None
        self._records.move_to_end(session)
        pieces = [part.payload for part in _cut(record.parts, first, end)]
        return record.dtype, pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def fork(self, parent: Place, child: Place, position: int) -> None:
        """`child` begins with the first `position` positions of `parent`, as far as they are here."""
        known = self._records.get(parent)
        self.release(child)
        if known is None:
            return
        record = _Record(owner=known.owner, dtype=known.dtype, start=known.start, end=min(known.end, position))
        self._share(record.parts, _cut(known.parts, record.start, record.end))
        if known.start > position or known.end < position:
            self._drop(record.parts)
            record.start = record.end = position
        self._records[child] = record

    def release(self, session: Place) -> None:
        """Forget a session; what it shared stays with the others. Idempotent."""
        record = self._records.pop(session, None)
        if record is not None:
            self._drop(record.parts)

    def forget_prefixes(self) -> None:
        """Those that hops keep for sessions to come; sessions that began with one go on."""
        for _, parts in self._blocks.values():
            self._drop(parts)
        self._blocks.clear()

    # --- inside ---

    def _truncate(self, record: _Record, end: int) -> None:
        while record.parts and record.parts[-1].end > end:
            last = record.parts.pop()
            if last.first < end:
                self._share(record.parts, [_Part(last.chunk, last.first, end)])
            self._drop([last])
        record.end = max(min(end, record.end), record.start)

    def _keep_blocks(self, record: _Record) -> None:
        """What the session's keys name is kept as soon as it is complete."""
        for index in range(record.kept, min(record.end // PREFIX_POSITIONS, len(record.keys))):
            record.kept = index + 1
            key, first = record.keys[index], index * PREFIX_POSITIONS
            if key not in self._blocks and first >= record.start:
                parts = list(_cut(record.parts, first, first + PREFIX_POSITIONS))
                self._share([], parts)
                self._blocks[key] = (record.dtype, parts)

    def _make_room(self, owner: PeerId) -> None:
        while self.memory_bytes[owner] > self.limits.max_bytes_per_peer and self._evict(owner):
            pass
        while self.memory_bytes.total() > self.limits.max_bytes:
            heaviest, _ = self.memory_bytes.most_common(1)[0]
            if not self._evict(heaviest):
                break

    def _evict(self, owner: PeerId) -> bool:
        """Let go of what this client pays for and was used longest ago: prefixes first, then its own sessions, then
        what those of others begin with, then the session that it used last. False when nothing of it is in memory."""
        for key, (_, parts) in self._blocks.items():
            if any(part.chunk.owner == owner for part in parts):
                del self._blocks[key]
                self._drop(parts)
                self.evictions += 1
                return True
        own = [record for record in self._records.values() if record.owner == owner]
        others = (record for record in self._records.values() if record.owner != owner)
        for record in chain(own[:-1], others, own[-1:]):
            paid = [part.chunk.owner == owner and part.chunk.in_memory for part in record.parts]
            if any(paid):
                if not self._to_disk(record):
                    self._forget(record, len(paid) if record.owner == owner else len(paid) - paid[::-1].index(True))
                return True
        return False

    def _to_disk(self, record: _Record) -> bool:
        chunks = list(dict.fromkeys(part.chunk for part in record.parts if part.chunk.in_memory))
        payloads = [chunk.payload for chunk in chunks]
        if self._spill is None or not self._spill(payloads, functools.partial(self._moved, chunks)):
            return False
        for chunk in chunks:
            chunk.in_memory = False
            self._unpay(chunk)
        return True

    def _moved(self, chunks: Sequence[_Chunk], payloads: Sequence[memoryview] | None) -> None:
        """These are on disk, or lost: then whatever shares one of them goes for good."""
        if payloads is not None:
            for chunk, payload in zip(chunks, payloads, strict=True):
                chunk.payload = payload
            return
        lost = set(chunks)
        for record in self._records.values():
            if any(part.chunk in lost for part in record.parts):
                self._forget(record, len(record.parts))
        for key, (_, parts) in list(self._blocks.items()):
            if any(part.chunk in lost for part in parts):
                del self._blocks[key]
                self._drop(parts)
                self.evictions += 1

    def _forget(self, record: _Record, count: int) -> None:
        """Its first `count` parts."""
        self._drop(record.parts[:count])
        record.parts = record.parts[count:]
        record.start = record.parts[0].first if record.parts else record.end
        self.evictions += 1

    def _share(self, parts: list[_Part], more: Sequence[_Part] | Iterator[_Part]) -> None:
        for part in more:
            part.chunk.users += 1
            parts.append(part)

    def _drop(self, parts: list[_Part]) -> None:
        for part in parts:
            part.chunk.users -= 1
            if not part.chunk.users and part.chunk.in_memory:
                self._unpay(part.chunk)

    def _unpay(self, chunk: _Chunk) -> None:
        self.memory_bytes[chunk.owner] -= len(chunk.payload)
        if not self.memory_bytes[chunk.owner]:
            del self.memory_bytes[chunk.owner]


def _cut(parts: Sequence[_Part], first: int, end: int) -> Iterator[_Part]:
    """Those of `parts` that make up `[first, end)`, cut to it."""
    for part in parts:
        if max(first, part.first) < min(end, part.end):
            yield _Part(part.chunk, max(first, part.first), min(end, part.end))

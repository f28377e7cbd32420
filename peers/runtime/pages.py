"""Which page of the KV cache holds which positions of which session. Integers only.

Owns the free list, the reference counts (a forked session shares its parent's pages until one of the two writes) and
every session's block table. Pages may also be held without a session, as `prefixes` does. Knows neither tensors nor
users nor why a session must go: `pressure` decides that.

A *slot* is the room for one position at every layer; page `p` of size `s` is the slots `[p·s, (p + 1)·s)`. A session's
positions `[i·s, (i + 1)·s)` lie in the i-th page of its table. Pages are taken next to each other wherever that is
possible, because a session whose pages form one run is read as a view and never copied:

    session A  ■■■■■■■····          the gap behind A is left for A to grow into: a newcomer that finds one large gap
    session B             ■■■····   settles in its middle, not at A's heels

Invariant: free pages + pages with a reference = all pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, KeysView, Sequence
from dataclasses import dataclass, field

_FREE_RUN = re.compile(rb"\x01+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCopy:
    """`slots` slots to be copied from `source` to `target` at every layer, before anything is written there."""

    source: int
    target: int
    slots: int


@dataclass(slots=True)
class _Table:
    """Pages in the order of positions, and the same as runs `[first page, count]`, which every step asks for."""

    pages: list[int] = field(default_factory=list)
    runs: list[list[int]] = field(default_factory=list)
    length: int = 0

    def extend(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.pages.append(page)
            if self.runs and sum(self.runs[-1]) == page:
                self.runs[-1][1] += 1
            else:
                self.runs.append([page, 1])

    def cut(self, count: int) -> list[int]:
        """Keep the first `count` pages and return the others."""
        removed = self.pages[count:]
        del self.pages[count:]
        excess = len(removed)
        while excess:
            taken = min(excess, self.runs[-1][1])
            self.runs[-1][1] -= taken
            excess -= taken
            if not self.runs[-1][1]:
                self.runs.pop()
        return removed


class PagePool:
    """Block tables over `num_pages` pages of `page_size` slots. Sessions are any integers the caller chooses."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError("a pool has at least one page of at least one slot")
        self.num_pages = num_pages
        self.page_size = page_size
        self.free_pages = num_pages
        self._references = [0] * num_pages
        self._is_free = bytearray(b"\x01" * num_pages)
        self._tables: dict[int, _Table] = {}

    @property
    def used_pages(self) -> int:
        return self.num_pages - self.free_pages

    @property
    def sessions(self) -> KeysView[int]:
        """Every session that was opened or forked and not released."""
        return self._tables.keys()

    def length(self, session: int) -> int:
        return self._tables[session].length

    def distinct_pages(self, sessions: Iterable[int]) -> int:
        """How many pages these sessions hold together, shared ones counted once."""
        return len({page for session in sessions for page in self._tables[session].pages})

    @property
    def idle_pages(self) -> int:
        """Pages that are held, but not by a session."""
        return self.used_pages - self.distinct_pages(self._tables)

    def pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def open(self, session: int, pages: Sequence[int] = ()) -> None:
        """A new session; with `pages`, which somebody holds, it begins with the positions that fill them."""
        assert session not in self._tables
        table = self._tables[session] = _Table(length=len(pages) * self.page_size)
        table.extend(pages)
        self.hold(pages)

    def fork(self, parent: int, child: int, length: int) -> None:
        """`child` begins with the first `length` positions of `parent`, in the same pages; costs no page."""
        assert length <= self._tables[parent].length
        self.open(child, self._tables[parent].pages[: self.pages_for(length)])
        self._tables[child].length = length

    def pages(self, session: int, first: int, end: int) -> list[int]:
        """The pages of positions `[first, end)`, both at the edge of a page."""
        assert end <= self._tables[session].length
        return self._tables[session].pages[first // self.page_size : end // self.page_size]

    def hold(self, pages: Iterable[int]) -> None:
        """Keep these pages, which are in use, as they are until they are let go, whatever becomes of their sessions."""
        for page in pages:
            assert self._references[page]
            self._references[page] += 1

    def let_go(self, pages: Iterable[int]) -> None:
        """Undo one `hold`."""
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._is_free[page] = 1
                self.free_pages += 1

    def makes_room(self, page: int, session: int) -> bool:
        """Whether letting go of `page` frees it, or spares `session` a copy of it."""
        table = self._tables[session]
        is_tail = table.length % self.page_size > 0 and table.pages[-1] == page
        return self._references[page] - is_tail == 1

    def missing(self, session: int, length: int) -> int:
        """How many pages are too few, or, negative, to spare, for `session` to grow to `length`."""
        return self._needed(self._tables[session], length) - self.free_pages

    def grow(self, session: int, length: int) -> list[SlotCopy] | None:
        """Make positions up to `length` writable and return the copies that must come first.

        A last page that is shared and has room left is replaced by a copy of the session's own. None means that too few
        pages are free, and nothing was changed.
        """
        table = self._tables[session]
        pages = table.pages
        assert length >= table.length
        if (needed := self._needed(table, length)) > self.free_pages:
            return None
        copies = []
        shared = self._shared_tail(table, length)
        filled, tail = divmod(table.length, self.page_size)
        if shared is not None:
            self.let_go(table.cut(filled))
        table.extend(self._take(needed, after=pages[-1] if pages else None))
        if shared is not None:
            copies.append(SlotCopy(source=shared * self.page_size, target=pages[filled] * self.page_size, slots=tail))
        table.length = length
        return copies

    def truncate(self, session: int, length: int) -> None:
        """Forget every position from `length` on."""
        table = self._tables[session]
        assert length <= table.length
        self.let_go(table.cut(self.pages_for(length)))
        table.length = length

    def release(self, session: int) -> None:
        self.let_go(self._tables.pop(session).pages)

    def runs(self, session: int, length: int) -> list[tuple[int, int]]:
        """The slots of positions `[0, length)` in order, as `(first slot, count)`, neighbouring pages as one."""
        runs = []
        for page, count in self._tables[session].runs:
            if length > 0:
                slots = min(length, count * self.page_size)
                runs.append((page * self.page_size, slots))
                length -= slots
        return runs

    def _needed(self, table: _Table, length: int) -> int:
        copied = self._shared_tail(table, length) is not None
        return self.pages_for(length) - len(table.pages) + copied

    def _shared_tail(self, table: _Table, length: int) -> int | None:
        """The page that growing to `length` must replace by a copy: the last one, where it has room and is shared."""
        if length > table.length and table.length % self.page_size and self._references[table.pages[-1]] > 1:
            return table.pages[-1]
        return None

    def _take(self, count: int, after: int | None) -> list[int]:
        taken: list[int] = []
        position = 0 if after is None else after + 1
        while len(taken) < count:
            if (not taken and after is None) or position >= self.num_pages or not self._is_free[position]:
                position = self._settle(count - len(taken))
            self._is_free[position] = 0
            self._references[position] = 1
            taken.append(position)
            position += 1
        self.free_pages -= count
        return taken

    def _settle(self, count: int) -> int:
        """Where a run of `count` pages should begin: in the largest gap, with room to grow on both sides of it."""
        start, end = max((match.span() for match in _FREE_RUN.finditer(self._is_free)), key=lambda gap: gap[1] - gap[0])
        return start if start == 0 else start + max(0, end - start - count) // 2

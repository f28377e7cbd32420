"""Which page of the KV cache holds which positions of which session. Integers only.

Owns the free list, the reference counts (a forked session shares its parent's pages until one of the two writes) and
every session's block table. Pages may also be held without a session, as `prefixes` does. Knows neither tensors nor
users nor why a session must go: `pressure` decides that.

A *slot* is the room for one position at the layers of one table; page `p` of size `s` is the slots `[p·s, (p + 1)·s)`.
A session's positions `[i·s, (i + 1)·s)` lie in the i-th page of its table. Pages are taken next to each other wherever
that is possible, because a session whose pages form one run is read as a view and never copied:

    session A  ■■■■■■■····          the gap behind A is left for A to grow into: a newcomer that finds one large gap
    session B             ■■■····   settles in its middle, not at A's heels

A session has one table for all layers, or several where some of them see no further back than a *window* (see
`arrangement`). All tables take their pages from one pool. Those of a table with a window are returned behind it, but
for some slack, so that a session can go back a little at any time:

    full      ■■■■■■■■■■■■     48 positions in pages of 4
    window 8  ········■■■■     with 5 of slack: position 48 sees what begins at 41, position 43 at 36; 32 to 35 go next

Invariant: free pages + pages with a reference = all pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, KeysView, Sequence
from dataclasses import dataclass, field
from itertools import chain

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

    window: int | None
    returned: int = 0
    """So many pages that came before `pages` were given back."""
    pages: list[int] = field(default_factory=list)
    runs: list[list[int]] = field(default_factory=list)

    def extend(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.pages.append(page)
            if self.runs and sum(self.runs[-1]) == page:
                self.runs[-1][1] += 1
            else:
                self.runs.append([page, 1])

    def cut(self, count: int) -> list[int]:
        """Keep the first `count` pages, those returned included, and give up the others."""
        removed = self.pages[max(0, count - self.returned) :]
        del self.pages[max(0, count - self.returned) :]
        excess = len(removed)
        while excess:
            taken = min(excess, self.runs[-1][1])
            self.runs[-1][1] -= taken
            excess -= taken
            if not self.runs[-1][1]:
                self.runs.pop()
        return removed

    def slide(self, count: int) -> list[int]:
        """Give up the first `count` pages, those returned included."""
        removed = self.pages[: max(0, count - self.returned)]
        del self.pages[: len(removed)]
        self.returned += len(removed)
        excess = len(removed)
        while excess:
            taken = min(excess, self.runs[0][1])
            self.runs[0][0] += taken
            self.runs[0][1] -= taken
            excess -= taken
            if not self.runs[0][1]:
                del self.runs[0]
        return removed


@dataclass(slots=True)
class _Session:
    tables: list[_Table]
    length: int = 0


class PagePool:
    """Block tables over `num_pages` pages of `page_size` slots. Sessions are any integers the caller chooses.

    Tables are numbered as in `windows`. From a table with a window, pages are returned that only positions more than
    `slack` behind the session's end would look at.
    """

    def __init__(self, num_pages: int, page_size: int, windows: Sequence[int | None] = (None,), slack: int = 0) -> None:
        if num_pages < len(windows) or page_size < 1:
            raise ValueError("a pool has at least one page of at least one slot for each table")
        self.num_pages = num_pages
        self.page_size = page_size
        self.windows = tuple(windows)
        self.slack = slack
        self.free_pages = num_pages
        self._references = [0] * num_pages
        self._is_free = bytearray(b"\x01" * num_pages)
        self._sessions: dict[int, _Session] = {}

    @property
    def used_pages(self) -> int:
        return self.num_pages - self.free_pages

    @property
    def sessions(self) -> KeysView[int]:
        """Every session that was opened or forked and not released."""
        return self._sessions.keys()

    def length(self, session: int) -> int:
        return self._sessions[session].length

    def distinct_pages(self, sessions: Iterable[int]) -> int:
        """How many pages these sessions hold together, shared ones counted once."""
        return len({page for session in sessions for table in self._sessions[session].tables for page in table.pages})

    @property
    def idle_pages(self) -> int:
        """Pages that are held, but not by a session."""
        return self.used_pages - self.distinct_pages(self._sessions)

    def tokens(self, pages: int) -> int:
        """Positions for which so many pages suffice, whatever the sessions: in all tables, as if none had a window."""
        return pages // len(self.windows) * self.page_size

    def longest(self, pages: int, work: int, most: int) -> int:
        """How long one session of works of `work` positions may become in so many pages, or `tokens(pages)`, whichever
        is more; `most` where only the model sets a limit."""
        sliding = sum(self._pages_for(window + self.slack + work) + 1 for window in self.windows if window is not None)
        full = self.windows.count(None)
        left = max(0, pages - sliding)
        room = left // full * self.page_size if full else most if pages >= sliding else 0
        return max(self.tokens(pages), min(room, most))

    def needed(self, start: int, end: int) -> int:
        """The pages of a session that works on positions `[start, end)`."""
        return sum(self._pages_for(end) - self._unseen(window, start) for window in self.windows)

    def weight(self, length: int, work: int) -> int:
        """What a session of that length takes in works of `work` positions, in positions held in all tables."""
        return min(length, self.tokens(self.needed(max(0, length - work), length) + len(self.windows) - 1))

    def open(self, session: int, pages: Sequence[Sequence[int]] = ()) -> None:
        """A new session; with `pages` of each table, which somebody holds, it begins with the positions in them."""
        assert session not in self._sessions
        tables = [_Table(window) for window in self.windows]
        for table, own in zip(tables, pages, strict=False):
            table.extend(own)
        self._sessions[session] = _Session(tables, len(tables[0].pages) * self.page_size)
        self.hold(chain.from_iterable(pages))

    def fork(self, parent: int, child: int, length: int) -> None:
        """`child` begins with the first `length` positions of `parent`, in the same pages; costs no page."""
        assert self.reaches(parent, length)
        tables = []
        for known in self._sessions[parent].tables:
            table = _Table(known.window, known.returned if length else 0)
            table.extend(known.pages[: max(0, self._pages_for(length) - table.returned)])
            tables.append(table)
        self._sessions[child] = _Session(tables, length)
        self.hold(chain.from_iterable(table.pages for table in tables))

    def pages(self, session: int, first: int, end: int) -> list[list[int]] | None:
        """The pages of positions `[first, end)` in each table, both at the edge of a page; None where some are gone."""
        assert end <= self._sessions[session].length
        low, high = first // self.page_size, end // self.page_size
        tables = self._sessions[session].tables
        if any(table.returned > low for table in tables):
            return None
        return [table.pages[low - table.returned : high - table.returned] for table in tables]

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
        held = self._sessions[session]
        is_tail = held.length % self.page_size > 0 and any(table.pages[-1] == page for table in held.tables)
        return self._references[page] - is_tail == 1

    def missing(self, session: int, length: int) -> int:
        """How many pages are too few, or, negative, to spare, for `session` to grow to `length`."""
        held = self._sessions[session]
        return sum(self._needed(held, table, length) for table in held.tables) - self.free_pages

    def grow(self, session: int, length: int) -> list[SlotCopy] | None:
        """Make positions up to `length` writable and return the copies that must come first.

        A last page that is shared and has room left is replaced by a copy of the session's own. None means that too few
        pages are free, and nothing was changed.
        """
        held = self._sessions[session]
        assert length >= held.length
        needed = [self._needed(held, table, length) for table in held.tables]
        if sum(needed) > self.free_pages:
            return None
        copies = []
        filled, tail = divmod(held.length, self.page_size)
        for table, count in zip(held.tables, needed, strict=True):
            pages, shared = table.pages, self._shared_tail(held, table, length)
            if shared is not None:
                self.let_go(table.cut(filled))
            table.extend(self._take(count, after=pages[-1] if pages else None))
            if shared is not None:
                target = pages[filled - table.returned] * self.page_size
                copies.append(SlotCopy(source=shared * self.page_size, target=target, slots=tail))
        held.length = length
        return copies

    def reaches(self, session: int, length: int) -> bool:
        """Whether the session may go on from `length`: it is not longer, and what that position sees is there."""
        held = self._sessions[session]
        return length <= held.length and (
            length == 0
            or all(
                table.window is None or table.returned * self.page_size <= max(0, length - table.window + 1)
                for table in held.tables
            )
        )

    def truncate(self, session: int, length: int) -> None:
        """Forget every position from `length` on, which the session reaches."""
        held = self._sessions[session]
        if length == held.length:
            return
        assert self.reaches(session, length)
        for table in held.tables:
            self.let_go(table.cut(self._pages_for(length)))
            if length == 0:
                table.returned = 0
        held.length = length

    def slide(self, session: int) -> None:
        """Return the pages that no position from `slack` behind the session's end on will look at."""
        held = self._sessions[session]
        for table in held.tables:
            if table.window is not None:
                self.let_go(table.slide(self._unseen(table.window, held.length)))

    def release(self, session: int) -> None:
        for table in self._sessions.pop(session).tables:
            self.let_go(table.pages)

    def runs(self, session: int, length: int, table: int = 0) -> list[tuple[int, int]]:
        """The slots of positions `[first(session, table), length)` in order, as `(first slot, count)`, neighbouring
        pages as one."""
        known = self._sessions[session].tables[table]
        length -= known.returned * self.page_size
        runs = []
        for page, count in known.runs:
            if length > 0:
                slots = min(length, count * self.page_size)
                runs.append((page * self.page_size, slots))
                length -= slots
        return runs

    def first(self, session: int, table: int) -> int:
        """The first position that this table still has."""
        return self._sessions[session].tables[table].returned * self.page_size

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _unseen(self, window: int | None, length: int) -> int:
        """How many of a table's first pages a session that is `length` long needs no more."""
        return 0 if window is None else max(0, length - self.slack - window + 1) // self.page_size

    def _needed(self, held: _Session, table: _Table, length: int) -> int:
        copied = self._shared_tail(held, table, length) is not None
        return self._pages_for(length) - table.returned - len(table.pages) + copied

    def _shared_tail(self, held: _Session, table: _Table, length: int) -> int | None:
        """The page that growing to `length` must replace by a copy: the last one, where it has room and is shared."""
        if length > held.length and held.length % self.page_size and self._references[table.pages[-1]] > 1:
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

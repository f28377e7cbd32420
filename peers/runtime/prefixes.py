"""Which positions are kept for sessions to come, and with how many of them a new session may begin. Pure decisions.

Owns the index from keys to pages of `pages.PagePool`, and what every open session said it would send. Knows neither
tensors nor how a key is made: equal keys stand for equal positions `[0, end of the key's block)`, and only whoever
chose a key can say that they do. So a key counts within its *scope* only, by default one client and one span.

    keys offered     k0    k1    k2    k3        each names everything up to the end of its block
    kept             ■■■■  ■■■■                  the longest run from the start: the session begins with two blocks,
    session          ■■■■  ■■■■  □□□□  □□        shared as a fork shares them, computes the third, and at once that is
                                 ↑ k2            kept too, for sessions that run beside it and those that come later

Kept pages cost a running session nothing: whoever needs room takes them, those used longest ago first, before any
session has to give way.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain

from peers.runtime.pages import PagePool
from peers.wire.messages import PREFIX_POSITIONS

_Key = tuple[Hashable, bytes]


@dataclass(slots=True, kw_only=True, eq=False)
class _Offer:
    """The keys with which a session was opened."""

    keys: tuple[_Key, ...]
    kept: int
    """The first so many blocks need not be kept any more."""
    described: int
    """What the session holds up to here is what its keys stand for."""
    sent: int = 0
    """Where the session's last work ends, whether or not it came so far."""


class PrefixIndex:
    """Blocks that are kept, in the order of their last use, and the offers of open sessions."""

    def __init__(self, pool: PagePool) -> None:
        self.block = math.lcm(PREFIX_POSITIONS, pool.page_size)
        """Positions that are kept or let go together: whole pages that end where a key does."""
        self.hits = 0
        """Sessions that began with kept positions."""
        self.hit_positions = 0
        """With how many, all of them together."""
        self._pool = pool
        self._max_blocks = pool.tokens(pool.num_pages) // 2 // self.block  # the rest stays for runs of free pages
        self._blocks: OrderedDict[_Key, list[list[int]]] = OrderedDict()
        """Their pages in each table: also where layers slide, so that a session may begin at the end of any block."""
        self._offers: dict[int, _Offer] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def open(self, session: int, scope: Hashable, keys: Sequence[bytes]) -> int:
        """Open `session` in the pool with what is kept of the positions that `keys` stand for; returns how many."""
        stride = self.block // PREFIX_POSITIONS
        usable = keys[stride - 1 :: stride][: self._max_blocks]
        offered = tuple(dict.fromkeys((scope, key) for key in usable))
        found = next((n for n, key in enumerate(offered) if key not in self._blocks), len(offered))
        by_table = zip(*(self._blocks[key] for key in offered[:found]), strict=True)
        self._pool.open(session, [list(chain.from_iterable(pages)) for pages in by_table])
        self._used(offered[:found])
        self._offers[session] = _Offer(keys=offered, kept=found, described=len(offered) * self.block)
        self.hits += found > 0
        self.hit_positions += found * self.block
        return found * self.block

    def close(self, session: int) -> None:
        """Keep nothing more of this session."""
        self._offers.pop(session, None)

    def begun(self, session: int, start: int, end: int) -> None:
        """A work of the session over `[start, end)` begins, and what the session held from `start` on is gone.

        The first work may begin below what the session was opened with: it sends the same again. A later one that goes
        back may go on with something else, of which the keys do not know.
        """
        offer = self._offers.get(session)
        if offer is not None:
            if start < offer.sent:
                offer.described = min(offer.described, start)
            offer.sent = end

    def computed(self, session: int, end: int) -> None:
        """The session holds positions up to `end`: keep the blocks that are complete."""
        offer = self._offers.get(session)
        if offer is None:
            return
        blocks = min(end, offer.described) // self.block
        for index in range(offer.kept, blocks):
            if offer.keys[index] not in self._blocks:
                pages = self._pool.pages(session, index * self.block, (index + 1) * self.block)
                if pages is None:  # a block is longer than what stays behind a window: what follows is of no use
                    self.close(session)
                    return
                self._pool.hold(chain.from_iterable(pages))
                self._blocks[offer.keys[index]] = pages
        if blocks > offer.kept:
            offer.kept = blocks
            self._used(offer.keys[:blocks])
            while len(self._blocks) > self._max_blocks:
                self._let_go(next(iter(self._blocks)))
        if offer.kept >= offer.described // self.block:
            self.close(session)

    def make_room(self, session: int, length: int) -> bool:
        """Let go of blocks until `session` can grow to `length`; False when none would help."""
        before = len(self._blocks)
        for key, pages in list(self._blocks.items()):
            if self._pool.missing(session, length) <= 0:
                break
            if any(self._pool.makes_room(page, session) for page in chain.from_iterable(pages)):
                self._let_go(key)
        return len(self._blocks) < before

    def clear(self) -> None:
        """Let go of every block."""
        for key in list(self._blocks):
            self._let_go(key)

    def _used(self, keys: Sequence[_Key]) -> None:
        """The last block first, so that no block is let go before those that are worthless without it."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def _let_go(self, key: _Key) -> None:
        self._pool.let_go(chain.from_iterable(self._blocks.pop(key)))

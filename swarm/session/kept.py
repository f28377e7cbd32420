"""Which routes hold which prompts, as far as this client knows: it computed them there.

Owns the memory. A hop keeps what passed it until it needs the room, and says what it has when it is asked; here is only
where to ask. Knows neither sessions nor prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from routing.routes import Hop

MAX_KEYS: Final = 16_384
"""Blocks of positions; two of 64 to a prompt of a few sentences."""

Hops = tuple[Hop, ...]


class KeptPrompts:
    """Guards at most `max_keys` keys; those that were neither added nor found for the longest time are forgotten."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._routes: dict[bytes, Hops] = {}

    def add(self, keys: Sequence[bytes], hops: Hops) -> None:
        """These hops hold the blocks that `keys` stand for, each of which commits to those before it."""
        for key in keys:
            self._routes.pop(key, None)
            if len(self._routes) >= self._max_keys:
                del self._routes[next(iter(self._routes))]
            self._routes[key] = hops

    def find(self, keys: Sequence[bytes]) -> tuple[int, Hops]:
        """How many of the first blocks are held, and where; (0, ()) where none are known to be."""
        for count in range(len(keys), 0, -1):
            if (hops := self._routes.get(keys[count - 1])) is not None:
                self.add(keys[:count], hops)
                return count, hops
        return 0, ()

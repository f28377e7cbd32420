"""Clients' adapters at a peer: taken in, checked, and kept for their owners alone. Bounded in bytes and seconds.

Owns who gives way; knows neither sessions nor computation. All of it may be dropped at any time: whoever needs an
adapter that is not here is told, and sends it again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from msgspec import structs

from peers.errors import Busy, ProtocolError, Refused
from peers.model.adapters import WIDTH, Adapter, check_order, num_rows, of_rows
from peers.transport.links import Link, Links
from peers.wire import parts
from peers.wire.messages import Adapter as AdapterMessage
from peers.wire.messages import Code
from routing.errors import SwarmError
from routing.ids import BlockSpan, PeerId

logger = logging.getLogger(__name__)

RETRY_S = 5.0
"""When there may be room again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """What clients' adapters may take of a peer. Raises ValueError."""

    max_bytes: int = 256 << 20
    max_bytes_per_peer: int = 64 << 20
    lease_s: float = 120.0
    """One that nobody used for so long is dropped."""

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.max_bytes_per_peer) < 0 or self.lease_s <= 0:
            raise ValueError("bytes are not negative, a lease is longer than 0 s")


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

    def __init__(self, limits: AdapterLimits) -> None:
        self.limits = limits
        self._owned: OrderedDict[tuple[PeerId, bytes], _Owned] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owned)

    def num_bytes(self, owner: PeerId | None = None) -> int:
        """Of this owner's, or of everybody's."""
        return sum(one.gathering.rows.nbytes for key, one in self._owned.items() if owner in (None, key[0]))

    def begin(self, link: Link, head: AdapterMessage, now_s: float) -> None:
        """Raises Refused, Busy."""
        key, needed = (link.remote, head.adapter), num_rows(head.targets) * WIDTH * 4
        known = self._owned.get(key)
        if known is not None and known.whole is not None:  # over another link, or after a doubt: who uses it goes on
            known.link, known.expires_at_s = link, now_s + self.limits.lease_s
            return
        self._owned.pop(key, None)
        if needed > self.limits.max_bytes_per_peer:
            raise Refused(
                f"an adapter of {needed >> 20} MiB, this peer takes {self.limits.max_bytes_per_peer >> 20}",
                code=Code.TOO_LONG,
            )
        while self.num_bytes(link.remote) + needed > self.limits.max_bytes_per_peer:
            del self._owned[next(other for other in self._owned if other[0] == link.remote)]
        if self.num_bytes() + needed > self.limits.max_bytes:
            raise Busy("no room for another adapter here", retry_after_s=RETRY_S)
        gathering = parts.Gathering(num_rows(head.targets), WIDTH, "float32")
        self._owned[key] = _Owned(link, head, gathering, now_s + self.limits.lease_s)

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

    def take(self, owner: PeerId, name: bytes, now_s: float) -> Adapter:
        """For one more use. Raises Refused."""
        owned = self._owned.get((owner, name))
        if owned is None or owned.whole is None:
            raise Refused("an adapter that is not here", code=Code.UNKNOWN_ADAPTER)
        self._owned.move_to_end((owner, name))
        owned.expires_at_s = now_s + self.limits.lease_s
        return owned.whole

    def drop_where(self, condition: Callable[[_Owned], bool]) -> None:
        for key in [key for key, owned in self._owned.items() if condition(owned)]:
            del self._owned[key]


class Adapters:
    """Serves `Adapter`. What is wrong with one is told to the opens and works that need it."""

    def __init__(
        self,
        *,
        links: Links,
        check: Callable[[AdapterMessage], None],
        limits: AdapterLimits,
        clock: Callable[[], float],
    ) -> None:
        """`check` raises Busy, Refused or ProtocolError for what is not wanted here."""
        self.wardrobe = Wardrobe(limits)
        self.hosted: Mapping[bytes, Adapter | None] = {}
        """For everybody, by digest: what of each is of the blocks that are served, if anything."""
        self._check = check
        self._clock = clock
        self._wrong: dict[Link, tuple[bytes, SwarmError]] = {}
        """The last one that was declined, and why."""
        links.handle(AdapterMessage, self._receive)
        links.on_lost(self._link_lost)

    def take(self, link: Link, name: bytes, span: BlockSpan) -> Adapter | None:
        """The sender's adapter of that name, or the hosted one, for these blocks; of that perhaps nothing.

        Raises Refused, ProtocolError, or what was wrong with it.
        """
        wrong, error = self._wrong.get(link, (None, None))
        if wrong == name and error is not None:
            del self._wrong[link]
            raise error
        adapter = self.again(link.remote, name)
        if adapter is not None and name not in self.hosted:
            check_order(adapter.targets, span)
        return adapter

    def again(self, owner: PeerId, name: bytes) -> Adapter | None:
        """What was taken before. Raises Refused."""
        if name in self.hosted:
            return self.hosted[name]
        return self.wardrobe.take(owner, name, self._clock())

    def expire(self) -> None:
        now_s = self._clock()
        self.wardrobe.drop_where(lambda owned: owned.expires_at_s <= now_s)

    def clear(self) -> None:
        self.wardrobe.drop_where(lambda _: True)

    async def _receive(self, link: Link, message: AdapterMessage, payload: memoryview) -> None:
        try:
            if message.first == 0:
                self._check(message)
                check_order(message.targets, BlockSpan(message.start, message.end))
                self.wardrobe.begin(link, message, self._clock())
            self.wardrobe.add(link, message, payload)
        except (Busy, Refused, ProtocolError) as error:
            self._wrong[link] = (message.adapter, error)
            logger.info("an adapter from %s: %s", link.remote, error)

    def _link_lost(self, link: Link) -> None:
        self.wardrobe.drop_where(lambda owned: owned.link is link)
        self._wrong.pop(link, None)

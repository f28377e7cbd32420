"""Where a hop's output goes: pushed to the next hop, or returned to the client on the client's own stream.

A hop that cannot reach its successor hands the output to the client to carry, and says why (`Relay`). The client says
who the successor is and where, and clients are strangers: what is dialled for them is bounded, and never inside a
network that they cannot reach themselves.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from peers.errors import Busy
from peers.serving.ledger import Entry
from peers.transport.links import Link, Links
from peers.wire.messages import Relay, Result, Step
from routing.addresses import is_public
from routing.errors import PeerError, SwarmError, Unavailable
from routing.ids import PeerId

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 3.0
MAX_DIALS = 16
MAX_DIALS_PER_OWNER = 4
"""Successors that are being dialled at once; outputs for one more go through the client meanwhile."""
SILENCE_S = 0.5
"""A successor that says nothing for less is not given up, whatever a client thinks."""
RETRY_PUSH_S = 30.0
"""After a failed dial outputs go through the client for this long before the successor is tried again."""


class Delivery(msgspec.Struct, frozen=True):
    """One output, ready for the wire, kept by the ledger as the step's stored answer."""

    message: Step | Result
    payload: memoryview
    bulk: bool


@dataclass(slots=True)
class PushCounts:
    """How outputs left this hop; a swarm in which `pushed` stays 0 has lost its forward-only path."""

    pushed: int = 0
    relayed: int = 0
    returned: int = 0


class Pusher:
    """Delivers outputs of sessions over the node's links."""

    def __init__(self, links: Links, clock: Callable[[], float]) -> None:
        self.counts = PushCounts()
        self._links = links
        self._clock = clock
        self._dials: Counter[tuple[PeerId, PeerId]] = Counter()
        """By owner and successor: who waits for a link that is being dialled."""

    async def warm(self, entry: Entry[Delivery, Link]) -> None:
        """Dial the successor while the client is still opening the other hops."""
        following = entry.next
        try:
            await self._successor(entry)
        except Busy as error:
            logger.debug("session %s: %s", entry.place, error)  # the first push dials too
        except (PeerError, Unavailable) as error:
            if entry.next == following:  # else that is about a successor of before
                self.relay_for_now(entry, error)

    async def reaches(self, entry: Entry[Delivery, Link], *, timeout_s: float) -> bool:
        """Whether the successor answers over the link that outputs take; from a silent one on they go through the
        client. True where there is no such link, as the next output finds that out by itself."""
        link = None if entry.next is None else self._links.known(entry.next)
        if link is None or entry.relay_until_s > self._clock():
            return True
        heard_at_s = link.heard_at_s
        # the link is everybody's, and whoever asks a stranger; but he waits no more than twice as long for what it says
        timeout_s = max(timeout_s, SILENCE_S, min(2 * link.answer_s, 1.5 * timeout_s))
        try:
            await self._links.ping(link.remote, timeout_s=timeout_s, renews=False)
        except PeerError as error:
            if link.heard_at_s > heard_at_s and not link.closed:
                return True  # it is late with this answer, no more
            if entry.next == link.remote:
                self.relay_for_now(entry, error)
            link.retire()  # who waits to send over it must not wait on
            return False
        return True

    async def arrived(self, entry: Entry[Delivery, Link], *, timeout_s: float) -> bool:
        """Whether all that was pushed to the successor has come there."""
        return entry.next is None or await self._links.arrived(entry.next, timeout_s=timeout_s)

    async def deliver(self, entry: Entry[Delivery, Link], delivery: Delivery) -> None:
        """Send one output on its way. A client that is gone is no error here: its link's end releases its sessions."""
        message = delivery.message
        if isinstance(message, Result):
            if await self._to_client(entry, message, delivery):
                self.counts.returned += 1
            return
        assert entry.next is not None
        if entry.relay_until_s <= self._clock():
            try:
                link = await self._successor(entry)
                await link.send(message, delivery.payload, bulk=delivery.bulk)
            except Busy as error:
                logger.info("session %s: relaying one step: %s", entry.place, error)
            except (PeerError, Unavailable) as error:  # Unavailable: out of descriptors, for example
                if message.epoch != entry.epoch:  # the route was replaced meanwhile: the new successor is another one
                    return
                self.relay_for_now(entry, error)
            else:
                self.counts.pushed += 1
                return
        relay = Relay(next=entry.next, reason="the successor could not be reached from here", step=message)
        if await self._to_client(entry, relay, delivery):
            self.counts.relayed += 1

    def deliver_now(self, entry: Entry[Delivery, Link], delivery: Delivery) -> bool:
        """As `deliver`, if nothing has to be waited for; else False, and nothing was sent."""
        message = delivery.message
        if delivery.bulk:
            return False
        if isinstance(message, Result):
            sent = entry.owner_link.send_now(message, delivery.payload)
            self.counts.returned += sent
            return sent
        assert entry.next is not None
        link = self._links.known(entry.next)
        if link is None or not link.wanted or entry.relay_until_s > self._clock():
            return False
        sent = link.send_now(message, delivery.payload)
        self.counts.pushed += sent
        return sent

    async def feed(
        self, entry: Entry[Delivery, Link], delivery: Delivery, to: PeerId, addresses: Sequence[str]
    ) -> None:
        """Send a step to a standby for the successor, never through the client. Raises as `_successor` does."""
        link = await self._link(entry.owner, to, addresses)
        await link.send(delivery.message, delivery.payload, bulk=delivery.bulk)

    async def _successor(self, entry: Entry[Delivery, Link]) -> Link:
        """The link to the next hop. Raises PeerError, Unavailable, and Busy when too many are being dialled already."""
        assert entry.next is not None
        return await self._link(entry.owner, entry.next, entry.next_addresses)

    async def _link(self, owner: PeerId, peer: PeerId, addresses: Sequence[str]) -> Link:
        if self._links.known(peer) is not None:
            return await self._links.to(peer)
        dial = (owner, peer)
        mine = sum(other == owner for other, _ in self._dials)
        if dial not in self._dials and (mine >= MAX_DIALS_PER_OWNER or len(self._dials) >= MAX_DIALS):
            raise Busy(f"{mine} peers are dialled for {owner}, {len(self._dials)} in all", retry_after_s=1.0)
        self._dials[dial] += 1
        try:
            return await self._links.to(peer, self._dialable(addresses), timeout_s=DIAL_TIMEOUT_S)
        finally:
            self._dials[dial] -= 1
            self._dials = +self._dials

    def _dialable(self, addresses: Sequence[str]) -> Sequence[str]:
        """A node of the internet dials no host of its own network for a stranger, nor a name that may lead to one."""
        if any(map(is_public, self._links.transport.addresses)):
            return tuple(filter(is_public, addresses))
        return addresses

    def relay_for_now(self, entry: Entry[Delivery, Link], error: SwarmError) -> None:
        """Do not try the successor for a while."""
        entry.relay_until_s = self._clock() + RETRY_PUSH_S
        logger.warning("session %s: relaying through the client, %s: %s", entry.place, entry.next, error)

    async def _to_client(self, entry: Entry[Delivery, Link], message: Result | Relay, delivery: Delivery) -> bool:
        try:
            await entry.owner_link.send(message, delivery.payload, bulk=delivery.bulk)
        except (PeerError, Unavailable) as error:  # Unavailable: a client that we dialled, and no lane can be opened
            logger.debug("session %s: the client is not reached: %s", entry.place, error)
            return False
        return True

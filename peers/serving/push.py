"""Where a hop's output goes: pushed to the next hop, or returned to the client on the client's own stream.

A hop that cannot reach its successor hands the output to the client to carry, and says why (`Relay`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from peers.serving.ledger import Entry
from peers.transport.links import Link, Links
from peers.wire.messages import Relay, Result, Step
from routing.errors import PeerError, SwarmError, Unavailable

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 3.0
MAX_WARMING = 16
"""Successors dialled ahead of the first push at once."""
RETRY_PUSH_S = 30.0
"""After a failed dial outputs go through the client for this long before the successor is tried again."""


@dataclass(frozen=True, slots=True)
class Delivery:
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
        self._warming = 0

    async def warm(self, entry: Entry[Delivery, Link]) -> None:
        """Dial the successor while the client is still opening the other hops."""
        assert entry.next is not None
        if self._warming >= MAX_WARMING:
            return  # strangers name the addresses; the first push dials too
        self._warming += 1
        try:
            await self._links.to(entry.next, entry.next_addresses, timeout_s=DIAL_TIMEOUT_S)
        except (PeerError, Unavailable) as error:
            self._relay_for_now(entry, error)
        finally:
            self._warming -= 1

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
                link = await self._links.to(entry.next, entry.next_addresses, timeout_s=DIAL_TIMEOUT_S)
                await link.send(message, delivery.payload, bulk=delivery.bulk)
            except (PeerError, Unavailable) as error:  # Unavailable: out of descriptors, for example
                self._relay_for_now(entry, error)
            else:
                self.counts.pushed += 1
                return
        relay = Relay(next=entry.next, reason="the successor could not be reached from here", step=message)
        if await self._to_client(entry, relay, delivery):
            self.counts.relayed += 1

    def _relay_for_now(self, entry: Entry[Delivery, Link], error: SwarmError) -> None:
        entry.relay_until_s = self._clock() + RETRY_PUSH_S
        logger.warning("session %s: relaying through the client, %s: %s", entry.session, entry.next, error)

    async def _to_client(self, entry: Entry[Delivery, Link], message: Result | Relay, delivery: Delivery) -> bool:
        try:
            await entry.owner_link.send(message, delivery.payload, bulk=delivery.bulk)
        except (PeerError, Unavailable) as error:  # Unavailable: a client that we dialled, and no lane can be opened
            logger.debug("session %s: the client is not reached: %s", entry.session, error)
            return False
        return True

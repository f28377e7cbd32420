"""Who is out there: a fold of verified announcements into an immutable snapshot.

Per peer the highest sequence wins. Knows nothing of signatures (only verified announcements come in), of the network,
or of how good a peer is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from routing.coordinates import Coordinate
from routing.ids import ModelId, PeerId
from routing.records import CLOCK_SLACK_S, Announcement, PeerState

MAX_PEERS: Final = 20_000
"""Above what one model's keys can hold; while the directory is full, newcomers wait and known peers stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The live peers at one moment. Never changes; safe to hand to other threads."""

    taken_at_s: float
    """When it was made; it holds until a peer appears, changes or expires."""
    by_model: Mapping[ModelId, tuple[Announcement, ...]]

    @property
    def peers(self) -> tuple[Announcement, ...]:
        """Live announcements of every model."""
        return tuple(itertools.chain.from_iterable(self.by_model.values()))

    def of_model(self, model: ModelId) -> tuple[Announcement, ...]:
        """Live announcements of this model; empty when nobody serves it."""
        return self.by_model.get(model, ())


class Directory:
    """Guards the fold. At most MAX_PEERS entries; expired ones leave whenever a snapshot is taken."""

    def __init__(self, max_peers: int = MAX_PEERS) -> None:
        self._max_peers = max_peers
        # Each announcement with the time until which it is live.
        self._entries: dict[PeerId, tuple[Announcement, float]] = {}
        self._snapshot: Snapshot | None = None
        self._next_expiry_s = math.inf

    def fold(self, announcements: Iterable[Announcement], now_s: float) -> None:
        """Take in verified announcements, in any order and any number of times."""
        for announcement in announcements:
            known = self._entries.get(announcement.peer_id)
            if known is not None and known[0].sequence >= announcement.sequence:
                continue
            live_until_s = _live_until_s(announcement, now_s)
            if live_until_s <= now_s:
                continue
            if known is None and len(self._entries) >= self._max_peers:
                self._drop_expired(now_s)
                if len(self._entries) >= self._max_peers:
                    continue
            self._entries[announcement.peer_id] = (announcement, live_until_s)
            if live_until_s < self._next_expiry_s:
                self._next_expiry_s = live_until_s
            self._snapshot = None

    def says(self, peer: PeerId, state: PeerState) -> None:
        """The peer itself says so: newer than its record, and true until it announces another one."""
        known = self._entries.get(peer)
        if known is not None and known[0].state is not state:
            self._entries[peer] = (replace(known[0], state=state), known[1])
            self._snapshot = None

    def place_of(self, peer: PeerId) -> Coordinate | None:
        """Where the peer said last that it is."""
        known = self._entries.get(peer)
        return None if known is None else known[0].place

    def snapshot(self, now_s: float) -> Snapshot:
        """The peers that are live now. The same object as before while nothing changed."""
        self._drop_expired(now_s)
        if self._snapshot is None:
            by_model: dict[ModelId, list[Announcement]] = {}
            for announcement, _ in self._entries.values():
                by_model.setdefault(announcement.model, []).append(announcement)
            self._snapshot = Snapshot(
                taken_at_s=now_s,
                by_model=MappingProxyType({model: tuple(peers) for model, peers in by_model.items()}),
            )
        return self._snapshot

    def _drop_expired(self, now_s: float) -> None:
        if now_s < self._next_expiry_s:
            return
        self._entries = {peer: entry for peer, entry in self._entries.items() if now_s < entry[1]}
        self._next_expiry_s = min((live_until_s for _, live_until_s in self._entries.values()), default=math.inf)
        self._snapshot = None


def _live_until_s(announcement: Announcement, now_s: float) -> float:
    # A peer whose clock is behind ours announces records that look old at birth: give each new one the slack from the
    # moment it is seen, within the slack that its verification grants. A peer with a true clock gets none of it, so
    # that the dead disappear on time.
    expires_at_s = announcement.expires_at_s
    return min(max(expires_at_s, now_s + CLOCK_SLACK_S), expires_at_s + CLOCK_SLACK_S)

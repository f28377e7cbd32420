"""Who is out there: a fold of verified announcements into an immutable snapshot.

Per peer the highest sequence wins. Knows nothing of signatures (only verified announcements come in), of the network,
or of how good a peer is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from types import MappingProxyType
from typing import Final

from routing.coordinates import Coordinate
from routing.ids import ModelId, PeerId
from routing.records import CLOCK_SLACK_S, RECORD_LIFETIME_S, Announcement, PeerState

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
        self._entries: dict[PeerId, Announcement] = {}
        # Not in pairs with it: ten thousand new objects would set off the search for cycles among all that there are.
        self._live_until_s: dict[PeerId, float] = {}
        # Whose last record is over here, and may be read on: its sequence, and until when.
        self._over: dict[PeerId, tuple[int, float]] = {}
        self._snapshot: Snapshot | None = None
        self._next_expiry_s = math.inf

    def fold(self, announcements: Iterable[Announcement], now_s: float) -> None:
        """Take in verified announcements, in any order and any number of times."""
        entries, ends_s = self._entries, self._live_until_s
        soonest_s, latest_s = now_s + CLOCK_SLACK_S, now_s + RECORD_LIFETIME_S  # of a peer with a true clock
        for announcement in announcements:
            peer = announcement.peer_id
            known = entries.get(peer)
            if known is not None:
                if known.sequence >= announcement.sequence:
                    continue
            elif peer in self._over and self._over[peer][0] >= announcement.sequence:
                continue
            live_until_s = announcement.expires_at_s
            if not soonest_s <= live_until_s <= latest_s:
                live_until_s = _live_until_s(live_until_s, now_s)
                if live_until_s <= now_s:
                    continue
            if known is None and len(entries) >= self._max_peers:
                self._drop_expired(now_s)
                if len(entries) >= self._max_peers:
                    continue
            entries[peer], ends_s[peer] = announcement, live_until_s
            if live_until_s < self._next_expiry_s:
                self._next_expiry_s = live_until_s
            self._snapshot = None

    def says(self, peer: PeerId, state: PeerState) -> None:
        """The peer itself says so: newer than its record, and true until it announces another one."""
        known = self._entries.get(peer)
        if known is not None and known.state is not state:
            self._entries[peer] = replace(known, state=state)
            self._snapshot = None

    def place_of(self, peer: PeerId) -> Coordinate | None:
        """Where the peer said last that it is."""
        known = self._entries.get(peer)
        return None if known is None else known.place

    def snapshot(self, now_s: float) -> Snapshot:
        """The peers that are live now. The same object as before while nothing changed."""
        self._drop_expired(now_s)
        if self._snapshot is None:
            by_model: dict[ModelId, list[Announcement]] = {}
            for model, peers in itertools.groupby(self._entries.values(), _model):  # most are of one
                by_model.setdefault(model, []).extend(peers)
            self._snapshot = Snapshot(
                taken_at_s=now_s,
                by_model=MappingProxyType({model: tuple(peers) for model, peers in by_model.items()}),
            )
        return self._snapshot

    def _drop_expired(self, now_s: float) -> None:
        if now_s < self._next_expiry_s:
            return
        self._over = {peer: over for peer, over in self._over.items() if now_s < over[1]}
        for peer in [peer for peer, live_until_s in self._live_until_s.items() if live_until_s <= now_s]:
            announcement = self._entries.pop(peer)
            del self._live_until_s[peer]
            readable_until_s = announcement.expires_at_s + CLOCK_SLACK_S
            if now_s < readable_until_s and len(self._over) < self._max_peers:
                self._over[peer] = (announcement.sequence, readable_until_s)
        self._next_expiry_s = min(self._live_until_s.values(), default=math.inf)
        self._snapshot = None


_model: Final = attrgetter("model")


def _live_until_s(expires_at_s: float, now_s: float) -> float:
    # A peer whose clock is behind ours announces records that look old at birth: give each new one the slack from the
    # moment it is seen, within the slack that its verification grants. One whose clock is ahead announces records that
    # would last for minutes: each counts for one lifetime from then on. A peer with a true clock gets none of both, so
    # that the dead disappear on time.
    at_least_s = min(now_s + CLOCK_SLACK_S, expires_at_s + CLOCK_SLACK_S)
    return max(min(expires_at_s, now_s + RECORD_LIFETIME_S), at_least_s)

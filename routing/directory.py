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
        # When the latest record of each was read last: what it announces next is no older than that.
        self._read_at_s: dict[PeerId, float] = {}
        # Whose last record is over here, and may be read on: its sequence, and until when.
        self._over: dict[PeerId, tuple[int, float]] = {}
        self._snapshot: Snapshot | None = None
        self._next_expiry_s = math.inf

    def fold(self, announcements: Iterable[Announcement], now_s: float) -> None:
        """Take in verified announcements, in any order and any number of times. At `now_s` somebody began to ask."""
        entries, ends_s, read_at_s = self._entries, self._live_until_s, self._read_at_s
        soonest_s, latest_s = now_s + CLOCK_SLACK_S, now_s + RECORD_LIFETIME_S  # of a peer with a true clock
        for announcement in announcements:
            peer = announcement.peer_id
            known = entries.get(peer)
            if known is not None or peer in self._over:
                sequence = self._over[peer][0] if known is None else known.sequence
                if sequence >= announcement.sequence:
                    if sequence == announcement.sequence:
                        read_at_s[peer] = now_s
                    continue
            live_until_s = announcement.expires_at_s
            if not soonest_s <= live_until_s <= latest_s:
                live_until_s = _live_until_s(live_until_s, now_s, read_at_s.get(peer))
                if live_until_s <= now_s:
                    continue
            if known is None and len(entries) >= self._max_peers:
                self._drop_expired(now_s)
                if len(entries) >= self._max_peers:
                    continue
            entries[peer], ends_s[peer], read_at_s[peer] = announcement, live_until_s, now_s
            if live_until_s < self._next_expiry_s:
                self._next_expiry_s = live_until_s
            self._snapshot = None

    def says(self, peer: PeerId, state: PeerState) -> None:
        """The peer itself says so: newer than its record, and true until it announces another one."""
        known = self._entries.get(peer)
        if known is not None and known.state is not state:
            self._entries[peer] = replace(known, state=state)
            self._snapshot = None

    def record_of(self, peer: PeerId) -> Announcement | None:
        """What the peer announced last, which may be over."""
        return self._entries.get(peer)

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
        for peer in [peer for peer, over in self._over.items() if over[1] <= now_s]:
            del self._over[peer]
            if peer not in self._entries:
                del self._read_at_s[peer]
        for peer in [peer for peer, live_until_s in self._live_until_s.items() if live_until_s <= now_s]:
            announcement = self._entries.pop(peer)
            del self._live_until_s[peer]
            readable_until_s = announcement.expires_at_s + CLOCK_SLACK_S
            if now_s < readable_until_s and len(self._over) < self._max_peers:
                self._over[peer] = (announcement.sequence, readable_until_s)
            elif peer not in self._over:
                del self._read_at_s[peer]
        self._next_expiry_s = min(self._live_until_s.values(), default=math.inf)
        self._snapshot = None


_model: Final = attrgetter("model")


def _live_until_s(expires_at_s: float, now_s: float, read_at_s: float | None) -> float:
    """Of a record read by who asked at `now_s`, and read the record before it at `read_at_s`, if any."""
    # Those of a peer whose clock is ahead would last for minutes: each counts for one lifetime from then on. Those of
    # one whose clock is behind look old at birth, as those of the dead do later. But a record is made after the one
    # before it was read, so for one lifetime from then on it may count; and who stores it keeps it past its end only
    # where it came late. Both within the slack that its verification grants. The dead with true clocks gain nothing.
    live_until_s = min(expires_at_s, now_s + RECORD_LIFETIME_S)
    if read_at_s is not None:
        live_until_s = max(live_until_s, min(read_at_s + RECORD_LIFETIME_S, expires_at_s + CLOCK_SLACK_S))
    elif expires_at_s <= now_s:
        live_until_s = expires_at_s + CLOCK_SLACK_S
    return live_until_s

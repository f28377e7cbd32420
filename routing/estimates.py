"""What this node measured about its peers, smoothed and aged: round trip, step time, queue; and where it is itself.

Owns the smoothing. Measurements outrank what a peer announces, and fade back to it when they grow old. The round trip
to a peer that was never measured is what network coordinates predict. Knows neither routes nor costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from routing.coordinates import Coordinate, distance_s, moved
from routing.dealing import Dealing, price_s
from routing.flow import capacity
from routing.ids import PeerId
from routing.records import Announcement

DEFAULT_RTT_S: Final = 0.1
"""For a peer of which neither a measurement nor a place is known: neither attractive nor out of the question."""

SMOOTHING: Final = 1 / 8
"""RFC 6298 section 2.3, alpha."""
HALF_LIFE_S: Final = 300.0
QUEUE_HALF_LIFE_S: Final = 10.0
"""A queue empties in seconds; last minute's says nothing."""
CYCLE_S: Final = 0.5
"""From one step of a session to its next, when nobody waits: at least, or until routes say otherwise."""
MAX_PEERS: Final = 20_000


@dataclass(slots=True)
class Smoothed:
    """An exponentially weighted mean that fades towards a prior with the age of its last sample."""

    half_life_s: float = HALF_LIFE_S
    _mean: float = 0.0
    _updated_at_s: float | None = None

    @property
    def known(self) -> bool:
        return self._updated_at_s is not None

    def lately(self, now_s: float) -> float | None:
        """The mean as it was at its last sample, or None where that is older than the half-life."""
        return self._mean if self.age_s(now_s) < self.half_life_s else None

    def add(self, sample: float, now_s: float) -> None:
        """Take one sample; after a long silence it counts as the first one.

        Negative and non-finite samples are dropped: peers report their own step times, and one NaN would stay for ever.
        """
        if not 0 <= sample < math.inf:
            return
        weight = max(SMOOTHING, 1 - 0.5 ** (self.age_s(now_s) / self.half_life_s))
        self._mean += weight * (sample - self._mean)
        self._updated_at_s = now_s

    def age_s(self, now_s: float) -> float:
        """Since the last sample; infinite without one."""
        return math.inf if self._updated_at_s is None else max(0.0, now_s - self._updated_at_s)

    def value(self, prior: float, now_s: float) -> float:
        if self._updated_at_s is None:
            return prior
        age_s = now_s - self._updated_at_s
        return prior + 0.5 ** (age_s / self.half_life_s) * (self._mean - prior) if age_s > 0 else self._mean


@dataclass(slots=True)
class StepEstimates:
    """How long the steps of one peer take, by kind."""

    decode_s_per_block: Smoothed = field(default_factory=Smoothed)
    prefill_s_per_token_block: Smoothed = field(default_factory=Smoothed)
    queue_s: Smoothed = field(default_factory=lambda: Smoothed(half_life_s=QUEUE_HALF_LIFE_S))

    def add(self, blocks: int, tokens: int, compute_s: float, queue_s: float, now_s: float) -> None:
        """`tokens` positions went through `blocks` blocks in `compute_s`, after waiting `queue_s`."""
        self.queue_s.add(queue_s, now_s)
        per_block_s = compute_s / blocks
        if tokens == 1:
            self.decode_s_per_block.add(per_block_s, now_s)
        else:
            # A block takes decode + (tokens - 1) × prefill; the first term is known, or small beside a long prompt.
            first_s = min(per_block_s, self.decode_s_per_block.value(0.0, now_s))
            self.prefill_s_per_token_block.add((per_block_s - first_s) / (tokens - 1), now_s)


@dataclass(slots=True)
class _Measured(StepEstimates):
    rtt_s: Smoothed = field(default_factory=Smoothed)


class RoundTrip(NamedTuple):
    """What this node measured to a peer, and how long ago it did so last."""

    peer_id: PeerId
    rtt_s: float
    age_s: float


class PeerEstimate(NamedTuple):
    """Everything `routing.cost` wants to know about one peer. A tuple, because plans make thousands."""

    rtt_s: float
    queue_s: float
    decode_s_per_block: float
    prefill_s_per_token_block: float
    max_bytes_per_s: int = 0
    """As announced; 0 where no bound is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much a swarm is used, as its peers announce."""

    tokens_per_s: float = 0.0
    """What it can carry."""
    turn_s: float = 0.0
    """From one token of a session to its next, where all sessions are shared out in proportion and nobody idles."""


class Estimates:
    """Guards the measurements of at most MAX_PEERS peers; the one measured longest ago is forgotten first."""

    def __init__(self, max_peers: int = MAX_PEERS) -> None:
        self._max_peers = max_peers
        self._measured: dict[PeerId, _Measured] = {}
        self._planned: dict[PeerId, tuple[int, int]] = {}
        """Sessions that this node sent to a peer since the record with this sequence, which does not count them."""
        self._dealing = Dealing()
        self._idle_s = Smoothed()
        self.load = Load()
        self.here = Coordinate()
        """Of this node; what it announces."""

    def on_rtt(self, peer: PeerId, rtt_s: float, now_s: float, place: Coordinate | None = None) -> None:
        """A round trip of a small message, to a peer that says it is at `place`.

        This node's own point moves by it.
        """
        self._touch(peer).rtt_s.add(rtt_s, now_s)
        if place is not None:
            self.here = moved(self.here, place, rtt_s, salt=peer)

    def on_step(self, peer: PeerId, blocks: int, tokens: int, compute_s: float, queue_s: float, now_s: float) -> None:
        """A peer ran `tokens` positions through `blocks` blocks in `compute_s`, after waiting `queue_s`."""
        self._touch(peer).add(blocks, tokens, compute_s, queue_s, now_s)

    def rtt_s(self, peer: PeerId, now_s: float) -> float | None:
        """The smoothed round trip, or None when it was never measured."""
        measured = self._measured.get(peer)
        return measured.rtt_s.value(DEFAULT_RTT_S, now_s) if measured is not None and measured.rtt_s.known else None

    def round_trips(self, now_s: float, count: int) -> list[RoundTrip]:
        """Of the `count` peers measured last, those to which a round trip is known; the latest first."""
        latest = itertools.islice(reversed(self._measured.items()), count)
        return [
            RoundTrip(peer, measured.rtt_s.value(DEFAULT_RTT_S, now_s), measured.rtt_s.age_s(now_s))
            for peer, measured in latest
            if measured.rtt_s.known
        ]

    def on_planned(
        self, session: Hashable | None, hops: Sequence[tuple[Announcement, int]], idle_s: float, now_s: float
    ) -> None:
        """A session of this node goes to these peers, for so many blocks each; its steps take `idle_s` where nobody
        waits. None: one whose end nobody will tell."""
        self._idle_s.add(idle_s, now_s)
        for peer, sequence in {a.peer_id: a.sequence for a, _ in hops}.items():
            before, count = self._planned.pop(peer, (0, 0))
            if len(self._planned) >= self._max_peers:
                del self._planned[next(iter(self._planned))]
            self._planned[peer] = (sequence, count + 1 if before == sequence else 1)
        if session is not None:
            self._dealing.deal(session, [(a.peer_id, blocks / _speed(a)) for a, blocks in hops])

    def on_ended(self, session: Hashable) -> None:
        """A session of this node is over."""
        self._dealing.end(session)

    def is_new(self, session: Hashable | None) -> bool:
        """Whether it has a name and was dealt to nobody yet."""
        return session is not None and session not in self._dealing

    @property
    def cycle_s(self) -> float:
        """From one step of a session to its next, when nobody waits."""
        return self._idle_s.lately(0.0) or CYCLE_S

    def price_s_per_block(self, announcement: Announcement) -> float:
        """By how much a peer is made dearer, per block, for the sessions that this node has there (see `dealing`)."""
        part = self._dealing.part(announcement.peer_id, self.load.tokens_per_s)
        return price_s(part, self.load.turn_s, self.cycle_s) / announcement.num_blocks if part else 0.0

    def expected_queue_s(self, announcement: Announcement) -> float:
        """What a step waits as the peer says, or will wait behind the sessions that are there, before a queue shows it.

        n sessions that each need it for S of a cycle of T wait in a closed queue for w = R - S, where (Schweitzer 1979)
        R² + R (T - n·S) - S·T = 0: about n·S - T once that is positive, and little before.
        """
        sessions = announcement.sessions
        if self._planned:
            sequence, count = self._planned.get(announcement.peer_id, (0, 0))
            sessions += count if sequence == announcement.sequence else 0
        if not sessions:
            return announcement.queue_s
        takes_s = announcement.spans.num_blocks / _speed(announcement)
        # a session with short steps does other things too: two of them alone do not queue behind one another
        turn_s = max(CYCLE_S, self.cycle_s, self.load.turn_s)
        excess_s = (sessions + 1) * takes_s - turn_s
        response_s = (excess_s + math.sqrt(excess_s * excess_s + 4 * takes_s * turn_s)) / 2
        return max(announcement.queue_s, response_s - takes_s)

    def predicted_rtt_s(self, announcement: Announcement) -> float:
        """What the places of both ends say, where both know theirs well enough."""
        place = announcement.place
        if place is None or not (place.usable and self.here.usable):
            return DEFAULT_RTT_S
        return distance_s(self.here, place)

    @property
    def measured(self) -> Set[PeerId]:
        """Peers of which anything was ever measured; a live view."""
        return self._measured.keys()

    def of(self, announcement: Announcement, now_s: float) -> PeerEstimate:
        """Measured where measured, announced or assumed where not."""
        measured = self._measured.get(announcement.peer_id, _NOTHING)
        return PeerEstimate(
            measured.rtt_s.value(self.predicted_rtt_s(announcement), now_s),
            measured.queue_s.value(self.expected_queue_s(announcement), now_s),
            measured.decode_s_per_block.value(announcement.decode_s_per_block, now_s),
            measured.prefill_s_per_token_block.value(announcement.prefill_s_per_token_block, now_s),
            announcement.max_bytes_per_s,
        )

    def _touch(self, peer: PeerId) -> _Measured:
        measured = self._measured.pop(peer, None) or _Measured()
        if len(self._measured) >= self._max_peers:
            del self._measured[next(iter(self._measured))]
        self._measured[peer] = measured
        return measured


def _speed(announcement: Announcement) -> float:
    return capacity(announcement.decode_s_per_block, announcement.prefill_s_per_token_block)


_NOTHING: Final = _Measured()

"""What this node measured about its peers, smoothed and aged: round trip, bandwidth, step time, queue; and where it is.

Owns the smoothing. Measurements outrank what a peer announces, and fade back to it when they grow old. The round trip
to a peer that was never measured is what network coordinates predict. Knows neither routes nor costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec

from routing.coordinates import USABLE_ERROR, Coordinate, distance_s, moved
from routing.dealing import Dealing, price_s
from routing.detours import Detours
from routing.flow import capacity
from routing.ids import PeerId
from routing.records import Announcement
from routing.uplink import Uplink

BANDWIDTH_BYTES_PER_S: Final = 12.5e6
"""100 Mbit/s: what is assumed of the way to a peer that was sent nothing large yet."""
LATENCY_SHARE_MAX: Final = 0.75
"""Of the time until something large had arrived: what the round trip may claim of it, so that a rate remains."""
DEFAULT_RTT_S: Final = 0.1
"""For a peer of which neither a measurement nor a place is known: neither attractive nor out of the question."""

SMOOTHING: Final = 1 / 8
"""RFC 6298 section 2.3, alpha."""
HALF_LIFE_S: Final = 300.0
QUEUE_HALF_LIFE_S: Final = 10.0
"""A queue empties in seconds; last minute's says nothing."""
CYCLE_S: Final = 0.5
"""From one step of a session to its next, when nobody waits: at least, or until routes say otherwise."""
DOUBT: Final = 1.5
"""A peer that was measured to be so many times slower than it says is measured again,"""
DOUBT_AFTER_S: Final = 15.0
"""once the last measurement is so old."""
MAX_PEERS: Final = 20_000
_BYTE_S_MIN: Final = 1e-11


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

    def replace(self, value: float, now_s: float) -> None:
        """Know this and nothing of before; of values as of samples."""
        self._updated_at_s = None
        self.add(value, now_s)

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
        per_block_s = compute_s / blocks
        if tokens == 1:
            self.queue_s.add(queue_s, now_s)
            self.decode_s_per_block.add(per_block_s, now_s)
        else:
            # A block takes decode + (tokens - 1) × prefill; the first term is known, or small beside a long prompt.
            first_s = min(per_block_s, self.decode_s_per_block.value(0.0, now_s))
            self.prefill_s_per_token_block.add((per_block_s - first_s) / (tokens - 1), now_s)
            if first_s:  # what takes longer waits as many times longer (`cost.waits_s`)
                self.queue_s.add(queue_s * first_s / per_block_s, now_s)


@dataclass(slots=True)
class _Measured(StepEstimates):
    rtt_s: Smoothed = field(default_factory=Smoothed)
    byte_s: Smoothed = field(default_factory=Smoothed)
    """Seconds per byte on the way there."""


class RoundTrip(NamedTuple):
    """What this node measured to a peer, and how long ago it did so last."""

    peer_id: PeerId
    rtt_s: float
    age_s: float


class PeerEstimate(msgspec.Struct, frozen=True, gc=False):
    """Everything `routing.cost` wants to know about one peer."""

    rtt_s: float
    queue_s: float
    decode_s_per_block: float
    prefill_s_per_token_block: float
    max_bytes_per_s: int = 0
    """As announced; 0 where no bound is."""
    uplink_bytes_per_s: int = 0
    """As announced; 0 where it is not known."""
    bytes_per_s: float = BANDWIDTH_BYTES_PER_S
    """On the way there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much a swarm is used, as its peers announce."""

    tokens_per_s: float = 0.0
    """What it can carry."""
    turn_s: float = 0.0
    """From one token of a session to its next, where all sessions are shared out in proportion and nobody idles."""


class Dealt(NamedTuple):
    """What prices of peers have in common: see `dealing`."""

    turn: float
    part_per_s: float
    turn_s: float
    cycle_s: float


class Estimates:
    """Guards the measurements of at most MAX_PEERS peers; the one measured longest ago is forgotten first."""

    def __init__(self, max_peers: int = MAX_PEERS, *, turn: float = 0.0) -> None:
        """`turn`: a `Dealing`'s."""
        self._max_peers = max_peers
        self._measured: dict[PeerId, _Measured] = {}
        self._planned: dict[PeerId, tuple[int, int]] = {}
        """Sessions that this node sent to a peer since the record with this sequence, which does not count them."""
        self._found: dict[PeerId, tuple[Announcement, PeerEstimate]] = {}
        self._found_for: tuple[object, ...] = ()
        """What `of` said last, as long as nothing that it follows from has changed."""
        self._fastest = (BANDWIDTH_BYTES_PER_S, -math.inf)
        """The best way out of here that was measured lately, and when."""
        self._uplink = Uplink()
        self.detours = Detours()
        self._dealing = Dealing(turn)
        self._idle_s = Smoothed()
        self._load = Load()
        self.cycle_s = self.turn_s = CYCLE_S
        """From one step of a session to its next: when nobody waits, and as the swarm is loaded."""
        self.here = Coordinate()
        """Of this node; what it announces."""

    def on_rtt(self, peer: PeerId, rtt_s: float, now_s: float, place: Coordinate | None = None) -> None:
        """A round trip of a small message, to a peer that says it is at `place`.

        This node's own point moves by it.
        """
        self._touch(peer).rtt_s.add(rtt_s, now_s)
        if place is not None:
            self.here = moved(self.here, place, rtt_s, salt=peer)

    def on_transfer(self, peer: PeerId, size: int, seconds: float, now_s: float) -> None:
        """It took so long until the peer had read `size` bytes and this node knew: a round trip, and the bytes."""
        known_s = self.rtt_s(peer, now_s)
        rtt_s = known_s or 0.0
        if size > 0 and 0 < seconds < math.inf:
            if known_s is not None:
                self._uplink.add(size, seconds, rtt_s, now_s)
            byte_s = max(_BYTE_S_MIN, max(seconds - rtt_s, (1 - LATENCY_SHARE_MAX) * seconds) / size)
            self._touch(peer).byte_s.add(byte_s, now_s)
            if 1 / byte_s >= self._fastest[0] or now_s - self._fastest[1] > HALF_LIFE_S:
                self._fastest = (min(1 / byte_s, BANDWIDTH_BYTES_PER_S), now_s)

    def uplink_bytes_per_s(self, now_s: float) -> int:
        """What goes out of here at best, as it is announced; 0 where that is not known, or no less than is assumed."""
        return announced_uplink(self._uplink.bytes_per_s(now_s))

    def on_step(self, peer: PeerId, blocks: int, tokens: int, compute_s: float, queue_s: float, now_s: float) -> None:
        """A peer ran `tokens` positions through `blocks` blocks in `compute_s`, after waiting `queue_s`."""
        self._touch(peer).add(blocks, tokens, compute_s, queue_s, now_s)

    def on_trial(self, peer: PeerId, blocks: int, compute_s: float, now_s: float) -> None:
        """A peer ran one position through `blocks` blocks only so that this is known: whatever was known is over."""
        self._touch(peer).decode_s_per_block.replace(compute_s / blocks, now_s)

    def doubted_for_s(self, announcement: Announcement, now_s: float) -> float:
        """How long ago it was measured to be much slower than it says; 0 where that is no matter."""
        measured, says_s = self._measured.get(announcement.peer_id, _NOTHING), announcement.decode_s_per_block
        age_s = measured.decode_s_per_block.age_s(now_s)
        slower = measured.decode_s_per_block.value(says_s, now_s) > DOUBT * says_s > 0
        return age_s if slower and age_s >= DOUBT_AFTER_S else 0.0

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
        self._settle()
        for peer, sequence in {a.peer_id: a.sequence for a, _ in hops}.items():
            before, count = self._planned.pop(peer, (0, 0))
            if len(self._planned) >= self._max_peers:
                self._forget(self._planned)
            self._planned[peer] = (sequence, count + 1 if before == sequence else 1)
            self._found.pop(peer, None)
        if session is not None:
            self._dealing.deal(session, [(a.peer_id, blocks / _speed(a)) for a, blocks in hops])

    def on_ended(self, session: Hashable) -> None:
        """A session of this node is over."""
        self._dealing.end(session)

    def is_new(self, session: Hashable | None) -> bool:
        """Whether it has a name and was dealt to nobody yet."""
        return session is not None and session not in self._dealing

    @property
    def load(self) -> Load:
        return self._load

    @load.setter
    def load(self, load: Load) -> None:
        self._load = load
        self._settle()

    def _settle(self) -> None:
        # A turn is never shorter than CYCLE_S: a session with short steps does other things too, and two of them alone
        # do not queue behind one another. In steps of a tenth, so that what follows from it need not be computed for
        # every plan.
        self.cycle_s = self._idle_s.lately(0.0) or CYCLE_S
        turn_s = max(self.cycle_s, self._load.turn_s, CYCLE_S)
        self.turn_s = CYCLE_S * 1.1 ** round(math.log(turn_s / CYCLE_S, 1.1))

    def price_s_per_block(self, announcement: Announcement) -> float:
        """By how much a peer is made dearer, per block, for the sessions that this node has there (see `dealing`)."""
        if not self._load.turn_s:
            return 0.0
        one_s = announcement.spans.num_blocks / _speed(announcement)
        part = self._dealing.part(announcement.peer_id, one_s, self._load.tokens_per_s)
        return price_s(part, self._load.turn_s, self.cycle_s) / announcement.num_blocks

    @property
    def dealt(self) -> Dealt:
        """From which that of all peers follows that have none of them."""
        return Dealt(self._dealing.turn, self._dealing.per_s(self._load.tokens_per_s), self._load.turn_s, self.cycle_s)

    def expected_queue_s(self, announcement: Announcement) -> float:
        """What a step waits there, the sessions included that this node sent since the peer counted."""
        if announcement.peer_id not in self._planned and not announcement.sessions:
            return announcement.queue_s
        sequence, count = self._planned.get(announcement.peer_id, (0, 0))
        planned = count if sequence == announcement.sequence else 0
        return queued_s(announcement, announcement.sessions + planned, self.turn_s)

    @property
    def used(self) -> Set[PeerId]:
        """Peers of which this node's own sessions say more than their records."""
        return self._planned.keys() | self._dealing.peers

    def predicted_rtt_s(self, announcement: Announcement) -> float:
        """What the places of both ends say, where both know theirs well enough."""
        here, place = self.here, announcement.place
        if place is None or place.error > USABLE_ERROR or here.error > USABLE_ERROR:
            return DEFAULT_RTT_S
        return distance_s(here, place)

    @property
    def measured(self) -> Set[PeerId]:
        """Peers of which anything was ever measured; a live view."""
        return self._measured.keys()

    def timed(self, peer: PeerId) -> bool:
        """Whether the bandwidth to it was ever measured."""
        return self._measured.get(peer, _NOTHING).byte_s.known

    def of(self, announcement: Announcement, now_s: float) -> PeerEstimate:
        """Measured where measured, announced or assumed where not."""
        found_for = (now_s, self.turn_s, self.here, self._fastest)
        if found_for != self._found_for:
            self._found, self._found_for = {}, found_for
        known = self._found.get(announcement.peer_id)
        if known is not None and known[0] is announcement:
            return known[1]
        estimate = self._of(announcement, now_s)
        self._found[announcement.peer_id] = announcement, estimate
        return estimate

    def _of(self, announcement: Announcement, now_s: float) -> PeerEstimate:
        measured = self._measured.get(announcement.peer_id)
        assumed = self.assumed_bytes_per_s(now_s)
        if measured is None:  # most peers of a large swarm
            return PeerEstimate(
                self.predicted_rtt_s(announcement),
                self.expected_queue_s(announcement),
                announcement.decode_s_per_block,
                announcement.prefill_s_per_token_block,
                announcement.max_bytes_per_s,
                announcement.uplink_bytes_per_s,
                assumed,
            )
        return PeerEstimate(
            measured.rtt_s.value(self.predicted_rtt_s(announcement), now_s),
            measured.queue_s.value(self.expected_queue_s(announcement), now_s),
            measured.decode_s_per_block.value(announcement.decode_s_per_block, now_s),
            measured.prefill_s_per_token_block.value(announcement.prefill_s_per_token_block, now_s),
            announcement.max_bytes_per_s,
            announcement.uplink_bytes_per_s,
            1 / measured.byte_s.value(1 / assumed, now_s) if measured.byte_s.known else assumed,
        )

    def assumed_bytes_per_s(self, now_s: float) -> float:
        """Of the way to a peer to which none was measured: the best of the others, or what everybody assumes."""
        fastest, at_s = self._fastest
        return fastest if now_s - at_s <= HALF_LIFE_S else BANDWIDTH_BYTES_PER_S

    def _touch(self, peer: PeerId) -> _Measured:
        self._found.pop(peer, None)
        measured = self._measured.pop(peer, None) or _Measured()
        if len(self._measured) >= self._max_peers:
            self._forget(self._measured)
        self._measured[peer] = measured
        return measured

    def _forget(self, known: dict[PeerId, Any]) -> None:
        first = next(iter(known))
        del known[first]
        self._found.pop(first, None)


def queued_s(announcement: Announcement, sessions: int, turn_s: float) -> float:
    """What a step waits as the peer says, or will wait behind the sessions that are there, before a queue shows it.

    n sessions that each need it for S of a turn of T wait in a closed queue for w = R - S, where (Schweitzer 1979)
    R² + R (T - n·S) - S·T = 0: about n·S - T once that is positive, and little before.
    """
    if not sessions:
        return announcement.queue_s
    takes_s = announcement.spans.num_blocks / _speed(announcement)
    excess_s = (sessions + 1) * takes_s - turn_s
    response_s = (excess_s + math.sqrt(excess_s * excess_s + 4 * takes_s * turn_s)) / 2
    return max(announcement.queue_s, response_s - takes_s)


def announced_uplink(bytes_per_s: float) -> int:
    """As a record says it: to a power of two, as no send repeats more exactly; 0 where that is no less than everybody
    assumes, or 0."""
    coarse = 2 ** round(math.log2(max(1.0, bytes_per_s)))
    return coarse if bytes_per_s > 0 and coarse < BANDWIDTH_BYTES_PER_S else 0


def _speed(announcement: Announcement) -> float:
    return capacity(announcement.decode_s_per_block, announcement.prefill_s_per_token_block)


_NOTHING: Final = _Measured()

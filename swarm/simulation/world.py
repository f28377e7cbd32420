"""What a simulated swarm is made of: peers with speeds, memory, places and a life; users with prompts.

Owns the draws. All chance comes from one generator, so a seed decides everything.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import Final

from routing.coordinates import Coordinate, distance_s
from routing.estimates import announced_uplink
from routing.flow import BATCH
from routing.identity import peer_id_of
from routing.ids import BlockSpan, BlockSpans, ModelId, PeerId
from routing.placement import Move
from routing.records import RECORD_LIFETIME_S, Announcement, PeerState

MODEL: Final = ModelId(hashlib.sha256(b"a simulated model").digest())
REGIONS: Final = ((0.0, 0.0), (0.09, 0.01), (0.15, 0.06), (0.17, -0.10), (0.03, 0.18))
"""Of the plane in which distances are round trips, in seconds: about two coasts, Europe, East Asia, Oceania."""
PLACE_NOISE: Final = 0.06
"""How wrong announced places are: the median error that Vivaldi reached in the tests of `routing.coordinates`."""
DECODE_S: Final = 0.015
"""Per block and token: a large model on consumers' machines."""
BLOCK_BYTES: Final = 200_000_000
DOWNLOAD_BYTES_PER_S: Final = 25e6
LINK_BYTES_PER_S: Final = 25e6
"""Median of what access links carry, each in both directions; of a way between two nodes the slower one counts."""
LOAD_S_PER_BLOCK: Final = 0.5
"""From disk, of blocks that were downloaded before."""
BYTES_PER_TOKEN: Final = 16_384
USERS_PER_PEER: Final = 10
"""So many ask for enough to fill the peers over the routes that they get. A user who waits for each token has one under
way, and half of its time passes on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """Raises ValueError when a number is out of range."""

    peers: int = 1000
    users: int = USERS_PER_PEER * 1000
    """Each asks again as soon as it was answered."""
    clients: int = 10
    """Nodes through which users come; each has a router of its own."""
    blocks: int = 32
    minutes: float = 10.0
    churn_per_hour: float = 0.2
    """The share of the peers that leaves, half of them by dying, and is replaced by strangers."""
    new_tokens: int = 200
    """Per answer, on average."""
    prompt_tokens: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.peers <= 20_000 and 1 <= self.clients <= self.users <= 200_000 and 1 <= self.blocks <= 512):
            raise ValueError("between 1 and 20,000 peers, 1 and 512 blocks, and no fewer users than clients")
        if not (0 < self.minutes <= 10_000 and 0 <= self.churn_per_hour <= 100):
            raise ValueError("minutes are above 0, churn is not negative")
        if min(self.new_tokens, self.prompt_tokens) < 1:
            raise ValueError("prompts and answers have at least one token")


@dataclass(slots=True, kw_only=True, eq=False)
class Peer:
    """One peer as it is; what others know of it is `record`."""

    peer_id: PeerId
    where: Coordinate
    """Its true place; distances to it are true round trips."""
    bytes_per_s: float
    """That its access link carries."""
    claimed: Coordinate
    decode_s: float
    max_blocks: int
    cache_tokens: int
    spans: BlockSpans
    state: PeerState = PeerState.JOINING
    ready_at_s: float = 0.0
    dies_at_s: float | None = None
    """Without a word; None: it stays or says goodbye."""
    leaves_at_s: float | None = None
    move: Move | None = None
    """That it intends."""
    ready: bool = False
    """All that this needs will be on its disk at `moves_at_s`."""
    moves_at_s: float = 0.0
    """When its intent has been read by all, or what it needs is there."""
    moved_at_s: float = 0.0
    looks_at_s: float = 0.0
    cached: set[int] = field(default_factory=set)
    """Blocks on its disk."""
    used_tokens: int = 0
    sessions: int = 0
    row: int = 0
    """Where `sharing` has it."""
    slowdowns: tuple[float, float] = (1.0, 1.0)
    """Steps, and prompts, take so many times as long as alone."""
    record: Announcement | None = None
    sequence: int = 0

    @property
    def token_s(self) -> float:
        """One token through one block when BATCH users are served together."""
        return (self.decode_s + (BATCH - 1) * self.decode_s / BATCH) / BATCH

    def step_s(self, blocks: int, tokens: int = 1) -> tuple[float, float]:
        """What a step takes here now: its computation, and its wait."""
        takes_s = blocks * self.decode_s * (1 + (tokens - 1) / BATCH)
        return takes_s, (self.slowdowns[tokens > 1] - 1) * takes_s

    def announce(self, num_blocks: int, now_s: float) -> Announcement:
        self.sequence += 1
        self.record = Announcement(
            peer_id=self.peer_id,
            model=MODEL,
            model_name="simulated",
            num_blocks=num_blocks,
            spans=self.spans,
            state=self.state,
            dtype="bfloat16",
            version="0",
            protocol=0,
            addresses=(f"/ip4/203.0.113.7/tcp/4001/p2p/{self.peer_id}",),
            decode_s_per_block=self.decode_s,
            prefill_s_per_token_block=self.decode_s / BATCH,
            cache_tokens=self.cache_tokens,
            free_tokens=max(0, self.cache_tokens - self.used_tokens),
            queue_s=self.step_s(self.spans.num_blocks)[1],
            sessions=self.sessions,
            place=self.claimed,
            uplink_bytes_per_s=announced_uplink(self.bytes_per_s),
            max_blocks=self.max_blocks,
            intent=None if self.move is None else self.move.intent,
            sequence=self.sequence,
            expires_at_s=now_s + RECORD_LIFETIME_S,
        )
        return self.record

    def fetch(self, spans: BlockSpans, now_s: float) -> tuple[int, float]:
        """Bring blocks onto the disk: how many bytes must be downloaded for that, and when they are there."""
        blocks = {block for span in spans for block in span}
        missing_bytes = len(blocks - self.cached) * BLOCK_BYTES
        self.cached |= blocks
        return missing_bytes, now_s + missing_bytes / DOWNLOAD_BYTES_PER_S

    def load(self, spans: BlockSpans, now_s: float) -> None:
        """Begin to serve blocks that are on the disk at `now_s`."""
        self.spans, self.state, self.move = spans, PeerState.JOINING, None
        self.ready_at_s = now_s + LOAD_S_PER_BLOCK * spans.num_blocks


def draw_place(rng: random.Random) -> Coordinate:
    x_s, y_s = rng.choice(REGIONS)
    height_s = min(0.08, rng.lognormvariate(-5.3, 0.7))  # 5 ms of access link, seldom 20
    return Coordinate(x_s + rng.gauss(0, 0.006), y_s + rng.gauss(0, 0.006), height_s, 0.1)


def draw_bytes_per_s(rng: random.Random) -> float:
    return LINK_BYTES_PER_S * min(5.0, max(0.1, rng.lognormvariate(0, 0.6)))


def draw_peer(number: int, config: SimulationConfig, rng: random.Random) -> Peer:
    where = draw_place(rng)
    blur = 1 + rng.gauss(0, PLACE_NOISE)
    return Peer(
        peer_id=peer_id_of(hashlib.sha256(f"{config.seed}/{number}".encode()).digest()),
        where=where,
        bytes_per_s=draw_bytes_per_s(rng),
        claimed=Coordinate(where.x_s * blur, where.y_s * blur, where.height_s, PLACE_NOISE),
        decode_s=DECODE_S * rng.lognormvariate(0, 0.5),
        max_blocks=min(config.blocks, rng.randint(2, 12)),
        cache_tokens=rng.choice((100_000, 200_000, 400_000)),
        spans=BlockSpans.of(BlockSpan(0, 1)),
    )


def round_trip_s(a: Coordinate, b: Coordinate) -> float:
    return distance_s(a, b)

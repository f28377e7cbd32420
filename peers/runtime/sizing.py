"""How a peer's memory is divided among weights, keys and values, and the rest. Pure arithmetic over sizes.

Owns one rule and its promise: on every device, weights + pool + headroom never exceed its limit. A pool wants to hold
USEFUL_TOKENS before the peer takes one more block; once the blocks are settled it takes what is left, up to
SESSIONS_MAX sessions of the longest kind, because nobody would ever fill more. Blocks that see no further than a window
keep less of a session, so there the same conversations fit in a smaller pool. On a CPU pages that were never written
cost nothing.

Several devices share the blocks so that the pool, which is as large on each of them, is as large as can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import sub

from routing.ids import BlockSpans

TOKENS_MIN = 2048
"""Below that, one conversation would fill the pool: such a peer is more trouble to a route than help."""
USEFUL_TOKENS = 16_384
"""Of conversations of TOKENS_MIN."""
SESSIONS_MAX = 16
WORK_TOKENS = 256
"""Positions of a work, as clients send prompts; whoever sends longer ones may be refused sooner than announced."""
BEHIND_WINDOW_TOKENS = 64 + WORK_TOKENS
"""What a block with a window keeps of a session besides it: the slack and the work that runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a model costs on this device."""

    block_bytes: int
    """The weights of one block."""
    token_bytes: tuple[int, ...]
    """The keys and values of one position, at each block of the model."""
    process_bytes: int
    """Everything else, whatever the number of blocks, but for"""
    forward_bytes: int
    """what the largest forward takes while it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be divided, and what somebody asked for."""

    limits_bytes: tuple[int, ...]
    """Of each device."""
    sizes: Sizes
    max_positions: int
    """Of one session."""
    windows: tuple[int | None, ...]
    """How many positions each block of the model sees; None: all."""
    blocks: BlockSpans | int | None = None
    """Which, or how many that follow each other."""
    cache_tokens: int | None = None

    def weight(self, tokens: int) -> int:
        """What a session of that length takes, in positions that every block keeps; on average over the model's."""
        sizes = self.sizes.token_bytes
        kept = (tokens if window is None else min(tokens, window + BEHIND_WINDOW_TOKENS) for window in self.windows)
        return -(-sum(count * size for count, size in zip(kept, sizes, strict=True)) // sum(sizes))

    def token_bytes(self) -> list[int]:
        """The most that a position takes at 0, 1, 2, … blocks that follow each other, of those that may be served."""
        sizes = self.sizes.token_bytes
        if isinstance(self.blocks, BlockSpans):
            sizes = tuple(sizes[block] for span in self.blocks for block in span)
        ends = list(accumulate(sizes, initial=0))
        return [max(map(sub, ends[count:], ends)) for count in range(len(ends))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a peer takes."""

    blocks: tuple[int, ...]
    """On each device; none where it has no room."""
    cache_tokens: int

    def fits(self, request: Request) -> bool:
        return all(
            not blocks or self.num_bytes(request, blocks) <= limit_bytes
            for blocks, limit_bytes in zip(self.blocks, request.limits_bytes, strict=True)
        )

    def num_bytes(self, request: Request, blocks: int) -> int:
        """On a device with so many blocks, those that store the most."""
        sizes, pool_bytes = request.sizes, self.cache_tokens * request.token_bytes()[blocks]
        return blocks * sizes.block_bytes + pool_bytes + sizes.process_bytes + sizes.forward_bytes


def divide(request: Request) -> Share:
    """The share that fits within the limits; where even the least does not, that least, which does not fit."""
    sizes, cache_tokens = request.sizes, request.cache_tokens
    rooms = [limit_bytes - sizes.process_bytes - sizes.forward_bytes for limit_bytes in request.limits_bytes]
    most = cache_tokens or SESSIONS_MAX * request.weight(request.max_positions)
    least = cache_tokens or min(request.weight(TOKENS_MIN), most)
    token_bytes = request.token_bytes()

    def affordable(device: int, blocks: int) -> int:
        return (rooms[device] - blocks * sizes.block_bytes) // token_bytes[blocks]

    wanted = request.blocks.num_blocks if isinstance(request.blocks, BlockSpans) else request.blocks
    if wanted is None:
        useful = cache_tokens or min(USEFUL_TOKENS // TOKENS_MIN * request.weight(TOKENS_MIN), most)
        counts = range(1, len(token_bytes))
        room = sum(affordable(device, count) >= useful for device in range(len(rooms)) for count in counts)
        wanted = min(len(counts), max(1, room))
    blocks = [0] * len(rooms)
    for _ in range(wanted):
        roomiest = max(range(len(rooms)), key=lambda device: affordable(device, blocks[device] + 1))
        blocks[roomiest] += 1
    tightest = min(affordable(device, count) for device, count in enumerate(blocks) if count)
    return Share(blocks=tuple(blocks), cache_tokens=max(least, min(tightest, most)))

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

TOKENS_MIN = 2048
"""Below that, one conversation would fill the pool: such a peer is more trouble to a route than help."""
USEFUL_TOKENS = 16_384
"""Of conversations of TOKENS_MIN."""
SESSIONS_MAX = 16
BEHIND_WINDOW_TOKENS = 320
"""What a block with a window keeps of a session besides it: the slack and a work as large as an engine's budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a model costs on this device."""

    block_bytes: int
    """The weights of one block."""
    token_bytes: int
    """The keys and values of one position at one block."""
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
    num_blocks: int
    """Of the whole model."""
    max_positions: int
    """Of one session."""
    windows: tuple[int | None, ...] = (None,)
    """How many positions each block of the model sees; None: all."""
    shares: tuple[int, ...] = ()
    """What each block stores of a position, in any unit; nothing where all store alike."""
    blocks: int | None = None
    cache_tokens: int | None = None

    def weight(self, tokens: int) -> int:
        """What a session of that length takes, in positions that every block keeps; on average over the blocks."""
        shares = self.shares or (1,) * len(self.windows)
        kept = (tokens if window is None else min(tokens, window + BEHIND_WINDOW_TOKENS) for window in self.windows)
        return -(-sum(count * share for count, share in zip(kept, shares, strict=True)) // sum(shares))


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a peer takes."""

    blocks: tuple[int, ...]
    """On each device; none where it has no room."""
    cache_tokens: int

    def fits(self, request: Request) -> bool:
        return all(
            not blocks or self.num_bytes(request.sizes, blocks) <= limit_bytes
            for blocks, limit_bytes in zip(self.blocks, request.limits_bytes, strict=True)
        )

    def num_bytes(self, sizes: Sizes, blocks: int) -> int:
        """On a device with so many blocks."""
        per_block = sizes.block_bytes + self.cache_tokens * sizes.token_bytes
        return blocks * per_block + sizes.process_bytes + sizes.forward_bytes


def divide(request: Request) -> Share:
    """The share that fits within the limits; where even the least does not, that least, which does not fit."""
    sizes, cache_tokens = request.sizes, request.cache_tokens
    rooms = [limit_bytes - sizes.process_bytes - sizes.forward_bytes for limit_bytes in request.limits_bytes]
    most = cache_tokens or SESSIONS_MAX * request.weight(request.max_positions)
    least = cache_tokens or min(request.weight(TOKENS_MIN), most)

    def affordable(device: int, blocks: int) -> int:
        return (rooms[device] // blocks - sizes.block_bytes) // sizes.token_bytes

    wanted = request.blocks
    if wanted is None:
        useful = cache_tokens or min(USEFUL_TOKENS // TOKENS_MIN * request.weight(TOKENS_MIN), most)
        room = sum(max(0, room // (sizes.block_bytes + useful * sizes.token_bytes)) for room in rooms)
        wanted = min(request.num_blocks, max(1, room))
    blocks = [0] * len(rooms)
    for _ in range(wanted):
        roomiest = max(range(len(rooms)), key=lambda device: affordable(device, blocks[device] + 1))
        blocks[roomiest] += 1
    tightest = min(affordable(device, count) for device, count in enumerate(blocks) if count)
    return Share(blocks=tuple(blocks), cache_tokens=max(least, min(tightest, most)))

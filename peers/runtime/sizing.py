"""How a peer's memory is divided among weights, keys and values, and the rest. Pure arithmetic over sizes.

Owns one rule and its promise: weights + pool + headroom never exceed the limit. A pool wants to hold USEFUL_TOKENS
before the peer takes one more block; once the blocks are settled it takes what is left, up to SESSIONS_MAX sessions of
the longest kind, because nobody would ever fill more. On a CPU pages that were never written cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKENS_MIN = 2048
"""Below that, one conversation would fill the pool: such a peer is more trouble to a route than help."""
USEFUL_TOKENS = 16_384
SESSIONS_MAX = 16


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

    limit_bytes: int
    sizes: Sizes
    num_blocks: int
    """Of the whole model."""
    max_positions: int
    """Of one session."""
    blocks: int | None = None
    cache_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a peer takes."""

    blocks: int
    cache_tokens: int

    def num_bytes(self, sizes: Sizes) -> int:
        per_block = sizes.block_bytes + self.cache_tokens * sizes.token_bytes
        return self.blocks * per_block + sizes.process_bytes + sizes.forward_bytes


def divide(request: Request) -> Share:
    """The share that fits into the limit; where even the least does not, that least, which is above the limit."""
    sizes, cache_tokens, blocks = request.sizes, request.cache_tokens, request.blocks
    room = request.limit_bytes - sizes.process_bytes - sizes.forward_bytes
    most = cache_tokens or SESSIONS_MAX * request.max_positions
    if blocks is None:
        useful = cache_tokens or min(USEFUL_TOKENS, most)
        blocks = min(request.num_blocks, max(1, room // (sizes.block_bytes + useful * sizes.token_bytes)))
    affordable = (room // blocks - sizes.block_bytes) // sizes.token_bytes
    least = cache_tokens or min(TOKENS_MIN, most)
    return Share(blocks=blocks, cache_tokens=max(least, min(affordable, most)))

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
    headroom_bytes: int
    """Everything else, whatever the number of blocks: the process, and its largest forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a peer takes."""

    blocks: int
    cache_tokens: int

    def num_bytes(self, sizes: Sizes) -> int:
        return self.blocks * (sizes.block_bytes + self.cache_tokens * sizes.token_bytes) + sizes.headroom_bytes


def divide(
    limit_bytes: int,
    sizes: Sizes,
    *,
    num_blocks: int,
    max_positions: int,
    blocks: int | None = None,
    cache_tokens: int | None = None,
) -> Share:
    """The share of a model of `num_blocks` blocks, and sessions of up to `max_positions`, that fits into `limit_bytes`.

    `blocks` and `cache_tokens` are what somebody asked for. Where even the least does not fit, the least is returned,
    and `Share.num_bytes` is above the limit.
    """
    room = limit_bytes - sizes.headroom_bytes
    most = cache_tokens or SESSIONS_MAX * max_positions
    if blocks is None:
        useful = cache_tokens or min(USEFUL_TOKENS, most)
        blocks = min(num_blocks, max(1, room // (sizes.block_bytes + useful * sizes.token_bytes)))
    affordable = (room // blocks - sizes.block_bytes) // sizes.token_bytes
    least = cache_tokens or min(TOKENS_MIN, most)
    return Share(blocks=blocks, cache_tokens=max(least, min(affordable, most)))

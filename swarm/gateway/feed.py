"""What an answer consists of, piece by piece, and where its reader takes the pieces.

Knows neither who makes them nor how they are written down.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from routing.errors import SwarmError
from swarm.session.live import HopTiming

BACKLOG = 64
"""Pieces that a reader may leave unread before its answers wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token's probability, and those of the likeliest in its place; of the model's own distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traversal:
    """One way of an answer through the swarm, and where its time went."""

    positions: int
    """1 for a token; the new ones of a prompt, which may travel in several parts at once."""
    total_s: float
    """From when it was handed to the network until it was back. What `hops` leave of it was spent between them."""
    hops: tuple[HopTiming, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is new in one answer."""

    choice: int
    text: str = ""
    tokens: int = 0
    """Generated since the last piece, an end token included."""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    """`stop` or `length`, with the last piece."""
    cached: int = 0
    """Of the prompt, with a request's first piece: positions that a kept sequence held already."""
    traversals: tuple[Traversal, ...] = ()
    """Where they were asked for: those since the last piece."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With an answer's first piece, if they were asked for: of the prompt's tokens but the first."""


class Feed:
    """Where one reader takes the pieces of its answers. Bounded: behind BACKLOG unread pieces the answers wait."""

    def __init__(self, choices: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.put = 0  # written by the engine's thread only
        self.taken = 0  # written by the reader's loop only
        self.resume: Callable[[], None] | None = None
        """Set while an answer waits for the reader."""
        self._pieces: asyncio.Queue[Piece | SwarmError] = asyncio.Queue()  # bounded by `put − taken`
        self._open = choices

    @property
    def full(self) -> bool:
        return self.put - self.taken >= BACKLOG

    def deliver(self, piece: Piece | SwarmError) -> None:
        self._pieces.put_nowait(piece)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """All pieces, until every answer has ended. Raises the SwarmError that ended one."""
        while self._open:
            piece = await self._pieces.get()
            self.taken += 1
            if (resume := self.resume) is not None and not self.full:
                self.resume = None
                resume()
            if isinstance(piece, SwarmError):
                raise piece
            self._open -= piece.finish is not None
            yield piece


def deliver_all(pieces: Sequence[tuple[Feed, Piece | SwarmError]]) -> None:
    for feed, piece in pieces:
        feed.deliver(piece)

"""What ended answers left at the peers, for requests that go on from there.

Owns which sequence a request begins with and which is given up, by bounds on count, tokens and age. Sequences never
pass from one owner to another. Pure: the clock is an argument, and a session is whatever it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

MIN_SHARED = 16
"""Tokens that are worth a fork; fewer are computed again as quickly."""


@dataclass(slots=True, eq=False, kw_only=True)
class Strand:
    """A session and the tokens it holds."""

    owner: str
    session: Any
    tokens: list[int] = field(default_factory=list)
    regimes: set[Hashable] = field(default_factory=set)
    """The rotary regimes under which the tokens were computed."""
    pins: int = 0
    """Forks whose first step is under way: until it has returned, the session must stay."""
    unwanted: bool = False
    """To be released as soon as nothing pins it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLimits:
    """What a gateway may hold for conversations that nobody is waiting in."""

    strands: int = 64
    tokens: int = 65_536
    age_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What a request need not compute again."""

    strand: Strand
    length: int
    """Tokens, fewer than the prompt's."""
    in_place: bool
    """The strand is the taker's now; else it is to be forked."""


class Kept:
    """Idle strands, the one used last at the end."""

    def __init__(self, limits: KeptLimits) -> None:
        self._limits = limits
        self._strands: dict[Strand, float] = {}

    def __len__(self) -> int:
        return len(self._strands)

    @property
    def tokens(self) -> int:
        return sum(len(strand.tokens) for strand in list(self._strands))  # metrics are read from other threads

    def match(self, owner: str, prompt: Sequence[int], regime: Hashable, now_s: float) -> Beginning | None:
        """The owner's strand with the longest beginning in common with `prompt`, or None where none is worth it.

        One that the prompt only goes on from is taken out, to be gone on with in place. Any other stays, to be forked:
        somebody may still go on with the rest of it.
        """
        best, longest = None, MIN_SHARED - 1
        for strand in self._strands:
            if strand.owner == owner and strand.regimes == {regime}:
                shared = _shared(strand.tokens, prompt)
                if shared > longest:
                    best, longest = strand, shared
        if best is None:
            return None
        del self._strands[best]
        in_place = longest == len(best.tokens) and not best.pins
        if not in_place:
            self._strands[best] = now_s  # used just now
        return Beginning(strand=best, length=longest, in_place=in_place)

    def put(self, strand: Strand, now_s: float) -> list[Strand]:
        """Keep one more; returns those that are to be released for it."""
        self._strands[strand] = now_s
        return self.expire(now_s)

    def expire(self, now_s: float) -> list[Strand]:
        """Those that are to be released: too old, or above the bounds, the least recently used first."""
        gone, tokens = [], self.tokens
        for strand, used_s in list(self._strands.items()):
            within = len(self._strands) <= self._limits.strands and tokens <= self._limits.tokens
            if within and now_s - used_s <= self._limits.age_s:
                break
            tokens -= len(strand.tokens)
            del self._strands[strand]
            gone.append(strand)
        return gone

    def clear(self) -> list[Strand]:
        gone = list(self._strands)
        self._strands.clear()
        return gone


def _shared(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens in common at the beginning; at least the prompt's last one is left to be computed."""
    limit = min(len(held), len(prompt) - 1)
    if list(held[:limit]) == list(prompt[:limit]):
        return limit
    return next(at for at in range(limit) if held[at] != prompt[at])

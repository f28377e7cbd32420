"""What a session sent so far, in the form from which it can be sent again: token ids where there are any.

Owns the positions and their inputs; knows neither routes nor hops. Token ids cost eight bytes a position, hidden
states thousands, so the hidden states of a replay are computed again by the model's own embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from swarm.session.remote import Embed


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive positions that arrived in one step."""

    first: int
    count: int
    token_ids: torch.Tensor | None
    """[count], or None when the caller gave embeddings."""
    hidden: torch.Tensor | None
    """[count, hidden] when there are no token ids."""
    position_offset: int
    """Position id of a row minus its position in the session."""
    regime_length: int

    @property
    def end(self) -> int:
        return self.first + self.count

    def cut(self, first: int, end: int) -> Segment:
        """The part within [first, end); the caller makes sure that there is one."""
        first, end = max(first, self.first), min(end, self.end)
        rows = slice(first - self.first, end - self.first)
        return replace(
            self,
            first=first,
            count=end - first,
            token_ids=None if self.token_ids is None else self.token_ids[rows],
            hidden=None if self.hidden is None else self.hidden[rows],
        )

    def rows(self, embed: Embed) -> torch.Tensor:
        """[count, hidden]"""
        if self.hidden is not None:
            return self.hidden
        assert self.token_ids is not None
        return embed(self.token_ids, self.first + self.position_offset)


class History:
    """Contiguous segments from position 0. Not for several threads at once."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []

    def __len__(self) -> int:
        return self._segments[-1].end if self._segments else 0

    def append(self, segment: Segment) -> None:
        """Add positions; a segment that starts before the end replaces what stood there."""
        assert segment.first <= len(self), f"history of {len(self)} positions, segment at {segment.first}"
        self.truncate(segment.first)
        self._segments.append(segment)

    def truncate(self, positions: int) -> None:
        while self._segments and self._segments[-1].end > positions:
            last = self._segments.pop()
            if last.first < positions:
                self._segments.append(last.cut(last.first, positions))

    def fork(self, positions: int) -> History:
        """The first `positions` positions, sharing storage with this history."""
        child = History()
        child._segments = list(self._segments)
        child.truncate(positions)
        return child

    def between(self, first: int, end: int) -> list[Segment]:
        """The segments that make up [first, end), cut to it."""
        within = [segment for segment in self._segments if max(first, segment.first) < min(end, segment.end)]
        return [segment.cut(first, end) for segment in within]

    def cuts(self, end: int, regime_key: Callable[[int], object]) -> list[int]:
        """Positions below `end` where the rotary regime changes, so that one step of a replay never mixes two."""
        segments = self.between(0, end)
        return [
            after.first
            for before, after in pairwise(segments)
            if regime_key(before.regime_length) != regime_key(after.regime_length)
        ]

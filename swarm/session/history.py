"""What a session sent so far, in the form from which it can be sent again: token ids where there are any.

Owns the positions and their inputs; knows neither routes nor hops. Token ids cost eight bytes a position, hidden
states thousands, so the hidden states of a replay are computed again by the model's own embedding.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise, repeat

import msgspec
import torch
from msgspec.structs import replace

from swarm.session.remote import Embed

RegimeKey = Callable[[int], object]
"""Lengths with equal keys may share one forward (`peers.model` RotaryRegime)."""


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive positions that arrived in one step, or may be sent again in one."""

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


@dataclass(slots=True)
class _Tokens:
    """Consecutive positions by their token ids. An object for each of them would take a hundred times their room."""

    first: int
    position_offset: int
    ids: array[int] = field(default_factory=lambda: array("i"))
    regime_lengths: array[int] = field(default_factory=lambda: array("i"))

    @property
    def end(self) -> int:
        return self.first + len(self.ids)

    def cut(self, first: int, end: int) -> _Tokens:
        rows = slice(max(0, first - self.first), end - self.first)
        return _Tokens(self.first + rows.start, self.position_offset, self.ids[rows], self.regime_lengths[rows])

    def segments(self, regime_key: RegimeKey) -> Iterator[Segment]:
        """One for each regime."""
        token_ids = torch.frombuffer(self.ids, dtype=torch.int32).long()
        at = 0
        for _, group in groupby(self.regime_lengths, regime_key):
            lengths = list(group)
            yield Segment(
                first=self.first + at,
                count=len(lengths),
                token_ids=token_ids[at : at + len(lengths)],
                hidden=None,
                position_offset=self.position_offset,
                regime_length=max(lengths),
            )
            at += len(lengths)


class History:
    """Contiguous positions from 0 on. Not for several threads at once; what `between` gave may go to another."""

    def __init__(self) -> None:
        self._parts: list[Segment | _Tokens] = []

    def __len__(self) -> int:
        return self._parts[-1].end if self._parts else 0

    def append(self, segment: Segment) -> None:
        """Add positions; a segment that starts before the end replaces what stood there."""
        assert segment.first <= len(self), f"history of {len(self)} positions, segment at {segment.first}"
        self.truncate(segment.first)
        if segment.token_ids is None:
            self._parts.append(segment)
            return
        last = self._parts[-1] if self._parts else None
        if not isinstance(last, _Tokens) or last.position_offset != segment.position_offset:
            last = _Tokens(segment.first, segment.position_offset)
            self._parts.append(last)
        last.ids.extend(segment.token_ids.tolist())
        last.regime_lengths.extend(repeat(segment.regime_length, segment.count))

    def truncate(self, positions: int) -> None:
        while self._parts and self._parts[-1].end > positions:
            last = self._parts.pop()
            if last.first < positions:
                self._parts.append(last.cut(last.first, positions))

    def fork(self, positions: int) -> History:
        """The first `positions` positions; hidden states share storage with this history's."""
        child = History()
        child._parts = [
            part.cut(part.first, min(part.end, positions)) for part in self._parts if part.first < positions
        ]
        return child

    def between(self, first: int, end: int, regime_key: RegimeKey) -> list[Segment]:
        """The segments that make up [first, end), cut to it. None of them mixes two rotary regimes."""
        found: list[Segment] = []
        for part in self._parts:
            if max(first, part.first) < min(end, part.end):
                within = part.cut(first, min(end, part.end))
                found += within.segments(regime_key) if isinstance(within, _Tokens) else [within]
        return found

    def cuts(self, end: int, regime_key: RegimeKey) -> list[int]:
        """Positions below `end` where the rotary regime changes, so that one step of a replay never mixes two."""
        segments = self.between(0, end, regime_key)
        return [
            after.first
            for before, after in pairwise(segments)
            if regime_key(before.regime_length) != regime_key(after.regime_length)
        ]

"""Identifiers shared by every package: what they are made of and how they are written.

Owns the syntax of model ids, block spans, peer ids, session ids, places and step ids. Knows no network and no key
material (see `routing.identity` for the key inside a peer id). What every token makes and looks up is a msgspec struct,
here as elsewhere: where the processor's caches have forgotten all, a frozen dataclass takes four times as long to make,
and ten times to hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NewType

import msgspec

from routing.errors import CallerError, InvalidSpan

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58 (`12D3Koo…`); `routing.identity.public_key_of` reads the Ed25519 key inside it."""

StepId = NewType("StepId", int)
"""Chosen by the client, unique within its session; a repeated id means "the same step again"."""

SESSION_ID_BYTES = 16
MODEL_ID_BYTES = 32
MAX_SPANS = 8
"""Of one peer."""


class SessionId(msgspec.Struct, frozen=True, order=True):
    """128 random bits, chosen by the client, that name one sequence at every hop."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != SESSION_ID_BYTES:
            raise CallerError(f"a session id has {SESSION_ID_BYTES} bytes, not {len(self.raw)}")

    def __str__(self) -> str:
        return self.raw.hex()[:12]


class Place(msgspec.Struct, frozen=True, order=True):
    """A session at one hop, which begins with `block`: a route may pass one peer several times, at several blocks."""

    session: SessionId
    block: int

    def __str__(self) -> str:
        return f"{self.session}@{self.block}"


class ModelId(msgspec.Struct, frozen=True, order=True):
    """SHA-256 over a checkpoint's canonical configuration and the hashes of its weight files.

    Two peers may serve the same route only if their model ids are equal.
    """

    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != MODEL_ID_BYTES:
            raise CallerError(f"a model id has {MODEL_ID_BYTES} bytes, not {len(self.digest)}")

    @property
    def hex(self) -> str:
        return self.digest.hex()

    def __str__(self) -> str:
        return self.hex[:12]


class BlockSpan(msgspec.Struct, frozen=True, order=True):
    """Consecutive blocks `[start, end)`; never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise InvalidSpan(
                f"blocks {self.start}:{self.end} are not a range", hint="write A:B with 0 <= A < B; B is not included"
            )

    @classmethod
    def parse(cls, text: str) -> BlockSpan:
        """Read `"A:B"`. Raises InvalidSpan."""
        start, colon, end = text.partition(":")
        if not (colon and start.strip().isdecimal() and end.strip().isdecimal()):
            raise InvalidSpan(f"cannot read blocks {text!r}", hint="write A:B, for example 0:10")
        return cls(int(start), int(end))

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def covers(self, other: BlockSpan) -> bool:
        return self.start <= other.start and other.end <= self.end


@dataclass(frozen=True, slots=True, order=True)
class BlockSpans:
    """What one peer serves: 1 to MAX_SPANS spans in order, with blocks of others between them.

    Raises InvalidSpan.
    """

    parts: tuple[BlockSpan, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= MAX_SPANS:
            raise InvalidSpan(
                f"{len(self.parts)} spans, a peer serves 1 to {MAX_SPANS}", hint="serve fewer, longer ones"
            )
        if any(before.end >= after.start for before, after in pairwise(self.parts)):
            raise InvalidSpan(f"spans {self} are not in order with blocks of others between them")

    @classmethod
    def of(cls, *spans: BlockSpan) -> BlockSpans:
        """In any order; those that follow each other without a gap become one. Raises InvalidSpan."""
        joined: list[BlockSpan] = []
        for span in sorted(spans):
            if joined and span.start < joined[-1].end:
                raise InvalidSpan(f"spans {joined[-1]} and {span} overlap", hint="name each block once")
            if joined and span.start == joined[-1].end:
                joined[-1] = BlockSpan(joined[-1].start, span.end)
            else:
                joined.append(span)
        return cls(tuple(joined))

    @classmethod
    def parse(cls, text: str) -> BlockSpans:
        """Read `"A:B"` or `"A:B,C:D"`. Raises InvalidSpan."""
        return cls.of(*map(BlockSpan.parse, text.split(",")))

    @property
    def num_blocks(self) -> int:
        first, *more = self.parts
        return first.end - first.start + sum([part.end - part.start for part in more])

    @property
    def end(self) -> int:
        return self.parts[-1].end

    def __iter__(self) -> Iterator[BlockSpan]:
        return iter(self.parts)

    def __str__(self) -> str:
        return ",".join(map(str, self.parts))

    def as_fields(self) -> dict[str, object]:
        """For JSON: `spans`, and beside it `span` where there is one only."""
        pairs = [[span.start, span.end] for span in self.parts]
        return {"spans": pairs} if len(pairs) > 1 else {"span": pairs[0], "spans": pairs}

    def covers(self, span: BlockSpan) -> bool:
        """Whether one of the parts does."""
        return any(part.covers(span) for part in self.parts)

    def overlaps(self, span: BlockSpan) -> bool:
        return any(part.start < span.end and span.start < part.end for part in self.parts)

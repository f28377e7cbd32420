"""Identifiers shared by every package: what they are made of and how they are written.

Owns the syntax of model ids, block spans, peer ids, session ids and step ids. Knows no network and no key material
(see `routing.identity` for the key inside a peer id).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NewType

from routing.errors import CallerError, InvalidSpan

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58 (`12D3Koo…`); `routing.identity.public_key_of` reads the Ed25519 key inside it."""

StepId = NewType("StepId", int)
"""Chosen by the client, unique within its session; a repeated id means "the same step again"."""

SESSION_ID_BYTES = 16
MODEL_ID_BYTES = 32


@dataclass(frozen=True, slots=True, order=True)
class SessionId:
    """128 random bits, chosen by the client, that name one sequence at every hop."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != SESSION_ID_BYTES:
            raise CallerError(f"a session id has {SESSION_ID_BYTES} bytes, not {len(self.raw)}")

    def __str__(self) -> str:
        return self.raw.hex()[:12]


@dataclass(frozen=True, slots=True, order=True)
class ModelId:
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


@dataclass(frozen=True, slots=True, order=True)
class BlockSpan:
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

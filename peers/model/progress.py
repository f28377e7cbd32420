"""How long work (hashing, downloading, converting, loading) tells a person how far it is.

Owns the protocol alone; who draws it, and whether anybody does, is decided by the caller.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One task at a time: `start`, any number of `advance`, `done`. Quantities are bytes."""

    def start(self, label: str, total: int) -> None: ...

    def advance(self, n: int) -> None: ...

    def done(self) -> None: ...


class Silent:
    """A Progress that nobody sees."""

    def start(self, label: str, total: int) -> None:
        """Ignored."""

    def advance(self, n: int) -> None:
        """Ignored."""

    def done(self) -> None:
        """Ignored."""

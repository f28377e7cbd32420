"""Rows that are too many for one message: cut into parts, and put together again.

Owns the cut and the checks that stand before the whole: parts come in order, without gap or overlap, and fill exactly
what was announced. Both sides of training use it; what the rows mean is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peers.errors import ProtocolError
from peers.wire import tensors
from peers.wire.codec import Buffer

PART_BYTES = 1 << 20
"""Of one part: a link's other traffic waits for no more than that."""


def cut(rows: torch.Tensor, dtype: str) -> Iterator[tuple[int, int, memoryview]]:
    """`rows` [count, hidden] in `dtype`, as (first row, rows, payload)."""
    row_bytes = rows.shape[1] * tensors.DTYPES[dtype].itemsize
    step = max(1, PART_BYTES // row_bytes)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        yield first, len(part), tensors.pack(part, dtype)


class Gathering:
    """Rows of which some have come."""

    def __init__(self, count: int, hidden: int, dtype: str) -> None:
        """Raises ProtocolError for an unknown dtype."""
        if dtype not in tensors.DTYPES:
            raise ProtocolError(f"unknown dtype {dtype!r}")
        self.rows = torch.empty(count, hidden, dtype=tensors.DTYPES[dtype])
        self._dtype = dtype
        self._arrived = 0

    @property
    def complete(self) -> bool:
        return self._arrived == len(self.rows)

    def add(self, first: int, count: int, dtype: str, payload: Buffer) -> bool:
        """One more part; whether it was the last. Raises ProtocolError for one that is out of turn, or not finite."""
        if first != self._arrived or count < 1 or first + count > len(self.rows) or dtype != self._dtype:
            raise ProtocolError(
                f"rows {first} to {first + count} in {dtype}, where {self._arrived} in {self._dtype} came"
            )
        part = tensors.unpack(payload, dtype=dtype, count=count, hidden=self.rows.shape[1])
        self.rows[first : first + count] = part
        self._arrived += count
        return self.complete

"""Hidden states ⇄ bytes. Owns dtypes, byte order and the checks that stand before every cache.

Rows travel as little-endian raw values of shape [count, hidden] in float32, bfloat16 or float16.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys

import torch

from peers.errors import ProtocolError
from peers.wire.codec import Buffer

assert sys.byteorder == "little", "rows travel little-endian; a big-endian machine needs a byte swap here"

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ITEM_BYTES: dict[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
COPIED_BYTES = 64 * 1024
"""Up to so many bytes are copied in less time than torch takes to show them to others."""


def pack(rows: torch.Tensor, dtype: str) -> memoryview:
    """Bytes of `rows` [count, hidden] in `dtype`; if many, they share memory with `rows` when nothing is converted."""
    # asked first: a call of torch that changes nothing takes as long as one that does
    if not (rows.is_cpu and rows.dtype is DTYPES[dtype] and rows.is_contiguous()):
        rows = rows.to(device="cpu", dtype=DTYPES[dtype]).contiguous()
    if rows.nbytes <= COPIED_BYTES:
        return memoryview(ctypes.string_at(rows.data_ptr(), rows.nbytes))
    return rows.detach().view(torch.uint8).numpy().data.cast("B")


class Room:
    """For rows that will come, made before: so that they wait for no tensor to be made when they are there."""

    __slots__ = ("_bytes", "_rows")

    def __init__(self, count: int, hidden: int, dtype: torch.dtype) -> None:
        self._rows = torch.empty(count, hidden, dtype=dtype)
        self._bytes = self._rows.view(torch.uint8).numpy().data.cast("B")

    def filled(self, payload: Buffer, dtype: str, shape: tuple[int, int]) -> torch.Tensor | None:
        """The rows, with what `check` let pass; None where they are others than were expected. Once."""
        rows = self._rows
        if DTYPES[dtype] is not rows.dtype or shape != rows.shape:
            return None
        self._bytes[:] = payload
        return rows


def unpack(payload: Buffer, *, dtype: str, count: int, hidden: int, room: Room | None = None) -> torch.Tensor:
    """Rows [count, hidden] from a stranger's bytes; in `room`, if they fit.

    Raises ProtocolError as `check`. The result may share memory with a writable `payload`.
    """
    check(payload, dtype=dtype, count=count, hidden=hidden)
    if room is not None and (rows := room.filled(payload, dtype, (count, hidden))) is not None:
        return rows
    return rows_in(payload, dtype=dtype, count=count, hidden=hidden)


def check(payload: Buffer, *, dtype: str, count: int, hidden: int) -> None:
    """Raises ProtocolError for an unknown dtype, a length that does not match, or values that are not finite."""
    if dtype not in ITEM_BYTES:
        raise ProtocolError(f"unknown dtype {dtype!r}; this version knows {', '.join(DTYPES)}")
    expected_bytes = count * hidden * ITEM_BYTES[dtype]
    if len(payload) != expected_bytes:
        raise ProtocolError(f"{len(payload)} bytes for {count} x {hidden} {dtype} values, which take {expected_bytes}")
    if not finite_in(payload, dtype):
        raise ProtocolError("hidden states that are not finite (NaN or infinity)")


def rows_in(payload: Buffer, *, dtype: str, count: int, hidden: int) -> torch.Tensor:
    """Rows [count, hidden] from bytes that were checked. May share memory with a writable `payload`."""
    if not len(payload):
        return torch.empty(count, hidden, dtype=DTYPES[dtype])
    view = memoryview(payload)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=DTYPES[dtype]).view(count, hidden)


def converted(payload: memoryview, *, dtype: str, to: str, hidden: int) -> memoryview:
    """The bytes of the same rows in another dtype."""
    if dtype == to:
        return payload
    count = len(payload) // (hidden * ITEM_BYTES[dtype])
    return pack(rows_in(payload, dtype=dtype, count=count, hidden=hidden), to)


def finite_in(payload: Buffer, dtype: str) -> bool:
    """As `finite`, of the values in these bytes.

    Of few values without torch, whose code is cold when a token comes: three times as long. One added to an exponent
    that is all ones, as that of NaN and infinity, carries into the place of the sign; no other one does.
    """
    if len(payload) > COPIED_BYTES:
        return finite(rows_in(payload, dtype=dtype, count=1, hidden=len(payload) // ITEM_BYTES[dtype]))
    exponents, ones, signs = _bits(dtype, len(payload))
    return not ((int.from_bytes(payload, "little") & exponents) + ones) & signs


@functools.lru_cache(maxsize=8)
def _bits(dtype: str, size: int) -> tuple[int, int, int]:
    """In each value of so many bytes: the bits of the exponent, the lowest of them, and the sign."""
    exponent, one = {"float32": (0x7F80_0000, 0x80_0000), "bfloat16": (0x7F80, 0x80), "float16": (0x7C00, 0x400)}[dtype]
    itemsize = ITEM_BYTES[dtype]
    values = size // itemsize
    exponents, ones, signs = (
        int.from_bytes(bits.to_bytes(itemsize, "little") * values, "little")
        for bits in (exponent, one, 1 << (8 * itemsize - 1))
    )
    return exponents, ones, signs


def finite(rows: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. One pass where all is well: a sum of finite values hardly ever overflows."""
    return math.isfinite(rows.sum(dtype=torch.float32)) or bool(torch.isfinite(rows).all())

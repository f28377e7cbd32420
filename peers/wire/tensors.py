"""Hidden states ⇄ bytes. Owns dtypes, byte order and the checks that stand before every cache.

Rows travel as little-endian raw values of shape [count, hidden] in float32, bfloat16 or float16.
"""

from __future__ import annotations

import ctypes
import math
import sys

import torch

from peers.errors import ProtocolError
from peers.wire.codec import Buffer

assert sys.byteorder == "little", "rows travel little-endian; a big-endian machine needs a byte swap here"

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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


def unpack(payload: Buffer, *, dtype: str, count: int, hidden: int) -> torch.Tensor:
    """Rows [count, hidden] from a stranger's bytes.

    Raises ProtocolError for an unknown dtype, a length that does not match, or values that are not finite.
    The result may share memory with a writable `payload`.
    """
    if dtype not in DTYPES:
        raise ProtocolError(f"unknown dtype {dtype!r}; this version knows {', '.join(DTYPES)}")
    torch_dtype = DTYPES[dtype]
    expected_bytes = count * hidden * torch_dtype.itemsize
    view = memoryview(payload)
    if len(view) != expected_bytes:
        raise ProtocolError(f"{len(view)} bytes for {count} x {hidden} {dtype} values, which take {expected_bytes}")
    if not expected_bytes:
        return torch.empty(count, hidden, dtype=torch_dtype)
    rows = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch_dtype).view(count, hidden)
    if not finite(rows):
        raise ProtocolError("hidden states that are not finite (NaN or infinity)")
    return rows


def finite(rows: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. One pass where all is well: a sum of finite values hardly ever overflows."""
    return math.isfinite(rows.sum(dtype=torch.float32)) or bool(torch.isfinite(rows).all())

"""The header of a safetensors file: where each tensor lies, without reading any tensor.

Owns a bounded, typed reader for headers from strangers, over any source that gives byte ranges (a file, a hub), and
the writer of headers that are the same bytes on every machine. Knows nothing of tensors' values.

Format (safetensors README, "Format"): 8 bytes little-endian length N · N bytes JSON `{name: {"dtype", "shape",
"data_offsets": [begin, end]}}` with an optional `__metadata__` of strings · the tensors' bytes, without holes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from peers.errors import CorruptCheckpoint

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 << 20
"""Room for 100,000 tensors in one file; the format's own cap is 100 MB."""

FIRST_READ_BYTES = 64 << 10
"""The first range that is asked for; it holds the whole header of most shards, so one request does."""

DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

RangeReader = Callable[[int, int], bytes]
"""`read(offset, count)`: up to `count` bytes, fewer only where the file ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_header(read: RangeReader, file_bytes: int, name: str) -> dict[str, TensorInfo]:
    """The tensors of the file `name`, which is `file_bytes` long. Raises CorruptCheckpoint."""
    first = read(0, min(FIRST_READ_BYTES, file_bytes))
    if len(first) < LENGTH_BYTES:
        raise CorruptCheckpoint(f"{name} is too short to be a safetensors file")
    (length,) = struct.unpack_from("<Q", first)
    if length > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise CorruptCheckpoint(f"{name} is damaged: it claims a header of {length} bytes")
    end = LENGTH_BYTES + length
    if len(first) < end:
        first += read(len(first), end - len(first))
    return _parse(first[LENGTH_BYTES:end], file_bytes - end, name)


def read_file_header(path: Path) -> dict[str, TensorInfo]:
    """`read_header` of a local file. Raises CorruptCheckpoint, also when the file is missing."""

    def read(offset: int, count: int) -> bytes:
        file.seek(offset)
        return file.read(count)

    try:
        with open(path, "rb", buffering=0) as file:
            return read_header(read, path.stat().st_size, path.name)
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{path} is missing", hint="download or copy the checkpoint again") from error


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Length and header for `(name, dtype, shape)` in the order in which the data follows; padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _parse(text: bytes, data_bytes: int, name: str) -> dict[str, TensorInfo]:
    try:
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        entries = {tensor: msgspec.json.decode(raw, type=_Entry) for tensor, raw in fields.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name} is damaged: its header cannot be read ({error})") from error
    expected = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        bits = DTYPE_BITS.get(entry.dtype)
        if bits is None:
            raise CorruptCheckpoint(f"{name} is damaged: {tensor} has the unknown dtype {entry.dtype[:20]!r}")
        if min(entry.shape, default=0) < 0 or begin != expected or (end - begin) * 8 != math.prod(entry.shape) * bits:
            raise CorruptCheckpoint(f"{name} is damaged: the place of {tensor} does not fit its shape")
        expected = end
    if expected != data_bytes:
        raise CorruptCheckpoint(f"{name} is damaged: it holds {data_bytes} bytes of tensors instead of {expected}")
    return {
        tensor: TensorInfo(
            dtype=entry.dtype, shape=tuple(entry.shape), num_bytes=entry.data_offsets[1] - entry.data_offsets[0]
        )
        for tensor, entry in entries.items()
    }

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from peers.errors import CorruptCheckpoint
from peers.model.safetensors_header import (
    MAX_HEADER_BYTES,
    TensorInfo,
    encode_header,
    read_file_header,
    read_header,
)

FILE = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, dtype=np.int8)}, {"format": "pt"})


def header_of(data: bytes) -> dict[str, TensorInfo]:
    return read_header(lambda offset, count: data[offset : offset + count], len(data), "x.safetensors")


def file_with(header: object, data_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_file_of_the_safetensors_library_is_read() -> None:
    assert header_of(FILE) == {
        "a": TensorInfo(dtype="F32", shape=(2, 3), num_bytes=24),
        "b": TensorInfo(dtype="I8", shape=(5,), num_bytes=5),
    }


def test_a_long_header_takes_one_more_read_of_just_the_rest() -> None:
    data = save({f"tensor.{number}": np.zeros(1, dtype=np.float32) for number in range(2000)})
    reads: list[tuple[int, int]] = []

    def read(offset: int, count: int) -> bytes:
        reads.append((offset, count))
        return data[offset : offset + count]

    assert len(read_header(read, len(data), "x")) == 2000
    (length,) = struct.unpack_from("<Q", data)
    assert len(reads) == 2
    assert sum(reads[1]) == 8 + length


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_header([("b", "F32", (2, 2)), ("a", "I64", ())]) + bytes(16 + 8))
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert [file.get_slice(name).get_shape() for name in ("a", "b")] == [[], [2, 2]]
    assert read_file_header(path)["b"] == TensorInfo(dtype="F32", shape=(2, 2), num_bytes=16)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        FILE[:7],
        FILE[:40],
        FILE[:-1],
        FILE + b"\0",
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + bytes(100),
        struct.pack("<Q", 2**64 - 1) + bytes(100),
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        file_with([], 0),
        file_with({"a": entry(dtype="F99")}, 8),
        file_with({"a": entry(dtype=3)}, 8),
        file_with({"a": entry(shape=(-2,), offsets=(8, 0))}, 8),
        file_with({"a": entry(shape=(2.5,))}, 8),
        file_with({"a": entry(shape=(2**62, 2**62))}, 8),
        file_with({"a": entry(offsets=(8, 16))}, 16),
        file_with({"a": entry(offsets=(0, 2**70))}, 8),
        file_with({"a": entry(), "b": entry()}, 8),
        file_with({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
        file_with({"a": entry() | {"code": "x"}}, 8),
    ],
)
def test_a_damaged_header_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptCheckpoint):
        header_of(data)


@given(st.integers(0, len(FILE) - 1), st.binary(max_size=12))
def test_damage_anywhere_is_refused_or_harmless(position: int, junk: bytes) -> None:
    try:
        tensors = header_of(FILE[:position] + junk + FILE[position + len(junk) :])
    except CorruptCheckpoint:
        return
    assert sum(tensor.num_bytes for tensor in tensors.values()) < len(FILE)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="gone"):
        read_file_header(tmp_path / "gone.safetensors")

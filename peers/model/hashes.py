"""SHA-256 of files, computed once per file and remembered.

A remembered hash holds as long as path, size, modification time, change time and inode stay what they were, so that
one flipped byte is noticed and a peer that starts again reads nothing. Knows nothing of checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from peers.model.progress import Progress, Silent
from peers.model.storage import write_atomically

_CHUNK_BYTES = 1 << 20

_RACY_S = 0.1
"""A file written this recently may change again under the same timestamp (kernel clocks tick every 1 to 10 ms), so
its hash is not remembered yet; git's "racy" index entries."""


class _Remembered(msgspec.Struct):
    stamp: tuple[int, int, int, int]
    sha256: str


def sha256_of(path: Path, *, cache: Path, progress: Progress | None = None) -> str:
    """The hash in hexadecimal, remembered below `cache`. Raises OSError when the file cannot be read."""
    path = path.resolve()
    entry = cache / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    stamp = _stamp(path)
    remembered = _recall(entry)
    if remembered is not None and remembered.stamp == stamp:
        return remembered.sha256
    digest = _digest(path, progress or Silent())
    if _stamp(path) == stamp and time.time() - max(stamp[1:3]) / 1e9 > _RACY_S:
        with suppress(OSError):  # the disk is full, or not ours: the next start hashes again
            write_atomically(entry, msgspec.json.encode(_Remembered(stamp, digest)))
    return digest


def _stamp(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _recall(entry: Path) -> _Remembered | None:
    try:
        return msgspec.json.decode(entry.read_bytes(), type=_Remembered)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None  # never hashed, or the note is damaged: hash now


def _digest(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        progress.start(f"checking {path.name}", os.fstat(file.fileno()).st_size)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress.advance(len(chunk))
    progress.done()
    return digest.hexdigest()

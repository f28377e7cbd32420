from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from peers.errors import NotEnoughDisk
from peers.model import hashes
from peers.model.hashes import sha256_of
from peers.model.storage import full_disk_named


class Readings:
    """A Progress that counts how often, and how much, was read."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.read_bytes = 0

    def start(self, label: str, total: int) -> None:
        self.labels.append(label)

    def advance(self, n: int) -> None:
        self.read_bytes += n

    def done(self) -> None: ...


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hashes, "_RACY_S", -1.0)  # remember files of this very moment too
    path = tmp_path / "shard"
    path.write_bytes(os.urandom(3 << 20))
    return path


def test_a_file_is_read_once(shard: Path, tmp_path: Path) -> None:
    readings = Readings()
    first = sha256_of(shard, cache=tmp_path / "cache", progress=readings)
    assert first == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert sha256_of(shard, cache=tmp_path / "cache", progress=readings) == first
    assert readings.labels == ["checking shard"]
    assert readings.read_bytes == 3 << 20


def test_a_link_to_a_known_file_is_known(shard: Path, tmp_path: Path) -> None:
    readings = Readings()
    (tmp_path / "link").symlink_to(shard)
    assert sha256_of(shard, cache=tmp_path, progress=readings) == sha256_of(tmp_path / "link", cache=tmp_path)
    assert len(readings.labels) == 1


def test_one_flipped_byte_is_noticed_even_when_its_time_is_set_back(shard: Path, tmp_path: Path) -> None:
    before, status = sha256_of(shard, cache=tmp_path), shard.stat()
    with open(shard, "r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sha256_of(shard, cache=tmp_path) != before


def test_a_file_of_this_very_moment_is_not_remembered(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_RACY_S", 3600.0)
    readings = Readings()
    for _ in range(2):
        sha256_of(shard, cache=tmp_path, progress=readings)
    assert len(readings.labels) == 2


def test_a_damaged_note_is_replaced(shard: Path, tmp_path: Path) -> None:
    digest = sha256_of(shard, cache=tmp_path)
    (note,) = (tmp_path / "hashes").iterdir()
    note.write_text("{")
    assert sha256_of(shard, cache=tmp_path) == digest
    assert note.read_bytes() != b"{"


def test_a_full_disk_costs_the_note_and_not_the_hash(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hashes, "write_atomically", full)
    readings = Readings()
    for _ in range(2):
        assert sha256_of(shard, cache=tmp_path, progress=readings) == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert len(readings.labels) == 2


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, NotEnoughDisk), (errno.EIO, OSError)])
def test_a_full_disk_is_named_and_another_failure_stays_what_it_is(
    tmp_path: Path, number: int, error: type[Exception]
) -> None:
    with pytest.raises(error) as caught, full_disk_named(tmp_path):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is error

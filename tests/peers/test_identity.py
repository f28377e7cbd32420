"""The identity file: made once and whole, for its owner's eyes only."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from peers.errors import InsecureIdentity
from peers.identity import load_identity
from routing.identity import SigningKey, identity_file_bytes


def test_a_new_identity_is_readable_by_its_owner_only_and_stays_the_same(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "identity"
    old_mask = os.umask(0)
    try:
        key = load_identity(path)
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_identity(path).peer_id == key.peer_id
    assert list(path.parent.iterdir()) == [path], "nothing else is left behind"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_loose_permissions_are_refused_with_the_command_that_mends_them(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity"
    load_identity(path)
    path.chmod(mode)
    with pytest.raises(InsecureIdentity, match=f"mode {mode:04o}") as caught:
        load_identity(path)
    assert caught.value.hint == f"run: chmod 600 {path}"
    path.chmod(0o600)
    load_identity(path)


@pytest.mark.parametrize("mode", [0o400, 0o700])
def test_an_owners_other_modes_are_fine(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity"
    key = load_identity(path)
    path.chmod(mode)
    assert load_identity(path).peer_id == key.peer_id


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        identity_file_bytes(SigningKey.from_seed(bytes(32)))[:-1],
        identity_file_bytes(SigningKey.from_seed(bytes(32))) + b"x",
        identity_file_bytes(SigningKey.from_seed(bytes(32)))[:-32] + bytes(32),
        b"\x08\x00" + bytes(5000),
    ],
    ids=["empty", "garbage", "short", "long", "another public key", "RSA"],
)
def test_what_is_no_ed25519_identity_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InsecureIdentity, match="no Ed25519 identity") as caught:
        load_identity(path)
    assert "move it away" in caught.value.hint
    assert path.read_bytes() == content


def test_a_place_where_no_file_can_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(InsecureIdentity, match="cannot be read: Is a directory"):
        load_identity(tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "identity", tmp_path / "file" / "folder" / "identity"):
        with pytest.raises(InsecureIdentity, match="Not a directory"):
            load_identity(path)
    with pytest.raises(InsecureIdentity, match="cannot be created"):
        load_identity(Path("/proc/self/identity"))


def test_all_who_start_at_the_same_moment_get_the_same_whole_identity(tmp_path: Path) -> None:
    for attempt in range(20):
        path, barrier = tmp_path / f"identity {attempt}", threading.Barrier(8)
        seen: list[str] = []

        def start(path: Path = path, barrier: threading.Barrier = barrier, seen: list[str] = seen) -> None:
            barrier.wait()
            seen.append(load_identity(path).peer_id)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 8, "somebody saw a half-written file"
        assert len(set(seen)) == 1


def test_nothing_prints_the_seed(tmp_path: Path) -> None:
    key = load_identity(tmp_path / "identity")
    assert key.seed.hex() not in repr(key)
    assert key.seed not in repr(key).encode()

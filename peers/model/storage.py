"""Files that several processes of one user share: the cache folder, locks, atomic writes and free space.

Knows nothing about what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from peers.errors import NotEnoughDisk

logger = logging.getLogger(__name__)

DISK_MARGIN_BYTES = 64 << 20
"""Left free for everybody else when we ask whether something fits."""


def cache_folder() -> Path:
    """`$HIVESWARM_CACHE`, else `$XDG_CACHE_HOME/hiveswarm`, else `~/.cache/hiveswarm`; it need not exist yet."""
    if own := os.environ.get("HIVESWARM_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "hiveswarm"


def require_disk(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raises NotEnoughDisk when `needed_bytes` and a margin are not free where `folder` lies (or will lie)."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes and free_bytes < needed_bytes + DISK_MARGIN_BYTES:
        raise NotEnoughDisk(
            f"{purpose} needs {_gigabytes(needed_bytes)}, but {existing} has {_gigabytes(free_bytes)} free",
            hint="free some space, or put the cache elsewhere with HIVESWARM_CACHE=FOLDER",
        )


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raises NotEnoughDisk where the body finds no room for what it writes in `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NotEnoughDisk(f"the disk that holds {folder} is full") from error


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock that belongs to `target` across processes; the kernel lets go of it when a holder dies."""
    import fcntl  # not everywhere: `peers.platform` says so in words

    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is preparing %s; waiting for it", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

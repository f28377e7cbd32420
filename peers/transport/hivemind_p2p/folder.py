"""A private folder for sockets that does not outlive its process for long: a later one removes what a killed one left.

Whoever made a folder holds a lock on it (flock(2)), which the kernel lets go however the process ends. Unlike a process
id the lock is never somebody else's later, and processes in other containers that share the parent folder see it too.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_PREFIX: Final = "hiveswarm-node-"
# Not $TMPDIR: the name of a UNIX socket has room for about a hundred bytes.
_PARENT: Final = Path("/tmp")


class SocketFolder:
    """An empty folder that only this user can enter. Raises OSError."""

    def __init__(self, parent: Path = _PARENT) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            with suppress(FileNotFoundError):  # taken for abandoned before it was locked
                self._lock: int | None = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                if self.path.exists():
                    return
                os.close(self._lock)  # likewise

    def remove(self) -> None:
        """With all that is in it. Idempotent."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def remove_abandoned(parent: Path = _PARENT) -> None:
    """Remove this user's folders whose processes are gone."""
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, in use, or removed by another process at the same moment
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.getuid():
                    shutil.rmtree(path)
                    logger.info("removed %s, which a process that is gone had left", path.name)
            finally:
                os.close(lock)

"""Room on disk for what a journal has no memory for: files without names, mapped into memory and read like it.

Owns the files and their total size. They vanish with the process, however it ends. Writing goes to the system's page
cache, and a full disk is an answer, not an error.
"""

from __future__ import annotations

import logging
import mmap
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


class Disk:
    """Implements `journal.Spill` in `folder`, with at most `max_bytes`."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._folder = folder
        self._full = False
        """The last attempt failed; one line in the log says so, however many follow."""

    def __call__(self, payloads: Sequence[memoryview]) -> list[memoryview] | None:
        size = sum(map(len, payloads))
        if not size or self.used_bytes + size > self.max_bytes:
            return None
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                for payload in payloads:
                    file.write(payload)
                file.flush()
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:  # the journal goes without, as if there were no disk
            if not self._full:
                logger.warning("a journal stays out of %s: %s", self._folder, error)
            self._full = True
            return None
        if self._full:
            logger.info("journals go to %s again", self._folder)
        self._full = False
        self.used_bytes += size
        weakref.finalize(mapped, self._freed, size)
        moved, at, view = [], 0, memoryview(mapped)
        for payload in payloads:
            moved.append(view[at : at + len(payload)])
            at += len(payload)
        return moved

    def _freed(self, size: int) -> None:
        self.used_bytes -= size

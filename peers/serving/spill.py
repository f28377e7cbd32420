"""Room on disk for what a journal has no memory for: files without names, mapped into memory and read like it.

Owns the files, their total size, and the order in which they are written, one at a time in a thread: a disk that is
slow, or hangs, keeps nobody waiting but what is to be written, and of that there is a bound. Files vanish with the
process, however it ends. A full disk is an answer, not an error.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from peers.serving.journal import Settle
from peers.transport.tasks import Tasks

logger = logging.getLogger(__name__)

WAITING_BYTES_MAX = 32 << 20
"""Of memory, for what is not written yet, unless one session alone has more. Page caches take that in a moment."""


class Disk:
    """Implements `journal.Spill` in `folder`, with at most `max_bytes`; what writes is a task of `tasks`."""

    def __init__(self, folder: Path, max_bytes: int, tasks: Tasks) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        """With what waits to be written."""
        self._folder = folder
        self._tasks = tasks
        self._waiting: deque[tuple[Sequence[memoryview], int, Settle]] = deque()
        self._waiting_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self._troubled = False
        """The last attempt failed; one line in the log says so, however many follow."""

    def __call__(self, payloads: Sequence[memoryview], settle: Settle) -> bool:
        size = sum(map(len, payloads))
        if not size or self.used_bytes + size > self.max_bytes:
            return False
        if self._waiting and self._waiting_bytes + size > WAITING_BYTES_MAX:
            self._stays_out(f"{self._waiting_bytes >> 20} MiB wait to be written")
            return False
        self.used_bytes += size
        self._waiting_bytes += size
        self._waiting.append((payloads, size, settle))
        if self._writer is None or self._writer.done():
            self._writer = self._tasks.spawn(self._write(), name="journals to disk")
        return True

    async def _write(self) -> None:
        while self._waiting:
            payloads, size, settle = self._waiting[0]
            moved: list[memoryview] | None = None
            try:
                with await asyncio.to_thread(_written, self._folder, payloads) as file:
                    # here, as what a thread returns lives until that thread has forgotten it
                    mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            except OSError as error:  # the journal goes without, as if there were no disk
                self._stays_out(error)
                self.used_bytes -= size
            else:
                if self._troubled:
                    logger.info("journals go to %s again", self._folder)
                self._troubled = False
                weakref.finalize(mapped, self._freed, size)
                moved, at, view = [], 0, memoryview(mapped)
                for payload in payloads:
                    moved.append(view[at : at + len(payload)])
                    at += len(payload)
                del mapped, view
            self._waiting.popleft()
            self._waiting_bytes -= size
            settle(moved)
            del payloads, moved, settle  # while this waits for the next one, it keeps nothing alive

    def _stays_out(self, why: object) -> None:
        if not self._troubled:
            logger.warning("a journal stays out of %s: %s", self._folder, why)
        self._troubled = True

    def _freed(self, size: int) -> None:
        self.used_bytes -= size


def _written(folder: Path, payloads: Sequence[memoryview]) -> IO[bytes]:
    """A new file of these bytes. Raises OSError."""
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # whoever gets it closes it
    try:
        for payload in payloads:
            file.write(payload)
        file.flush()
    except OSError:
        file.close()
        raise
    return file

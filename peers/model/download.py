"""One file over HTTP, appended to what an earlier attempt, or an earlier process, has left of it.

Owns how often a break is survived. Whose server it is, and whether the bytes are right, is the caller's affair.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

from peers.errors import CorruptCheckpoint, HubUnreachable
from peers.model.progress import Progress

logger = logging.getLogger(__name__)

STALL_S = 10.0
"""A download that gives no byte for this long is broken off and resumed."""

RESUME_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Waits between attempts that bring nothing, once a download has begun; then the error reaches the user."""

Get: TypeAlias = Callable[[int, float], AbstractContextManager[Any]]
"""The response from byte `first` on, with a timeout in seconds for each read. Raises HubUnreachable, also within."""


def receive(part: Path, size: int, get: Get, progress: Progress, *, name: str, first_timeout_s: float) -> None:
    """Append to `part` until it has `size` bytes, resuming after breaks as long as they are short.

    `name` is what people call the file. Raises what `get` raises, and CorruptCheckpoint when more arrives.
    """
    part.touch()
    progress.advance(min(size_of(part), size))
    pauses: Iterator[float] = iter(())
    while (held := size_of(part)) != size:
        if held > size:
            os.truncate(part, 0)
            continue
        try:
            with get(held, STALL_S if held else first_timeout_s) as response, open(part, "r+b") as sink:
                # a server that ignores the range starts again from the first byte
                sink.seek(held if response.status_code == 206 else 0)
                for chunk in response.iter_bytes():  # as it arrives: a break loses nothing
                    before = sink.tell()
                    if before + len(chunk) > size:
                        raise CorruptCheckpoint(f"more than the {size} bytes of {name} are sent")
                    sink.write(chunk)
                    progress.advance(max(0, sink.tell() - max(held, before)))
        except HubUnreachable as error:
            if size_of(part) > held:
                pauses = iter(RESUME_PAUSES_S)
            pause_s = next(pauses, None)
            if pause_s is None:
                raise
            logger.warning("%s; resuming %s at byte %s in %s s", error, name, size_of(part), pause_s)
            time.sleep(pause_s)


def part_of(target: Path) -> Path:
    """Where a file grows until it is whole."""
    return target.with_name(f".{target.name}.part")


def size_of(path: Path) -> int:
    """In bytes; 0 for a file that is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

"""A parent for background tasks: nothing runs unowned, no failure is lost.

Unlike `asyncio.TaskGroup`, one failing task does not cancel its siblings: a peer serves many strangers at once. The
first unexpected exception is kept and handed to whoever awaits `failed()`, which is the composition root.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class Tasks:
    """Owns tasks from `spawn` until they end or `close` cancels them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] | None = None
        self._closed = False

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run `work` in the background. After `close` it is cancelled at once."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if self._closed:
            task.cancel()
        return task

    async def failed(self) -> None:
        """Never returns; raises the first unexpected exception of any task."""
        if self._failure is None:
            self._failure = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._failure)  # one who stops waiting does not end it for the others

    async def settled(self, *, timeout_s: float) -> None:
        """Wait until the tasks that run now have ended, at most `timeout_s`."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)

    async def close(self) -> None:
        """Cancel what still runs and wait until it has ended."""
        self._closed = True
        while running := self._tasks - {asyncio.current_task()}:  # one that ends may have begun another
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.error("task %s failed", task.get_name(), exc_info=error)
        if self._failure is None:
            self._failure = task.get_loop().create_future()
        if not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # marked as seen: nobody may be waiting yet

"""Families of processes: all that a test started, however deep and whoever its parent is by now.

A member is known by a mark in its environment, which children inherit. So nobody is missed that was started after a
look at the tree, or whose parent is gone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Container

import psutil

MARK = "HIVESWARM_TEST_FAMILY"


class Family:
    """Start the first member with `environment`."""

    def __init__(self) -> None:
        self._mark = secrets.token_hex(16)

    @property
    def environment(self) -> dict[str, str]:
        """This process's own, marked."""
        return os.environ | {MARK: self._mark}

    def members(self) -> list[psutil.Process]:
        """Who lives now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it ended, or is somebody else's
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def survivors(self, *, besides: Container[int] = (), timeout_s: float = 60.0) -> list[str]:
        """Who is still there after so long, in words; they are ended then. Empty as soon as nobody is left, or nobody
        but the processes `besides`."""
        deadline_s = time.monotonic() + timeout_s
        while members := [member for member in self.members() if member.pid not in besides]:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            psutil.wait_procs(members, timeout=left_s)
        names = []
        for member in members:
            with contextlib.suppress(psutil.Error):
                names.append(f"{member.pid}: {' '.join(member.cmdline())}")
                member.kill()
        return names

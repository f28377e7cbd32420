"""A person's terminal, with `swarm` in it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable

DEADLINE_S = 90.0


class Terminal:
    """A process at the other end of a pseudo-terminal, read until something is on the screen."""

    def __init__(self, *command: str) -> None:
        self.end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "swarm", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_own_the_terminal,
            env=os.environ | {"TERM": "xterm"},
        )
        os.close(theirs)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def wait_for(self, text: str, *, since: int = 0) -> int:
        """The place behind `text`, once it stands on the screen behind `since`."""
        self._wait(lambda: text in self.screen[since:], repr(text))
        return self.screen.index(text, since) + len(text)

    def wait_for_more(self, count: int, *, since: int) -> int:
        """That place, once the screen has so many characters behind `since`."""
        self._wait(lambda: len(self.screen) >= since + count, f"{count} characters behind {since}")
        return since + count

    def _wait(self, met: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not met():
            assert time.monotonic() < deadline_s, f"no {what} in {self.screen!r}"
            if select.select([self.end], [], [], 1.0)[0]:
                try:
                    self.screen += os.read(self.end, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    raise AssertionError(f"it ended: {self.screen!r}") from None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)


def _own_the_terminal() -> None:
    """So that Ctrl-C reaches the process as a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)

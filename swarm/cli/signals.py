"""What Ctrl-C, SIGTERM and a closed terminal do at each moment of a command.

    before and during imports     end at once
    a node that is starting       cancel, take the libp2p daemon down, exit 0
    a node that serves            drain, exit 0
    a fine-tuning                 write a checkpoint after the step under way, exit 0
    anything else                 unwind (which frees pages at peers), exit 128 + signal
    the second signal             end at once, whatever is going on

Knows no command. Imports nothing that takes time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which is what `nohup` asks for
    SIGNALS.append(signal.SIGHUP)
UNWIND_TIMEOUT_S = 10.0
"""How long a cancelled start may take to end what it started."""
ORPHAN_TIMEOUT_S = 5.0
"""How long a node whose parent died may drain."""


class Interrupted(KeyboardInterrupt):
    """The first signal, raised in the main thread."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def end_at_once() -> None:
    """From now on a signal ends the process immediately; for the time when there is nothing to take down."""
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os._exit(_code(number)))


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, the first signal raises Interrupted, and a second one leaves."""
    with _restored():
        raise_on_signal()
        yield


@contextmanager
def noticed(on_signal: Callable[[], None]) -> Iterator[list[int]]:
    """Within, the first signal is put into the list, for a loop that looks there, and told; a second one leaves."""
    received: list[int] = []

    def notice(number: int, _: FrameType | None) -> None:
        if received:
            leave(_code(number))
        received.append(number)
        on_signal()

    with _restored():
        for number in SIGNALS:
            signal.signal(number, notice)
        yield received


@contextmanager
def _restored() -> Iterator[None]:
    """Whatever is done with signals within, afterwards they do what they did."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_on_signal() -> None:
    """The next signal raises Interrupted in the main thread, the one after it leaves."""
    for number in SIGNALS:
        signal.signal(number, _raise_once)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, Ctrl-C raises Interrupted. After it Ctrl-C does nothing until the next: what it was to stop has ended."""
    raise_on_signal()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, lambda *_: None)


def _raise_once(number: int, _: FrameType | None) -> NoReturn:
    for each in SIGNALS:
        signal.signal(each, lambda number, _: leave(_code(number)))
    raise Interrupted(number)


def run(main: Coroutine[Any, Any, None], *, stop: Callable[[], bool] = lambda: False) -> None:
    """Run `main` in a new event loop, in the main thread.

    The first signal calls `stop`; if that returns False, `main` cannot stop by itself: it is cancelled, and Interrupted
    is raised when it has unwound. A second signal leaves.
    """
    import asyncio

    from peers.transport.loop import new_event_loop

    async def supervise() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        received: list[int] = []

        def on_signal(number: int) -> None:
            received.append(number)
            if len(received) > 1:
                leave(_code(number))
            elif not stop():
                task.cancel()
                # what runs in threads (a download, reading weights) cannot be cancelled and is not waited for
                threading.Thread(target=_leave_after, args=(UNWIND_TIMEOUT_S, _code(number)), daemon=True).start()

        for number in SIGNALS:
            loop.add_signal_handler(number, on_signal, number)
        try:
            await main
        except asyncio.CancelledError:
            if not received:
                raise
            interrupted.append(received[0])

    interrupted: list[int] = []
    runner = asyncio.Runner(loop_factory=new_event_loop)
    runner.run(supervise())
    if interrupted:  # without closing the runner, which would wait for threads
        raise Interrupted(interrupted[0])
    runner.close()


def end_with_parent() -> None:
    """Act on the end of standard input, which a parent holds open while it lives, as on SIGTERM."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        _leave_after(ORPHAN_TIMEOUT_S, 1)

    threading.Thread(target=watch, daemon=True, name="watch parent").start()


def leave(code: int) -> NoReturn:
    """End the process now, with everything that it started, waiting for no thread."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h")  # a progress bar may have hidden the cursor
    os._exit(code)


def _leave_after(delay_s: float, code: int) -> None:
    time.sleep(delay_s)
    leave(code)


def _code(number: int) -> int:
    return 128 + number

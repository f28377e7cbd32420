"""Lets a process run for a share of the time only, until standard input ends or that process does:
`python -m tests.lab.pacer PID SHARE PERIOD_S`.

It is a process of its own, because a thread of the lab's waits for whoever holds the interpreter's lock, and the shares
of fast and slow peers come out more alike than they should be.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import sys
import time


def pace(pid: int, share: float, period_s: float) -> None:
    """Stop the process and let it run in turn, by one clock: what a turn was late, the next one does not add to."""
    turns = ((signal.SIGSTOP, (1 - share) * period_s), (signal.SIGCONT, share * period_s))
    at_s = time.monotonic()
    with contextlib.suppress(ProcessLookupError):  # it has ended
        process = os.pidfd_open(pid)  # its id may be another one's later
        try:
            for number, seconds in itertools.cycle(turns):
                signal.pidfd_send_signal(process, number)
                now_s = time.monotonic()
                at_s = max(at_s + seconds, now_s)
                if select.select([sys.stdin], [], [], at_s - now_s)[0]:
                    return
        finally:
            signal.pidfd_send_signal(process, signal.SIGCONT)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the lab, which ends this
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    sys.stdout.write("begins\n")
    sys.stdout.flush()
    pace(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))

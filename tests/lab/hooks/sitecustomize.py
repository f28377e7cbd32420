"""What a lab does to a node from within, before the node's own code begins; the environment says what.

LAB_CLOCK=FILE          this process's clock is off by the seconds that the file holds, also when they change
LAB_SMALL_DISK=N:A:B    a disk of N bytes lies under folder A, for this process and its children; it goes with them, and
                        what lies in folder B can be reached from it
LAB_JOURNAL_BYTES=N     memory for the journal

Python imports a module of this name at its start, where it finds one.
"""

from __future__ import annotations

import os
import time


def set_clock(file: str) -> None:
    real, monotonic = time.time, time.monotonic
    read_at_s, skew_s = -1.0, 0.0

    def skewed() -> float:
        nonlocal read_at_s, skew_s
        if monotonic() - read_at_s > 0.1:
            with open(file) as said:
                read_at_s, skew_s = monotonic(), float(said.read() or 0)
        return real() + skew_s

    time.time = skewed


def mount_disk(size: str, folder: str, other: str) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, ms_rec_private = 0x20000, 0x44000

    def must(outcome: int, what: str) -> None:
        if outcome:
            raise OSError(ctypes.get_errno(), what)

    must(libc.unshare(clone_newns), "unshare")
    must(libc.mount(b"none", b"/", None, ms_rec_private, None), "make mounts private")
    os.makedirs(folder, exist_ok=True)
    must(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode()), "mount")
    for name in os.listdir(other):
        os.symlink(os.path.join(other, name), os.path.join(folder, name))


if clock := os.environ.get("LAB_CLOCK"):
    set_clock(clock)
if disk := os.environ.get("LAB_SMALL_DISK"):
    mount_disk(*disk.split(":"))
if journal_bytes := os.environ.get("LAB_JOURNAL_BYTES"):
    import peers.capacity

    peers.capacity.JOURNAL_BYTES = int(journal_bytes)

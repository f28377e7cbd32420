"""Whether a node can run on this machine at all: found out before anything is downloaded; and how many threads it
should have, and how they wait.

Knows what the node needs of the system. Imports only what every Python has, so that it can be asked before the rest.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

from peers.errors import UnsupportedPlatform

SYSTEMS = ("Linux", "Darwin")
CONTAINER = Path("/sys/fs/cgroup")
"""Where the kernel says what the container that this process may run in uses, and may use (cgroup v2)."""


def require_platform() -> None:
    """Raises UnsupportedPlatform: another system, or no libp2p daemon for this one."""
    system = platform.system()
    if system not in SYSTEMS:
        raise UnsupportedPlatform(f"{system} has neither the UNIX sockets nor the file locks that a node needs")
    hivemind = importlib.util.find_spec("hivemind")
    folders = (hivemind and hivemind.submodule_search_locations) or ()
    if not any(os.access(Path(folder, "hivemind_cli", "p2pd"), os.X_OK) for folder in folders):
        raise UnsupportedPlatform(
            f"hivemind is here without its libp2p daemon for {system} on {platform.machine()}",
            hint="on x86-64 or arm64, install it again: pip install --force-reinstall --no-deps hivemind",
        )


def let_threads_sleep() -> bool:
    """Have torch's threads sleep when they wait: spinning, they keep those of other peers and programs from work.

    Before anything imports torch: its libraries read this once, when they are loaded. False where they have been,
    without anybody having said how threads are to wait.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return "OMP_WAIT_POLICY" in os.environ


def container_cpus() -> int:
    """How many CPUs the container's time is worth, rounded up; no limit where there is none. More threads than that
    stand still together for the rest of each period."""
    try:
        quota_us, period_us = map(int, (CONTAINER / "cpu.max").read_text().split())
        return -(-quota_us // period_us)
    except (OSError, ValueError):  # no container, or "max"
        return sys.maxsize


def keep_to_quota() -> None:
    """Have torch start no more threads than the container's time is worth, unless somebody has said how many.

    Before anything imports torch, which goes by the CPUs that it sees.
    """
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (cpus := container_cpus()) < seen:
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))

"""Network namespaces that are known by their names to be a lab's, so that the next lab can remove what a dead one left.

Owns names, creation, entering and removal. A name says which process made it: `hivelab-PID-STARTED-HOST`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

FOLDER: Final = Path("/run/netns")
PREFIX: Final = "hivelab"
SOCKETS: Final = "sockets"
STOP_TIMEOUT_S: Final = 10.0
_CLONE_NEWNET: Final = 0x40000000
_NEEDED: Final = 1 << 12 | 1 << 21
"""CAP_NET_ADMIN and CAP_SYS_ADMIN: root in a container may lack them."""
_NAME: Final = re.compile(rf"{PREFIX}-(?P<pid>\d+)-(?P<started>\d+)(-.+)?")
_SOCKETS: Final = re.compile(r"/tmp/hiveswarm-\w+(?=/)")
"""The folder that a node's or user's libp2p daemon has its sockets in, as its arguments tell it."""

_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str | None:
    """Why this machine cannot have a lab, in words; None if it can."""
    if sys.platform != "linux":
        return "network namespaces are a thing of Linux"
    held = int(re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)
    if held & _NEEDED != _NEEDED:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program ip is missing (package iproute2)"
    return None if os.path.exists("/dev/net/tun") else "/dev/net/tun is missing (kernel module tun)"


def end_in_order() -> None:
    """From now on whoever ends this process, or its terminal, lets it clean up, as after Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # which is what `nohup` asks for
            signal.signal(number, signal.default_int_handler)


def own_prefix() -> str:
    """What the names of everything that this process makes begin with."""
    return f"{PREFIX}-{os.getpid()}-{_started(os.getpid())}"


@contextlib.contextmanager
def entered(namespace: str) -> Iterator[None]:
    """Run the body of this thread, and all threads and processes that it starts, in a namespace."""
    with open("/proc/thread-self/ns/net") as before, open(FOLDER / namespace) as inside:
        _set_namespace(inside.fileno())
        try:
            yield
        finally:
            _set_namespace(before.fileno())


def create(namespace: str) -> None:
    ip("netns", "add", namespace)


def remove(namespace: str) -> None:
    """End everything that runs in a namespace, then remove it with its devices. Raises CalledProcessError."""
    try:
        _end_members(namespace)
        ip("netns", "del", namespace)
    except subprocess.CalledProcessError:
        if (FOLDER / namespace).exists():  # else another lab that starts now was faster
            raise


def remove_leftovers() -> list[str]:
    """Remove what labs left that did not live to do it; returns the names."""
    left = [path.name for path in FOLDER.glob(f"{PREFIX}-*") if not _alive(path.name)]
    for namespace in left:
        remove(namespace)
    for folder in Path("/tmp").glob(f"{PREFIX}-*"):
        if not _alive(folder.name):
            if (noted := folder / SOCKETS).exists():
                for sockets in _SOCKETS.findall(noted.read_text()):
                    shutil.rmtree(sockets, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
    return left


def note_sockets(namespace: str, folder: Path) -> None:
    """Note in a lab's folder the sockets of daemons that run in a namespace: a killed daemon does not remove them."""
    with (folder / SOCKETS).open("a") as noted:
        for process in _members(namespace):
            with contextlib.suppress(psutil.Error):
                noted.write(" ".join(process.cmdline()) + "\n")


def kill(process: psutil.Process) -> None:
    """End a process and remove the folder of sockets that its libp2p daemon would have removed."""
    with contextlib.suppress(psutil.Error):
        sockets = {found.group() for word in process.cmdline() if (found := _SOCKETS.search(word))}
        process.send_signal(signal.SIGKILL)
        for folder in sockets:
            shutil.rmtree(folder, ignore_errors=True)


def ip(*arguments: str) -> str:
    """Run `ip …`; returns what it printed. Raises CalledProcessError."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _end_members(namespace: str) -> None:
    members = _members(namespace)
    for member in members:
        kill(member)
    psutil.wait_procs(members, timeout=STOP_TIMEOUT_S)


def _members(namespace: str) -> list[psutil.Process]:
    """What runs in a namespace, without this process, of which a thread may be inside."""
    members = []
    for pid in map(int, ip("netns", "pids", namespace).split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            members.append(psutil.Process(pid))
    return [member for member in members if member.pid != os.getpid()]


def _alive(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and _started(int(match["pid"])) == int(match["started"])


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with its id it names a process for ever. None if it ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    return None if state in "ZX" else int(fields[18])  # a zombie has ended: only its parent has not looked yet


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))

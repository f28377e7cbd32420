"""Processes of `python -m swarm` that start in a moment: one process imports what takes seconds, then forks.

    child = nursery.fork(["join", …], os.environ, stdin=…, stdout=…, stderr=…)

What a child does is what `python -m swarm` does: it is a process of its own in a group of its own, and its memory is
shared only as long as nobody writes to it. Linux only (`AVAILABLE`): other systems' libraries do not survive a fork.

Owns the process that forks, and both ends of the socket to it; knows nothing of what children do.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final, TypeAlias

import psutil

from peers.platform import let_threads_sleep
from routing.errors import Unavailable

logger = logging.getLogger(__name__)

AVAILABLE: Final = sys.platform == "linux"
START_TIMEOUT_S: Final = 120.0
"""Imports included, on a busy machine."""
PRELOADED: Final = ("peers.host.run", "swarm.cli.node")
"""What nodes need."""
UNKNOWN: Final = 255
"""The exit code of a child that outlived its nursery."""
_MESSAGE_BYTES_MAX: Final = 1 << 16


class Child:
    """A process that the nursery forked: what is used of `subprocess.Popen`, by the same names."""

    def __init__(self, command: Sequence[str]) -> None:
        self.args = list(command)
        self.pid = 0
        self.returncode: int | None = None
        """Negative: the signal that ended it."""
        self._started = threading.Event()
        self._ended = threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)


Process: TypeAlias = Child | subprocess.Popen[bytes]

_nurseries: dict[frozenset[tuple[str, str]], Nursery] = {}
_making = threading.Lock()


def fork(arguments: Sequence[str], environment: Mapping[str, str], *, stdin: int, stdout: int, stderr: int) -> Process:
    """`python -m swarm` with these arguments, out of a nursery with this environment, made where there is none yet.

    Where there cannot be one, as `execute` does it. Raises Unavailable.
    """
    if not AVAILABLE:
        return execute(arguments, environment, stdin=stdin, stdout=stdout, stderr=stderr)
    # pytest says in its own variables which test is running, and changes them with it
    key = frozenset(pair for pair in environment.items() if not pair[0].startswith("PYTEST_"))
    with _making:
        if key not in _nurseries or not _nurseries[key].running:
            _nurseries[key] = Nursery(environment)
            atexit.register(_nurseries[key].close)
    return _nurseries[key].start(arguments, stdin=stdin, stdout=stdout, stderr=stderr)


def execute(
    arguments: Sequence[str], environment: Mapping[str, str], *, stdin: int, stdout: int, stderr: int
) -> subprocess.Popen[bytes]:
    """`python -m swarm` with these arguments as any other program, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "swarm", *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=environment,
        process_group=0,  # Ctrl-C is for the process that made it, which then stops it in order
    )


class Nursery:
    """The process that forks. It ends with `close`, or with the process that made it; its children live on then."""

    def __init__(self, environment: Mapping[str, str], *, preload: Sequence[str] = PRELOADED) -> None:
        """Children have this `environment`, all of them; `preload` names the modules that they will need."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *preload],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for the process that made it
            )
        self._children: dict[int, Child] = {}
        self._lock = threading.Lock()
        self._asked = 0
        self._gone = threading.Event()
        threading.Thread(target=self._read, name="nursery", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return not self._gone.is_set()

    def start(self, arguments: Sequence[str], *, stdin: int, stdout: int, stderr: int) -> Child:
        """A new `python -m swarm` with these arguments and descriptors, which stay the caller's to close.

        Raises Unavailable when the nursery has ended, or is not ready within START_TIMEOUT_S.
        """
        child = Child(["swarm", *arguments])
        with self._lock:
            self._asked += 1
            self._children[self._asked] = child
            try:
                socket.send_fds(self._socket, [json.dumps([self._asked, *arguments]).encode()], [stdin, stdout, stderr])
            except OSError as error:
                del self._children[self._asked]
                raise Unavailable(f"the process that starts nodes is gone: {error}", hint="start again") from error
        if not child._started.wait(START_TIMEOUT_S) or not child.pid:
            raise Unavailable("no process was started", hint="what was written to standard error above says why")
        return child

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._socket.close()
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        try:
            while message := self._socket.recv(_MESSAGE_BYTES_MAX):
                number, pid, code = json.loads(message)
                child = self._children[number]
                child.pid, child.returncode = pid, code
                child._started.set()
                if code is not None:
                    del self._children[number]
                    child._ended.set()
        except OSError as error:  # closed on this side, or reset by the end of the other
            logger.debug("the nursery's socket: %s", error)
        self._gone.set()
        for child in list(self._children.values()):  # they live on, but who waits for them is gone
            child._started.set()
            with suppress(psutil.NoSuchProcess):
                psutil.Process(child.pid).wait()
            child.returncode = UNKNOWN
            child._ended.set()


def _fork_on_demand(control: socket.socket) -> list[str] | None:
    """Fork for each request that comes; returns the arguments in each child, and None when the other side is gone."""
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is control:
                message, files, _, _ = socket.recv_fds(control, _MESSAGE_BYTES_MAX, 3)
                if not message:
                    return None
                arguments: list[str]
                number, *arguments = json.loads(message)
                if not (pid := os.fork()):
                    os.setpgid(0, 0)
                    for opened in selector.get_map().values():
                        os.close(opened.fd)
                    control.detach()
                    selector.close()
                    for target, file in enumerate(files):
                        os.dup2(file, target)
                        os.close(file)
                    return arguments
                os.setpgid(pid, pid)  # whoever comes first
                for file in files:
                    os.close(file)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (number, pid))
                control.send(json.dumps([number, pid, None]).encode())
            else:
                number, pid = key.data
                selector.unregister(key.fd)
                os.close(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                control.send(json.dumps([number, pid, code]).encode())


if __name__ == "__main__":
    let_threads_sleep()
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # a collection in a child would write to, and so copy, what is shared
    own = _fork_on_demand(socket.socket(fileno=int(sys.argv[1])))
    if own is not None:
        sys.argv = ["swarm", *own]
        runpy.run_module("swarm", run_name="__main__", alter_sys=True)

"""The C++ library of this package: compiled with the system's compiler on first use, and kept in the cache folder.

Owns the compiler's call and the name under which its product is kept: one per source, compiler, flags and processor, so
that a home directory shared by different machines is harmless. Knows nothing of tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from peers.model.storage import cache_folder, locked

logger = logging.getLogger(__name__)

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
COMPILE_TIMEOUT_S = 120.0
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
TARGETS = (("-march=native",), ("-mcpu=native",), ())
"""How compilers are told to use what this processor has, tried in turn."""


class NoLibrary(Exception):
    """The library cannot be had here; the message says why, for one line of a log."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, compiled where that has not happened yet (seconds). Raises NoLibrary."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise NoLibrary("there is no C++ compiler (install g++ or clang)")
    try:
        return _declared(ctypes.CDLL(str(_compiled(compiler))))
    except (OSError, subprocess.SubprocessError) as error:  # of the cache folder, the compiler, or the loader
        raise NoLibrary(str(error)) from error


def _compiled(compiler: str, targets: tuple[tuple[str, ...], ...] = TARGETS) -> Path:
    key = [
        *(source.read_bytes() for source in SOURCES),
        compiler.encode(),
        _version(compiler),
        _processor(),
        *map(str.encode, (*FLAGS, *map(str, targets))),
    ]
    path = cache_folder() / "kernels" / f"{hashlib.sha256(b'|'.join(key)).hexdigest()[:24]}.so"
    if path.exists():
        return path
    with locked(path):
        if not path.exists():
            logger.info("compiling the kernels with %s (once)", compiler)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                product = Path(folder) / path.name
                units = [str(source) for source in SOURCES if source.suffix == ".cpp"]
                for target in targets:
                    refusal = _compile(compiler, [*FLAGS, *target, *units, "-o", str(product)])
                    if refusal is None:
                        os.replace(product, path)
                        return path
            raise NoLibrary(f"{compiler} does not compile it: {refusal}")
    return path


def _compile(compiler: str, arguments: list[str]) -> str | None:
    """None when it went well, else the first line of what the compiler said. Raises NoLibrary where it does not end: it
    would be no quicker for less than this processor has, and what it made of that would be kept."""
    try:
        run = subprocess.run(
            [compiler, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NoLibrary(f"{compiler} did not end within {COMPILE_TIMEOUT_S:.0f} s") from error
    return None if run.returncode == 0 else next(iter(run.stderr.splitlines()), f"exit status {run.returncode}")


def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_TIMEOUT_S, check=False).stdout


def _processor() -> bytes:
    """What `native` means here."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = ""
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}".encode()


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    found.hive_pool.restype, found.hive_pool.argtypes = pointer, [ctypes.c_int]
    found.hive_pool_end.restype, found.hive_pool_end.argtypes = None, [pointer]
    found.hive_linear.restype = None
    found.hive_linear.argtypes = [pointer, ctypes.c_int, ctypes.c_int, *[pointer] * 5, *[size] * 3]
    found.hive_unpack.restype = None
    found.hive_unpack.argtypes = [pointer, ctypes.c_int, ctypes.c_int, *[pointer] * 3, *[size] * 2]
    found.hive_attend.restype = None
    found.hive_attend.argtypes = [pointer, ctypes.c_int, *[pointer] * 5, size, pointer, pointer, *[size] * 10]
    found.hive_attend.argtypes += [ctypes.c_float, ctypes.c_float, size]
    found.hive_run.restype, found.hive_run.argtypes = None, [pointer, pointer, size, pointer, pointer]
    return found

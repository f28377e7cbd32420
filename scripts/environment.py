"""Create or refresh .venv: the locked dependencies and this project, editable, with its [dev] extra.

Does nothing when the stamp inside .venv says that it was made from these very files. Needs only the standard library;
`scripts/env` finds the interpreter that runs it.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed-from"
NEEDED_BYTES = 3 << 30


def main() -> int:
    with open(LOCK) as held:  # the lock file also serves as the lock between processes
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is preparing .venv; waiting for it")
            fcntl.flock(held, fcntl.LOCK_EX)
        sources = hashlib.sha256(b"\0".join([bytes(ROOT), (ROOT / "pyproject.toml").read_bytes(), LOCK.read_bytes()]))
        usable = PYTHON.exists() and subprocess.run([PYTHON, "-c", ""], check=False).returncode == 0
        if usable and STAMP.exists() and STAMP.read_text() == sources.hexdigest():
            return 0
        if not usable and shutil.disk_usage(ROOT).free < NEEDED_BYTES:
            say(f"the environment needs {NEEDED_BYTES >> 30} GiB, and {ROOT} has less free: make room and run again")
            return 1
        STAMP.unlink(missing_ok=True)
        try:
            if not usable:
                say(f"creating .venv with Python {sys.version.split()[0]}")
                subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
            say("installing the locked dependencies and this project (minutes the first time)")
            install = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--constraint", LOCK]
            subprocess.run([*install, "--no-compile", "pip", "--editable", f"{ROOT}[dev]"], check=True)
            # pip would compile on one core; what some package has that is no Python of this version stays as it is
            compiling = [PYTHON, "-m", "compileall", "-q", "-j", "0", VENV / "lib"]
            subprocess.run(compiling, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except subprocess.CalledProcessError:
            say("that failed, as printed above. Check the network and pip's index settings, then run scripts/env again")
            return 1
        STAMP.write_text(sources.hexdigest())
        return 0


def say(text: str) -> None:
    print(f"scripts/env: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

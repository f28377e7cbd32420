from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.helpers.processes import Family

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_the_demo_answers_and_leaves_nothing_behind() -> None:
    family = Family()
    line = [sys.executable, "-m", "swarm", "demo", "What is the capital of France?", "--max-new-tokens", "24"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, env=family.environment)
    assert done.returncode == 0, done.stderr
    assert family.survivors() == []
    assert "Paris" in done.stdout
    for span in ("0:10", "10:20", "20:30"):
        assert f"serves blocks {span}" in done.stderr
    assert re.search(r"route: you → .* → you", done.stderr)
    assert re.search(r"first after [0-9.]+ s, then [0-9.]+ tokens/s", done.stderr)


def test_the_wrapper_prepares_the_environment_and_hands_over_the_whole_prompt(tmp_path: Path) -> None:
    """In a checkout whose environment only says how it was called: a stale real one would be installed anew here."""
    scripts, python = tmp_path / "scripts", tmp_path / ".venv" / "bin" / "python"
    scripts.mkdir()
    shutil.copy(SCRIPTS / "demo", scripts)
    env = scripts / "env"
    env.write_text(f"#!/bin/sh\nmkdir -p {python.parent}\ncp {scripts}/python {python}\n")
    (scripts / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    for script in (env, scripts / "python"):
        script.chmod(0o755)
    line = [scripts / "demo", "what is *this*?", "--max-new-tokens", "3"]
    done = subprocess.run(line, capture_output=True, text=True, cwd="/", timeout=60, check=True)
    assert done.stdout.splitlines() == [str(tmp_path), "-m", "swarm", "demo", *map(str, line[1:])]


def test_ctrl_c_ends_the_demo_with_all_its_processes() -> None:
    with subprocess.Popen([sys.executable, "-m", "swarm", "demo"], stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        assert demo.stderr.readline().startswith("starting")
        me = psutil.Process(demo.pid)
        while not (family := me.children(recursive=True)):
            assert demo.poll() is None
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert errors == ""
    assert psutil.wait_procs(family, timeout=60)[1] == []

from __future__ import annotations

import re
import signal
import subprocess
import sys

import psutil

from tests.integration.conftest import Swarm


def test_the_demo_answers_and_leaves_nothing_behind(command: Swarm) -> None:
    done = command("demo", "What is the capital of France?", "--max-new-tokens", "24")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    for span in ("0:10", "10:20", "20:30"):
        assert f"serves blocks {span}" in done.stderr
    assert re.search(r"route: you → .* → you", done.stderr)
    assert re.search(r"first after [0-9.]+ s, then [0-9.]+ tokens/s", done.stderr)
    for pid in re.findall(r"\(process (\d+)\)", done.stderr):
        assert not psutil.pid_exists(int(pid))


def test_ctrl_c_ends_the_demo_with_all_its_processes() -> None:
    with subprocess.Popen([sys.executable, "-m", "swarm", "demo"], stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        assert demo.stderr.readline().startswith("starting")
        me = psutil.Process(demo.pid)
        while not (family := me.children(recursive=True)):
            assert demo.poll() is None
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert errors == ""
    assert psutil.wait_procs(family, timeout=10)[1] == []

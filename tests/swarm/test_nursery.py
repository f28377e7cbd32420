"""Forked `python -m swarm`: what it gets, how it ends, and what happens when its nursery ends first.

Nothing is preloaded here, so that a nursery starts at once; integration tests fork whole nodes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from routing.errors import Unavailable
from routing.version import VERSION
from swarm import nursery
from swarm.nursery import UNKNOWN, Child, Nursery

pytestmark = pytest.mark.skipif(not nursery.AVAILABLE, reason="only Linux forks")

CHAT = ("chat", "--help")


@pytest.fixture
def forking() -> Iterator[Nursery]:
    forking = Nursery(os.environ | {"COLUMNS": "60"}, preload=())
    yield forking
    forking.close()


def start(forking: Nursery, *arguments: str) -> tuple[Child, int, int]:
    """A child, the writing end of its standard input, and the reading end of its standard output."""
    stdin, held = os.pipe()
    said, stdout = os.pipe()
    child = forking.start(arguments, stdin=stdin, stdout=stdout, stderr=stdout)
    os.close(stdin)
    os.close(stdout)
    return child, held, said


def read(descriptor: int) -> str:
    with open(descriptor) as lines:
        return lines.read()


def test_a_child_is_python_m_swarm_with_its_own_arguments_descriptors_and_environment(forking: Nursery) -> None:
    expected = subprocess.run(
        [sys.executable, "-m", "swarm", *CHAT], env=os.environ | {"COLUMNS": "60"}, capture_output=True, check=True
    )
    children = [start(forking, *CHAT), start(forking, "--version")]
    for (child, held, said), text in zip(children, [expected.stdout.decode(), f"hiveswarm {VERSION}\n"], strict=True):
        assert read(said) == text
        assert child.wait(timeout=60) == child.poll() == 0
        os.close(held)
    assert children[0][0].pid != children[1][0].pid


def test_an_error_and_a_signal_are_told_by_the_exit_code(forking: Nursery) -> None:
    wrong, held, said = start(forking, "no-such-command")
    assert wrong.wait(timeout=60) == 2
    assert "no-such-command" in read(said)
    os.close(held)
    waiting, held, said = start(forking, *WAITING)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=0)
    assert os.getpgid(waiting.pid) == waiting.pid
    waiting.send_signal(signal.SIGKILL)
    assert waiting.wait(timeout=60) == -signal.SIGKILL
    waiting.send_signal(signal.SIGKILL)  # to nobody
    os.close(held)
    os.close(said)


WAITING = ("generate", "smollm2-135m-instruct", "--invite", "swarm://nobody")
"""Reads its prompt from standard input first."""


def test_a_child_outlives_its_nursery_and_is_still_waited_for(forking: Nursery) -> None:
    child, held, said = start(forking, *WAITING)
    assert forking.running
    forking.close()
    forking.close()
    assert child.poll() is None
    assert psutil.pid_exists(child.pid)
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=60) == UNKNOWN
    with pytest.raises(Unavailable):
        start(forking, "--version")
    os.close(held)
    os.close(said)


def test_a_nursery_that_cannot_import_says_so() -> None:
    broken = Nursery(os.environ, preload=["no_such_module"])
    with pytest.raises(Unavailable):
        start(broken, "--version")
    assert not broken.running
    broken.close()


def test_what_is_preloaded_finds_that_its_threads_are_to_sleep(tmp_path: Path) -> None:
    """Torch's libraries ask when they are loaded, which here is before `python -m swarm` begins."""
    (tmp_path / "preloaded.py").write_text(
        "import os\nopen(os.environ['SEEN'], 'w').write(os.environ['OMP_WAIT_POLICY'])"
    )
    for asked, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | asked
        environment |= {"PYTHONPATH": f"{tmp_path}:{environment.get('PYTHONPATH', '')}", "SEEN": str(tmp_path / "seen")}
        forking = Nursery(environment, preload=["preloaded"])
        child, held, said = start(forking, "--version")
        assert child.wait(timeout=60) == 0
        assert (tmp_path / "seen").read_text() == policy
        forking.close()
        os.close(held)
        os.close(said)


def test_a_nursery_ends_with_its_owner(tmp_path: Path) -> None:
    program = "import os, time; from swarm.nursery import Nursery; "
    program += "print(Nursery(os.environ, preload=()).pid, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        orphan = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    orphan.wait(timeout=60)


def test_where_nothing_can_be_forked_the_same_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "AVAILABLE", False)
    said, stdout = os.pipe()
    child = nursery.fork(["--version"], os.environ, stdin=0, stdout=stdout, stderr=stdout)
    os.close(stdout)
    assert child.wait(timeout=60) == 0
    assert read(said) == f"hiveswarm {VERSION}\n"

"""A machine that cannot run a node is told so in words, whichever door it comes through."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from peers import host
from peers.errors import UnsupportedPlatform
from peers.host.config import PeerConfig
from peers.host.run import run_peer
from peers.platform import container_cpus, keep_to_quota, let_threads_sleep, require_platform
from routing.errors import CallerError

WITHOUT_UNIX = """
import platform, signal, sys
sys.modules["fcntl"] = None
del signal.SIGHUP
"""
COMMAND_LINE = """
platform.system = lambda: "Windows"
from swarm.cli import main
sys.argv = ["swarm", "generate", "no/such-model", "--prompt", "x"]
main()
"""
PYTHON = """
import asyncio, pathlib
from peers.errors import UnsupportedPlatform
from peers.host.config import PeerConfig
from peers.host.run import run_peer
from swarm import SwarmModelForCausalLM
platform.system = lambda: "Windows"
config = PeerConfig(model="no/such-model", network="hive", identity=pathlib.Path("nowhere.key"))
try:
    asyncio.run(run_peer(config, emit=print, stop=asyncio.Event()))
except UnsupportedPlatform as refusal:
    print(refusal)
SwarmModelForCausalLM.from_pretrained("no/such-model", initial_peers=["anybody"])
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_UNIX + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_this_platform_is_supported() -> None:
    require_platform()


def test_the_command_line_says_it_in_one_line_and_a_hint() -> None:
    done = run(COMMAND_LINE)
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: Windows has neither")
    assert hint.startswith("hint: use Linux")


def test_a_peer_and_a_client_in_python_get_a_typed_error_before_any_download() -> None:
    done = run(PYTHON)
    assert done.returncode == 1
    assert done.stdout.startswith("Windows has neither")
    assert done.stderr.splitlines()[-1].startswith("peers.errors.UnsupportedPlatform: Windows has neither")


HOW_THREADS_WAIT = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ["OMP_WAIT_POLICY"], flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
import peers.host.run
"""


def test_in_a_program_that_embeds_a_peer_how_threads_wait_is_settled_before_torch_is_loaded() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", HOW_THREADS_WAIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=environment)
    assert done.stdout == "PASSIVE\n"


@pytest.mark.parametrize(
    ("loaded", "asked", "policy"),
    [(False, None, "PASSIVE"), (False, "ACTIVE", "ACTIVE"), (True, None, None), (True, "ACTIVE", "ACTIVE")],
)
def test_threads_sleep_unless_somebody_says_otherwise_or_torch_is_there_already(
    loaded: bool, asked: str | None, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peers.platform.sys", SimpleNamespace(modules={"torch": None} if loaded else {}))
    monkeypatch.setattr(os, "environ", {} if asked is None else {"OMP_WAIT_POLICY": asked})
    assert let_threads_sleep() is (policy is not None)
    assert os.environ.get("OMP_WAIT_POLICY") == policy


@pytest.mark.parametrize(
    ("said", "cpus"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("1000 100000\n", 1),
        ("max 100000\n", sys.maxsize),
        ("", sys.maxsize),
        (None, sys.maxsize),
    ],
)
def test_a_container_has_the_cpus_that_its_quota_is_worth(
    said: str | None, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peers.platform.CONTAINER", tmp_path)
    if said is not None:
        (tmp_path / "cpu.max").write_text(said)
    assert container_cpus() == cpus


@pytest.mark.parametrize(
    ("cpus", "asked", "threads"), [(64, None, "2"), (64, "8", "8"), (2, None, None), (1, None, None)]
)
def test_torch_is_told_of_a_quota_below_the_cpus_that_it_sees_unless_somebody_says_otherwise(
    cpus: int, asked: str | None, threads: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    monkeypatch.setattr("peers.platform.CONTAINER", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    monkeypatch.setattr(os, "environ", {} if asked is None else {"OMP_NUM_THREADS": asked})
    keep_to_quota()
    assert os.environ.get("OMP_NUM_THREADS") == threads


async def test_a_peer_whose_threads_spin_says_so_at_its_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = PeerConfig(model="no/such-model", network="hive", identity=Path("nowhere.key"), device="abacus")
    for sleep in (True, False):
        monkeypatch.setattr(host, "THREADS_SLEEP", sleep)
        with pytest.raises(CallerError):
            await run_peer(config, emit=print, stop=asyncio.Event())
        assert ("OMP_WAIT_POLICY=PASSIVE" in caplog.text) is not sleep


def test_a_hivemind_without_its_daemon_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = importlib.util.spec_from_file_location("hivemind", submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    for spec in (empty, None):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(UnsupportedPlatform, match="riscv64") as caught:
            require_platform()
        assert "install" in caught.value.hint

"""The examples that people copy, run as they would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from peers.model.storage import cache_folder
from swarm.testing import LocalSwarm
from tests.integration.conftest import MODEL

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_generate_py_answers_and_says_who_computed_what(swarm: LocalSwarm) -> None:
    line = [sys.executable, SCRIPTS / "generate.py", MODEL, swarm.invite, "What is the capital of France?"]
    done = subprocess.run(
        [*line, "--max-new-tokens", "16"], capture_output=True, text=True, timeout=300, check=False, env=_environment()
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    for peer in swarm.peers:
        assert peer.peer_id in done.stdout


def test_join_py_serves_until_ctrl_c(swarm: LocalSwarm, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, SCRIPTS / "join.py", MODEL, swarm.invite],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=_environment() | _home(tmp_path / "home"),
    ) as peer:
        assert peer.stdout is not None
        said = ""
        for line in peer.stdout:
            said += line
            if line.startswith("ready"):
                break
        me = psutil.Process(peer.pid)
        family = [me, *me.children(recursive=True)]
        peer.send_signal(signal.SIGINT)
        rest = peer.stdout.read()
        assert peer.wait(60) == 0, said + rest
    assert rest.splitlines()[-1].startswith("stopped")
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert (tmp_path / "my-peer.key").stat().st_mode & 0o777 == 0o600


def _home(folder: Path) -> dict[str, str]:
    """A home of its own, but for the models that are here already."""
    folder.mkdir()
    own = {f"XDG_{kind}_HOME": str(folder / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA", "STATE")}
    return {"HOME": str(folder), "HIVESWARM_CACHE": str(cache_folder())} | own


def _environment() -> dict[str, str]:
    """The packages of this checkout, wherever the process starts."""
    return os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"}

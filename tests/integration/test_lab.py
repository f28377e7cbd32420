"""Two runs of an experiment of the lab, as `scripts/lab` makes them: what of it no machine is too slow for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import namespaces
from tests.lab.network import ROOT

TIMEOUT_S = 500.0

pytestmark = pytest.mark.skipif(namespaces.why_not() is not None, reason=str(namespaces.why_not()))


def test_peers_that_are_killed_and_one_that_replaces_another_are_noticed_by_nobody(tmp_path: Path) -> None:
    """Two at once, then a hop and, while it is rebuilt, the peer in its place."""
    out = tmp_path / "kill.json"
    command = [sys.executable, str(ROOT / "scripts" / "lab"), "kill", "--seed", "7", "--from", "8", "--runs", "2"]
    with (tmp_path / "log").open("w+") as log:
        with subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=log, text=True) as lab:
            try:
                table, _ = lab.communicate(timeout=TIMEOUT_S)
            finally:
                lab.terminate()  # it cleans up
                lab.wait(30)
        log.seek(0)
        assert out.exists(), log.read()
    assert lab.returncode in (0, 1), "1: too slow"
    rows, bars = (json.loads(out.read_text())[name] for name in ("rows", "bars"))
    assert [(row["run"], row["when"], row["hops"]) for row in rows] == [(8, "two at once", [0, 2]), (9, "token", [0])]
    assert [row["identical"] for row in rows] == [True, True]
    assert all(row["rebuilds"] for row in rows)
    assert all(bar["name"] in table for bar in bars)
    assert [bar["met"] for bar in bars if "again" in bar["name"]] == [True]
    assert not list(namespaces.FOLDER.glob(f"{namespaces.PREFIX}-{lab.pid}-*")), "it cleans up"

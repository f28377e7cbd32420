"""The swarm's health over a real swarm: the dashboard as a process of its own, `swarm top`, and the example to copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from swarm.testing import LocalSwarm
from tests.helpers.terminal import DEADLINE_S, Terminal
from tests.integration.conftest import MODEL, SPANS, Commands

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def http(command: Commands, swarm: LocalSwarm, tmp_path: Path) -> Iterator[httpx2.Client]:
    """Of a dashboard that is asked to leave afterwards, and leaves nothing behind but its history."""
    history = tmp_path / "history.sqlite3"
    arguments = ("dashboard", "--invite", swarm.invite, "--port", "0", "--history", str(history), "--json")
    with (
        command.until_interrupted(*arguments) as dashboard,
        httpx2.Client(base_url=json.loads(dashboard.stdout.readline())["url"], timeout=60) as client,
    ):
        yield client
    assert dashboard.errors == ""
    assert history.stat().st_size > 0


def eventually(http: httpx2.Client, path: str, met: Any) -> Any:
    deadline_s = time.monotonic() + DEADLINE_S
    while not met(said := http.get(f"/api/v1/{path}").json()):
        assert time.monotonic() < deadline_s, said
        time.sleep(0.1)
    return said


def test_a_dashboard_shows_real_peers_their_own_word_and_whether_they_can_be_reached(
    http: httpx2.Client, swarm: LocalSwarm
) -> None:
    def served(said: Any) -> Any:
        """What peers of other tests held is told of for a while after they left."""
        return next((model for model in said["models"] if model["name"] == MODEL), None)

    def seen(said: Any) -> bool:
        return said["totals"]["answering"] == 3 and (served(said) or {}).get("holders") == [1] * 30

    overview = eventually(http, "overview", seen)
    model = served(overview)
    assert (model["name"], model["healthy"], model["replication"]) == (MODEL, True, 1)
    assert [hop["span"] for hop in model["route"]] == [[*span] for span in SPANS]
    assert model["stream_tokens_per_s"] > 0 < model["total_tokens_per_s"]
    assert 0 < overview["totals"]["memory_used_bytes"] < overview["totals"]["memory_offered_bytes"]
    peer = swarm.peers[1]
    detail = http.get(f"/api/v1/peers/{peer.peer_id}").json()
    assert detail["status"]["cache_tokens"] == peer.wait_for("ready")["cache_tokens"]
    assert detail["status"]["uptime_s"] > 0
    assert detail["status"]["device"] == "cpu"
    assert {trip["peer_id"] for trip in detail["round_trips"]} <= {each.peer_id for each in swarm.peers}
    assert [each["address"] for each in detail["addresses"]] == peer.addresses
    reached = http.post("/api/v1/reachability", json={"peer_id": peer.peer_id}).json()
    assert reached["reachable"], reached
    stranger = peer.addresses[0].replace(peer.peer_id, swarm.peers[0].peer_id)
    wrong = http.post("/api/v1/reachability", json={"address": stranger}).json()
    assert not wrong["reachable"], "it dials an address at which another peer is"


def test_top_is_drawn_until_q_and_once(swarm: LocalSwarm, command: Commands) -> None:
    terminal = Terminal("top", "--invite", swarm.invite)
    try:
        terminal.wait_for("every block at 1 or more")
        terminal.type("xq")
        terminal.wait_for("\x1b[?1049l")
        assert terminal.process.wait(DEADLINE_S) == 0
    finally:
        terminal.close()
    done = command("top", "--once", "--invite", swarm.invite)
    assert done.returncode == 0, done.stderr
    for peer in swarm.peers:
        assert peer.peer_id[-6:] in done.stdout
    assert "\x1b" not in done.stdout


def test_dashboard_py_reads_the_swarms_health(swarm: LocalSwarm) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "dashboard.py", swarm.invite],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert f"{MODEL}: 3 peers, rarest block ×1, missing: none" in done.stdout

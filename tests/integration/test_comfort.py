"""A volunteer's machine is its owner's first."""

from __future__ import annotations

from pathlib import Path

import psutil

from swarm.testing import LocalSwarm
from tests.helpers.checkpoints import save_llama
from tests.helpers.hours import hours_without_now
from tests.integration.conftest import Commands


def test_outside_its_hours_a_peer_says_that_it_waits_and_takes_and_offers_nothing(
    swarm: LocalSwarm, command: Commands, tmp_path: Path
) -> None:
    """With a model of its own, so that nobody else's tests see its record."""
    save_llama(tmp_path, seed=7)  # other peers with the weights of 0 may have been here a moment ago
    hours = str(hours_without_now())
    comfort = ("--schedule", hours, "--nice", "5", "--pause-on-load", "90", "--max-bandwidth", "2MB/s")
    guest = swarm.add_peer((0, 2), *comfort, "--cache-tokens", "256", model=tmp_path, wait=False)
    try:
        paused = guest.wait_for("paused", timeout_s=60)
        assert (paused["reason"], paused["schedule"]) == ("schedule", hours)
        assert paused["resumes_at"] == hours.partition("-")[0]
        done = command("status", "--invite", swarm.invite, "--json")
        assert done.returncode == 0, done.stderr
        assert str(guest.wait_for("connected")["peer_id"]) not in done.stdout
        family = [psutil.Process(guest.pid), *psutil.Process(guest.pid).children(recursive=True)]
        assert len(family) > 1, "the libp2p daemon is one of them"
        assert {process.nice() for process in family} == {5}
        assert guest.terminate() == 0
    finally:
        swarm.peers.remove(guest)
        guest.close()

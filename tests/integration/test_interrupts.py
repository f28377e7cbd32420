"""Ctrl-C at any moment of a start leaves no process behind.

The moments are drawn afresh in each run, one from each part of the time that a start takes; a failure names the seed,
and HIVESWARM_TEST_SEED draws the same ones again. The first lines of Python itself are not ours: the time is counted
from when the process takes care of signals.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swarm.testing import LISTEN
from tests.helpers.processes import Family
from tests.integration.conftest import MODEL

SEED = int(os.environ.get("HIVESWARM_TEST_SEED") or secrets.randbelow(2**32))
MOMENTS = {"join": (5, 6.0), "demo": (3, 12.0)}
"""How many, and within how many seconds: about what it takes until a peer serves, and until the demo's peers do."""


def moment_s(start: str, part: int) -> float:
    parts, within_s = MOMENTS[start]
    return (part + random.Random(f"{SEED} {start} {part}").random()) * within_s / parts


def takes_care_of_signals(pid: int) -> bool:
    """Python catches SIGINT by itself, SIGTERM only for who asks."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in status if line.startswith("SigCgt"))
    return bool(int(caught, 16) & 1 << (signal.SIGTERM - 1))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("start", "part"), [(start, part) for start, (parts, _) in MOMENTS.items() for part in range(parts)]
)
def test_ctrl_c_at_any_moment_of_a_start_leaves_no_process(start: str, part: int, tmp_path: Path) -> None:
    after_s = moment_s(start, part)
    print(f"HIVESWARM_TEST_SEED={SEED}: Ctrl-C after {after_s:.3f} s")  # noqa: T201 - shown with a failure
    peer = [MODEL, "--new-swarm", "--blocks", "0:10", "--listen", LISTEN, "--identity", str(tmp_path / "peer.key")]
    family = Family()
    with subprocess.Popen(
        [sys.executable, "-m", "swarm", start, *(peer if start == "join" else ["Hello"])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=family.environment,
        process_group=0,
    ) as process:
        deadline_s = time.monotonic() + 60
        while not takes_care_of_signals(process.pid):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        try:
            _, errors = process.communicate(timeout=after_s)
        except subprocess.TimeoutExpired:
            members = {member.pid for member in family.members()}
            assert process.pid in members or process.poll() is not None, "unless it has ended at this very moment"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        else:
            assert start == "demo", errors  # which a fast machine may have finished
            assert process.returncode == 0, errors
    assert family.survivors() == [], errors
    assert "Traceback" not in errors
    assert process.returncode in (0, 128 + signal.SIGINT), errors

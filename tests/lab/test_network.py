"""Two real hosts talk through the forwarder. Only root can make them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.lab import namespaces
from tests.lab.links import LinkProfile
from tests.lab.network import Network

pytestmark = pytest.mark.skipif(namespaces.why_not() is not None, reason=str(namespaces.why_not()))

DELAY_S = 0.05
DATA = os.urandom(200_000)


def own() -> list[str]:
    """What this process's labs have made and not removed."""
    return [path.name for path in namespaces.FOLDER.glob(f"{namespaces.own_prefix()}-*")]


def test_two_hosts_talk_with_the_delay_that_was_set_and_leave_nothing() -> None:
    with Network(["a", "b"], seed=1, profile=LinkProfile(delay_s=DELAY_S)) as network:
        assert len(own()) == 2
        with network["b"].entered(), socket.create_server((network["b"].address, 0)) as server:
            address = server.getsockname()
            with network["a"].entered(), socket.create_connection(address, timeout=20) as client:
                connection, _ = server.accept()
                with connection:
                    client.sendall(DATA)
                    client.shutdown(socket.SHUT_WR)
                    with connection.makefile("rb") as received:
                        assert received.read() == DATA
                    # what the kernel measured: a lower bound holds on a busy machine, too
                    info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
                    smoothed_rtt_us = int.from_bytes(info[68:72], sys.byteorder)
                    assert smoothed_rtt_us > 1.9e6 * DELAY_S
            network.refuse("b", on=True)
            with network["a"].entered(), pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, timeout=20)
        counts = network.counts()
        assert counts["links"]["a b"]["carried_bytes"] > len(DATA)
        assert counts["links"]["a b"]["lost"] == counts["forwarder"]["dropped"] == 0
        folder = network.folder
    assert own() == []
    assert not folder.exists()


def test_what_a_killed_lab_left_is_removed_by_the_next() -> None:
    script = (
        "from tests.lab.network import Network as N; n = N(['a', 'b'], seed=1); print(n.folder, flush=True); input()"
    )
    root = Path(__file__).parents[2]
    sockets = Path(tempfile.mkdtemp(prefix="hiveswarm-", dir="/tmp"))
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as lab:
        assert lab.stdout is not None
        folder = Path(lab.stdout.readline().strip())
        (namespace, *_) = [path.name for path in namespaces.FOLDER.glob(f"{namespaces.PREFIX}-{lab.pid}-*-a")]
        with namespaces.entered(namespace):
            left = subprocess.Popen(["sh", "-c", "sleep 600; :", f"/unix{sockets}/control"])
        namespaces.remove_leftovers()
        assert left.poll() is None  # its lab lives
        assert folder.exists()
        lab.kill()
        os.waitid(os.P_PID, lab.pid, os.WEXITED | os.WNOWAIT)  # it ended, and nobody has taken notice
        namespaces.remove_leftovers()
    left.wait(10)
    assert not [path for path in (namespaces.FOLDER / namespace, folder, sockets) if path.exists()]

"""Two real hosts talk through the forwarder. Only root can make them."""

from __future__ import annotations

import os
import signal
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


def test_a_host_behind_a_nat_is_seen_elsewhere_and_dialled_in_vain() -> None:
    with Network(["a", "b"], seed=1) as network:
        a, b = network["a"], network["b"]
        network.put_behind_nat("a")
        with b.entered(), socket.create_server((b.address, 0)) as server, a.entered():
            client = socket.create_connection(server.getsockname(), timeout=20)
            connection, (seen, _) = server.accept()
            assert seen == a.outside
            for sender, receiver in ((client, connection), (connection, client)):
                with receiver.makefile("rb") as received:
                    sender.sendall(DATA)
                    sender.shutdown(socket.SHUT_WR)
                    assert received.read() == DATA
            client.close()
            connection.close()
        with a.entered(), socket.create_server(("", 0)) as server, b.entered():
            for address in (a.address, a.outside):
                with pytest.raises(TimeoutError):
                    socket.create_connection((address, server.getsockname()[1]), timeout=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_lab_that_is_ended_or_loses_its_terminal_leaves_nothing(number: signal.Signals) -> None:
    script = (
        "from tests.lab.namespaces import end_in_order; from tests.lab.network import Network as N; end_in_order()\n"
        "with N(['a', 'b'], seed=1) as n: print(n.folder, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as lab:
        assert lab.stdout is not None
        folder = Path(lab.stdout.readline().strip())
        made = list(namespaces.FOLDER.glob(f"{namespaces.PREFIX}-{lab.pid}-*"))
        lab.send_signal(number)
        lab.wait(60)
    assert len(made) == 2
    assert not [path for path in (*made, folder) if path.exists()]


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
    left.wait(60)
    assert not [path for path in (namespaces.FOLDER / namespace, folder, sockets) if path.exists()]

"""What people get wrong is refused with a typed error, and nobody else is disturbed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from peers.errors import AddressInUse, InsecureIdentity, PeerTooSmall, PeerUnreachable, UnknownModel
from peers.host.config import BootstrapConfig, PeerConfig
from peers.host.run import run_bootstrap, run_peer
from routing.errors import InvalidAddress, NoRoute
from routing.identity import SigningKey
from swarm import SwarmModelForCausalLM
from swarm.testing import LISTEN, LocalNode, LocalSwarm, NodeFailed
from tests.helpers.checkpoints import save_llama
from tests.integration.conftest import MODEL, Commands

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/" + SigningKey.from_seed(bytes(32)).peer_id


async def start_peer(tmp_path: Path, **options: Any) -> None:
    config = {"model": MODEL, "network": "hive", "identity": tmp_path / "peer.key", "listen": (LISTEN,)}
    await run_peer(PeerConfig(**(config | options)), emit=lambda event: None, stop=asyncio.Event())


async def start_bootstrap(tmp_path: Path, *listen: str) -> None:
    config = BootstrapConfig(network="hive", identity=tmp_path / "bootstrap.key", listen=listen or (LISTEN,))
    await run_bootstrap(config, emit=lambda event: None, stop=asyncio.Event())


async def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="nowhere"):
        await start_peer(tmp_path, model="./nowhere")


async def test_a_peer_too_small_for_one_block_is_told_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(PeerTooSmall, match=r"1 block\(s\) of this model .* MiB") as caught:
        await start_peer(tmp_path, max_memory_bytes=700_000_000)
    assert "--max-memory" in caught.value.hint


async def test_entry_nodes_that_nobody_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(PeerUnreachable, match=NOBODY[-52:]):
        await start_peer(tmp_path, initial_peers=(NOBODY,))


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=str(port)):
            await start_bootstrap(tmp_path, f"/ip4/127.0.0.1/tcp/{port}")


async def test_an_identity_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bootstrap.key").write_bytes(b"secret")
    (tmp_path / "bootstrap.key").chmod(0o644)
    with pytest.raises(InsecureIdentity, match="0644") as caught:
        await start_bootstrap(tmp_path)
    assert "chmod 600" in caught.value.hint


def test_a_client_says_that_nobody_is_there(command: Commands) -> None:
    done = command("status", "--initial-peers", NOBODY)
    assert done.returncode == 1
    assert "\nerror: " in f"\n{done.stderr}"
    assert NOBODY[-52:] in done.stderr
    assert len(done.stderr.splitlines()) <= 3  # what it waited for, the error and the hint


@pytest.mark.parametrize(
    "entry", [{"initial_peers": ["/ip4/1.2.3.4"]}, {"invite": "swarm://AAAA"}, {}, {"initial_peers": []}]
)
def test_a_malformed_way_in_is_refused_by_the_python_api(entry: dict[str, Any]) -> None:
    with pytest.raises(InvalidAddress):
        SwarmModelForCausalLM.from_pretrained(MODEL, **entry)


def test_a_failed_node_shows_what_it_said(swarm: LocalSwarm) -> None:
    with pytest.raises(NodeFailed, match="this model has 30") as caught:
        swarm.add_peer((25, 35))
    assert "InvalidSpan" in str(caught.value)
    assert any("error: blocks 25:35" in note for note in caught.value.__notes__)
    assert "exit code 1" in str(caught.value)
    assert len(swarm.peers) == 3


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints that differ in their values only."""
    folders = (tmp_path / "a" / "twin", tmp_path / "b" / "twin")
    for seed, folder in enumerate(folders):
        save_llama(folder, seed=seed)
    return folders


def test_peers_with_different_checkpoints_are_never_mixed(swarm: LocalSwarm, twins: tuple[Path, Path]) -> None:
    first = swarm.add_peer((0, 1), model=twins[0], wait=False)
    second = swarm.add_peer((1, 2), model=twins[1], wait=False)
    try:
        ids = {peer.wait_for("ready")["model_id"] for peer in (first, second)}
        assert len(ids) == 2
        with (
            SwarmModelForCausalLM.from_pretrained(str(twins[0]), initial_peers=swarm.initial_peers) as model,
            pytest.raises(NoRoute) as caught,
        ):
            model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
        assert caught.value.missing == ((1, 2),)
    finally:
        for peer in (first, second):
            peer.close()
            swarm.peers.remove(peer)


# --- nothing stays behind ---


def test_ctrl_c_while_loading_leaves_no_process(tmp_path: Path) -> None:
    peer = LocalNode("early", ["join", MODEL, "--new-swarm"], folder=tmp_path, environment=os.environ)
    peer.wait_for("connected")
    family = psutil.Process(peer.pid).children(recursive=True)
    assert family  # the libp2p daemon
    psutil.Process(peer.pid).send_signal(signal.SIGINT)
    assert psutil.wait_procs([psutil.Process(peer.pid), *family], timeout=60)[1] == []
    peer.close()
    assert peer.log.read_text() == ""


def test_nothing_outlives_the_process_that_started_a_swarm() -> None:
    program = "from swarm.testing import LocalSwarm; import time\n"
    program += f"swarm = LocalSwarm({MODEL!r}); print(swarm.bootstrap.pid, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        node = psutil.Process(int(owner.stdout.readline()))
        family = [node, *node.children(recursive=True)]
        assert len(family) > 1
        owner.kill()
    assert psutil.wait_procs(family, timeout=60)[1] == []

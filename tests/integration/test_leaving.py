"""Any hop may leave in the middle of a generation, politely or not, and what is generated stays the same."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from swarm import SwarmModelForCausalLM
from swarm.testing import LocalPeer, LocalSwarm
from tests.integration.conftest import MODEL, SPANS, Greedy, driver, generate
from tests.integration.test_failover import At


@pytest.fixture(scope="module")
def doubled() -> Iterator[LocalSwarm]:
    """Two peers for every block."""
    with LocalSwarm(MODEL, [*SPANS, *SPANS], dtype="float32") as swarm:
        yield swarm


@pytest.fixture
def client(doubled: LocalSwarm) -> Iterator[Any]:
    for peer in doubled.peers:
        if not peer.running:
            peer.restart()
    with SwarmModelForCausalLM.from_pretrained(
        MODEL, initial_peers=doubled.initial_peers, dtype=torch.float32
    ) as model:
        yield model


def serving(client: Any, swarm: LocalSwarm, hop: int) -> LocalPeer:
    return next(peer for peer in swarm.peers if peer.peer_id == client.route.hops[hop].peer_id)


@pytest.fixture(scope="module")
def prompt(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer("The history of the steam engine begins in antiquity, when").input_ids)


@pytest.mark.parametrize("hop", [0, 2], ids=["first", "last"])
def test_the_ends_of_a_route_are_replaced_without_changing_a_token(
    client: Any, doubled: LocalSwarm, prompt: tuple[int, ...], greedy: Greedy, hop: int
) -> None:
    killed: list[LocalPeer] = []

    def kill() -> None:
        killed.append(serving(client, doubled, hop))
        killed[0].kill()

    assert generate(client, prompt, 40, streamer=At(15, kill)) == greedy(prompt, 40)
    assert serving(client, doubled, hop) is not killed[0]
    assert driver(client).traffic.rebuilds >= 1


def test_ctrl_c_at_a_serving_peer_drains_it_and_nobody_notices(
    client: Any, doubled: LocalSwarm, prompt: tuple[int, ...], greedy: Greedy
) -> None:
    leaving: list[LocalPeer] = []
    family: list[psutil.Process] = []

    def interrupt() -> None:
        leaving.append(serving(client, doubled, 1))
        me = psutil.Process(leaving[0].pid)
        family.extend([me, *me.children(recursive=True)])
        me.send_signal(signal.SIGINT)

    assert generate(client, prompt, 40, streamer=At(15, interrupt)) == greedy(prompt, 40)
    (peer,) = leaving
    assert peer.wait_for("draining")
    assert peer.wait_for("stopped")
    assert peer._process.wait(30) == 0
    assert psutil.wait_procs(family, timeout=20)[1] == []

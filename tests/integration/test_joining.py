"""A peer that is not told what to serve takes what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from routing.ids import BlockSpan
from swarm import SwarmModelForCausalLM
from swarm.testing import LocalSwarm
from tests.helpers.checkpoints import save_llama
from tests.integration.conftest import MODEL, Commands, Greedy, driver, generate
from tests.integration.test_failover import At

GAP = BlockSpan(10, 20)


@pytest.fixture(scope="module")
def gapped() -> Iterator[LocalSwarm]:
    with LocalSwarm(MODEL, [[(0, 10), (20, 30)]], dtype="float32") as swarm:
        yield swarm


@pytest.mark.parametrize(
    "told", [("--num-blocks", "10"), ("--max-memory", "920MB"), ()], ids=["how many", "how much", "nothing"]
)
def test_a_newcomer_fills_the_gap(gapped: LocalSwarm, greedy: Greedy, told: tuple[str, ...]) -> None:
    newcomer = gapped.add_peer(None, *told, "--cache-tokens", "1024")
    try:
        assert newcomer.span.start <= GAP.start
        assert newcomer.span.end >= GAP.end
        with SwarmModelForCausalLM.from_pretrained(
            MODEL, initial_peers=gapped.initial_peers, dtype=torch.float32
        ) as model:
            assert generate(model, (5, 6, 7), 8) == greedy((5, 6, 7), 8)
    finally:
        assert newcomer.terminate() == 0
        gapped.peers.remove(newcomer)


def test_a_peer_of_two_spans_serves_both_to_one_session_and_is_replaced_when_killed(
    gapped: LocalSwarm, greedy: Greedy
) -> None:
    ids, twice = (5, 6, 7), gapped.peers[0]
    middle = gapped.add_peer((10, 20))
    with SwarmModelForCausalLM.from_pretrained(MODEL, initial_peers=gapped.initial_peers, dtype=torch.float32) as model:
        assert generate(model, ids, 8) == greedy(ids, 8)
        assert [hop.peer_id for hop in model.route.hops] == [twice.peer_id, middle.peer_id, twice.peer_id]
        assert driver(model).traffic.relays == 0
        other = gapped.add_peer([(0, 10), (20, 30)])
        assert generate(model, ids, 24, streamer=At(8, twice.kill)) == greedy(ids, 24)
        assert [hop.peer_id for hop in model.route.hops] == [other.peer_id, middle.peer_id, other.peer_id]
    assert middle.terminate() == 0
    gapped.peers[:] = [other]


def test_a_peer_has_the_same_address_after_a_restart(command: Commands, tmp_path: Path) -> None:
    """Without `--listen`, on the port that it chose when it started first."""
    save_llama(tmp_path / "model")
    identity = ("--identity", str(tmp_path / "peer.key"))
    line = ("join", str(tmp_path / "model"), "--new-swarm", "--json", *identity, "--cache-tokens", "256")
    seen = []
    for _ in range(2):
        with command.until_interrupted(*line, "--threads", "1") as peer:
            ready = next(event for event in map(json.loads, peer.stdout) if event["event"] == "ready")
            assert ready["span"] == [0, 2]
            seen.append((ready["peer_id"], {address.split("/")[4] for address in ready["addresses"]}))
        assert [json.loads(line)["event"] for line in peer.rest][-2:] == ["draining", "stopped"]
    assert seen[0] == seen[1]
    assert len(seen[0][1]) == 1


def test_peers_with_8_bit_weights_answer_and_say_so(tmp_path: Path) -> None:
    save_llama(tmp_path)
    with LocalSwarm(tmp_path, [(0, 2)], dtype="float32", quantize="int8") as swarm:
        assert swarm.peers[0].wait_for("ready")["quantization"] == "int8"
        with SwarmModelForCausalLM.from_pretrained(swarm.model, initial_peers=swarm.initial_peers) as model:
            remote: Any = model._remote_layers.remote
            generate(model, (5, 6, 7), 8)
            assert [hop.quantization for hop in remote.route.hops] == ["int8"]

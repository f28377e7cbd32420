"""A peer that is not told what to serve takes what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from routing.ids import BlockSpan
from swarm import SwarmModelForCausalLM
from swarm.testing import LocalSwarm
from tests.integration.conftest import MODEL, Greedy, generate

GAP = BlockSpan(10, 20)


@pytest.fixture(scope="module")
def gapped() -> Iterator[LocalSwarm]:
    with LocalSwarm(MODEL, [(0, 10), (20, 30)], dtype="float32") as swarm:
        yield swarm


@pytest.mark.parametrize("told", [("--num-blocks", "10"), ("--max-memory", "920MB")], ids=["how many", "how much"])
def test_a_newcomer_fills_the_gap(gapped: LocalSwarm, greedy: Greedy, told: tuple[str, str]) -> None:
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


def test_peers_with_8_bit_weights_answer_and_say_so(greedy: Greedy) -> None:
    with LocalSwarm(MODEL, [(0, 30)], dtype="float32", quantize="int8") as swarm:
        assert swarm.peers[0].wait_for("ready")["quantization"] == "int8"
        with SwarmModelForCausalLM.from_pretrained(MODEL, initial_peers=swarm.initial_peers) as model:
            remote: Any = model._remote_layers.remote
            generate(model, (5, 6, 7), 8)
            assert [hop.quantization for hop in remote.route.hops] == ["int8"]

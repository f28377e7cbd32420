"""A gap is closed by a peer that can be spared: real processes, one of which is killed."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedTokenizerBase

from swarm import SwarmModelForCausalLM
from swarm.testing import LocalSwarm
from tests.integration.conftest import MODEL, Greedy, generate

HEALED_WITHIN_S = 60.0
EXPIRY_S = 20.0 + 6.0
"""Until the record of a killed peer has expired and others have looked."""


def test_a_killed_last_holder_is_replaced_by_a_peer_that_can_be_spared(
    tokenizer: PreTrainedTokenizerBase, greedy: Greedy
) -> None:
    prompt_ids = tuple(tokenizer("The capital of France is").input_ids)
    with LocalSwarm(MODEL, [(0, 15)], dtype="float32") as swarm:
        spare = swarm.add_peer(None, "--num-blocks", "15")
        assert str(spare.span) == "15:30"
        other = swarm.add_peer((15, 30))
        swarm.peers[0].kill()
        killed_at_s = time.monotonic()
        assert spare.wait_for("moving", timeout_s=EXPIRY_S + HEALED_WITHIN_S)["spans"] == [[0, 15]]
        spare.wait_for("moved", timeout_s=EXPIRY_S + HEALED_WITHIN_S - (time.monotonic() - killed_at_s))
        with SwarmModelForCausalLM.from_pretrained(
            MODEL, initial_peers=swarm.initial_peers, dtype=torch.float32
        ) as model:
            assert generate(model, prompt_ids, 8) == greedy(prompt_ids, 8)
            assert {hop.peer_id for hop in model.route.hops} == {spare.peer_id, other.peer_id}

"""A gap is closed by a peer that can be spared: real processes, one of which is killed."""

from __future__ import annotations

import time
from pathlib import Path

from swarm import SwarmModelForCausalLM
from swarm.testing import LocalSwarm
from tests.helpers.checkpoints import save_llama
from tests.integration.conftest import generate

HEALED_WITHIN_S = 60.0
EXPIRY_S = 20.0 + 6.0
"""Until the record of a killed peer has expired and others have looked."""


def test_a_killed_last_holder_is_replaced_by_a_peer_that_can_be_spared(
    tmp_path: Path,
) -> None:
    local = save_llama(tmp_path, layers=6)
    with LocalSwarm(tmp_path, [(0, 3)], dtype="float32") as swarm:
        spare = swarm.add_peer(None, "--num-blocks", "3")
        assert str(spare.span) == "3:6"
        other = swarm.add_peer((3, 6))
        swarm.peers[0].kill()
        killed_at_s = time.monotonic()
        assert spare.wait_for("moving", timeout_s=EXPIRY_S + HEALED_WITHIN_S)["spans"] == [[0, 3]]
        spare.wait_for("moved", timeout_s=EXPIRY_S + HEALED_WITHIN_S - (time.monotonic() - killed_at_s))
        with SwarmModelForCausalLM.from_pretrained(swarm.model, initial_peers=swarm.initial_peers) as model:
            assert generate(model, (5, 6, 7), 8) == generate(local, (5, 6, 7), 8)
            assert {hop.peer_id for hop in model.route.hops} == {spare.peer_id, other.peer_id}

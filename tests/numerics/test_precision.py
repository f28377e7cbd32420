"""A client that demands a precision is served by peers that have it, and its ids are those of the local model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from routing.errors import NoRoute
from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm, impatient


def test_a_demanded_precision_is_served_or_the_blocks_are_named(tmp_path: Path) -> None:
    local = save_checkpoint(FAMILIES["llama"], tmp_path / "model")
    ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    greedy["attention_mask"] = torch.ones_like(ids)
    with MemorySwarm(tmp_path / "model", [(0, 1)], cache=tmp_path / "cache") as swarm:
        packed = swarm.add_peer(0, NUM_BLOCKS, quantization="nf4")
        strict = swarm.model(min_precision="float32")
        refusal = f"blocks 1:{NUM_BLOCKS} are served only below the demanded precision"
        with impatient(), pytest.raises(NoRoute, match=refusal):
            strict.generate(ids, **greedy)
        anybody = swarm.model(guest=True)
        anybody.generate(ids, **greedy)
        assert packed.links.transport.peer_id in [hop.peer_id for hop in anybody.route.hops]
        swarm.add_peer(1, NUM_BLOCKS)
        assert torch.equal(strict.generate(ids, **greedy), local.generate(ids, **greedy))
        assert {(hop.dtype, hop.quantization) for hop in strict.route.hops} == {("float32", "none")}

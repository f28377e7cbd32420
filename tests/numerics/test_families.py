"""Client and peers of every family equal the whole local model, through real engines, handlers and drivers.

One process, memory transport, spans of unequal size, two rows of unequal length in one batch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm

SPANS = [(0, 1), (1, 3), (3, NUM_BLOCKS)]
TOLERANCE = 1e-5


def ragged_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of 9 and 6 tokens, padded on the left: ids and mask."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


@pytest.mark.usefixtures("plain_forwards")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_through_peers_equals_the_local_model(family: str, tmp_path: Path) -> None:
    local = save_checkpoint(FAMILIES[family], tmp_path / "model")
    ids, mask = ragged_batch()
    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    greedy |= {"return_dict_in_generate": True, "output_logits": True}
    with MemorySwarm(tmp_path / "model", SPANS, cache=tmp_path / "cache") as swarm:
        model = swarm.model()
        with torch.no_grad():
            expected = local(ids[:1]).logits
            actual = model(ids[:1]).logits
        scale = expected.abs().max()
        assert (actual - expected).abs().max() <= TOLERANCE * scale
        # each row alone: sparse attention (DeepSeek V3.2) lets padding disturb even the local model
        rows = [local.generate(row[kept > 0][None], **greedy) for row, kept in zip(ids, mask, strict=True)]
        together = model.generate(ids, attention_mask=mask, **greedy)
        assert torch.equal(together.sequences[:, -8:], torch.stack([row.sequences[0, -8:] for row in rows]))
        # of the ragged prompts, and of every token decoded from the peers' caches
        expected = torch.stack([torch.cat(row.logits) for row in rows], 1)
        assert (torch.stack(together.logits) - expected).abs().max() <= TOLERANCE * expected.abs().max()
        assert model._remote_layers.remote.traffic.relays == 0
        assert all(peer.handler.pusher.counts.pushed for peer in swarm.peers[:-1])

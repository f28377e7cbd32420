"""A prompt over six hops, in pieces of which two are under way for each: the ids stay those of the local model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.families import FAMILIES, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm
from tests.numerics.test_trouble import generate, prompt

HOPS = 6


@pytest.mark.usefixtures("plain_forwards")
def test_a_prompt_in_pieces_over_six_hops_gives_the_ids_of_the_local_model(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    deep = replace(family, settings={**family.settings, "num_hidden_layers": HOPS, "max_position_embeddings": 512})
    local, ids = save_checkpoint(deep, tmp_path / "model"), prompt(length=400)
    spans = [(at, at + 1) for at in range(HOPS)]
    with MemorySwarm(tmp_path / "model", spans, cache=tmp_path / "cache") as swarm:
        model = swarm.model()
        traffic = model._remote_layers.remote.traffic
        generate(model, prompt(), max_new_tokens=1, min_new_tokens=1)  # the route is known by then
        before = traffic.steps
        assert torch.equal(generate(model, ids), generate(local, ids))
        assert traffic.steps - before == 2 * HOPS + 15, "the last token is not run"

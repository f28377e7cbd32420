"""Peers that join several devices: the ids stay those of the local model, and every device's pages come back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.families import NUM_BLOCKS, VOCABULARY
from tests.helpers.memory_swarm import MemorySwarm


@pytest.fixture(scope="module")
def swarm(folder: Path, local: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemorySwarm]:
    cache = tmp_path_factory.mktemp("cache")
    with MemorySwarm(folder, [(0, 3), (1, NUM_BLOCKS)], device="cpu,cpu", cache=cache) as swarm:
        yield swarm


@pytest.mark.parametrize(
    ("rows", "options"),
    [(1, {}), (3, {}), (1, {"num_beams": 3}), (1, {"prompt_lookup_num_tokens": 3}), (2, {"max_new_tokens": 40})],
    ids=["one", "batch", "beams", "drafts", "long"],
)
def test_joined_devices_say_what_the_local_model_says(
    rows: int, options: dict[str, Any], swarm: MemorySwarm, local: Any
) -> None:
    ids = torch.randint(3, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(rows))
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = local.generate(ids, **{**settings, **options})
    assert torch.equal(swarm.model().generate(ids, **{**settings, **options}), expected)
    assert all(len(peer.engine._engines) == 2 for peer in swarm.peers)  # type: ignore[union-attr]
    assert swarm.eventually_settled()

"""What a peer's process takes: its weights, its pool, and a bounded rest."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from peers.model.catalog import resolve
from peers.model.loading import load_config
from peers.model.support import examine
from swarm import SwarmModelForCausalLM
from swarm.testing import LocalSwarm
from tests.integration.conftest import MODEL, generate

CACHE_TOKENS = 2048
BLOCKS = 30


def resident_bytes(pid: int) -> int:
    """Proportional memory of a process and its daemon where the system tells it, else resident memory."""
    me = psutil.Process(pid)
    infos = [process.memory_full_info() for process in (me, *me.children(recursive=True))]
    return sum(getattr(info, "pss", info.rss) for info in infos)


def test_a_peer_stays_within_its_weights_its_pool_and_700_mb(tmp_path: Path) -> None:
    config = load_config(resolve(MODEL))
    anatomy = examine(config)
    blocks = [size for name, size in anatomy.weights.items() if name.startswith(f"{anatomy.layers_path}.")]
    weight_bytes = sum(blocks) * 4 // config.dtype.itemsize
    pool_bytes = sum(shape.elements for shape in anatomy.kv_shapes) * 4 * CACHE_TOKENS
    with (
        LocalSwarm(MODEL, [(0, BLOCKS)], dtype="float32", cache_tokens=CACHE_TOKENS) as swarm,
        SwarmModelForCausalLM.from_pretrained(MODEL, initial_peers=swarm.initial_peers, dtype=torch.float32) as model,
        model.session(),
    ):
        prompt = torch.randint(10, 40_000, (CACHE_TOKENS - 8,), generator=torch.Generator().manual_seed(0))
        generate(model, tuple(prompt.tolist()), 4)  # nearly the whole pool has been written now
        assert resident_bytes(swarm.peers[0].pid) <= weight_bytes + pool_bytes + 700_000_000

"""Peers on a CUDA device give the ids of the local model on the CPU. Skipped, by name, where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peers.model.catalog import resolve
from peers.model.loading import load_span
from peers.model.quantization import QUANTIZATIONS
from peers.runtime.cache import PagedCache, open_cache
from peers.runtime.graphs import COUNTS, recorder_for
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES, NUM_BLOCKS, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm
from tests.peers.runtime.spans import assert_graphs_say_the_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt-oss", "deepseek-v3", "bloom"])
def test_peers_on_a_gpu_equal_the_local_model(family: str, tmp_path: Path) -> None:
    local = save_checkpoint(FAMILIES[family], tmp_path / "model")
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    with MemorySwarm(tmp_path / "model", [(0, 1), (1, NUM_BLOCKS)], device="cuda:0", cache=tmp_path / "cache") as swarm:
        model = swarm.model()
        with torch.no_grad():
            expected, actual = local(ids).logits, model(ids).logits
        assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()
        for extra in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
            assert torch.equal(model.generate(ids, **options, **extra), local.generate(ids, **options, **extra))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_packed_weights_say_the_same_on_a_gpu(family: str, quantization: str, tmp_path: Path) -> None:
    save_checkpoint(FAMILIES[family], tmp_path / "model")
    checkpoint, span = resolve(str(tmp_path / "model"), cache=tmp_path / "cache"), BlockSpan(0, NUM_BLOCKS)
    outputs = []
    for device in ("cpu", "cuda:0"):
        model = load_span(checkpoint, span, dtype=torch.float32, device=device, quantization=quantization)
        hidden = torch.randn(1, 7, model.hidden_size, generator=torch.Generator().manual_seed(0))
        outputs.append(model.forward(hidden.to(device), torch.arange(7, device=device)[None]).cpu())
    assert (outputs[1] - outputs[0]).norm() <= 1e-3 * outputs[0].norm()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_steps_run_as_graphs_that_say_the_same(family: str, tmp_path: Path) -> None:
    save_checkpoint(FAMILIES[family], tmp_path / "model")
    checkpoint, span = resolve(str(tmp_path / "model"), cache=tmp_path / "cache"), BlockSpan(0, NUM_BLOCKS)
    model = load_span(checkpoint, span, dtype=torch.float32, device="cuda:0")
    with torch.inference_mode():
        cache, _ = open_cache(model, 512, 4, None, recorder_for(model.device))
        for _ in cache.prepare():
            pass
    assert isinstance(cache, PagedCache)
    assert cache._graphs is not None
    assert any(cache._graphs._graphs.values())
    assert_graphs_say_the_same(cache, COUNTS[-1])

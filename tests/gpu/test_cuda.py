"""Peers on a CUDA device give the ids of the local model on the CPU. Skipped, by name, where there is no GPU."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peers.model import grouped
from peers.model.catalog import resolve
from peers.model.kernels import accelerate_by_torch, linear
from peers.model.loading import load_span
from peers.model.quantization import NONE, QUANTIZATIONS, quantize
from peers.runtime.cache import PagedCache, open_cache
from peers.runtime.flex import Flex, compiled
from peers.runtime.graphs import COUNTS, recorder_for
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES, NUM_BLOCKS, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm
from tests.peers.model.test_grouped import FORMS
from tests.peers.runtime.spans import assert_graphs_say_the_same
from tests.peers.runtime.test_attention import assert_attends_as_each_alone, assert_sessions_are_apart

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


@pytest.mark.parametrize("name", FORMS)
def test_integers_of_a_checkpoint_are_made_whole_on_a_gpu(name: str) -> None:
    tensors, weight = FORMS[name].pack("weight", 48, 64, np.random.default_rng(0))
    parts = [None if (part := tensors.get(name)) is None else part.to("cuda:0") for name in grouped.PARTS]
    assert torch.equal(grouped.whole(FORMS[name].layout, torch.float32, *parts).cpu(), weight)


def test_a_group_that_is_not_there_is_refused_before_a_gpu_sees_it() -> None:
    tensors, _ = FORMS["gptq"].pack("weight", 48, 64, np.random.default_rng(0))
    parts = [(tensors[name] + 100 if name == "g_idx" else tensors[name]).to("cuda:0") for name in grouped.PARTS]
    with pytest.raises(ValueError, match="does not name a group"):
        grouped.whole("gptq", torch.float32, *parts)
    assert torch.ones(1, device="cuda:0").item() == 1, "the device works on"


@pytest.mark.parametrize("quantization", [name for name in QUANTIZATIONS if name != NONE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_packed_weights_on_a_gpu_are_right_whoever_makes_them(
    dtype: torch.dtype, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 512)).to("cuda:0", dtype).requires_grad_(False)
    quantize(module, quantization)
    x = torch.randn(4, 512, device="cuda:0", dtype=dtype)
    whole = module(x).float()
    accelerate_by_torch(module)  # which may stay with whole weights
    assert (module(x).float() - whole).norm() <= 2e-2 * whole.norm()
    monkeypatch.setattr(linear, "_fastest_s", lambda *_: (0.0, 1.0))
    monkeypatch.setattr(linear, "_ways", lambda *_: [linear._by_a_compiled_kernel])
    assert accelerate_by_torch(module) == 2, "the kernel compiles, and says the same"
    assert (module(x).float() - whole).norm() <= 2e-2 * whole.norm()


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


@functools.cache
def way(name: str) -> Flex | None:
    return Flex(compiled()) if name == "at once" else None


WAYS = pytest.mark.parametrize("name", ["one by one", "at once"])


@WAYS
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_ragged_batch_on_a_gpu_attends_as_each_of_its_sessions_would_alone(name: str, data: st.DataObject) -> None:
    assert_attends_as_each_alone(data, None, way(name), "cuda:0", shapes=st.just((2, 3, 64, 64)), error=1e-3)


@WAYS
def test_what_one_session_made_of_itself_on_a_gpu_reaches_no_other(name: str) -> None:
    assert_sessions_are_apart(None, way(name), "cuda:0")

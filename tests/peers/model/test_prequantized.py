"""Checkpoints in quantized forms load cut, and a span of them says what the whole model says in plain transformers.

FP8 and compressed-tensors are written here tensor by tensor, as their tools would; bitsandbytes writes its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from peers.capacity import plan_capacity
from peers.errors import MissingExtra, UnsupportedModel
from peers.model.catalog import resolve
from peers.model.kernels.packed import PackedLinear
from peers.model.loading import check_folder, kept_block_bytes, load_client, load_config, load_span, span_tensors
from routing.errors import CallerError, NoRoute
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES, NUM_BLOCKS, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm, impatient

SPAN = BlockSpan(1, 3)
IDS = torch.tensor([[3, 4, 5, 6, 7]])
WEIGHTS = "model.safetensors"
BLOCK = 8

Encode = Callable[[str, Tensor], dict[str, Tensor]]


def rewrite(folder: Path, family: str, quantization: dict[str, Any], encode: Encode) -> None:
    save_checkpoint(FAMILIES[family], folder)
    tensors = load_file(folder / WEIGHTS)
    stored: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        stored |= encode(name, weight) if name.endswith(("proj.weight", "w1.weight")) else {name: weight}
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    change_config(folder, quantization_config=quantization)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_fp8(folder: Path, family: str) -> None:
    def encode(name: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": scale}

    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    rewrite(folder, family, fp8, encode)


def write_mxfp4(folder: Path, family: str) -> None:
    """As gpt-oss is published: experts in 4 bits, with an exponent for each 32 of them."""
    tiny = FAMILIES[family]
    save_checkpoint(replace(tiny, settings={**tiny.settings, "intermediate_size": 64}), folder)
    tensors, stored = load_file(folder / WEIGHTS), dict[str, Tensor]()
    generator = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight
            continue
        experts, inputs, outputs = weight.shape
        groups = (experts, outputs, inputs // 32)
        stored[f"{name}_blocks"] = torch.randint(256, (*groups, 16), generator=generator, dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(121, 124, groups, generator=generator, dtype=torch.uint8)
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def write_compressed_tensors(folder: Path, family: str) -> None:
    def encode(name: str, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}

    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    compressed = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    rewrite(folder, family, compressed, encode)


def write_bitsandbytes(folder: Path, family: str, form: str = "nf4", max_shard_size: str = "1GB") -> None:
    from transformers import BitsAndBytesConfig

    wide = {"hidden_size": 64, "intermediate_size": 128}  # its groups
    tiny = FAMILIES[family]
    save_checkpoint(replace(tiny, settings={**tiny.settings, **wide}), folder / "plain")
    kind = {"load_in_8bit": True} if form == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": form}
    config = BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def seen_by(model: Any) -> tuple[Tensor, Tensor]:
    """What enters and what leaves SPAN in the whole model."""
    seen: dict[str, Tensor] = {}
    layers = model.model.layers
    layers[SPAN.start].register_forward_pre_hook(
        lambda _, given, named: seen.update(enters=given[0] if given else named["hidden_states"]), with_kwargs=True
    )
    layers[SPAN.end - 1].register_forward_hook(
        lambda _, given, out: seen.update(leaves=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(IDS)
    return seen["enters"], seen["leaves"]


@pytest.mark.parametrize(
    ("write", "family"),
    [
        (write_fp8, "llama"),
        (write_fp8, "qwen3-moe"),
        (write_mxfp4, "gpt-oss"),
        (write_compressed_tensors, "llama"),
        (write_bitsandbytes, "llama"),
    ],
)
def test_a_quantized_checkpoint_loads_cut(write: Callable[[Path, str], None], family: str, tmp_path: Path) -> None:
    write(tmp_path, family)
    checkpoint = resolve(str(tmp_path), cache=tmp_path / "cache", accept=check_folder)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, config=load_config(checkpoint), dtype=torch.float32).eval()
    enters, leaves = seen_by(whole)
    span = load_span(checkpoint, SPAN, dtype=torch.float32, device="cpu")
    positions = torch.arange(IDS.shape[1])[None]
    torch.testing.assert_close(span.forward(enters, positions), leaves, atol=1e-5 * float(leaves.abs().max()), rtol=0)
    client = load_client(checkpoint, dtype=torch.float32, device="cpu")
    assert torch.equal(client.lm_head.weight, whole.lm_head.weight)
    assert torch.equal(client.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    if write is write_bitsandbytes:
        with pytest.raises(CallerError, match="format of its own"):
            load_span(checkpoint, SPAN, dtype=torch.float32, device="cpu", quantization="int8")
    else:
        packed = load_span(checkpoint, SPAN, dtype=torch.float32, device="cpu", quantization="int8")
        assert any(isinstance(module, PackedLinear) for module in packed.module.modules())
        assert (packed.forward(enters, positions) - leaves).norm() <= 0.1 * leaves.norm()


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_what_keeps_its_own_form_is_planned_by_the_bytes_in_its_files_and_named_by_it(
    form: str, tmp_path: Path
) -> None:
    write_bitsandbytes(tmp_path, "llama", form)
    checkpoint = resolve(str(tmp_path), cache=tmp_path / "cache", accept=check_folder)
    config, stored = load_config(checkpoint), load_file(tmp_path / WEIGHTS)
    blocks_bytes = [
        sum(tensor.nbytes for name, tensor in stored.items() if name.startswith(f"model.layers.{block}."))
        for block in range(NUM_BLOCKS)
    ]
    room = {"device": "cpu", "dtype": "float32", "max_memory_bytes": 4 << 30}
    plan = plan_capacity(config, **room, kept_block_bytes=kept_block_bytes(checkpoint, config))
    assert (plan.quantization, plan.request.sizes.block_bytes) == (form, max(blocks_bytes))
    whole = plan_capacity(load_config(resolve(str(tmp_path / "plain"), cache=tmp_path / "cache")), **room)
    assert 2 * plan.request.sizes.block_bytes < whole.request.sizes.block_bytes
    span = load_span(checkpoint, SPAN, dtype=plan.dtype, device="cpu", quantization=plan.quantization)
    assert 0.75 * sum(blocks_bytes[SPAN.start : SPAN.end]) < span.weight_bytes <= len(SPAN) * max(blocks_bytes)
    with pytest.raises(CallerError, match=f"in {form}, a format of its own"):
        plan_capacity(config, **room, quantization="int4")


@pytest.mark.parametrize("write", [write_fp8, write_compressed_tensors])
def test_what_is_made_whole_is_planned_and_named_as_whole(write: Callable[[Path, str], None], tmp_path: Path) -> None:
    write(tmp_path / "packed", "llama")
    save_checkpoint(FAMILIES["llama"], tmp_path / "plain")
    plans = []
    for folder in (tmp_path / "packed", tmp_path / "plain"):
        checkpoint = resolve(str(folder), cache=tmp_path / "cache", accept=check_folder)
        config = load_config(checkpoint)
        assert kept_block_bytes(checkpoint, config) is None
        plans.append(plan_capacity(config, device="cpu", max_memory_bytes=4 << 30))
    assert plans[0] == plans[1]


def test_peers_announce_the_form_that_weights_keep_and_a_demanded_precision_goes_by_it(tmp_path: Path) -> None:
    write_bitsandbytes(tmp_path, "llama")
    with MemorySwarm(tmp_path, [(0, NUM_BLOCKS)], cache=tmp_path / "cache") as swarm:
        assert swarm.peers[0].presence.describe().quantization == "nf4"
        greedy = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 2, "pad_token_id": 0}
        content = swarm.model(min_precision="nf4")
        assert content.generate(IDS, **greedy).shape == (1, 7)
        with impatient(), pytest.raises(NoRoute, match="below the demanded precision, int8"):
            swarm.model(min_precision="int8", guest=True).generate(IDS, **greedy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_were_not_quantized_come_in_the_wanted_dtype_too(dtype: torch.dtype, tmp_path: Path) -> None:
    write_fp8(tmp_path, "llama")
    tensors = load_file(tmp_path / WEIGHTS)
    stored = torch.bfloat16 if dtype == torch.float32 else torch.float32
    plain = {name: weight.to(stored) for name, weight in tensors.items() if "_proj" not in name}
    save_file(tensors | plain, tmp_path / WEIGHTS, {"format": "pt"})
    checkpoint = resolve(str(tmp_path), cache=tmp_path / "cache", accept=check_folder)
    span = load_span(checkpoint, SPAN, dtype=dtype, device="cpu")
    client = load_client(checkpoint, dtype=dtype, device="cpu")
    norm = plain["model.layers.1.input_layernorm.weight"]
    assert torch.equal(span.module.layers[0].input_layernorm.weight, norm.to(dtype))
    assert {weight.dtype for model in (span.module, client) for weight in model.parameters()} == {dtype}


def test_a_swarm_of_an_fp8_checkpoint_gives_the_local_models_ids(tmp_path: Path) -> None:
    write_fp8(tmp_path / "model", "llama")
    greedy = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    with MemorySwarm(tmp_path / "model", [(0, 2), (2, NUM_BLOCKS)], cache=tmp_path / "cache") as swarm:
        config = load_config(swarm.checkpoint)
        local = AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=config, dtype=torch.float32).eval()
        assert torch.equal(swarm.model().generate(IDS, **greedy), local.generate(IDS, **greedy))


@pytest.mark.parametrize(
    ("quantization", "package", "finder", "hint"),
    [
        ({"quant_method": "hqq"}, "HQQ", "hqq.is_hqq", "another checkpoint"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes",
            "bnb_4bit.is_bitsandbytes",
            "hiveswarm[quant]",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "int-quantized"},
            "compressed.tensors",
            "compressed_tensors.is_compressed_tensors",
            "hiveswarm[quant]",
        ),
    ],
)
def test_a_missing_package_is_named_before_weights_are_read(
    quantization: dict[str, Any], package: str, finder: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"transformers.quantizers.quantizer_{finder}_available", lambda: False)
    save_checkpoint(FAMILIES["llama"], tmp_path)
    change_config(tmp_path, quantization_config=quantization)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(MissingExtra, match=package) as caught:
        resolve(str(tmp_path), cache=tmp_path / "cache", accept=check_folder)
    assert hint in caught.value.hint


def test_a_form_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": "runes"})
    with pytest.raises(UnsupportedModel, match="runes") as caught:
        resolve(str(tmp_path), cache=tmp_path / "cache", accept=check_folder)
    assert caught.value.hint


def test_what_can_be_loaded_is_asked_for_the_device_that_it_is_loaded_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fp8(tmp_path, "llama")
    devices: list[Any] = []

    def validated(self: Any, *, device_map: dict[str, Any] | None = None, **_: Any) -> None:
        if device_map is not None:  # transformers itself says none on a CPU
            devices.append(device_map[""])
            if device_map[""] == "cpu":
                raise RuntimeError("runes run on a GPU")

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", validated)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    checkpoint = resolve(str(tmp_path), cache=tmp_path / "cache", accept=check_folder)
    config = load_config(checkpoint, device="cuda:1")
    assert span_tensors(checkpoint, config, SPAN, device="cuda:1")
    assert devices == ["cuda", "cuda:1", "cuda:1"]
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UnsupportedModel, match="run on a GPU"):
        load_span(checkpoint, SPAN, dtype=torch.float32, device="cpu")
    with pytest.raises(UnsupportedModel, match="run on a GPU"):
        load_client(checkpoint, dtype=torch.float32, device="cpu")

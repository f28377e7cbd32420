"""GPTQ and AWQ checkpoints load cut without their packages, and give exactly what their weights, made whole, give.

They are packed here from the formats' specifications, integer by integer.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from peers.capacity import plan_capacity
from peers.errors import CorruptCheckpoint, UnsupportedModel
from peers.model import grouped
from peers.model.catalog import Checkpoint, resolve
from peers.model.kernels.packed import PackedLinear
from peers.model.loading import check_folder, load_client, load_config, load_span, span_tensors
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES, NUM_BLOCKS, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm

SPAN = BlockSpan(1, 3)
IDS = torch.tensor([[3, 4, 5, 6, 7]])
WEIGHTS = "model.safetensors"
GROUP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One of the forms in which hubs keep such checkpoints."""

    config: Mapping[str, Any]
    bits: int = 4
    symmetric: bool = False
    reordered: bool = False
    """Whether groups hold inputs from anywhere (`desc_act`)."""
    names_groups: bool = True

    @property
    def awq(self) -> bool:
        return self.config["quant_method"] == "awq"

    @property
    def layout(self) -> str:
        return str(self.config.get("version") or self.config.get("checkpoint_format", "gptq"))

    def pack(self, name: str, outputs: int, inputs: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of a random layer, and its weight [O, I] in float32."""
        groups, top = inputs // GROUP, 2**self.bits
        integers = rng.integers(top, size=(inputs, outputs))
        zeros = rng.integers(1, top, size=(groups, outputs))
        if self.symmetric:
            zeros[:] = top // 2
        scales = torch.tensor(rng.uniform(0.02, 0.1, size=(groups, outputs)) * 8 / top).half()
        group = np.arange(inputs) // GROUP
        if self.reordered:
            rng.shuffle(group)
        if self.awq:
            tensors = {"qweight": awq_words(integers), "qzeros": awq_words(zeros)}
        else:
            stored = zeros - 1 if self.layout == "gptq" else zeros
            tensors = {"qweight": gptq_words(integers.T, self.bits).T, "qzeros": gptq_words(stored, self.bits)}
            if self.names_groups:
                tensors["g_idx"] = group.astype(np.int32)
        parts = {part: torch.tensor(tensor) for part, tensor in tensors.items()} | {"scales": scales}
        weight = torch.tensor(integers - zeros[group]).float() * scales.float()[group]
        return {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in parts.items()}, weight.T


def gptq_words(integers: Any, bits: int) -> Any:
    """Each row of integers, the first in a word's lowest bits."""
    words = np.zeros((integers.shape[0], integers.shape[1] * bits // 32), np.uint32)
    for column in range(integers.shape[1]):
        word, place = divmod(column, 32 // bits)
        words[:, word] |= integers[:, column].astype(np.uint32) << np.uint32(place * bits)
    return words.astype(np.int32)


def awq_words(integers: Any) -> Any:
    """Each row of integers in 4 bits, where the nibbles of a word, from the lowest, are columns 0 2 4 6 1 3 5 7."""
    words = np.zeros((integers.shape[0], integers.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, word] |= integers[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * nibble)
    return words.astype(np.int32)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
FORMS = {
    "gptq": Form(config=GPTQ, symmetric=True),
    "gptq asymmetric": Form(config=GPTQ | {"sym": False}),
    "gptq in order of activations": Form(config=GPTQ | {"desc_act": True}, reordered=True),
    "gptq without g_idx": Form(config=GPTQ | {"checkpoint_format": "gptq"}, names_groups=False),
    "gptq of 8 bits": Form(config=GPTQ | {"bits": 8}, bits=8),
    "gptq of 2 bits": Form(config=GPTQ | {"bits": 2}, bits=2),
    "gptq_v2": Form(config=GPTQ | {"checkpoint_format": "gptq_v2", "pack_dtype": "int32"}, reordered=True),
    "awq": Form(config={"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
}


def write(folder: Path, family: str, form: Form, *, head: bool = False) -> None:
    """The same model in `folder/plain` and, its blocks' linear layers (and its head) packed, in `folder/packed`."""
    tiny = FAMILIES[family]
    words = {
        "moe_intermediate_size": 16,
        "head_dim": 16,
        **({"vocab_size": 96} if head else {}),
    }  # multiples of 32 bits
    tiny = replace(tiny, settings={**tiny.settings, **{name: words[name] for name in words if name in tiny.settings}})
    save_checkpoint(tiny, folder / "plain")
    save_checkpoint(tiny, folder / "packed")
    plain, packed, rng = load_file(folder / "plain" / WEIGHTS), dict[str, Tensor](), np.random.default_rng(0)
    for name, weight in plain.items():
        layers = ("proj.weight", "c_fc.weight", "c_attn.weight", *(["lm_head.weight"] if head else []))
        if not name.endswith(layers):
            packed[name] = weight
            continue
        by_input = family == "gpt2" and ".h." in name  # Conv1D
        outputs, inputs = reversed(weight.shape) if by_input else weight.shape
        parts, whole = form.pack(name, outputs, inputs, rng)
        packed |= parts
        plain[name] = (whole.T if by_input else whole).contiguous()
    save_file(plain, folder / "plain" / WEIGHTS, {"format": "pt"})
    save_file(packed, folder / "packed" / WEIGHTS, {"format": "pt"})
    change_config(folder / "packed", quantization_config=dict(form.config))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def opened(folder: Path) -> Checkpoint:
    return resolve(str(folder), cache=folder.parent / "cache", accept=check_folder)


def outputs(folder: Path, hidden: Tensor, **options: Any) -> Tensor:
    span = load_span(opened(folder), SPAN, **({"dtype": torch.float32, "device": "cpu"} | options))
    return span.forward(hidden.to(span.dtype), torch.arange(hidden.shape[1])[None])


def hidden_states(width: int = 32) -> Tensor:
    return torch.randn(1, 5, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "family"),
    [*itertools.product(FORMS, ["llama", "qwen3-moe"]), ("gptq of 8 bits", "gpt2")],  # whose layers keep [I, O]
)
def test_a_span_gives_exactly_what_the_whole_weights_give(name: str, family: str, tmp_path: Path) -> None:
    write(tmp_path, family, FORMS[name])
    assert torch.equal(outputs(tmp_path / "packed", hidden_states()), outputs(tmp_path / "plain", hidden_states()))


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_in_fewer_digits_weights_are_rounded_once(name: str, tmp_path: Path) -> None:
    write(tmp_path, "llama", FORMS[name])
    packed, plain = (
        load_span(opened(tmp_path / folder), SPAN, dtype=torch.bfloat16, device="cpu").module.state_dict()
        for folder in ("packed", "plain")
    )
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[weight], plain[weight]) for weight in plain)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_quantize_packs_again_what_was_made_whole(name: str, tmp_path: Path) -> None:
    write(tmp_path, "llama", FORMS[name])
    span = load_span(opened(tmp_path / "packed"), SPAN, dtype=torch.float32, device="cpu", quantization="int8")
    assert any(isinstance(module, PackedLinear) for module in span.module.modules())
    again, plain = (outputs(tmp_path / folder, hidden_states(), quantization="int8") for folder in ("packed", "plain"))
    assert torch.equal(again, plain)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", ["gptq of 8 bits", "awq"])
def test_a_client_has_the_whole_ends_also_where_the_head_was_packed(name: str, head: bool, tmp_path: Path) -> None:
    write(tmp_path, "llama", FORMS[name], head=head)
    ends = [load_client(opened(tmp_path / it), dtype=torch.float32, device="cpu") for it in ("packed", "plain")]
    packed, plain = ({n: w for n, w in end.state_dict().items() if ".layers." not in n} for end in ends)
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[name], plain[name]) for name in plain)


def test_a_swarm_of_a_gptq_checkpoint_gives_the_ids_of_its_whole_weights(tmp_path: Path) -> None:
    write(tmp_path, "llama", FORMS["gptq"])
    greedy = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    local = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    with MemorySwarm(tmp_path / "packed", [(0, 2), (2, NUM_BLOCKS)], cache=tmp_path / "cache") as swarm:
        assert torch.equal(swarm.model().generate(IDS, **greedy), local.generate(IDS, **greedy))


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_peer_reads_packed_bytes_and_plans_for_whole_ones(name: str, tmp_path: Path) -> None:
    write(tmp_path, "llama", FORMS[name])
    packed, plain = opened(tmp_path / "packed"), opened(tmp_path / "plain")
    needed = span_tensors(packed, load_config(packed), SPAN)
    in_file = load_file(tmp_path / "packed" / WEIGHTS)
    of_span = [tensor for tensor in in_file if tensor.startswith(("model.layers.1.", "model.layers.2."))]
    assert sorted(needed) == sorted(of_span)
    assert packed.num_bytes(needed) == sum(in_file[tensor].nbytes for tensor in of_span)
    assert 3 * packed.num_bytes(needed) < plain.num_bytes(span_tensors(plain, load_config(plain), SPAN))
    plans = [plan_capacity(load_config(it), device="cpu", max_memory_bytes=4 << 30) for it in (packed, plain)]
    assert plans[0] == plans[1]
    span = load_span(packed, SPAN, dtype=torch.float32, device="cpu")
    assert span.weight_bytes <= len(SPAN) * plans[0].request.sizes.block_bytes


def test_what_zeros_mean_is_part_of_the_model_id(tmp_path: Path) -> None:
    write(tmp_path, "llama", FORMS["gptq"])
    before = opened(tmp_path / "packed").model_id
    assert opened(tmp_path / "packed").model_id == before != opened(tmp_path / "plain").model_id
    change_config(tmp_path / "packed", quantization_config=GPTQ | {"checkpoint_format": "gptq_v2"})
    assert opened(tmp_path / "packed").model_id != before


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GPTQ | {"bits": 3}, "3 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, "marlin"),
        (GPTQ | {"is_marlin_format": True}, "marlin"),
        (GPTQ | {"pack_dtype": "int16"}, "int16"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "gemv_fast"),
        ({"quant_method": "awq", "version": "exllama"}, "exllama"),
        ({"quant_method": "awq", "version": "marlin"}, "marlin"),
        ({"quant_method": "awq", "backend": "llm-awq"}, "llm-awq"),
        ({"quant_method": "awq", "bits": 8}, "8 bits"),
        ({"quant_method": ["gptq"]}, "cannot be loaded"),
        ({"quant_method": "grouped", "layout": "gemv"}, "gemv"),
    ],
)
def test_a_form_that_is_not_read_is_refused_by_name_before_weights_are(
    config: dict[str, Any], named: str, tmp_path: Path
) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path)
    change_config(tmp_path, quantization_config=config)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UnsupportedModel, match=named) as caught:
        opened(tmp_path)
    assert "plain weights" in caught.value.hint


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_what_only_a_file_beside_the_configuration_tells_is_refused_before_weights_are_read(
    name: str, method: str, tmp_path: Path
) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedModel, match=f"in {method}, as {name} says") as caught:
        check_folder(tmp_path)
    assert f'"quant_method": "{method}"' in caught.value.hint
    change_config(tmp_path, quantization_config=dict(FORMS[method].config))
    check_folder(tmp_path)


def test_awq_with_scaled_activations_is_refused(tmp_path: Path) -> None:
    save_checkpoint(FAMILIES["starcoder2"], tmp_path)
    change_config(tmp_path, quantization_config=dict(FORMS["awq"].config))
    with pytest.raises(UnsupportedModel, match="scaled activations"):
        opened(tmp_path)


Parts = dict[str, Any]
BROKEN: dict[str, Callable[[Parts], Parts]] = {
    "no scales": lambda parts: parts | {"scales": None},
    "no zeros": lambda parts: parts | {"qzeros": None},
    "zeros for fewer groups": lambda parts: parts | {"qzeros": parts["qzeros"][1:]},
    "zeros for fewer outputs": lambda parts: parts | {"qzeros": parts["qzeros"][:, 1:]},
    "zeros for no outputs": lambda parts: parts | {"qzeros": parts["qzeros"][:, :0]},
    "weights for fewer outputs": lambda parts: parts | {"qweight": parts["qweight"][:, 1:]},
    "no weights": lambda parts: parts | {"qweight": parts["qweight"][:0]},
    "weights in one row": lambda parts: parts | {"qweight": parts["qweight"].flatten()},
    "weights as floats": lambda parts: parts | {"qweight": parts["qweight"].float()},
    "words of 64 bits": lambda parts: parts | {"qweight": parts["qweight"].long()},
    "scales as integers": lambda parts: parts | {"scales": parts["scales"].int()},
    "a scale for all": lambda parts: parts | {"scales": parts["scales"][0, 0]},
    "a group too many": lambda parts: parts | {"g_idx": parts["g_idx"] + 1},
    "a group below the first": lambda parts: parts | {"g_idx": parts["g_idx"] - 1},
    "groups of fewer inputs": lambda parts: parts | {"g_idx": parts["g_idx"][1:]},
    "groups as floats": lambda parts: parts | {"g_idx": parts["g_idx"].float()},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_parts_that_do_not_fit_each_other_make_no_weight(broken: str) -> None:
    tensors, _ = FORMS["gptq asymmetric"].pack("weight", 24, 32, np.random.default_rng(0))
    parts = BROKEN[broken](tensors)
    with pytest.raises(ValueError, match=r"\w"):
        grouped.whole("gptq", torch.float32, *(parts[part] for part in grouped.PARTS))


@pytest.mark.parametrize("broken", ["a group too many", "no scales"])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_a_checkpoint_with_such_parts_is_refused(family: str, broken: str, tmp_path: Path) -> None:
    write(tmp_path, family, FORMS["gptq"])
    file = tmp_path / "packed" / WEIGHTS
    tensors = load_file(file)
    stem = next(name for name in sorted(tensors, reverse=True) if ".layers.2.mlp" in name and "qweight" in name)
    names = {part: stem.removesuffix("qweight") + part for part in grouped.PARTS}
    parts = BROKEN[broken]({part: tensors.pop(name) for part, name in names.items()})
    tensors |= {names[part]: tensor for part, tensor in parts.items() if tensor is not None}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"do not fit|missing"):
        outputs(tmp_path / "packed", hidden_states())


@given(
    name=st.sampled_from(sorted(FORMS)),
    outputs=st.integers(1, 5).map(lambda n: 16 * n),
    inputs=st.integers(1, 9).map(lambda n: 16 * n),
    slab=st.integers(1, 3000),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_are_what_was_packed_however_few_are_unpacked_at_a_time(
    name: str, outputs: int, inputs: int, slab: int, seed: int
) -> None:
    tensors, weight = FORMS[name].pack("weight", outputs, inputs, np.random.default_rng(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "SLAB", slab)
        parts = [tensors.get(part) for part in grouped.PARTS]
        assert torch.equal(grouped.whole(FORMS[name].layout, torch.float32, *parts), weight)
        assert torch.equal(grouped.whole(FORMS[name].layout, torch.float32, *parts, transposed=True), weight.T)


def test_zeros_of_the_first_format_carry_as_its_loaders_carry_them() -> None:
    """GPTQModel takes one from each zero by taking a word from a word: a zero of 0 borrows from its neighbour."""
    tensors, _ = FORMS["gptq_v2"].pack("weight", 16, 16, np.random.default_rng(0))
    tensors["qzeros"] &= ~0xF  # the first of each eight
    second = grouped.whole("gptq_v2", torch.float32, *(tensors[part] for part in grouped.PARTS))
    tensors["qzeros"] -= 0x11111111
    assert torch.equal(grouped.whole("gptq", torch.float32, *(tensors[part] for part in grouped.PARTS)), second)


class Largest(TorchDispatchMode):
    """The most elements that any operation made in a dtype other than that of the result."""

    def __init__(self, result: torch.dtype) -> None:
        super().__init__()
        self.result, self.elements = result, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype != self.result:
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("name", ["gptq of 8 bits", "awq"])
def test_no_more_than_a_slab_is_unpacked_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "SLAB", 2048)
    tensors, weight = FORMS[name].pack("weight", 256, 512, np.random.default_rng(0))
    packed = [tensors.get(part) for part in grouped.PARTS]
    with Largest(torch.bfloat16) as largest:
        made = grouped.whole(FORMS[name].layout, torch.bfloat16, *packed)
    assert torch.equal(made, weight.bfloat16())
    assert 2048 <= largest.elements <= max(part.numel() for part in packed if part is not None) < weight.numel()

"""GPTQ and AWQ checkpoints: weights as small integers in groups of inputs, packed into 32-bit words, made whole.

Owns what the tensors of these formats mean, and the refusal of forms that mean something else. transformers reads the
tensors and merges experts; of it this is a quantizer like its own, in plain torch.

Of a layer with I inputs and O outputs, G groups of inputs and P = 32 / bits integers in a word, a checkpoint holds
`scales` [G, O], floats, and as int32

    GPTQ  `qweight` [I / P, O]   `qzeros` [G, O / P]   `g_idx` [I], the group of each input (may be absent)
    AWQ   `qweight` [I, O / P]   `qzeros` [G, O / P]

with the first integer in a word's lowest bits; AWQ's words hold theirs in the order AWQ_ORDER. A weight is (integer −
zero) × scale. GPTQ's first format stores every zero less one; ones are added word by word, with carries, as they were
taken away (AutoGPTQ, `qlinear_cuda.py`; GPTQModel, `convert_gptq_v1_to_v2_format_module`; AutoAWQ, `linear/gemm.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.integrations.awq import AWQ_SCALES_MAPPINGS
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peers.errors import UnsupportedModel

METHOD = "grouped"
"""The name under which transformers knows this module."""
GPTQ, AWQ = "gptq", "awq"
FORMS = {GPTQ: (GPTQ, "gptq_v2"), AWQ: ("gemm",)}
"""Those that are read here, the usual one first."""
BITS = {GPTQ: (2, 4, 8), AWQ: (4,)}
APART = {"quantize_config.json": GPTQ, "quant_config.json": AWQ}
"""Where these formats were told of before configurations did."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
SLAB = 1 << 20
"""Weights that are unpacked at a time: what this takes beside the result."""


def layout_in(stored: Mapping[str, Any], model_type: str) -> str | None:
    """How the weights lie that a `quantization_config` tells of; None where it tells of another format.

    Raises UnsupportedModel for a form of GPTQ or AWQ that is not read here.
    """
    method = stored.get("quant_method")
    if method not in (GPTQ, AWQ):
        return None
    named = stored.get("version") if method == AWQ else stored.get("checkpoint_format")
    form = str(named or stored.get("format") or FORMS[method][0]).lower()
    if stored.get("backend") == "llm-awq":
        form = "llm-awq"
    elif stored.get("is_marlin_format"):  # AutoGPTQ before 0.8
        form = "marlin"
    bits = stored.get("bits", 4)
    words = str(stored.get("pack_dtype") or "int32").removeprefix("torch.")
    if form not in FORMS[method]:
        raise _refusal(f"{method} packed for {form}")
    if bits not in BITS[method]:
        raise _refusal(f"{method} of {bits} bits")
    if words != "int32":
        raise _refusal(f"{method} in words of {words}")
    if method == AWQ and model_type in AWQ_SCALES_MAPPINGS:  # which only its own modules apply
        raise _refusal(f"{method} with scaled activations, as for all {model_type} models")
    return form


def check_apart(folder: Path) -> None:
    """Raises UnsupportedModel where only a file beside a configuration that tells of no quantization does, as in what
    AutoGPTQ and AutoAWQ wrote at first: whoever reads the configuration alone takes such weights for plain ones."""
    for name, method in APART.items():
        if (folder / name).exists():
            raise UnsupportedModel(
                f"the checkpoint's weights are in {method}, as {name} says and config.json does not",
                hint=f"choose a newer copy of it, or in a folder of yours add to config.json what {name} holds, as "
                f'"quantization_config", with "quant_method": "{method}"',
            )


def _refusal(form: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the checkpoint's weights are in {form}, which is not read here",
        hint="choose a checkpoint of the same model in plain weights, GPTQ of 4 or 8 bits, AWQ (gemm) or FP8",
    )


@register_quantization_config(METHOD)
class GroupedConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped to mypy here
    """What stands in the configuration of a model in place of what its checkpoint says."""

    dequantize = True

    def __init__(self, layout: str, **_: Any) -> None:
        if not any(layout in forms for forms in FORMS.values()):
            raise ValueError(f"unknown layout {layout!r}")
        self.quant_method = METHOD
        self.layout = layout


@register_quantizer(METHOD)
class GroupedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Makes weights whole while transformers loads them; layers stay as they are."""

    quantization_config: GroupedConfig

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Every conversion of weights (of experts, above all) is one of packed ones too; plain ones go as they went."""
        unpack = _Unpack(self.quantization_config.layout)
        packed = [
            converter.copy(
                [
                    source.removesuffix("weight") + part
                    for source in converter._original_source_patterns
                    for part in PARTS
                ],
                converter._original_target_patterns,
                operations=[unpack, *converter.operations],
            )
            for converter in weight_conversions
            if isinstance(converter, WeightConverter)
            and all(source.endswith(".weight") for source in converter._original_source_patterns)
        ]
        alone = WeightConverter([rf"\.{part}" for part in PARTS], ".weight", [unpack])
        return [*weight_conversions, *packed, alone]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Unpack(ConversionOps):  # type: ignore[misc]
    """The first step of a conversion: from lists of parts to lists of weights, under the names of their `qweight`."""

    hf_quantizer = True
    """Says to transformers that parts keep their dtypes: scales would lose digits."""

    def __init__(self, layout: str) -> None:
        self.layout = layout

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, list[Tensor]], *, full_layer_name: str, model: PreTrainedModel, **_: Any
    ) -> dict[str, list[Tensor] | Tensor]:
        """Raises ValueError for parts that do not fit each other, which transformers reports as an error of loading."""
        stems: dict[str, dict[str, list[Tensor]]] = {}
        for pattern in list(input_dict):
            stem, _dot, part = pattern.rpartition(".")
            stems.setdefault(stem, {})[part] = input_dict.pop(pattern)
        path, _dot, name = full_layer_name.replace("*.", "0.").rpartition(".")
        layer = model.get_submodule(path)
        target = getattr(layer, name)
        if list(stems) == ["\\"]:
            (weight,) = self._whole(stems["\\"], target.dtype, transposed=isinstance(layer, Conv1D))
            return {full_layer_name: weight}
        return {f"{stem}.{PARTS[0]}": list(self._whole(parts, target.dtype)) for stem, parts in stems.items()}

    def _whole(
        self, parts: dict[str, list[Tensor]], dtype: torch.dtype, *, transposed: bool = False
    ) -> Iterator[Tensor]:
        if len({len(tensors) for tensors in parts.values()}) > 1:
            raise ValueError(f"some layers lack some of {', '.join(parts)}")
        for packed in itertools.zip_longest(*(parts.get(part, []) for part in PARTS)):
            yield whole(self.layout, dtype, *packed, transposed=transposed)


def whole(
    layout: str,
    dtype: torch.dtype,
    qweight: Tensor | None,
    qzeros: Tensor | None,
    scales: Tensor | None,
    g_idx: Tensor | None,
    *,
    transposed: bool = False,
) -> Tensor:
    """The weight [O, I] that these parts stand for ([I, O] if `transposed`), rounded once, to `dtype`.

    Raises ValueError for parts that are missing or do not fit each other.
    """
    if qweight is None or qzeros is None or scales is None:
        raise ValueError(f"a packed weight is made of {', '.join(PARTS[:3])}")
    if not (qweight.ndim == qzeros.ndim == scales.ndim == 2 and qweight.numel() and scales.numel()):
        raise ValueError("packed weights are matrices")
    if not (qweight.dtype == qzeros.dtype == torch.int32 and scales.is_floating_point()):
        raise ValueError("packed weights and zeros are words of 32 bits, scales are floats")
    by_output = layout in FORMS[AWQ]  # words go along outputs
    num_groups, outputs = scales.shape
    bits = 32 * qzeros.shape[1] // outputs
    if bits not in BITS[AWQ if by_output else GPTQ] or 32 * qzeros.shape[1] != outputs * bits:
        raise ValueError(f"{qzeros.shape[1]} words of zeros do not fit {outputs} outputs")
    in_word = 32 // bits
    rows_per_word = 1 if by_output else in_word
    inputs = qweight.shape[0] * rows_per_word
    if qzeros.shape[0] != num_groups or qweight.shape[1] * (in_word if by_output else 1) != outputs:
        raise ValueError("packed weights, zeros and scales are of different sizes")
    group_I = _groups(inputs, num_groups, g_idx, scales.device)
    shifts_P = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device)
    if by_output:
        shifts_P = shifts_P[torch.tensor(AWQ_ORDER, device=qweight.device).argsort()]
    elif layout == GPTQ:
        qzeros = qzeros + sum(1 << shift for shift in range(0, 32, bits))
    zeros_GO, scales_GO = _integers(qzeros, shifts_P, 1).float(), scales.float()
    weight = torch.empty((inputs, outputs) if transposed else (outputs, inputs), dtype=dtype, device=qweight.device)
    weight_IO = weight if transposed else weight.T
    step = max(1, SLAB // (outputs * rows_per_word))
    for start in range(0, len(qweight), step):
        slab = slice(start * rows_per_word, (start + step) * rows_per_word)
        integers_SO = _integers(qweight[start : start + step], shifts_P, int(by_output))
        weight_IO[slab] = (integers_SO - zeros_GO[group_I[slab]]) * scales_GO[group_I[slab]]
    return weight


def _groups(inputs: int, num_groups: int, g_idx: Tensor | None, device: torch.device) -> Tensor:
    """The group of each input. A checkpoint that names the first one for all names none (AutoGPTQ, `_utils.py`)."""
    if g_idx is None or (num_groups > 1 and not g_idx.any()):
        if inputs % num_groups:
            raise ValueError(f"{num_groups} groups do not fit {inputs} inputs")
        return torch.arange(inputs, device=device) // (inputs // num_groups)
    if (
        g_idx.shape != (inputs,)
        or g_idx.is_floating_point()
        or not 0 <= int(g_idx.min()) <= int(g_idx.max()) < num_groups
    ):
        raise ValueError(f"g_idx does not name a group, of {num_groups}, for each of {inputs} inputs")
    return g_idx.long()


def _integers(words: Tensor, shifts_P: Tensor, dim: int) -> Tensor:
    """What `words` hold, one after the other along `dim`."""
    spread = words.unsqueeze(dim + 1) >> (shifts_P if dim else shifts_P[:, None])
    return (spread & ((1 << 32 // len(shifts_P)) - 1)).flatten(dim, dim + 1)

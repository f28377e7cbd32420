"""Checkpoints whose weights are already quantized, in any form that transformers loads.

Owns the decision whether such a checkpoint can be loaded here, before a weight is read, and in what form: whole where
its weights can be made so (GPTQ and AWQ by `peers.model.grouped`; compressed-tensors, FP8 and MXFP4 by the format's own
loader), so that they run on any device, by the library of this package, and may be packed again by `--quantize`; in the
format's own layers else (bitsandbytes). Reading goes through transformers (`HfQuantizer`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from peers.errors import MissingExtra, UnsupportedModel
from peers.model import grouped
from peers.model.quantization import NONE
from peers.model.support import first_line
from routing.errors import CallerError

BITSANDBYTES = "bitsandbytes"
EXTRA = ("compressed-tensors", BITSANDBYTES)
"""Formats whose packages the extra `quant` installs; others need none, or one that is built for a GPU."""


def settle(config: PretrainedConfig, device: torch.device | str) -> None:
    """Check that quantized weights of this configuration can be loaded on `device`, and ask for whole ones where that
    works.

    Raises MissingExtra, and UnsupportedModel for a format that is unknown or does not run on this machine.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    name = stored.get("quant_method", BITSANDBYTES)
    try:
        if layout := grouped.layout_in(stored, config.model_type):
            config.quantization_config = {"quant_method": grouped.METHOD, "layout": layout}
        elif hasattr(AutoQuantizationConfig.from_dict(dict(stored)), "dequantize"):
            config.quantization_config = {**stored, "dequantize": True}
        quantizer_of(config, device)
    except UnsupportedModel:
        raise
    except ImportError as error:
        hint = (
            "pip install 'hiveswarm[quant]'" if name in EXTRA else "install that package, or choose another checkpoint"
        )
        raise MissingExtra(f"the checkpoint's weights are in {name}: {first_line(error)}", hint=hint) from error
    except Exception as error:  # a stranger's configuration runs through the format's own code
        raise UnsupportedModel(
            f"the checkpoint's weights are in {name}, which cannot be loaded on this machine ({first_line(error)})",
            hint="choose a checkpoint of the same model in plain weights, GPTQ, AWQ, compressed-tensors or FP8",
        ) from error


def kept_form(config: PretrainedConfig) -> str:
    """The form that weights of a settled configuration keep in the format's own layers, as records name it: NONE where
    they are plain or made whole; `nf4`, `fp4` and `int8` of bitsandbytes; else the name of the format."""
    stored = getattr(config, "quantization_config", None)
    if stored is None or stored.get("dequantize"):
        return NONE
    name = str(stored.get("quant_method", BITSANDBYTES))
    if name == BITSANDBYTES:
        return "int8" if stored.get("load_in_8bit") else str(stored.get("bnb_4bit_quant_type", "fp4"))
    return NONE if name == grouped.METHOD else name


def form_loaded(config: PretrainedConfig, quantization: str) -> str:
    """What weights of a settled configuration are in where `quantization` is asked for: that, or the form they keep.

    Raises CallerError where they cannot be changed to it.
    """
    kept = kept_form(config)
    if kept == NONE:
        return quantization
    if quantization not in (NONE, kept):
        raise CallerError(
            f"weights cannot be changed to {quantization}: the checkpoint keeps them in {kept}, a format of its own",
            hint="leave --quantize out",
        )
    return kept


def quantizer_of(config: PretrainedConfig, device: torch.device | str) -> Any:
    """What loads the quantized weights of a model with a settled configuration (`HfQuantizer`); None for plain ones."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    quantizer = AutoHfQuantizer.from_config(copy.deepcopy(stored), pre_quantized=True)
    quantizer.validate_environment(device_map={"": str(device)})  # some notice only here what they will do
    return quantizer

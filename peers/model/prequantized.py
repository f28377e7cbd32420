"""Checkpoints whose weights are already quantized, in any form that transformers loads.

Owns the decision whether such a checkpoint can be loaded here, before a weight is read, and in what form: whole where
the format's own loader can make its weights so (compressed-tensors, FP8, MXFP4), so that they run on any device, by the
library of this package, and may be packed again by `--quantize`; else in the format's own layers (bitsandbytes).
Reading and unpacking are transformers' own (`HfQuantizer`).
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from peers.errors import MissingExtra, UnsupportedModel

EXTRA = ("compressed-tensors", "bitsandbytes")
"""Formats whose packages the extra `quant` installs; others need none, or one that is built for a GPU."""


def settle(config: PretrainedConfig) -> None:
    """Check that quantized weights of this configuration can be loaded here, and ask for whole ones where that works.

    Raises MissingExtra, and UnsupportedModel for a format that is unknown or does not run on this machine.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    name = stored.get("quant_method", "bitsandbytes")
    try:
        if hasattr(AutoQuantizationConfig.from_dict(dict(stored)), "dequantize"):
            config.quantization_config = {**stored, "dequantize": True}
        quantizer_of(config)
    except ImportError as error:
        hint = (
            "pip install 'hiveswarm[quant]'" if name in EXTRA else "install that package, or choose another checkpoint"
        )
        raise MissingExtra(f"the checkpoint's weights are in {name}: {_first_line(error)}", hint=hint) from error
    except Exception as error:  # a stranger's configuration runs through the format's own code
        raise UnsupportedModel(
            f"the checkpoint's weights are in {name}, which cannot be loaded on this machine ({_first_line(error)})",
            hint="choose a checkpoint of the same model in plain weights, compressed-tensors or FP8",
        ) from error


def quantizer_of(config: PretrainedConfig) -> Any:
    """What loads the quantized weights of a model with a settled configuration (`HfQuantizer`); None for plain ones."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    quantizer = AutoHfQuantizer.from_config(copy.deepcopy(stored), pre_quantized=True)
    quantizer.validate_environment(device_map={"": "cpu"})  # some notice only here what they will do
    return quantizer


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

"""Weights in fewer bits: what a peer may trade for more blocks and more speed.

Owns the names and the change of loaded blocks; the formats are those of `peers.model.kernels`. Each block is loaded
whole and changed before the next one is read, so memory peaks one block higher.

What `int8` costs, measured with the built-in model (three spans of ten blocks in float32, real hidden states; README.md
as the text): relative L2 of a span's output 0.006 to 0.020, perplexity 42.56 → 42.76 (+0.5 %).
"""

from __future__ import annotations

from torch import nn

from peers.model.kernels import experts
from peers.model.kernels.int8 import Int8Linear
from routing.errors import CallerError

NONE, INT8 = "none", "int8"
QUANTIZATIONS = (NONE, INT8)


def bytes_in(block_bytes: int, bytes_per_value: int, quantization: str) -> int:
    """What a block of `block_bytes` takes once it is changed; nearly all of its values are weights of linear layers."""
    return block_bytes if quantization == NONE else block_bytes // bytes_per_value + block_bytes // 64


def check(quantization: str) -> None:
    """Raises CallerError for a name that is not known."""
    if quantization not in QUANTIZATIONS:
        raise CallerError(f"unknown quantization {quantization!r}", hint=f"use {' or '.join(QUANTIZATIONS)}")


def quantize(blocks: nn.Module, quantization: str) -> None:
    """Change every linear layer and mixture of experts within `blocks`, in place."""
    check(quantization)
    if quantization == NONE:
        return
    for parent in list(blocks.modules()):
        if experts.suits(parent):
            experts.quantize(parent)
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and any(layer.weight.stride()):  # hollow ones stand for what is not here
                setattr(parent, name, Int8Linear(layer))

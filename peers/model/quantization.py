"""Weights in fewer bits: what a peer may trade for more blocks and more speed.

Owns the names and the change of loaded blocks; the formats are those of `peers.model.kernels`. Blocks are loaded first
and changed layer by layer, so memory peaks one block higher.
"""

from __future__ import annotations

from torch import nn

from peers.model.kernels import experts
from peers.model.kernels.int8 import Int8Linear
from routing.errors import CallerError

NONE, INT8 = "none", "int8"
QUANTIZATIONS = (NONE, INT8)
BYTES_PER_WEIGHT = {INT8: 1}
"""Of the weights of linear layers and experts; scales and norms are small beside them."""


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

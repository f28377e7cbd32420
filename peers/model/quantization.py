"""Weights in fewer bits: what a peer may trade for more blocks and more speed.

Owns the names and the change of loaded blocks; the formats are those of `peers.model.kernels`. Each block is loaded
whole and changed before the next one is read, so memory peaks one block higher.

What each costs is measured by `scripts/quality`; the figures are in this package's README.
"""

from __future__ import annotations

from torch import nn

from peers.model.kernels import experts
from peers.model.kernels.packed import Format, PackedLinear
from routing.errors import CallerError

NONE = "none"
QUANTIZATIONS = (NONE, *(format_.value for format_ in Format))


def bytes_in(block_bytes: int, bytes_per_value: int, quantization: str) -> int:
    """What a block of `block_bytes` takes once it is changed; nearly all of its values are weights of linear layers."""
    if quantization == NONE:
        return block_bytes
    return int(block_bytes / bytes_per_value * Format(quantization).bits / 8) + block_bytes // 64


def check(quantization: str) -> None:
    """Raises CallerError for a name that is not known."""
    if quantization not in QUANTIZATIONS:
        raise CallerError(f"unknown quantization {quantization!r}", hint=f"use {', '.join(QUANTIZATIONS)}")


def quantize(blocks: nn.Module, quantization: str) -> None:
    """Change every linear layer and mixture of experts within `blocks`, in place.

    Raises CallerError for an unknown name, and where the layers have a format of their own already.
    """
    check(quantization)
    if quantization == NONE:
        return
    format_, changed = Format(quantization), False
    for parent in list(blocks.modules()):
        if experts.packable(parent):
            experts.quantize(parent, format_)
            changed = True
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and any(layer.weight.stride()):  # hollow ones stand for what is not here
                setattr(parent, name, PackedLinear(layer, format_))
                changed = True
    if not changed:
        raise CallerError(
            f"these weights cannot be changed to {quantization}: the checkpoint keeps them in a format of its own",
            hint="leave --quantize out",
        )

"""Linear layers with 8-bit weights: half the memory of bfloat16, and half the time where reading them is what takes it.

Owns the format: weights are rounded to 8 bits, with one scale for each output; inputs and sums are not rounded, so the
error is that of the weights alone.

Legend: M rows, N outputs, K inputs; a leading E counts experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.model.kernels.pool import Pool

LEVELS = 127


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights. What the library does not multiply is made whole for a moment."""

    weight_NK: Tensor
    scale_N: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        """Of inputs and outputs."""
        self.pool: Pool | None = None
        self.rows_max = 0
        """Up to so many rows `pool` makes the product."""
        weight_NK, scale_N = quantized(layer.weight.detach())
        self.register_buffer("weight_NK", weight_NK)
        self.register_buffer("scale_N", scale_N)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    @property
    def weight(self) -> Tensor:
        """What the layer computes with, whole; some architectures look at its dtype."""
        return whole(self.weight_NK, self.scale_N, self.dtype)

    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, scale and bias, as the library takes them."""
        return self.weight_NK, self.scale_N, self.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's own name
        if (
            self.pool is not None
            and input.dtype is self.dtype
            and 0 < input.numel() <= self.rows_max * self.in_features
            and not (torch.is_grad_enabled() and input.requires_grad)
        ):
            return self.pool.linear(input.contiguous(), self.weight_NK, self.bias, self.scale_N)
        weight_NK = whole(self.weight_NK, self.scale_N, input.dtype)
        return F.linear(input, weight_NK, None if self.bias is None else self.bias.to(input.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def quantized(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit weights and the scale of each row, float32: `weight ≈ int8 * scale`. Leading dimensions are kept."""
    weight_NK = weight_NK.float()
    scale_N = weight_NK.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
    return torch.round(weight_NK / scale_N[..., None]).to(torch.int8), scale_N


def whole(weight_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that 8-bit ones stand for."""
    return (weight_NK * scale_N[..., None]).to(dtype)

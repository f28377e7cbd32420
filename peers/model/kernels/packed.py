"""Linear layers whose weights take 8 or 4 bits: less memory, and less time where reading them is what takes it.

Owns the formats. Inputs and sums are not rounded, so the error is that of the weights alone:

- `int8`: 8 bits, one scale for each output (8 bits per weight);
- `int4`: 16 even levels for each group of 32 (5 bits per weight, as llama.cpp's Q4_1), laid where the squared error is
  least, not from the least weight to the greatest;
- `nf4`: 16 levels where normally distributed weights are, times the greatest magnitude in each group of 32 (4.5 bits
  per weight; QLoRA, arXiv 2305.14314, section 3 and appendix E, with groups half as long and scales half as wide).

Legend: M rows, N outputs, K inputs, G groups of K; a leading E counts experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.model.kernels.pool import GROUP, INPUTS, Pool

INT8_MAX = 127
INT4_MAX = 15
INT4_STEPS = (14.0, 14.5, 15.0, 15.5, 16.0, 16.5, 17.0)
"""Into how many steps the range of a group's weights is cut, to see which codes suit them best. 15 finds the levels of
weights that had 16 even ones before; beyond it the greatest weights share a level, and the others come closer."""
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
CHUNK = 8192
"""Groups that a CPU packs at once: they stay in its cache."""
TINY = torch.finfo(torch.float32).tiny
"""The scale of weights that are all alike: nothing is divided by zero."""


class Format(Enum):
    """How weights are kept, by the name that users see."""

    INT8 = "int8"
    INT4 = "int4"
    NF4 = "nf4"

    @property
    def bits(self) -> float:
        """Per weight, with the scales of its group."""
        return {Format.INT8: 8, Format.INT4: 5, Format.NF4: 4.5}[self]


class PackedLinear(nn.Module):
    """A linear layer with weights in fewer bits. What the library does not multiply is made whole for a moment."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, format_: Format) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.format = format_
        self.dtype = layer.weight.dtype
        """Of inputs and outputs."""
        self.pool: Pool | None = None
        self.rows_max = 0
        """Up to so many rows `pool` or `by_torch` makes the product."""
        self.by_torch: Callable[[Tensor, PackedLinear], Tensor] | None = None
        """Rows [M, K] times this layer's packed weights, without its bias: [M, N]."""
        codes, scales = packed(layer.weight.detach(), format_)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    @property
    def weight(self) -> Tensor:
        """What the layer computes with, whole; some architectures look at its dtype."""
        return self.whole(self.dtype)

    @functools.cached_property
    def scales_for_torch(self) -> Tensor:
        """The scales in `dtype`, for products of torch's own; once, and where the layer stays from then on."""
        return self.scales.to(self.dtype)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """[N, K]"""
        return whole(self.codes, self.scales, self.format, self.in_features, dtype, self.pool)

    def operands(self) -> tuple[str, Tensor, Tensor | None, Tensor | None]:
        """Format, weights, scales and bias, as the library takes them."""
        return self.format.value, self.codes, self.scales, self.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's own name
        if (
            input.dtype is self.dtype
            and 0 < input.numel() <= self.rows_max * self.in_features
            and not (torch.is_grad_enabled() and input.requires_grad)
        ):
            if self.pool is not None:
                return self.pool.linear(input.contiguous(), self.codes, self.bias, self.scales, self.format.value)
            if self.by_torch is not None:
                output_MN = self.by_torch(input.reshape(-1, self.in_features), self)
                if self.bias is not None:
                    output_MN = output_MN + self.bias.to(input.dtype)
                return output_MN.view(*input.shape[:-1], self.out_features)
        if torch.is_grad_enabled() and input.requires_grad:
            return _Product.apply(input, self)  # type: ignore[no-any-return, no-untyped-call]
        return F.linear(input, self.whole(input.dtype), None if self.bias is None else self.bias.to(input.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format.value}"


class _Product(torch.autograd.Function):
    """Of a `PackedLinear` whose input wants a gradient: the weights are made whole again, instead of being kept so."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: PackedLinear) -> Tensor:  # noqa: A002
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        return F.linear(input, layer.whole(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, None]:
        return output_gradient @ ctx.layer.whole(output_gradient.dtype), None


def packed(weight_NK: Tensor, format_: Format) -> tuple[Tensor, Tensor]:
    """Codes and scales of weights; leading dimensions are kept.

    `int8`: int8 [N, K] and float32 [N]. `int4` and `nf4`: uint8 [N, G · 16], whose bytes hold weights 0 to 15 of a
    group in their lower halves and 16 to 31 in their upper ones, and bfloat16 [N, G, 2] (scale, least weight) or
    [N, G]; a last group that is not full is filled with zeros.
    """
    if format_ is Format.INT8:
        weight_NK = weight_NK.float()
        scale_N = weight_NK.abs().amax(-1).clamp_min(TINY) / INT8_MAX
        return torch.round(weight_NK / scale_N[..., None]).to(torch.int8), scale_N
    weight_NK = F.pad(weight_NK, (0, -weight_NK.shape[-1] % GROUP))
    weight_ng = weight_NK.reshape(-1, GROUP)
    chunks = torch.split(weight_ng, CHUNK) if weight_ng.device.type == "cpu" else (weight_ng,)
    pack = _evenly if format_ is Format.INT4 else _normally
    codes, scales = (torch.cat(parts) for parts in zip(*(pack(chunk.float()) for chunk in chunks), strict=True))
    lower, upper = codes.view(*weight_NK.shape[:-1], -1, GROUP).chunk(2, -1)
    return (lower | upper << 4).flatten(-2), scales.view(*weight_NK.shape[:-1], -1, *scales.shape[1:])


# A weight is compared with what the rounded scales say, so that their rounding costs nearly nothing.


def _evenly(weight_ng: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, 32] and scales [n, 2] of n groups for `int4`.

    As llama.cpp's `make_qkx2_quants` (ggml-quants.c) without importance: codes for several scales, for each of them the
    line from codes to weights with the least squares, and of these lines the one that explains most.
    """
    least_n = weight_ng.amin(-1)
    range_n = (weight_ng.amax(-1) - least_n).clamp_min(TINY)
    unit_ng = (weight_ng - least_n[:, None]) / range_n[:, None]
    average_g = unit_ng.new_full((GROUP,), 1 / GROUP)
    unit_n = unit_ng @ average_g
    explained_n, slope_n, start_n = (torch.zeros_like(unit_n) for _ in range(3))
    for steps in INT4_STEPS:
        code_ng = (unit_ng * steps).round_().clamp_(max=INT4_MAX)
        code_n = code_ng @ average_g
        covariance_n = (code_ng * unit_ng) @ average_g - code_n * unit_n
        new_slope_n = covariance_n / (code_ng.square_() @ average_g - code_n.square())
        better_n = covariance_n * new_slope_n > explained_n  # never where all weights are alike
        explained_n = torch.where(better_n, covariance_n * new_slope_n, explained_n)
        slope_n = torch.where(better_n, new_slope_n, slope_n)
        start_n = torch.where(better_n, unit_n - new_slope_n * code_n, start_n)
    scales = torch.stack(((slope_n * range_n).clamp_min(TINY), least_n + start_n * range_n), -1).bfloat16()
    scale_n1, least_n1 = scales.float()[..., None].unbind(-2)
    return ((weight_ng - least_n1) / scale_n1).round_().clamp_(0, INT4_MAX).to(torch.uint8), scales


def _normally(weight_ng: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, 32] and scales [n] of n groups for `nf4`."""
    scale_n = weight_ng.abs().amax(-1).clamp_min(TINY).bfloat16()
    levels = nf4_levels(weight_ng.device)
    codes = torch.bucketize(weight_ng / scale_n.float()[:, None], (levels[1:] + levels[:-1]) / 2)
    return codes.to(torch.uint8), scale_n


def whole(
    codes: Tensor, scales: Tensor, format_: Format, inputs: int, dtype: torch.dtype, pool: Pool | None = None
) -> Tensor:
    """The weights [N, K = `inputs`] that codes and scales stand for; without `pool`, leading dimensions are kept."""
    if pool is not None and dtype in INPUTS and codes.device.type == "cpu":
        return pool.unpack(codes, scales, format_.value, inputs, dtype)
    if format_ is Format.INT8:
        return (codes * scales[..., None]).to(dtype)
    two_NGh = codes.view(*codes.shape[:-1], -1, GROUP // 2)
    weight_NGg = _meant(torch.cat((two_NGh & 15, two_NGh >> 4), -1), scales, format_, nf4_levels(codes.device))
    return weight_NGg.flatten(-2)[..., :inputs].to(dtype)


def times_row(row_K: Tensor, codes: Tensor, scales: Tensor, format_: Format, levels: Tensor) -> Tensor:
    """The product [N] of one row and packed weights, in float32; `levels`: those of `nf4`. A sum and no matrix product,
    so that a compiler makes one kernel of it, which reads the codes once and writes no weight."""
    if format_ is Format.INT8:
        return (codes * row_K.float()).sum(-1) * scales
    two_NGh = codes.view(len(codes), -1, GROUP // 2)
    row_Gg = F.pad(row_K.float(), (0, -len(row_K) % GROUP)).view(-1, GROUP)
    lower_Gh, upper_Gh = row_Gg.chunk(2, -1)
    lower_NGh = _meant(two_NGh & 15, scales, format_, levels) * lower_Gh
    return (lower_NGh + _meant(two_NGh >> 4, scales, format_, levels) * upper_Gh).sum((-2, -1))


def _meant(codes_NGg: Tensor, scales: Tensor, format_: Format, levels: Tensor) -> Tensor:
    """What 4-bit codes of some groups stand for, in float32."""
    scales = scales.float()
    if format_ is Format.INT4:
        return codes_NGg * scales[..., :1] + scales[..., 1:]
    return levels[codes_NGg.int()] * scales[..., None]


@functools.cache
def nf4_levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, device=device)

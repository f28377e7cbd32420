"""Mixtures of experts through the library: each expert that was chosen multiplies its own rows, in place.

Owns one implementation of transformers' experts interface, registered as `hive`. Those that transformers brings for
a CPU either copy the weights of the chosen experts before they multiply, or go through torch's slower products.

Legend: T tokens, k experts per token, S = T · k rows sorted by expert, E experts, H hidden size, N outputs, K inputs.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from peers.model.kernels.packed import Format, packed, whole
from peers.model.kernels.pool import Pool

HIVE = "hive"
OTHERWISE = "grouped_mm"
"""transformers' own implementation for what the library does not do (gradients, another dtype or device)."""


def packable(module: nn.Module) -> bool:
    """Whether `module` holds experts, as transformers decorates them."""
    down = getattr(module, "down_proj", None)
    return (
        isinstance(getattr(module, "is_transposed", None), bool)
        and isinstance(down, nn.Parameter)
        and down.ndim == 3
        and all(any(weight.stride()) for weight in module.parameters())
    )


def suits(module: Any) -> bool:
    """Whether `module` holds experts whose weights stand as the library reads them."""
    return (
        packable(module) and not module.is_transposed and all(weight.is_contiguous() for weight in module.parameters())
    )


def kind(module: nn.Module) -> tuple[torch.dtype, Format | None] | None:
    """The dtype in which experts of this kind compute, and the format of their weights; None for any other module."""
    if suits(module):
        return cast(torch.dtype, module.down_proj.dtype), None
    return getattr(module, "hive_kind", None)


def quantize(module: Any, format_: Format) -> None:
    """Give these experts weights in fewer bits."""
    module.hive_kind = module.down_proj.dtype, format_
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weights = getattr(module, name).detach()
        weight_ENK = weights.transpose(1, 2) if module.is_transposed else weights
        parts = [packed(weight_NK.contiguous(), format_) for weight_NK in weight_ENK]
        codes, scales = (torch.stack(each) for each in zip(*parts, strict=True))
        delattr(module, name)
        module.register_buffer(name, codes)
        module.register_buffer(f"{name}_scales", scales)
    _select(module)


def install(module: Any, pool: Pool, rows_max: int) -> None:
    """Let the library make the products of these experts, for up to `rows_max` rows each."""
    module.hive_kind = kind(module)
    module.hive_pool, module.hive_rows_max = pool, rows_max
    _select(module)


def _select(module: Any) -> None:
    ALL_EXPERTS_FUNCTIONS.register(HIVE, forward)
    module.config._experts_implementation = HIVE


def forward(self: Any, hidden_TH: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """[T, H]; what transformers' experts interface calls."""
    counts_E = torch.bincount(chosen_Tk.reshape(-1), minlength=self.num_experts).tolist()
    pool, (dtype, format_) = getattr(self, "hive_pool", None), getattr(self, "hive_kind", (None, None))
    ours = (
        pool is not None
        and hidden_TH.dtype is dtype
        and hidden_TH.device.type == "cpu"
        and max(counts_E) <= self.hive_rows_max
        and not (torch.is_grad_enabled() and hidden_TH.requires_grad)
    )
    if self._is_expert_parallel or (format_ is None and not (ours and self.down_proj.dtype is hidden_TH.dtype)):
        return ALL_EXPERTS_FUNCTIONS[OTHERWISE](self, hidden_TH, chosen_Tk, weights_Tk)  # type: ignore[no-any-return]
    experts_S, order_S = torch.sort(chosen_Tk.reshape(-1))

    def product(rows_SK: Tensor, name: str) -> Tensor:
        weight_ENK, scales_EN, parts = getattr(self, name), getattr(self, f"{name}_scales", None), []
        for expert, (start, end) in enumerate(pairwise(accumulate(counts_E, initial=0))):
            if start < end:
                rows, weight = rows_SK[start:end], weight_ENK[expert]
                scales = None if scales_EN is None else scales_EN[expert]
                parts.append(_product(rows, weight, scales, format_, pool, ours))
        product_SN = torch.cat(parts)
        return product_SN + getattr(self, f"{name}_bias")[experts_S] if self.has_bias else product_SN

    given_SH = hidden_TH[order_S // chosen_Tk.shape[1]]
    if self.has_gate:
        inner_SK = self._apply_gate(product(given_SH, "gate_up_proj"))
    else:
        inner_SK = self.act_fn(product(given_SH, "up_proj"))
    out_SH = product(inner_SK.contiguous(), "down_proj")
    if self.has_post_expert_norm:
        out_SH = self.post_expert_norm(out_SH)
    out_SH = out_SH * weights_Tk.reshape(-1)[order_S, None]
    in_turn_SH = torch.empty_like(out_SH)
    in_turn_SH[order_S] = out_SH
    return in_turn_SH.view(*chosen_Tk.shape, -1).sum(1).to(hidden_TH.dtype)


def _product(
    rows_SK: Tensor, weight_NK: Tensor, scales_N: Tensor | None, format_: Format | None, pool: Pool | None, ours: bool
) -> Tensor:
    """Of one expert: by the library, or by torch with weights that are made whole for it."""
    if ours:
        assert pool is not None
        return pool.linear(rows_SK, weight_NK, None, scales_N, format_.value if format_ else "")
    assert scales_N is not None, "only quantized experts come here without the library"
    assert format_ is not None
    return F.linear(rows_SK, whole(weight_NK, scales_N, format_, rows_SK.shape[1], rows_SK.dtype, pool))

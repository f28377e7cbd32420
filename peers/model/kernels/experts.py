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

from peers.model.kernels import int8
from peers.model.kernels.pool import Pool

HIVE = "hive"
OTHERWISE = "grouped_mm"
"""transformers' own implementation for what the library does not do (gradients, another dtype or device)."""


def suits(module: nn.Module) -> bool:
    """Whether `module` holds experts, as transformers decorates them, whose weights stand as the library reads them."""
    down = getattr(module, "down_proj", None)
    return (
        getattr(module, "is_transposed", True) is False
        and isinstance(down, nn.Parameter)
        and down.ndim == 3
        and all(any(weight.stride()) and weight.is_contiguous() for weight in module.parameters())
    )


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype in which experts of this kind compute; None for any other module."""
    if suits(module):
        return cast(torch.dtype, module.down_proj.dtype)
    return getattr(module, "hive_dtype", None)


def quantize(module: Any) -> None:
    """Give these experts 8-bit weights, each output of each expert with its own scale."""
    module.hive_dtype = module.down_proj.dtype
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weight_ENK, scale_EN = int8.quantized(getattr(module, name).detach())
        delattr(module, name)
        module.register_buffer(name, weight_ENK)
        module.register_buffer(f"{name}_scale", scale_EN)
    _select(module)


def install(module: Any, pool: Pool, rows_max: int) -> None:
    """Let the library make the products of these experts, for up to `rows_max` rows each."""
    module.hive_dtype = getattr(module, "hive_dtype", module.down_proj.dtype)
    module.hive_pool, module.hive_rows_max = pool, rows_max
    _select(module)


def _select(module: Any) -> None:
    ALL_EXPERTS_FUNCTIONS.register(HIVE, forward)
    module.config._experts_implementation = HIVE


def forward(self: Any, hidden_TH: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """[T, H]; what transformers' experts interface calls."""
    counts_E = torch.bincount(chosen_Tk.reshape(-1), minlength=self.num_experts).tolist()
    pool = getattr(self, "hive_pool", None)
    if (
        hidden_TH.dtype is not getattr(self, "hive_dtype", None)
        or hidden_TH.device.type != "cpu"
        or max(counts_E) > getattr(self, "hive_rows_max", 0)
        or (torch.is_grad_enabled() and hidden_TH.requires_grad)
    ):
        pool = None
    is_quantized = self.down_proj.dtype is torch.int8
    if self._is_expert_parallel or not (is_quantized or (pool is not None and self.down_proj.dtype is hidden_TH.dtype)):
        return ALL_EXPERTS_FUNCTIONS[OTHERWISE](self, hidden_TH, chosen_Tk, weights_Tk)  # type: ignore[no-any-return]
    experts_S, order_S = torch.sort(chosen_Tk.reshape(-1))

    def product(rows_SK: Tensor, name: str) -> Tensor:
        weight_ENK, parts = getattr(self, name), []
        for expert, (start, end) in enumerate(pairwise(accumulate(counts_E, initial=0))):
            if start < end:
                scale_N = getattr(self, f"{name}_scale")[expert] if is_quantized else None
                parts.append(_product(pool, rows_SK[start:end], weight_ENK[expert], scale_N))
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


def _product(pool: Pool | None, rows_SK: Tensor, weight_NK: Tensor, scale_N: Tensor | None) -> Tensor:
    if pool is not None:
        return pool.linear(rows_SK, weight_NK, None, scale_N)
    assert scale_N is not None, "only quantized experts come here without the library"
    return F.linear(rows_SK, int8.whole(weight_NK, scale_N, rows_SK.dtype))

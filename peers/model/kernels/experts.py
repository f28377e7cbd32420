"""Mixtures of experts through the library: each expert that was chosen multiplies its own rows, in place.

Owns one implementation of transformers' experts interface, registered as `hive`. Those that transformers brings for
a CPU either copy the weights of the chosen experts before they multiply, or go through torch's slower products.

Legend: T tokens, k experts per token, S = T · k rows sorted by expert, E experts, H hidden size, N outputs, K inputs.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from peers.model.kernels.pool import Pool

HIVE = "hive"
OTHERWISE = "grouped_mm"
"""transformers' own implementation for what the library does not do (gradients, another dtype or device)."""


def suits(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `module` holds experts, as transformers decorates them, whose weights the library can read in place."""
    down = getattr(module, "down_proj", None)
    return (
        getattr(module, "is_transposed", True) is False
        and isinstance(down, nn.Parameter)
        and down.ndim == 3
        and down.dtype is dtype
        and down.device.type == "cpu"
        and all(weight.is_contiguous() for weight in module.parameters())
    )


def install(module: Any, pool: Pool, rows_max: int) -> None:
    """Let the library make the products of these experts, for up to `rows_max` rows each."""
    ALL_EXPERTS_FUNCTIONS.register(HIVE, _forward)
    module.hive = (pool, module.down_proj.dtype, rows_max)
    module.config._experts_implementation = HIVE


def _forward(self: Any, hidden_TH: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    pool, dtype, rows_max = getattr(self, "hive", (None, None, 0))
    counts_E = torch.bincount(chosen_Tk.reshape(-1), minlength=self.num_experts).tolist()
    if (
        pool is None
        or hidden_TH.dtype is not dtype
        or self.down_proj.dtype is not dtype
        or hidden_TH.device.type != "cpu"
        or self._is_expert_parallel
        or max(counts_E) > rows_max
        or (torch.is_grad_enabled() and (hidden_TH.requires_grad or self.down_proj.requires_grad))
    ):
        return ALL_EXPERTS_FUNCTIONS[OTHERWISE](self, hidden_TH, chosen_Tk, weights_Tk)  # type: ignore[no-any-return]
    experts_S, order_S = torch.sort(chosen_Tk.reshape(-1))
    given_SH = hidden_TH[order_S // chosen_Tk.shape[1]]

    def product(rows_SK: Tensor, name: str) -> Tensor:
        weight_ENK = getattr(self, name)
        bounds = pairwise(accumulate(counts_E, initial=0))
        parts = [pool.linear(rows_SK[a:b], weight_ENK[e], None) for e, (a, b) in enumerate(bounds) if a < b]
        product_SN = torch.cat(parts)
        return product_SN + getattr(self, f"{name}_bias")[experts_S] if self.has_bias else product_SN

    if self.has_gate:
        inner_SK = self._apply_gate(product(given_SH, "gate_up_proj"))
    else:
        inner_SK = self.act_fn(product(given_SH, "up_proj"))
    out_SH = product(inner_SK.contiguous(), "down_proj")
    if self.has_post_expert_norm:
        out_SH = self.post_expert_norm(out_SH)
    out_SH = out_SH * weights_Tk.reshape(-1)[order_S, None]
    sorted_back_SH = torch.empty_like(out_SH)
    sorted_back_SH[order_S] = out_SH
    return sorted_back_SH.view(*chosen_Tk.shape, -1).sum(1).to(hidden_TH.dtype)

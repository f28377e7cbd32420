"""Linear layers and experts that go through the library where it is faster, and through torch everywhere else.

Owns the choice: every `nn.Linear` of a module on the CPU is seen, whatever the architecture; the library's results are
checked against torch, and both are timed on the layers themselves, before any of them is replaced. What changes is the
class of a layer, not its weights: names, `state_dict` and torch's own product stay as they were.

Legend: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.model.kernels import experts
from peers.model.kernels.packed import Format, PackedLinear
from peers.model.kernels.pool import INPUTS, Pool
from peers.model.support import one_line

logger = logging.getLogger(__name__)

ROWS_TIMED = (1, 4, 8, 12, 16, 32, 64, 256)
UNLIMITED = 1 << 62
MARGIN = 1.05
"""So much slower than torch a product may seem: two measurements are never quite alike."""
SAMPLE_BYTES = 64 << 20
"""Different layers are timed in turn, as in a forward, so that the processor's cache does not flatter anybody."""
TURNS_S = 0.1
"""Two products that take so long together are timed twice, not six times."""
OUTPUTS_CHECKED = 4096
"""Of a layer that has more, as a head has: so many from all over it."""
ERROR_MAX = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative distance from the exact product; measured: 2e-7 and 2e-3 (the rounding of the result)."""

Layer = nn.Linear | PackedLinear
Product = Callable[[Tensor, Layer], Tensor]


class FastLinear(nn.Linear):
    """A linear layer whose products of up to `rows_max` rows the library makes. Made by `accelerate` only."""

    pool: Pool
    dtype: torch.dtype
    """Of the weights when this was decided; a model that was moved to another one is torch's again."""
    rows_max: int
    bias_float32: Tensor | None

    def operands(self) -> tuple[str, Tensor, Tensor | None, Tensor | None]:
        """Format, weights, scales and bias, as the library takes them."""
        return "", self.weight, None, self.bias_float32

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's own name
        weight, values = self.weight, input.numel()
        if (
            not 0 < values <= self.rows_max * self.in_features
            or input.dtype is not self.dtype
            or weight.dtype is not self.dtype
            or weight.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        ):
            return F.linear(input, weight, self.bias)
        return self.pool.linear(input.contiguous(), weight, self.bias_float32)


def accelerate(module: nn.Module, pool: Pool, *, rows: int = ROWS_TIMED[-1]) -> int:
    """Let the library make the products of `module`'s linear layers where it is exact and faster than torch.

    Measures for about a second, with torch's threads as they are set; products of more than `rows` rows, below the last
    of ROWS_TIMED, are torch's without being timed. Returns the number of layers changed. One line of the log says so
    when there is nothing to gain.
    """
    kinds: dict[tuple[torch.dtype, Format | None], list[Layer]] = {}
    for layer in module.modules():
        if isinstance(layer, nn.Linear | PackedLinear) and _suits(layer):
            kinds.setdefault(_kind(layer), []).append(layer)
    changed = 0
    for (dtype, format_), layers in kinds.items():
        name = f"{dtype} and {format_.value}" if format_ else str(dtype)
        rows_max = _rows_max(pool, layers, rows)
        if not rows_max:
            logger.info("linear layers in %s stay with torch, which is faster here", name)
            continue
        for layer in layers:
            if not isinstance(layer, PackedLinear):
                layer.__class__ = FastLinear
                fast = cast(FastLinear, layer)
                fast.dtype, fast.bias_float32 = dtype, None if layer.bias is None else layer.bias.detach().float()
            layer.pool, layer.rows_max = pool, rows_max
            changed += 1
        for mixture in (mixture for mixture in module.modules() if experts.kind(mixture) == (dtype, format_)):
            experts.install(mixture, pool, rows_max)
        logger.info("%d linear layers in %s at memory's speed, up to %d rows", len(layers), name, rows_max)
    return changed


def accelerate_by_torch(module: nn.Module) -> int:
    """For where there is no library: multiply 8-bit weights by torch's own product, instead of making them whole first,
    where there is one, it is right, and it is faster. Returns the number of layers changed, with one line in the log.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[PackedLinear]] = {}
    for layer in module.modules():
        if isinstance(layer, PackedLinear) and layer.format is Format.INT8:
            kinds.setdefault((layer.dtype, layer.codes.device), []).append(layer)
    changed = 0
    for (dtype, device), layers in kinds.items():
        try:
            rows_max = _rows_max_of_torch(layers)
        except RuntimeError as error:  # torch knows no such product of this dtype on this device
            logger.info(
                "8-bit weights in %s on %s are made whole for every product: %s", dtype, device, one_line(error)
            )
            continue
        for layer in layers if rows_max else ():
            layer.scales_like, layer.rows_max = layer.scales.to(dtype), rows_max
            changed += 1
        logger.info("%d layers in %s and int8 multiply by torch's product, up to %d rows", len(layers), dtype, rows_max)
    return changed


def _rows_max_of_torch(layers: Sequence[PackedLinear]) -> int:
    """As `_rows_max`, for torch's own product against weights that are made whole. Raises RuntimeError."""
    largest = max(layers, key=lambda layer: layer.codes.numel())
    alike: list[Layer] = [layer for layer in layers if layer.codes.shape == largest.codes.shape]
    alike = alike[: max(2, SAMPLE_BYTES // largest.codes.nbytes)]
    weight_NK, scales_N, rows_max = largest.whole(torch.float32), largest.scales.to(largest.dtype), 0
    for rows in ROWS_TIMED:
        generator = torch.Generator().manual_seed(rows)
        input_MK = torch.randn(rows, largest.in_features, generator=generator).to(weight_NK.device, largest.dtype)
        right_MN = input_MK.double() @ weight_NK.double().T
        wrong_MN = torch._weight_int8pack_mm(input_MK, largest.codes, scales_N).double() - right_MN
        if not bool(wrong_MN.norm() <= ERROR_MAX[largest.dtype] * right_MN.norm()):
            return 0
        ours_s, whole_s = _fastest_s((_int8_product, _whole_product), input_MK, alike[: max(2, 64 // rows)])
        if ours_s > whole_s:
            break
        rows_max = rows
    return rows_max if rows_max < ROWS_TIMED[-1] else UNLIMITED


def _int8_product(input_MK: Tensor, layer: Layer) -> Tensor:
    assert isinstance(layer, PackedLinear)
    return torch._weight_int8pack_mm(input_MK, layer.codes, layer.scales.to(layer.dtype))


def _whole_product(input_MK: Tensor, layer: Layer) -> Tensor:
    return F.linear(input_MK, layer.weight)


def _kind(layer: Layer) -> tuple[torch.dtype, Format | None]:
    return (layer.dtype, layer.format) if isinstance(layer, PackedLinear) else (layer.weight.dtype, None)


def _suits(layer: Layer) -> bool:
    if isinstance(layer, PackedLinear):
        return layer.codes.device.type == "cpu" and layer.dtype in INPUTS
    if type(layer) is not nn.Linear:  # a subclass has reasons of its own
        return False
    weight = layer.weight
    hollow = not any(weight.stride())
    return weight.device.type == "cpu" and weight.dtype in INPUTS and weight.is_contiguous() and not hollow


def _rows_max(pool: Pool, layers: Sequence[Layer], limit: int) -> int:
    """The largest of ROWS_TIMED up to `limit` up to which the library is never slower; 0 when it is slower or wrong at
    one row."""
    shape = max(((layer.out_features, layer.in_features) for layer in layers), key=lambda shape: shape[0] * shape[1])
    alike = [layer for layer in layers if (layer.out_features, layer.in_features) == shape]
    first = alike[0].codes if isinstance(alike[0], PackedLinear) else alike[0].weight
    alike = alike[: max(2, SAMPLE_BYTES // first.nbytes)]
    for layer in alike:
        if isinstance(layer, PackedLinear):
            layer.pool = pool  # what torch multiplies by is unpacked by the library too
    rows_max = 0
    for rows in filter(limit.__ge__, ROWS_TIMED):
        input_MK = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(_kind(alike[0])[0])
        if not _exact(pool, input_MK, alike[0]):
            logger.error("the compiled linear products are wrong on this machine; torch's are used")
            return 0
        some = alike[: max(2, 64 // rows)]  # many rows take long, and hardly depend on memory
        ours_s, torch_s = _fastest_s((functools.partial(_product, pool), _torch_product), input_MK, some)
        if ours_s > MARGIN * torch_s:
            break
        rows_max = rows
    return rows_max if rows_max < ROWS_TIMED[-1] else UNLIMITED


def _product(pool: Pool, input_MK: Tensor, layer: Layer) -> Tensor:
    if isinstance(layer, PackedLinear):
        return pool.linear(input_MK, layer.codes, None, layer.scales, layer.format.value)
    return pool.linear(input_MK, layer.weight, None)


def _torch_product(input_MK: Tensor, layer: Layer) -> Tensor:
    return F.linear(input_MK, layer.weight)


def _exact(pool: Pool, input_MK: Tensor, layer: Layer) -> bool:
    weight_NK = layer.whole(torch.float32) if isinstance(layer, PackedLinear) else layer.weight
    every = -(-len(weight_NK) // OUTPUTS_CHECKED) | 1  # odd, so that each lane of a register has its turn
    right_MN = input_MK.double() @ weight_NK[::every].double().T
    wrong_MN = _product(pool, input_MK, layer)[:, ::every].double() - right_MN
    return bool(wrong_MN.norm() <= ERROR_MAX[input_MK.dtype] * right_MN.norm())


@torch.inference_mode()
def _fastest_s(products: Sequence[Product], input_MK: Tensor, layers: Sequence[Layer], turns: int = 6) -> list[float]:
    """Seconds for all of `layers` once, by each product in turn; whatever else the machine does only adds."""
    best_s = [[float("inf")] * len(layers) for _ in products]
    began_s = time.perf_counter()
    for turn in range(turns):
        if turn > 1 and time.perf_counter() - began_s > TURNS_S:
            break
        for product, fastest_s in zip(products, best_s, strict=True):
            for index, layer in enumerate(layers):
                started_s = time.perf_counter()
                product(input_MK, layer)
                if input_MK.is_cuda:
                    torch.cuda.synchronize(input_MK.device)
                fastest_s[index] = min(fastest_s[index], time.perf_counter() - started_s)
    return [sum(fastest_s) for fastest_s in best_s]

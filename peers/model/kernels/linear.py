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
from collections.abc import Callable, Generator, Sequence
from types import FunctionType
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.model.kernels import experts
from peers.model.kernels.packed import Format, PackedLinear, nf4_levels, times_row, whole
from peers.model.kernels.pool import INPUTS, Pool
from peers.model.support import one_line

logger = logging.getLogger(__name__)

ROWS_TIMED = (1, 4, 8, 12, 16, 32, 64, 256)
ROWS_ENOUGH = 16
"""From here on it is no more reading the weights alone that takes the time, and"""
PRODUCT_S = 0.05
"""what wins a product that takes longer than that is taken to win those of more rows: timing these would keep forwards
waiting."""
UNLIMITED = 1 << 62
MARGIN = 1.05
"""So much slower than torch a product may seem: two measurements are never quite alike."""
SAMPLE_BYTES = 64 << 20
"""Different layers are timed in turn, as in a forward, so that the processor's cache does not flatter anybody."""
TURNS_S = 0.1
"""Two products that take so long together are timed twice, not six times."""
OUTPUTS_CHECKED = 256
"""Of a layer that has more: so many from all over it. All of its weights in float64 would be a multiple of what it is.
"""
ERROR_MAX = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative distance from the exact product; measured: 2e-7 and 2e-3 (the rounding of the result)."""

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Something to be done in steps, and its result."""
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
    return _finished(accelerating(module, pool, rows=rows))


def accelerating(module: nn.Module, pool: Pool, *, rows: int = ROWS_TIMED[-1]) -> Steps[int]:
    """`accelerate`, in steps of a few products between which this thread may run forwards."""
    kinds: dict[tuple[torch.dtype, Format | None], list[Layer]] = {}
    for layer in module.modules():
        if isinstance(layer, nn.Linear | PackedLinear) and _suits(layer):
            kinds.setdefault(_kind(layer), []).append(layer)
    changed = 0
    for (dtype, format_), layers in kinds.items():
        name = f"{dtype} and {format_.value}" if format_ else str(dtype)
        rows_max = yield from _rows_max(pool, layers, rows)
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
    """For where there is no library: multiply by packed weights as torch can, instead of making them whole first, in
    the first of its ways that is right and faster than that for the most rows. Returns the number of layers changed,
    with one line in the log for each kind of them.

    Takes as long as torch's compiler where that has a part in it; forwards may run meanwhile.
    """
    return _finished(accelerating_by_torch(module))


def accelerating_by_torch(module: nn.Module) -> Steps[int]:
    """`accelerate_by_torch`, in steps between which this thread may run forwards."""
    kinds: dict[tuple[Format, torch.dtype, torch.device], list[PackedLinear]] = {}
    for layer in module.modules():
        if isinstance(layer, PackedLinear):
            kinds.setdefault((layer.format, layer.dtype, layer.codes.device), []).append(layer)
    changed = 0
    for (format_, dtype, device), layers in kinds.items():
        name = f"{len(layers)} layers in {dtype} and {format_.value} on {device}"
        rows_max, by_torch, why = 0, None, "nothing else is right and faster here"
        for way in _ways(format_, device):
            try:
                rows = yield from _rows_max_of_torch(way, layers)
            except Exception as error:  # torch has no such product here; or whatever a compiler, or its work, may raise
                logger.debug("%s: a way to multiply failed", name, exc_info=True)
                why = one_line(error)
                continue
            if rows > rows_max:
                rows_max, by_torch = rows, way
        if by_torch is None:
            logger.info("%s are made whole for every product: %s", name, why)
            continue
        for layer in layers:
            layer.by_torch = by_torch
            layer.rows_max = rows_max  # last: from now on it is used
        changed += len(layers)
        logger.info("%s multiply %s, up to %d rows", name, by_torch.__name__.strip("_"), rows_max)
    return changed


def _ways(format_: Format, device: torch.device) -> list[Product]:
    ways: list[Product] = [_by_torchs_own_product] if format_ is Format.INT8 else []
    return [*ways, _by_a_compiled_kernel] if device.type == "cuda" else ways


def _by_torchs_own_product(input_MK: Tensor, layer: Layer) -> Tensor:
    assert isinstance(layer, PackedLinear)
    return torch._weight_int8pack_mm(input_MK, layer.codes, layer.scales_for_torch)


def _by_a_compiled_kernel(input_MK: Tensor, layer: Layer) -> Tensor:
    assert isinstance(layer, PackedLinear)
    product = _compiled_times_row(layer.format, input_MK.device)
    weights = layer.codes, layer.scales, layer.format, nf4_levels(input_MK.device)
    return torch.stack([product(row_K, *weights) for row_K in input_MK]).to(input_MK.dtype)


@functools.cache
def _compiled_times_row(format_: Format, device: torch.device) -> Callable[..., Tensor]:
    """With code of its own, as torch's compiler keeps only so many results for each."""
    return torch.compile(FunctionType(times_row.__code__.replace(), times_row.__globals__), dynamic=True)


@torch.inference_mode()  # as in the forwards to come: for others a compiler would do its work again
def _rows_max_of_torch(way: Product, layers: Sequence[PackedLinear]) -> Steps[int]:
    """As `_rows_max`, against weights that are made whole. Raises what `way` raises."""
    largest = max(layers, key=lambda layer: layer.codes.numel())
    alike: list[Layer] = [layer for layer in layers if layer.codes.shape == largest.codes.shape]
    alike, rows_max = alike[: max(2, SAMPLE_BYTES // largest.codes.nbytes)], 0
    for rows in ROWS_TIMED:
        input_MK = torch.randn(rows, largest.in_features, generator=torch.Generator().manual_seed(rows))
        input_MK = input_MK.to(largest.codes.device, largest.dtype)
        if not _exact(way, input_MK, largest):
            return 0
        some = alike[: max(2, 64 // rows)]
        ours_s, whole_s = _fastest_s((way, _whole_product), input_MK, some)
        if ours_s > whole_s:
            break
        if _tells(rows, whole_s / len(some)):
            return UNLIMITED
        rows_max = rows
        yield
    return rows_max


def _tells(rows: int, product_s: float) -> bool:
    """Whether what wins a product of so many rows, which takes so long, is taken to win all larger ones."""
    return rows == ROWS_TIMED[-1] or (rows >= ROWS_ENOUGH and product_s > PRODUCT_S)


def _finished(steps: Steps[T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as over:
            result: T = over.value
            return result


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


def _rows_max(pool: Pool, layers: Sequence[Layer], limit: int) -> Steps[int]:
    """The largest of ROWS_TIMED up to `limit` up to which the library is never slower; 0 when it is slower or wrong at
    one row."""
    shape = max(((layer.out_features, layer.in_features) for layer in layers), key=lambda shape: shape[0] * shape[1])
    alike = [layer for layer in layers if (layer.out_features, layer.in_features) == shape]
    first = alike[0].codes if isinstance(alike[0], PackedLinear) else alike[0].weight
    alike = alike[: max(2, SAMPLE_BYTES // first.nbytes)]
    for layer in alike:
        if isinstance(layer, PackedLinear):
            layer.pool = pool  # what torch multiplies by is unpacked by the library too
    rows_max, product = 0, functools.partial(_product, pool)
    for rows in filter(limit.__ge__, ROWS_TIMED):
        input_MK = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(_kind(alike[0])[0])
        if not _exact(product, input_MK, alike[0]):
            logger.error("the compiled linear products are wrong on this machine; torch's are used")
            return 0
        some = alike[: max(2, 64 // rows)]  # many rows take long, and hardly depend on memory
        ours_s, torch_s = _fastest_s((product, _torch_product), input_MK, some)
        if ours_s > MARGIN * torch_s:
            break
        rows_max = rows
        if _tells(rows, torch_s / len(some)):
            return UNLIMITED if limit >= ROWS_TIMED[-1] else limit
        yield
    return rows_max


def _product(pool: Pool, input_MK: Tensor, layer: Layer) -> Tensor:
    if isinstance(layer, PackedLinear):
        return pool.linear(input_MK, layer.codes, None, layer.scales, layer.format.value)
    return pool.linear(input_MK, layer.weight, None)


def _torch_product(input_MK: Tensor, layer: Layer) -> Tensor:
    return F.linear(input_MK, layer.weight)


def _exact(product: Product, input_MK: Tensor, layer: Layer) -> bool:
    """Compared on the CPU: not every device has numbers that are exact enough."""
    every = -(-layer.out_features // OUTPUTS_CHECKED) | 1  # odd, so that each lane of a register has its turn
    some = torch.arange(layer.out_features - 1, -1, -every)  # the last one may have a register of its own
    if isinstance(layer, PackedLinear):
        codes, scales = layer.codes[some].cpu(), layer.scales[some].cpu()
        weight_nK = whole(codes, scales, layer.format, layer.in_features, torch.float32)
    else:
        weight_nK = layer.weight[some]
    right_Mn = input_MK.cpu().double() @ weight_nK.double().T
    wrong_Mn = product(input_MK, layer).cpu()[:, some].double() - right_Mn
    return bool(wrong_Mn.norm() <= ERROR_MAX[input_MK.dtype] * right_Mn.norm())


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
                if input_MK.device.type != "cpu":
                    torch.accelerator.synchronize(input_MK.device)
                fastest_s[index] = min(fastest_s[index], time.perf_counter() - started_s)
    return [sum(fastest_s) for fastest_s in best_s]

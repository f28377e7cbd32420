"""How fast this machine may be at most with a block, before any block is here: by products with as many weights, of
torch and of the library, as a block has the faster ones.

Owns the guess. It is for a choice that comes before there is anything to measure (`probe`), and errs on one side: what
a block does besides reading its weights is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peers.model.kernels import Pool
from peers.model.kernels.build import NoLibrary
from peers.model.kernels.pool import INPUTS

ROUGH_BYTES: Final = 64 << 20
"""More than most processors' caches hold."""
ROUGH_S: Final = 0.2
"""Of products with one number of rows, torch's and the library's in turn, of which the fastest counts; one of each is
made in any case."""
ROWS: Final = 16
_WIDTH: Final = 1024
_Product = Callable[[Tensor, Tensor], Tensor]
"""Of rows and weights."""


class Speed(NamedTuple):
    """As in a record."""

    decode_s_per_block: float
    prefill_s_per_token_block: float


def rough_speed(
    block_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    threads: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Of a block of so many bytes whose weights are all used for every token. Takes about half a second."""
    products: list[_Product] = [F.linear]
    if device.type == "cpu" and dtype in INPUTS:
        with suppress(NoLibrary):  # as the engine will say
            library = Pool(threads)
            products.append(lambda input_RI, weight_OI: library.linear(input_RI, weight_OI, None))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            weight_OI = torch.ones(ROUGH_BYTES // dtype.itemsize // _WIDTH, _WIDTH, dtype=dtype, device=device)
            one_s, rows_s = (_fastest_s(products, rows, weight_OI, clock) for rows in (1, ROWS))
    finally:
        torch.set_num_threads(before)
    scale = block_bytes / ROUGH_BYTES
    return Speed(scale * one_s, scale * max(0.0, rows_s - one_s) / (ROWS - 1))


def _fastest_s(products: Sequence[_Product], rows: int, weight_OI: Tensor, clock: Callable[[], float]) -> float:
    input_RI = torch.ones(rows, _WIDTH, dtype=weight_OI.dtype, device=weight_OI.device)
    for product in products:
        product(input_RI, weight_OI)[0, 0].item()  # allocates, and waits for a device that computes by itself
    until_s = clock() + ROUGH_S
    times_s: list[float] = []
    while not times_s or clock() < until_s:
        for product in products:
            began_s = clock()
            product(input_RI, weight_OI)[0, 0].item()
            times_s.append(clock() - began_s)
    return min(times_s)

"""How fast this machine may be at most with a block, before any block is here: by products with as many weights.

Owns the guess. It is for a choice that comes before there is anything to measure (`probe`), and errs on one side: what
a block does besides reading its weights is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

import torch

ROUGH_BYTES: Final = 64 << 20
"""More than most processors' caches hold."""
ROUGH_S: Final = 0.2
"""Of products with one number of rows, of which the fastest counts; one of them is made in any case."""
ROWS: Final = 16
_WIDTH: Final = 1024


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
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            weight_IO = torch.ones(_WIDTH, ROUGH_BYTES // dtype.itemsize // _WIDTH, dtype=dtype, device=device)
            one_s, rows_s = (_fastest_s(rows, weight_IO, clock) for rows in (1, ROWS))
    finally:
        torch.set_num_threads(before)
    scale = block_bytes / ROUGH_BYTES
    return Speed(scale * one_s, scale * max(0.0, rows_s - one_s) / (ROWS - 1))


def _fastest_s(rows: int, weight_IO: torch.Tensor, clock: Callable[[], float]) -> float:
    input_RI = torch.ones(rows, _WIDTH, dtype=weight_IO.dtype, device=weight_IO.device)
    (input_RI @ weight_IO)[0, 0].item()  # allocates, and waits for a device that computes by itself
    until_s = clock() + ROUGH_S
    times_s: list[float] = []
    while not times_s or clock() < until_s:
        began_s = clock()
        (input_RI @ weight_IO)[0, 0].item()
        times_s.append(clock() - began_s)
    return min(times_s)

from __future__ import annotations

import itertools

import pytest
import torch

from peers.runtime.rough import ROUGH_BYTES, ROUGH_S, ROWS, rough_speed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_takes_its_part_of_the_fastest_product_and_of_what_more_rows_add(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    # a deadline, then each product from one reading to the next: one of one row, one of ROWS, each beyond its deadline
    readings = [0.0, 0.0, ROUGH_S, ROUGH_S, 0.0, 0.0, 4 * ROUGH_S, 4 * ROUGH_S]
    clock = itertools.chain(readings).__next__
    found = rough_speed(ROUGH_BYTES // 2, dtype, torch.device("cpu"), threads=1, clock=clock)
    assert found.decode_s_per_block == pytest.approx(ROUGH_S / 2)
    assert found.prefill_s_per_token_block == pytest.approx(3 * ROUGH_S / 2 / (ROWS - 1))
    assert torch.get_num_threads() == threads

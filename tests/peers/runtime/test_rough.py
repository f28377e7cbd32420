from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from peers.model.kernels.build import NoLibrary
from peers.runtime import rough
from peers.runtime.rough import ROUGH_BYTES, ROUGH_S, ROWS, rough_speed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("library_first", [None, False, True])
def test_a_block_takes_its_part_of_the_fastest_product_and_of_what_more_rows_add(
    dtype: torch.dtype, library_first: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torch's and the library's, where there is one."""
    threads = torch.get_num_threads()

    def readings(torch_s: float) -> Iterator[float]:
        """A deadline, then each product from one reading to the next, the last one beyond the deadline."""
        yield 0.0
        times_s = [torch_s] if library_first is None else [torch_s, 3 * torch_s][:: -1 if library_first else 1]
        for seconds in times_s:
            yield from (0.0, seconds)
        yield 2 * ROUGH_S

    if library_first is None:

        def none(threads: int) -> None:
            raise NoLibrary("there is no C++ compiler")

        monkeypatch.setattr(rough, "Pool", none)
    clock = itertools.chain(readings(ROUGH_S), readings(4 * ROUGH_S)).__next__
    found = rough_speed(ROUGH_BYTES // 2, dtype, torch.device("cpu"), threads=1, clock=clock)
    assert found.decode_s_per_block == pytest.approx(ROUGH_S / 2)
    assert found.prefill_s_per_token_block == pytest.approx(3 * ROUGH_S / 2 / (ROWS - 1))
    assert torch.get_num_threads() == threads

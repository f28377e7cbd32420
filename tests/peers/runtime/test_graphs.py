"""Steps from tensors of fixed shapes say what the program says, whoever's they are and however many.

Here, without a GPU, what stands for a graph runs the forward again; `tests/gpu` has real ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peers.runtime import graphs
from peers.runtime.cache import PagedCache, open_cache
from routing.ids import BlockSpan
from tests.peers.runtime.spans import Local, assert_graphs_say_the_same


def again(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    output = run().clone()

    def repeat() -> None:
        output.copy_(run())

    return repeat, output


def opened(family: str, record: graphs.Record, monkeypatch: pytest.MonkeyPatch) -> PagedCache:
    monkeypatch.setattr(graphs, "COUNTS", (1, 2, 4))
    monkeypatch.setattr(graphs, "REACHES", (8, 64))
    monkeypatch.setattr(graphs, "_seconds", lambda *_: 0.0)
    with torch.inference_mode():
        cache, _ = open_cache(Local(family, BlockSpan(1, 3)).cut(), 64, 4, None, record)
        for _ in cache.prepare():
            pass
    assert isinstance(cache, PagedCache)
    return cache


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3", "gpt-oss", "deepseek-v3", "gpt2", "opt", "llama-dynamic"]
)
@torch.inference_mode()
def test_steps_of_a_family_say_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(family, again, monkeypatch)
    if cache._programs is None:
        assert cache._graphs is None
        return
    made = cache._graphs
    assert made is not None
    assert_graphs_say_the_same(cache, 4)
    assert len(made._graphs) == 6
    assert all(made._graphs.values())

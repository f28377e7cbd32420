"""Steps from tensors of fixed shapes say what the program says, whoever's they are and however many.

Here, without a GPU, what stands for a graph runs the forward again; `tests/gpu` has real ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from peers.runtime import cache as cache_module
from peers.runtime import flex, graphs
from peers.runtime.attention import Whole
from peers.runtime.cache import PagedCache, open_cache
from peers.runtime.flex import Flex
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
    monkeypatch.setattr(graphs, "fastest_s", lambda *_: 0.0)
    with torch.inference_mode():
        cache, _ = open_cache(Local(family, BlockSpan(1, 3)).cut(), 64, 4, None, record)
        for _ in cache.prepare():
            pass
    assert isinstance(cache, PagedCache)
    return cache


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3", "gemma4", "gpt-oss", "deepseek-v3", "gpt2", "opt", "llama-dynamic"]
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


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "deepseek-v3", "gemma4"])  # caps, sinks, widths
def test_all_sessions_of_a_forward_may_attend_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(family, again, monkeypatch)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # no compiler: its definition
    monkeypatch.setattr(flex, "BLOCK", 16)
    monkeypatch.setattr(cache_module, "DIFFERENCE", 1e-4)
    monkeypatch.setattr(cache_module, "fastest_s", lambda *_: 0.0)
    cache.attend_at_once(whole := Flex(flex_attention.flex_attention))
    assert cache._whole is whole


def broken(*_: object) -> Tensor:
    raise RuntimeError("no compiler\nat all")


@pytest.mark.parametrize(
    ("whole", "seconds"), [(broken, 0.0), (lambda _, q, *__: q.transpose(1, 2) * 2, 0.0), (None, 1.0)]
)
def test_where_a_kernel_fails_is_wrong_or_slow_sessions_attend_one_by_one(
    whole: Whole | None, seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = opened("llama", again, monkeypatch)
    taken = iter((seconds, 0.0))
    monkeypatch.setattr(cache_module, "fastest_s", lambda *_: next(taken))
    caplog.clear()
    caplog.set_level("INFO")
    cache.attend_at_once(whole or (lambda *_: None))
    assert cache._whole is None
    assert ["sessions attend one by one" in record.message for record in caplog.records] == [True]

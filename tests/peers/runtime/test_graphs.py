"""Steps from tensors of fixed shapes say what the program says, whoever's they are and however many.

Here, without a GPU, what stands for a graph runs the forward again; `tests/gpu` has real ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from peers.runtime import cache as cache_module
from peers.runtime import engine as engine_module
from peers.runtime import flex, graphs
from peers.runtime.attention import Whole
from peers.runtime.cache import Chunk, PagedCache, open_cache
from peers.runtime.flex import Flex
from routing.ids import BlockSpan
from tests.peers.runtime.spans import Local, Sequence, assert_graphs_say_the_same, running

SPAN = BlockSpan(1, 3)


def again(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    output = run().clone()

    def repeat() -> None:
        output.copy_(run())

    return repeat, output


def opened(
    family: str, record: graphs.Record, monkeypatch: pytest.MonkeyPatch, *, max_bytes: int = 1 << 20
) -> PagedCache:
    monkeypatch.setattr(graphs, "COUNTS", (1, 2, 4))
    monkeypatch.setattr(graphs, "REACHES", (8, 64, 256))
    monkeypatch.setattr(graphs, "fastest_s", lambda *_: 0.0)
    with torch.inference_mode():
        cache, _ = open_cache(Local(family, SPAN).cut(), 200, 4, None, record, graph_bytes=max_bytes)
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


class Steps:
    """Sessions that hold so many positions, and take one more each."""

    def __init__(self, cache: PagedCache, *lengths: int) -> None:
        self.cache = cache
        for session, length in enumerate(lengths):
            cache._pages.open(session)
            cache._pages.grow(session, length + 1)
        self.chunks = [Chunk(session=session, start=length, tokens=1) for session, length in enumerate(lengths)]
        self.hidden_TH = torch.randn(len(lengths), 32, generator=torch.Generator().manual_seed(0))

    def bucket(self) -> tuple[int, int] | None:
        """Of the graph by which they go, if any."""
        used: list[tuple[int, int]] = []
        made = self.cache._graphs
        assert made is not None
        with pytest.MonkeyPatch.context() as patch:
            for bucket, graph in made._graphs.items():
                if graph is not None:
                    patch.setattr(graph, "repeat", functools.partial(used.append, bucket))
            self.cache.forward(self.chunks, self.hidden_TH, SPAN, 0)
        return used[0] if used else None


@torch.inference_mode()
def test_what_steps_want_beyond_what_was_recorded_is_recorded_between_forwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records: list[object] = []

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        records.append(run)
        return again(run)

    cache = opened("llama", record, monkeypatch)
    steps = Steps(cache, 100, 100)
    before = len(records)
    assert cache.prepared
    assert [steps.bucket(), steps.bucket()] == [None, None]
    assert (cache.prepared, len(records)) == (False, before)
    for _ in cache.prepare():
        pass
    assert (cache.prepared, len(records)) == (True, before + 1)
    assert steps.bucket() == (2, 256)


async def test_the_engine_records_it_beside_the_sessions_that_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "COUNTS", (1, 2))
    monkeypatch.setattr(graphs, "REACHES", (8, 16, 128))
    monkeypatch.setattr(graphs, "fastest_s", lambda *_: 0.0)
    monkeypatch.setattr(engine_module, "recorder_for", lambda _: again)
    local = Local("llama", SPAN)
    async with running(local.cut()) as engine:
        cache = engine._cache
        assert isinstance(cache, PagedCache)
        await engine.prepared()
        sequence = Sequence(local, engine)
        await sequence.step(20)
        while cache._graphs is None or cache._graphs._graphs.get((1, 128)) is None:
            assert sequence.length < 100
            await sequence.step(1)
        await sequence.step(1)


@torch.inference_mode()
def test_a_long_session_does_not_make_short_ones_gather_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened("llama", again, monkeypatch)
    assert Steps(cache, 60, 1, 1, 1).bucket() == (4, 64)
    cache = opened("llama", again, monkeypatch)
    assert Steps(cache, 20, 1, 1, 1).bucket() is None
    assert cache.prepared


def full(*_: object) -> Tensor:
    raise torch.OutOfMemoryError("no more")


@pytest.mark.parametrize("where", ["in the first forward", "while it records", "too large"])
@torch.inference_mode()
def test_where_memory_does_not_do_steps_go_by_the_program(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record, max_bytes = again, 1 << 20
    if where == "in the first forward":
        monkeypatch.setattr(graphs.Rows, "run", full)
    elif where == "while it records":
        record = full  # type: ignore[assignment]
    else:
        max_bytes = 4 * 64 * 2 * 2 * (8 + 8) * 4 - 1  # rows, positions, copies, heads, widths, bytes
    cache = opened("llama", record, monkeypatch, max_bytes=max_bytes)
    assert cache._graphs is not None
    made = {bucket for bucket, graph in cache._graphs._graphs.items() if graph is not None}
    every = {(count, reach) for count in (1, 2, 4) for reach in (8, 64)}
    assert made == (every - {(4, 64)} if where == "too large" else set())
    assert Steps(cache, 60, 60, 60).bucket() is None
    assert cache.prepared


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

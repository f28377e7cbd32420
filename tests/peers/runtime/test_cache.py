"""Spans of many architectures, in ragged batches or alone, against the whole local model."""

from __future__ import annotations

import psutil
import pytest
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from peers.model.cutting import SpanModel
from peers.model.kernels import Pool
from peers.runtime import attention, cache
from peers.runtime.cache import PagedCache, SoloCache, bytes_per_token, open_cache
from peers.runtime.scheduler import STEP_TOKENS
from peers.runtime.works import Work
from peers.wire.messages import MAX_POSITIONS
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES, NUM_BLOCKS
from tests.peers.runtime.spans import (
    ALICE,
    Local,
    Sequence,
    assert_same,
    new_session,
    random_ids,
    running,
    together,
)

SPAN = BlockSpan(1, 4)
UNLIKE = ["gemma4", "gemma4-moe", "mimo-v2", "dots3-note"]
"""Layers that slide store other things than those that see everything."""
PLUGGABLE = ["llama", "mistral", "gemma2", "gpt-oss", "deepseek-v3", "opt", "biogpt", *UNLIKE]
ALONE = ["llama4", "bloom", "falcon-alibi", "gptj"]
INDEXED = ["deepseek-v32", "dots3-note-indexed"]


@pytest.mark.parametrize("family", PLUGGABLE + ALONE)
async def test_ragged_batches_of_prefills_and_decodes_equal_the_local_model(family: str) -> None:
    await assert_ragged_batches_equal_the_local_model(family)


async def assert_ragged_batches_equal_the_local_model(family: str) -> None:
    local = Local(family, SPAN)
    async with running(local.cut()) as engine:
        assert isinstance(engine._cache, PagedCache if FAMILIES[family].pluggable else SoloCache)
        long, middle, short = (Sequence(local, engine, seed=seed) for seed in (100, 200, 300))
        await together(long.step(40), middle.step(20), short.step(6))  # more than one forward holds
        await together(long.step(1), middle.step(1), short.step(1))
        child = middle.fork(13)  # inside a page
        long.roll_back(37)
        await together(long.step(4), middle.step(1), child.step(2), short.step(9))
        await together(long.step(1), middle.step(1), child.step(1), short.step(1))


@pytest.mark.parametrize("family", INDEXED)
async def test_sparse_attention_that_is_rolled_back_is_that_of_transformers_with_the_same_steps(family: str) -> None:
    """An indexer's scores are often zero, and which of equal ones it takes depends on what stands behind them: locally,
    too, the first 13 positions of a prompt of 20 are not those of a prompt of 13."""
    local, session = Local(family, SPAN), new_session()
    async with running(local.cut()) as engine:
        assert isinstance(engine._cache, SoloCache)
        cache = DynamicCache(config=local.model.config)
        # as it would be rolled back if every layer could be
        cache.layers = [DynamicLayer() if layer.is_sliding else layer for layer in cache.layers]
        for start, tokens in ((0, 20), (13, 4), (17, 1), (18, 1), (5, 30), (34, 1), (30, 5)):
            cache.crop(start - cache.get_seq_length())
            hidden, expected = local.run(random_ids(tokens, start), cache)
            done = await engine.run(Work(session=session, owner=ALICE, start=start, hidden=hidden, span=SPAN))
            assert_same(done.hidden, expected)


@pytest.mark.parametrize("family", INDEXED)
async def test_sparse_attention_without_equal_scores_equals_the_local_model_after_rollbacks_and_forks(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "relu", F.softplus)
    await assert_ragged_batches_equal_the_local_model(family)


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope"])
async def test_sessions_of_unlike_rotary_regimes_do_not_disturb_each_other(family: str) -> None:
    local = Local(family, SPAN)
    async with running(local.cut()) as engine:
        sequences = [Sequence(local, engine, seed=100 * i) for i in range(4)]
        await together(*(sequence.step(tokens) for sequence, tokens in zip(sequences, (50, 30, 14, 5), strict=True)))
        for _ in range(4):  # the third crosses its model's original 16 positions
            await together(*(sequence.step(1) for sequence in sequences))


@pytest.mark.parametrize("family", ["llama", "bloom"])
async def test_a_route_may_use_a_part_of_the_span(family: str) -> None:
    local, narrow = Local(family, BlockSpan(0, NUM_BLOCKS)), Local(family, SPAN)
    async with running(local.cut()) as engine:
        wide, part = Sequence(local, engine), Sequence(narrow, engine)
        for tokens in (7, 1, 1):
            await together(wide.step(tokens), part.step(tokens))


def span_of(family: str) -> SpanModel:
    return Local(family, SPAN).cut()


def test_the_cost_of_a_position_is_what_the_layers_keep() -> None:
    assert bytes_per_token(span_of("llama")) == len(SPAN) * 2 * (8 + 8) * 4
    assert bytes_per_token(span_of("deepseek-v3")) == len(SPAN) * 4 * (12 + 6) * 4
    assert bytes_per_token(span_of("bloom")) == len(SPAN) * 4 * (8 + 8) * 4


def test_pages_of_slots_are_not_touched_before_they_are_used() -> None:
    model = span_of("llama")
    before = psutil.Process().memory_info().rss
    opened, _ = open_cache(model, 1 << 16, 16)
    assert isinstance(opened, PagedCache)
    assert bytes_per_token(model) << 20 > 400e6
    assert psutil.Process().memory_info().rss - before < 50e6


def test_a_model_on_which_ragged_attention_is_wrong_runs_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "RaggedBatch", _Forgetful)
    assert isinstance(open_cache(span_of("llama"), 4, 4)[0], SoloCache)
    assert "sessions run alone" in caplog.text


def test_a_compiled_attention_that_says_something_else_is_used_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "_pays", lambda *_: None)
    opened, _ = open_cache(span_of("llama"), 4, 4, library=Pool(1))
    assert isinstance(opened, PagedCache)
    assert opened._library is None
    assert "the compiled attention is wrong" in caplog.text


class _Forgetful(attention.RaggedBatch):
    def attend(self, q_1HTK: torch.Tensor, *args: object) -> torch.Tensor:
        return super().attend(q_1HTK * 1.5, *args)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("taken_s", "attends", "said"),
    [
        ((1.0, 1.5, 1.0, 1.5), MAX_POSITIONS, None),
        ((1.0, 1.5, 2.0, 1.5), STEP_TOKENS, "pieces of prompts of llama attend by torch"),
        ((2.0, 1.5), 0, "steps and pieces of prompts of llama attend by torch"),
    ],
    ids=["nowhere", "pieces", "steps"],
)
async def test_where_the_librarys_attention_loses_torchs_is_kept(
    taken_s: tuple[float, ...],
    attends: int,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`taken_s`: by the library and by torch, for steps and then for pieces."""
    caplog.set_level("INFO")
    seconds = iter(taken_s)
    monkeypatch.setattr(cache, "fastest_s", lambda run, _: run() is not None and next(seconds))
    local = Local("llama", SPAN)
    async with running(local.cut()) as engine:
        opened = engine._cache
        assert isinstance(opened, PagedCache)
        assert opened._library is not None
        assert opened._attends == attends
        assert said in caplog.text if said else "attend by torch" not in caplog.text
        long, short = Sequence(local, engine, seed=1), Sequence(local, engine, seed=2)
        await together(long.step(40), short.step(3))
        await together(long.step(1), short.step(1))


def test_a_layer_with_unknown_arguments_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_HARMLESS", frozenset())
    assert isinstance(open_cache(span_of("llama"), 4, 4)[0], SoloCache)

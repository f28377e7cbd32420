"""What a start measures decides which way forwards are computed, and never what they say."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention

from peers.model.kernels import linear
from peers.runtime import cache as cache_module
from peers.runtime import engine as engine_module
from peers.runtime import flex, graphs
from peers.runtime.cache import PagedCache
from peers.runtime.engine import Engine
from peers.runtime.flex import Flex
from routing.ids import BlockSpan
from tests.peers.runtime.spans import Local, Sequence, running, together
from tests.peers.runtime.test_graphs import again

SPAN = BlockSpan(1, 3)
ON_A_CPU = {"products by the library", "attention by the library"}
ON_A_GPU = {"a graph", "one kernel"}


def chosen(engine: Engine) -> set[tuple[str, bool]]:
    """What was, and what was not."""
    cache = engine._cache
    assert isinstance(cache, PagedCache)
    if cache._library is not None:
        attends = cache._attends > 0
        return {("products by the library", engine._accelerated), ("attention by the library", attends)}
    assert cache._graphs is not None
    made = {("a graph", graph is not None) for graph in cache._graphs._graphs.values()}
    return made | {("one kernel", cache._whole is not None)}


async def run_sessions(local: Local, rng: random.Random, *, on_a_gpu: bool) -> set[tuple[str, bool]]:
    """Whose outputs are checked, on an engine that finds faster what chance wants; returns what it has chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_fastest_s", lambda products, *_: [rng.random() for _ in products])
        for module in (cache_module, graphs):
            patch.setattr(module, "fastest_s", lambda *_: rng.random())
        if on_a_gpu:  # as in `test_graphs`
            patch.setattr(engine_module, "pool_for", lambda *_: None)
            patch.setattr(engine_module, "recorder_for", lambda _: again)
            patch.setattr(graphs, "COUNTS", (1, 2, 4))
            patch.setattr(graphs, "REACHES", (8, 64, 256))
            patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
            patch.setattr(flex, "BLOCK", 16)
        async with running(local.cut(), token_budget=128) as engine:
            await engine.prepared()
            if on_a_gpu:
                assert isinstance(engine._cache, PagedCache)
                engine._cache.attend_at_once(Flex(flex_attention.flex_attention))
            long, middle, short = (Sequence(local, engine, seed=seed) for seed in (100, 200, 300))
            await together(long.step(90), middle.step(20), short.step(6))
            for _ in range(3):
                await together(long.step(1), middle.step(1), short.step(1))
            child = middle.fork(13)
            long.roll_back(87)
            await together(long.step(4), middle.step(1), child.step(2), short.step(9))
            await short.step(1)
            short.at_once()
            return chosen(engine)


@pytest.mark.parametrize("on_a_gpu", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_whichever_is_found_faster_sessions_say_what_the_whole_model_says(family: str, on_a_gpu: bool) -> None:
    local, seen = Local(family, SPAN), Counter[tuple[str, bool]]()

    @settings(max_examples=8, deadline=None)
    @given(seed=st.integers(0, 1 << 32))
    def check(seed: int) -> None:
        seen.update(asyncio.run(run_sessions(local, random.Random(seed), on_a_gpu=on_a_gpu)))

    check()
    assert seen.keys() == {(what, was) for what in (ON_A_GPU if on_a_gpu else ON_A_CPU) for was in (True, False)}

"""In bfloat16 runs that are batched, cut, preempted or begun with what another one computed stay within a stated bound
(`spans.ERRORS`) of the plain model's, which in float32 they equal."""

from __future__ import annotations

import pytest
import torch

from peers.errors import Preempted
from routing.ids import BlockSpan
from tests.peers.runtime.spans import Local, Sequence, running, together
from tests.peers.runtime.test_engine_prefixes import BLOCK, Prompted

SPAN = BlockSpan(1, 4)


@pytest.fixture(scope="module", params=["llama", "gemma2", "gemma3"])
def local(request: pytest.FixtureRequest) -> Local:
    return Local(request.param, SPAN, dtype=torch.bfloat16)


@pytest.mark.parametrize("recorded", [False, True])
async def test_in_batches_and_in_pieces(local: Local, recorded: bool) -> None:
    async with running(local.cut()) as engine:
        if recorded:
            await engine.prepared()
        long, middle, short = (Sequence(local, engine, seed=seed) for seed in (100, 200, 300))
        await together(long.step(90), middle.step(20), short.step(6))  # more than one forward holds
        for _ in range(3):
            await together(long.step(1), middle.step(1), short.step(1))
        child = middle.fork(13)
        long.roll_back(87)
        await together(long.step(4), middle.step(1), child.step(2), short.step(9))


async def test_after_a_preemption(local: Local) -> None:
    async with running(local.cut(), cache_tokens=200) as engine:
        old, young = Sequence(local, engine, seed=1), Sequence(local, engine, seed=2)
        await old.step(20)
        await young.step(60)
        await old.step(130)
        with pytest.raises(Preempted):
            await young.step(1)
        young.steps.pop()
        engine.release(old.session)
        await young.replay()
        await young.step(1)


async def test_behind_a_prefix_that_another_one_computed(local: Local) -> None:
    async with running(local.cut(), cache_tokens=1024) as engine:
        first, second = (Prompted(local, engine, seed=seed) for seed in (1, 20))
        assert first.begin(2 * BLOCK + 9) == 0
        await first.send_rest()
        assert second.begin(2 * BLOCK + 5) == 2 * BLOCK
        await together(second.send_rest(), first.step(3))
        await together(second.step(1), first.step(1))

"""What a peer says about its own speed."""

from __future__ import annotations

import time

from peers.runtime.probe import measure_speed
from routing.ids import BlockSpan
from tests.peers.runtime.spans import Local, running


async def test_speed_is_measured_quickly_and_leaves_nothing_behind() -> None:
    async with running(Local("gpt2", BlockSpan(0, 2)).cut(), cache_tokens=64) as engine:
        began_s = time.perf_counter()
        speed = await measure_speed(engine)
        assert time.perf_counter() - began_s < 3
        assert 0 < speed.prefill_s_per_token_block <= speed.decode_s_per_block
        assert engine.stats().free_tokens == engine.stats().total_tokens
        assert engine.stats().sessions == 0

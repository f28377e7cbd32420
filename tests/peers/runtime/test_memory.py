"""A peer whose owner needs the machine gives back what keys and values took of its memory, and goes on as before."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections.abc import Callable
from itertools import chain
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peers.runtime.engine import Engine
from peers.runtime.joined import AnyEngine, JoinedEngine
from peers.runtime.memory import give_back
from peers.runtime.works import EngineConfig
from peers.wire.messages import PREFIX_POSITIONS
from routing.ids import BlockSpan
from tests.peers.runtime.spans import ALICE, Local, Sequence, new_session, running

SPAN = BlockSpan(1, 4)
KEYS = [b"0" * 16]


@pytest.fixture(scope="module")
def local() -> Local:
    return Local("llama", SPAN)


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # of a thread
            await asyncio.sleep(0.01)


@given(st.integers(0, 9000), st.integers(0, 9000))
def test_nothing_is_lost_but_what_is_given_back(first: int, end: int) -> None:
    first, end = sorted((first, end))
    values = torch.ones(9000)
    give_back([values[first:end]])
    assert values[:first].eq(1).all()
    assert values[end:].eq(1).all()
    values.fill_(2)
    assert values.eq(2).all()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages stay until somebody wants them")
@pytest.mark.parametrize("spans", [[SPAN], [BlockSpan(1, 2), BlockSpan(2, 4)]])
async def test_a_resting_engine_gives_memory_back_once_no_session_is_left_and_takes_it_as_it_is_used(
    local: Local, spans: list[BlockSpan]
) -> None:
    config = EngineConfig(cache_tokens=200_000, page_size=4, token_budget=64)
    engines = [Engine(local.cut(span), config) for span in spans]
    engine: AnyEngine = engines[0] if len(engines) == 1 else JoinedEngine(engines)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(engine.stop)
        await engine.start()
        await engine.prepared()
        sequence = Sequence(local, engine, seed=1)  # type: ignore[arg-type]
        engine.open(sequence.session, ALICE, SPAN, KEYS)
        await sequence.step(PREFIX_POSITIONS + 3)
        frames = [each._cache._frames for each in engines]  # type: ignore[attr-defined]
        pools = list(chain.from_iterable(chain.from_iterable(frames)))
        pool_bytes, untouched_bytes = sum(pool.nbytes for pool in pools), resident_bytes()
        with torch.inference_mode():
            for pool in pools:
                pool[:, :, 1000:] = 1  # as others did that are gone
        full_bytes = resident_bytes()
        assert full_bytes - untouched_bytes > 0.8 * pool_bytes > 50_000_000
        engine.rest(True)
        await sequence.step(2)
        assert resident_bytes() > full_bytes - 0.1 * pool_bytes, "its session is there still"
        assert all(len(each._prefixes) == 1 for each in engines)
        engine.release(sequence.session)
        await eventually(lambda: resident_bytes() < untouched_bytes + 0.1 * pool_bytes)
        engine.rest(False)
        assert engine.open(new_session(), ALICE, SPAN, KEYS) == 0
        again = Sequence(local, engine, seed=9)  # type: ignore[arg-type]
        await again.step(40)
        await again.step(1)
        assert resident_bytes() < untouched_bytes + 0.1 * pool_bytes


async def test_an_engine_that_does_not_rest_keeps_prefixes(local: Local) -> None:
    async with running(local.cut()) as engine:
        engine.rest(True)
        engine.rest(False)
        sequence = Sequence(local, engine, seed=1)
        engine.open(sequence.session, ALICE, SPAN, KEYS)
        await sequence.step(PREFIX_POSITIONS + 3)
        engine.release(sequence.session)
        await Sequence(local, engine, seed=2).step(1)
        assert engine.stats().kept_tokens == PREFIX_POSITIONS


async def test_an_engine_that_is_to_rest_no_more_just_as_it_would_give_memory_back_goes_on(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_batch = Engine._wait_for_batch

    def overtaken(engine: Engine) -> Any:
        batch = wait_for_batch(engine)
        if engine._spares:
            engine.rest(False)
        return batch

    monkeypatch.setattr(Engine, "_wait_for_batch", overtaken)
    async with running(local.cut()) as engine:
        await engine.prepared()
        sequence = Sequence(local, engine, seed=1)
        engine.open(sequence.session, ALICE, SPAN, KEYS)
        await sequence.step(PREFIX_POSITIONS + 3)
        engine.release(sequence.session)
        engine.rest(True)
        await eventually(lambda: not engine._resting)
        async with asyncio.timeout(60):
            await Sequence(local, engine, seed=2).step(1)
        assert engine.stats().kept_tokens == PREFIX_POSITIONS


async def test_where_sessions_run_alone_what_they_had_is_given_back_likewise() -> None:
    local = Local("bloom", SPAN)
    async with running(local.cut()) as engine:
        sequence = Sequence(local, engine, seed=1)
        await sequence.step(5)
        engine.rest(True)
        engine.release(sequence.session)
        await eventually(lambda: not engine._touched)
        await Sequence(local, engine, seed=2).step(5)

"""Blocks on a machine: how long their start waits, and whose the threads are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from peers.capacity import plan_capacity
from peers.host import blocks as blocks_module
from peers.host.blocks import Blocks, Running
from peers.model.catalog import resolve
from peers.model.loading import load_config
from peers.runtime.cache import PagedCache
from peers.runtime.engine import Engine
from peers.runtime.joined import JoinedEngine
from peers.runtime.probe import Probe
from peers.runtime.works import EngineConfig
from routing.ids import BlockSpans
from tests.helpers.families import FAMILIES, save_checkpoint
from tests.helpers.memory_swarm import PROBE


async def started(folder: Path, spans: str, *, threads: int = 1, device: str = "cpu", probe: Probe = PROBE) -> Running:
    save_checkpoint(FAMILIES["llama"], folder / "model")
    checkpoint, parsed = resolve(str(folder / "model"), cache=folder / "cache"), BlockSpans.parse(spans)
    plan = plan_capacity(
        load_config(checkpoint), device=device, max_memory_bytes=8 << 30, cache_tokens=256, blocks=parsed
    )
    config = EngineConfig(cache_tokens=256, threads=threads)
    return await Blocks(checkpoint=checkpoint, config=config, adapters={}).start(parsed, plan, probe=probe)


@pytest.mark.parametrize("ends", [True, False])
async def test_blocks_whose_speed_is_known_wait_a_moment_to_be_prepared_and_no_longer(
    ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def prepare(_: PagedCache) -> Iterator[None]:
        while not ends or len(steps) < 100:
            steps.append(1)
            yield

    monkeypatch.setattr(PagedCache, "prepare", prepare)
    monkeypatch.setattr(blocks_module, "PREPARATION_S", 60.0 if ends else 0.0)
    engine = (await started(tmp_path, "0:2")).engine
    assert isinstance(engine, Engine)
    try:
        assert engine._faster.done() == ends
        assert not ends or len(steps) == 100
    finally:
        await engine.stop()


async def test_forwards_are_as_large_as_an_earlier_start_found_right(tmp_path: Path) -> None:
    engine = (await started(tmp_path, "0:2", probe=replace(PROBE, token_budget=1024))).engine
    try:
        assert engine.config.token_budget == 1024
    finally:
        await engine.stop()


@pytest.mark.parametrize(("spans", "device"), [("0:1,2:3", "cpu"), ("0:3", "cpu,cpu")])
@pytest.mark.usefixtures("plain_forwards")
async def test_engines_on_the_cpu_share_its_threads(spans: str, device: str, tmp_path: Path) -> None:
    engine = (await started(tmp_path, spans, threads=3, device=device)).engine
    assert isinstance(engine, JoinedEngine)
    try:
        first, second = engine._engines
        assert (first.config.threads, second.config.threads) == (1, 1), "torch's"
        assert first._library is not None
        assert first._library is second._library
    finally:
        await engine.stop()

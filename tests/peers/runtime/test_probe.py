"""What a peer finds out about itself."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peers.runtime import probe
from peers.runtime.cost import ForwardCost
from peers.runtime.engine import Engine
from peers.runtime.probe import Probe, measure
from peers.runtime.probe_cache import DISTURBED_LIFETIME_S, LIFETIME_S, probe_file, recall, remember
from peers.runtime.scheduler import Pace, Tempo
from routing.ids import BlockSpan, ModelId
from tests.peers.runtime.spans import Local, running

SPAN = BlockSpan(0, 2)
ROOM_BYTES = 200_000_000
PROBE = Probe(
    decode_s_per_block=0.5,
    prefill_s_per_token_block=0.25,
    block_cost=ForwardCost(base_s=0.5, per_token_s=0.25, per_token_past_s=1e-6),
    token_budget=256,
    forward_bytes=1 << 20,
)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])  # in packed forwards, and session by session
@pytest.mark.parametrize(("cache_tokens", "page_size"), [(4096, 16), (64, 4), (20, 16), (16, 16)])
async def test_a_peer_is_measured_whatever_its_cache_and_nothing_is_left_behind(
    family: str, cache_tokens: int, page_size: int
) -> None:
    model = Local(family, SPAN).cut()
    async with running(model, cache_tokens=cache_tokens, page_size=page_size, token_budget=256) as engine:
        found = await measure(engine, room_bytes=ROOM_BYTES)
        assert 0 <= found.prefill_s_per_token_block <= found.decode_s_per_block
        assert found.decode_s_per_block > 0
        assert found.block_cost.seconds(256) >= found.block_cost.seconds(1) > 0
        assert found.forward_bytes >= 0
        assert found.token_budget == 256, "on a CPU"
        assert engine.stats().free_tokens == engine.stats().total_tokens
        assert engine.stats().sessions == 0


async def test_no_forward_begins_that_would_not_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[int] = []

    async def slow(self: Any, sessions: list[Any], start: int, tokens: int, **_: Any) -> float:
        forwards.append(len(sessions) * tokens)
        clock_s[0] += 1.0 * forwards[-1]
        return 1.0 * forwards[-1]

    clock_s = [0.0]
    monkeypatch.setattr(probe.time, "monotonic", lambda: clock_s[0])
    monkeypatch.setattr(probe._Bench, "_forward", slow)
    async with running(Local("gpt2", SPAN).cut(), cache_tokens=4096) as engine:
        found = await measure(engine, room_bytes=ROOM_BYTES)
    assert clock_s[0] < 10
    assert found.decode_s_per_block == found.prefill_s_per_token_block == 1.0 / len(SPAN)


@pytest.mark.parametrize("busy", [False, True])
async def test_busy_programs_beside_a_probe_are_noticed(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    elapsed_s, others_s = itertools.count(0.0, 0.01), itertools.count(0.0, 1.0 if busy else 0.0)
    monkeypatch.setattr(probe.psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(probe, "_others_s", lambda: next(others_s))
    monkeypatch.setattr(probe, "_Bench", lambda *_: SimpleNamespace(run=found, clear=lambda: None))
    monkeypatch.setattr(probe.time, "monotonic", lambda: next(elapsed_s))

    async def found() -> Probe:
        return PROBE

    engine: Any = SimpleNamespace(prepared=lambda: asyncio.sleep(0))
    assert (await measure(engine, room_bytes=ROOM_BYTES)).disturbed == busy


async def test_what_was_measured_before_the_engine_was_prepared_is_soon_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And in no more time than if it had been."""
    asked: list[float] = []

    async def found() -> Probe:
        return PROBE

    def bench(_: Any, deadline_s: float, room_bytes: int) -> Any:
        asked.append(deadline_s - began_s)
        return SimpleNamespace(run=found, clear=lambda: None)

    monkeypatch.setattr(probe, "PREPARATION_S", 0.0)
    monkeypatch.setattr(probe, "_others_s", lambda: 0.0)
    monkeypatch.setattr(probe, "_Bench", bench)
    engine: Any = SimpleNamespace(prepared=asyncio.Event().wait)
    began_s = time.monotonic()
    monkeypatch.setattr(probe.time, "monotonic", lambda: began_s)
    result = await measure(engine, room_bytes=ROOM_BYTES)
    assert (result.disturbed, result.forward_bytes) == (True, 0)
    assert asked == [pytest.approx(probe.PROBE_S)]


async def test_works_that_are_gathered_share_a_forward() -> None:
    async with running(Local("gpt2", SPAN).cut(), token_budget=256) as engine:
        bench = probe._Bench(engine, time.monotonic() + 60, ROOM_BYTES)
        sizes: list[int] = []
        run_batch = Engine._run_batch

        def counted(self: Engine, batch: Any, **how: Any) -> None:
            sizes.append(len(batch))
            run_batch(self, batch, **how)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "_run_batch", counted)
            assert await bench._forward([bench._session() for _ in range(16)], 0, 1) > 0
        bench.clear()
    assert sizes == [16]


@settings(max_examples=50, deadline=None)
@given(
    base_s=st.floats(0, 0.1),
    per_token_s=st.floats(1e-6, 1e-3),
    token_bytes=st.integers(0, 1_000_000),
    room=st.sampled_from([300, 1500, 1 << 20]),
)
def test_forwards_are_as_large_as_is_quick_and_fits_and_what_they_take_is_measured_at_that_size(
    base_s: float, per_token_s: float, token_bytes: int, room: int
) -> None:
    cost = ForwardCost(base_s=base_s, per_token_s=per_token_s, per_token_past_s=0.0)
    budget, largest = [256], [0]

    async def forward(self: Any, sessions: list[Any], start: int, tokens: int, **_: Any) -> float:
        assert len(sessions) * tokens <= budget[0]
        largest[0] = max(largest[0], len(sessions) * tokens)
        return cost.seconds(len(sessions) * tokens)

    def watch(device: torch.device) -> Any:
        largest[0] = 0
        return lambda: largest[0] * token_bytes

    engine: Any = SimpleNamespace(
        model=SimpleNamespace(device=torch.device("cuda"), hidden_size=1, max_positions=room),
        config=SimpleNamespace(page_size=16),
        stats=lambda: SimpleNamespace(total_tokens=1 << 20, free_tokens=1 << 20),
        num_blocks=2,
        packs_sessions=True,
        set_token_budget=lambda tokens: budget.insert(0, tokens),
        release=lambda session: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe._Bench, "_forward", forward)
        patch.setattr(probe, "_watch_memory", watch)
        found = asyncio.run(probe._Bench(engine, time.monotonic() + 60, ROOM_BYTES).run())
    right = 256
    for tokens in probe.TOKEN_BUDGETS:
        if cost.seconds(tokens) > probe.FORWARD_S * 1.001 or tokens * token_bytes > ROOM_BYTES or tokens > room:
            break
        right = tokens
    assert found.token_budget == right or cost.seconds(right) == pytest.approx(probe.FORWARD_S, rel=0.01)
    assert found.forward_bytes == found.token_budget * token_bytes


async def test_prompts_are_measured_whole_also_where_steps_would_have_them_come_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    note = Engine._note_forward

    def noting(self: Engine, chunks: Sequence[tuple[int, int]], *rest: Any, **more: Any) -> None:
        sizes.append(sum(tokens for _, tokens in chunks))
        note(self, chunks, *rest, **more)

    monkeypatch.setattr(Engine, "_note_forward", noting)
    monkeypatch.setattr(probe._Bench, "_left_s", lambda _: probe.PROBE_S)  # however long this machine takes
    monkeypatch.setattr(
        Tempo, "pace", lambda _, budget, decoding: Pace(beside_steps=16, alone=64 if decoding else budget)
    )
    async with running(Local("llama", SPAN).cut(), cache_tokens=4096, token_budget=256) as engine:
        await measure(engine, room_bytes=ROOM_BYTES)
    assert max(sizes) == 256


def file_of(cache: Path, **changes: Any) -> Path:
    facts: dict[str, Any] = {
        "model": ModelId(bytes(32)),
        "blocks": 2,
        "dtype": "float32",
        "quantization": "none",
        "devices": (torch.device("cpu"),),
        "threads": 1,
    }
    return probe_file(cache, **facts | changes)


@pytest.mark.parametrize(("disturbed", "lifetime_s"), [(False, LIFETIME_S), (True, DISTURBED_LIFETIME_S)])
def test_a_probe_is_remembered_longer_if_nothing_disturbed_it(
    disturbed: bool, lifetime_s: float, tmp_path: Path
) -> None:
    now_s, file, found = time.time(), file_of(tmp_path), replace(PROBE, disturbed=disturbed)
    assert recall(file, now_s) is None
    remember(file, found, now_s)
    assert recall(file, now_s + lifetime_s - 1) == found
    assert recall(file, now_s + lifetime_s) is None
    assert recall(file, now_s - 1) is None  # the clock was set back


def test_a_note_of_before_forwards_sizes_were_measured_is_not_used(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    remember(file, PROBE, 1.0)
    note = msgspec.json.decode(file.read_bytes())
    del note["probe"]["token_budget"]
    file.write_bytes(msgspec.json.encode(note))
    assert recall(file, 2.0) is None


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b'{"measured_at_s": 1, "probe": {"forward_bytes": "many"}}'])
def test_a_damaged_note_is_as_good_as_none(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_bytes(damage)
    assert recall(tmp_path / "probe.json", 2.0) is None


@pytest.mark.parametrize(
    "change",
    [
        {"model": ModelId(bytes([1] * 32))},
        {"blocks": 3},
        {"dtype": "bfloat16"},
        {"quantization": "int8"},
        {"threads": 2},
    ],
)
def test_another_start_has_another_probe(change: dict[str, Any], tmp_path: Path) -> None:
    assert file_of(tmp_path, **change) != file_of(tmp_path)


def test_a_cache_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "probes").write_text("a file where a folder should be")
    remember(file_of(tmp_path), PROBE, 1.0)

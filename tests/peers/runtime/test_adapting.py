"""Sessions with different adapters, and with none, in one forward: each as its own local model, nobody else changed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peers.model.adapters import Adapter
from peers.model.kernels import linear
from peers.runtime.engine import Engine
from peers.runtime.works import Done, Work
from peers.wire.messages import AdapterTarget
from routing.ids import BlockSpan
from tests.peers.runtime.spans import ALICE, Local, Sequence, new_session, running, together
from tests.peers.runtime.test_engine import Gate, Interlude

SPAN = BlockSpan(1, 4)
LAYERS = {
    "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"),
    "bloom": ("self_attention.query_key_value", "mlp.dense_4h_to_h"),
    "gpt-neox": ("attention.query_key_value", "mlp.dense_4h_to_h"),
    "mixtral": ("self_attn.v_proj",),
}


class Adapted(Local):
    """As the local model is once the adapter has been merged into it."""

    def __init__(self, family: str, seed: int, blocks: BlockSpan = SPAN) -> None:
        super().__init__(family, SPAN)
        generator = torch.Generator().manual_seed(seed)
        layers = self.model.get_submodule(self.anatomy.layers_path)
        targets, values = [], []
        for block in blocks:
            for path in LAYERS[family]:
                layer = layers[block].get_submodule(path)
                assert isinstance(layer, nn.Linear)
                rank, (outputs, inputs) = 2 + seed, layer.weight.shape
                a_RK = torch.randn(rank, inputs, generator=generator) * 0.1
                b_NR = torch.randn(outputs, rank, generator=generator) * 0.1
                targets.append(
                    AdapterTarget(block=block, module=path, rank=rank, inputs=inputs, outputs=outputs, scaling=1.5)
                )
                values += [a_RK.flatten(), b_NR.flatten()]
                layer.weight.data += 1.5 * b_NR @ a_RK
        self.adapter = Adapter(tuple(targets), torch.cat(values))


class Adapting(Sequence):
    def work(self, start: int, hidden: Tensor) -> Work:
        assert isinstance(self.local, Adapted)
        return replace(super().work(start, hidden), adapter=self.local.adapter)


async def in_one_forward(engine: Engine, gate: Gate, *works: Awaitable[Done]) -> list[Done]:
    """Where the engine packs sessions, and has no other works."""
    gate.close()
    opener = asyncio.ensure_future(engine.run(work_of(torch.zeros(1, 32))))
    await gate.reached()
    runs = [asyncio.ensure_future(work) for work in works]
    await asyncio.sleep(0)
    before = gate.forwards
    gate.open()
    done = list(await asyncio.gather(*runs))
    await opener
    assert gate.forwards == before + 2 or not engine.packs_sessions
    return done


def work_of(hidden: Tensor, adapter: Adapter | None = None) -> Work:
    return Work(session=new_session(), owner=ALICE, start=0, hidden=hidden, span=SPAN, adapter=adapter)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is the library's, as large ones are, so that short forwards are tapes."""
    monkeypatch.setattr(linear, "_fastest_s", lambda *_: (0.0, 1.0))


@pytest.mark.parametrize("family", LAYERS)
async def test_sessions_of_several_adapters_and_of_none_share_forwards(family: str) -> None:
    local, first, second = Local(family, SPAN), Adapted(family, 1), Adapted(family, 2, BlockSpan(2, 3))
    async with running(local.cut()) as engine:
        plain = Sequence(local, engine, seed=1)
        mine, theirs = Adapting(first, engine, seed=2), Adapting(second, engine, seed=3)
        more = Adapting(first, engine, seed=4)
        await engine.prepared()
        gate = Gate(engine)
        for tokens in ((7, 5, 9, 6), (1, 1, 1, 1), (1, 3, 1, 2)):
            steps = [s.step(n) for s, n in zip((mine, plain, more, theirs), tokens, strict=True)]
            await in_one_forward(engine, gate, *steps)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
async def test_rows_without_an_adapter_are_to_the_bit_what_they_are_without_any(family: str) -> None:
    local, first, second = Local(family, SPAN), Adapted(family, 1), Adapted(family, 2)
    generator = torch.Generator().manual_seed(0)
    async with running(local.cut()) as engine:
        await engine.prepared()
        gate = Gate(engine)
        for lengths in ((1, 1, 1, 1), (3, 9, 16, 2)):
            hidden = [torch.randn(n, 32, generator=generator) for n in lengths]
            before, after = [
                await in_one_forward(engine, gate, *map(engine.run, map(work_of, hidden, adapters)))
                for adapters in ([None] * 4, [first.adapter, None, second.adapter, None])
            ]
            tapes = engine._cache._tapes  # type: ignore[attr-defined]
            assert sum(lengths) in tapes._stopping
            same = [torch.equal(a.hidden, b.hidden) for a, b in zip(before, after, strict=True)]
            assert same == [False, True, False, True], lengths


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("adapted", ["long", "short", "both"])
async def test_who_is_let_into_a_long_forward_has_its_own_adapter(family: str, adapted: str) -> None:
    local, first, second = Local(family, SPAN), Adapted(family, 1), Adapted(family, 2)
    async with running(local.cut(), token_budget=128) as engine:
        short: Any = Sequence(local, engine, seed=1) if adapted == "long" else Adapting(first, engine, seed=1)
        long: Any = Sequence(local, engine, seed=2) if adapted == "short" else Adapting(second, engine, seed=2)
        await short.step(5)
        tasks: list[asyncio.Task[Done]] = []
        interlude = Interlude(engine, lambda: tasks.append(asyncio.ensure_future(short.step(1))))
        await long.step(100)
        await tasks[0]
        assert interlude.pauses == (2 if engine.packs_sessions else 1) * len(SPAN) - 1
        await together(short.step(1), long.step(1))


@pytest.mark.parametrize(("family", "missing"), [("llama", "self_attn"), ("mixtral", "mlp.experts")])
async def test_only_layers_that_are_called_as_layers_can_be_adapted(family: str, missing: str) -> None:
    local = Local(family, SPAN)
    async with running(local.cut()) as engine:
        for path in LAYERS[family]:
            assert engine.linear_shape(2, path) == engine.model.linear_shape(2, path) != None  # noqa: E711
        assert engine.linear_shape(2, missing) is None
        assert engine.linear_shape(0, LAYERS[family][0]) is None

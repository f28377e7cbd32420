"""Gradients of a span equal those of the whole local model, while others generate through the same engine."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Generator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from peers.errors import Refused
from peers.model.adapters import Adapter
from peers.model.support import hidden_argument
from peers.runtime import engine as engine_module
from peers.runtime import gradients
from peers.runtime.engine import Engine
from peers.runtime.errands import GAP, Errand, Errands
from peers.runtime.gradients import Graph, Outcome, Passage, positions_of
from peers.runtime.scheduler import Tempo
from peers.runtime.works import ComputeFailed
from peers.wire.messages import PREFIX, AdapterTarget, Urgency
from routing.errors import Unavailable
from routing.ids import BlockSpan, PeerId
from tests.peers.runtime.spans import ALICE, Local, Sequence, random_ids, running

LENGTHS = (5, 1, 9, 3)
SPAN = BlockSpan(1, 3)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def local_pass(local: Local, input_TH: Tensor, gradient_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient of the blocks, each sequence alone in the model's own forward."""
    layers = local.model.get_submodule(local.anatomy.layers_path)
    outputs, given = [], []
    name = hidden_argument(layers[local.span.start])
    for end, length in zip(accumulate(LENGTHS), LENGTHS, strict=True):
        leaf = input_TH[None, end - length : end].clone().requires_grad_()

        def put(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaf: Tensor = leaf) -> Any:
            return ((leaf.clone(), *args[1:]), kwargs) if args else (args, {**kwargs, name: leaf.clone()})

        hook = layers[local.span.start].register_forward_pre_hook(put, with_kwargs=True)
        local.model(random_ids(length, 0)[None], use_cache=False)
        hook.remove()
        output = local._seen["leaves"]
        output.backward(gradient_TH[None, end - length : end])
        outputs.append(output[0].detach())
        given.append(leaf.grad[0])
    return torch.cat(outputs), torch.cat(given)


async def forward(engine: Engine, passage: Passage, *, keep: bool = True, positions: int = 0) -> Outcome:
    def job(most: int) -> gradients.Pieces:
        return gradients.forward(
            engine.model, passage, packs=engine.packs_sessions, keep=keep, positions=positions or most
        )

    outcome, _ = await engine.run_between(ALICE, job)
    return outcome


async def backward(
    engine: Engine, passage: Passage, gradient: Tensor, graph: Graph | None, *, positions: int = 0
) -> Outcome:
    def job(most: int) -> gradients.Pieces:
        packs = engine.packs_sessions
        return gradients.backward(engine.model, passage, gradient, graph, packs=packs, positions=positions or most)

    outcome, _ = await engine.run_between(ALICE, job)
    return outcome


@functools.cache
def local_of(family: str) -> Local:
    local = Local(family, SPAN)
    local.model.requires_grad_(False)
    local._pristine.requires_grad_(False)
    return local


def passage_of(local: Local, seed: int = 0) -> tuple[Passage, Tensor]:
    input_TH, gradient_TH = torch.randn(2, sum(LENGTHS), 32, generator=torch.Generator().manual_seed(seed))
    return Passage(span=SPAN, lengths=LENGTHS, regime_length=0, input_TH=input_TH), gradient_TH


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "gptj"])
async def test_a_packed_pass_equals_each_sequence_alone_with_and_without_its_graph(family: str) -> None:
    local = local_of(family)
    passage, gradient_TH = passage_of(local)
    output_TH, given_TH = local_pass(local, passage.input_TH, gradient_TH)
    async with running(local.cut()) as engine:
        for positions in (0, 6):
            kept = await forward(engine, passage, positions=positions)
            assert relative(kept.rows_TH, output_TH) < 1e-5
            assert kept.graph is not None
            assert kept.bytes_per_token > 0
            with_graph = await backward(engine, passage, gradient_TH, kept.graph, positions=positions)
            assert relative(with_graph.rows_TH, given_TH) < 1e-5
            assert not kept.graph.groups, "the graph is used up"
        bare = await forward(engine, passage, keep=False)
        assert bare.graph is None
        assert relative(bare.rows_TH, output_TH) < 1e-5
        again = await backward(engine, passage, gradient_TH, None)
        assert relative(again.rows_TH, given_TH) < 1e-5


async def test_attention_that_is_a_models_own_takes_neither_gaps_nor_a_prefix() -> None:
    local = local_of("gptj")
    passage, _ = passage_of(local)
    prefix = Adapter((AdapterTarget(1, PREFIX, 2, 32, 32, 1.0),), torch.zeros(2 * 64))
    async with running(local.cut()) as engine:
        for wrong in (replace(passage, jumps=((2, 1),)), replace(passage, adapter=prefix)):
            with pytest.raises(Refused, match="whose attention is their own"):
                await forward(engine, wrong)


def test_positions_count_from_0_in_each_sequence_but_for_the_jumps() -> None:
    assert positions_of((3, 1, 2), ()).tolist() == [0, 1, 2, 0, 0, 1]
    assert positions_of((3, 1, 2), ((1, 4), (2, 1), (3, 7), (5, 2))).tolist() == [0, 5, 7, 7, 0, 3]


async def test_steps_and_prompts_go_on_between_the_pieces_of_a_job_and_change_nothing() -> None:
    local = local_of("llama")
    passage, gradient_TH = passage_of(local)
    _, given_TH = local_pass(local, passage.input_TH, gradient_TH)
    async with running(local.cut()) as engine:
        one, other = Sequence(local, engine), Sequence(local, engine, seed=100)

        async def train() -> Tensor:
            kept = await forward(engine, passage, positions=4)
            return (await backward(engine, passage, gradient_TH, kept.graph)).rows_TH

        training = [asyncio.create_task(train()) for _ in range(3)]
        for tokens in (20, 1, 1, 3, 1, 1):
            await asyncio.gather(one.step(tokens), other.step(tokens))
        for task in training:
            assert relative(await task, given_TH) < 1e-5
        assert engine.stats().free_tokens < engine.stats().total_tokens, "sessions have pages, and jobs none"


async def test_a_job_that_fails_or_is_given_up_ends_alone() -> None:
    async with running(local_of("llama").cut()) as engine:
        begun, closed = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def endless(_: int) -> Generator[None, None, int]:
            try:
                while True:
                    loop.call_soon_threadsafe(begun.set)
                    yield
            finally:
                loop.call_soon_threadsafe(closed.set)

        def wrong(_: int) -> Generator[None, None, int]:
            yield
            raise RuntimeError("not ours")

        def right(_: int) -> Generator[None, None, int]:
            yield
            return 7

        given_up = asyncio.create_task(engine.run_between(ALICE, endless))
        await begun.wait()
        waiting = asyncio.create_task(engine.run_between(ALICE, right))
        given_up.cancel()
        assert (await waiting)[0] == 7
        await closed.wait()
        with pytest.raises(ComputeFailed):
            await engine.run_between(ALICE, wrong)
        assert (await engine.run_between(ALICE, right))[0] == 7
        stopped = asyncio.create_task(engine.run_between(ALICE, endless))
        begun.clear()
        await begun.wait()
        await engine.stop()
        with pytest.raises(Unavailable):
            await stopped
        with pytest.raises(Unavailable):
            await engine.run_between(ALICE, right)


async def test_where_steps_are_late_a_job_waits_for_some_of_them_or_until_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def piece(_: int) -> Generator[None, None, float]:
        yield
        return time.perf_counter()

    monkeypatch.setattr(Tempo, "late", True)
    local = local_of("llama")
    async with running(local.cut()) as engine:
        session = Sequence(local, engine)
        await session.step(1)
        monkeypatch.setattr(engine_module, "DECODING_S", 0.2)
        ended_s, _ = await engine.run_between(ALICE, piece)
        assert ended_s >= engine._last_step_s + 0.2
        monkeypatch.setattr(engine_module, "DECODING_S", 600.0)
        await session.step(1)
        job = asyncio.create_task(engine.run_between(ALICE, piece))
        steps = 0
        while not job.done():
            await session.step(1)
            steps += 1
        assert GAP < steps <= 3 * GAP, "it has two pieces"


@pytest.mark.parametrize(("urgency", "before"), [(Urgency.INTERACTIVE, 0), (Urgency.BACKGROUND, GAP)])
async def test_a_job_goes_before_what_only_the_background_waits_for_but_not_for_ever(
    urgency: Urgency, before: int
) -> None:
    local = local_of("llama")
    async with running(local.cut()) as engine:
        await engine.prepared()
        session = Sequence(local, engine)
        hidden, _ = local.follow([random_ids(5, 0)])
        seen = []

        def pieces(_: int) -> Generator[None, None, None]:
            for _ in range(2 * GAP):
                seen.append(engine.held(session.session))
                yield

        with engine.gathering():
            job = asyncio.create_task(engine.run_between(ALICE, pieces))
            work = asyncio.create_task(engine.run(replace(session.work(0, hidden), urgency=urgency)))
            await asyncio.sleep(0)  # each of them is submitted
        await asyncio.gather(job, work)
        assert seen == [0] * before + [5] * (2 * GAP - before)


async def test_owners_take_turns_and_a_job_waits_for_no_more_than_so_many_forwards() -> None:
    loop = asyncio.get_running_loop()

    def pieces(_: int) -> Generator[None, None, None]:
        yield

    def errand(owner: str) -> Errand[None]:
        return Errand(PeerId(owner), pieces, loop.create_future())

    errands = Errands()
    errands.passed_over()
    for owner in ("a", "a", "a", "b"):
        errands.add(errand(owner))
    assert not errands.due
    for _ in range(GAP):
        errands.passed_over()
    assert errands.due
    order = []
    while (current := errands.next()) is not None:
        assert not errands.due
        assert errands.next() is current, "one at a time"
        assert [current.advance(1), current.advance(1)] == [False, True]
        order.append(current.owner)
        errands.ended()
    assert order == ["a", "b", "a", "a"]
    assert not errands

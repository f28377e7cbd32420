"""The engine as its callers see it: what comes out, what goes wrong for whom, and what is free afterwards."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from peers.errors import Busy, Preempted
from peers.model.cutting import SpanModel
from peers.model.kernels import Pool, linear
from peers.runtime import engine as engine_module
from peers.runtime.cache import PagedCache
from peers.runtime.engine import Engine
from peers.runtime.program import TOKENS_MAX
from peers.runtime.tape import Tapes
from peers.runtime.works import (
    CacheTooSmall,
    ComputeFailed,
    Done,
    EngineConfig,
    NonFiniteOutput,
    PositionGap,
    SessionReleased,
    Work,
)
from routing.errors import CallerError, Unavailable
from routing.ids import BlockSpan, PeerId, SessionId
from tests.peers.runtime.spans import ALICE, Local, Sequence, assert_same, at_once, new_session, running, together

SPAN = BlockSpan(1, 4)
WIDTH = 32


@pytest.fixture(scope="module")
def local() -> Local:
    return Local("llama", SPAN)


@pytest.fixture(scope="module")
def alone() -> Local:
    """A family that is not batched."""
    return Local("bloom", SPAN)


class Gate:
    """Stops the engine's thread in front of a forward."""

    def __init__(self, of: Engine | SpanModel) -> None:
        owner: Any = of._cache if isinstance(of, Engine) else of
        self._forward = owner.forward
        self._open = threading.Event()
        self._reached = threading.Event()
        self.forwards = 0
        self.failure: Exception | None = None
        self._open.set()
        owner.forward = self._pass

    def _pass(self, *args: Any, **kwargs: Any) -> Tensor:
        self._reached.set()
        self._open.wait()
        self.forwards += 1
        if self.failure is not None:
            raise self.failure
        return self._forward(*args, **kwargs)

    def close(self) -> None:
        self._open.clear()
        self._reached.clear()

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        await asyncio.to_thread(self._reached.wait)


def work(session: SessionId, start: int, tokens: int, *, owner: PeerId = ALICE, **others: Any) -> Work:
    hidden = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(start))
    return Work(**{"session": session, "owner": owner, "start": start, "hidden": hidden, "span": SPAN, **others})


def assert_all_free(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.free_tokens, stats.queued_tokens, stats.sessions) == (stats.total_tokens, 0, 0)


async def test_works_of_one_session_run_in_submission_order(local: Local) -> None:
    async with running(local.cut()) as engine:
        await engine.prepared()  # bit for bit, forwards are alike only if they go the same way
        session = new_session()
        whole = await engine.run(work(new_session(), 0, 3))
        first, second = work(session, 0, 3), work(session, 3, 2)
        done, more = await together(engine.run(first), engine.run(second))
        assert torch.equal(done.hidden, whole.hidden)
        assert more.hidden.shape == (2, WIDTH)
        assert engine.held(session) == 5


async def test_works_of_one_turn_of_the_loop_share_a_forward_whatever_the_thread_does(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MOMENT_S", 60.0)  # however late the loop is on a busy machine
    async with running(local.cut()) as engine:
        await engine.prepared()
        sessions = [new_session() for _ in range(5)]
        for number in range(20):
            await together(*(engine.run(work(session, number, 1)) for session in sessions))
        works = engine.counts().batch_works
        assert (sum(works.counts), works.sum) == (20, 100)


async def test_forwards_run_between_the_steps_in_which_layers_are_timed(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = threading.Event()

    def timing(*_: object) -> Generator[None, None, int]:
        while not enough.is_set():
            yield
        return 0

    for name in ("accelerating", "accelerating_by_torch"):
        monkeypatch.setattr(engine_module, name, timing)
    async with running(local.cut()) as engine:
        sequence = Sequence(local, engine)
        await sequence.step(3)
        await sequence.step(1)
        assert not engine._faster.done()
        enough.set()
        await engine.prepared()


async def test_a_late_loop_keeps_nothing_that_has_come_from_running(local: Local) -> None:
    async with running(local.cut()) as engine:
        session = new_session()

        async def is_busy() -> None:
            deadline_s = time.monotonic() + 30
            while not engine.held(session):  # in the turn in which the work came
                assert time.monotonic() < deadline_s
                threading.Event().wait(0.001)

        await together(engine.run(work(session, 0, 1)), engine.run(work(new_session(), 0, 1)), is_busy())


async def test_sessions_that_are_ready_together_share_a_forward(local: Local) -> None:
    async with running(local.cut()) as engine:
        gate, sessions = Gate(engine), [new_session() for _ in range(6)]
        gate.close()
        runs = asyncio.gather(*(engine.run(work(session, 0, 2)) for session in [*sessions, new_session()]))
        await gate.reached()
        gate.open()
        await runs
        assert gate.forwards <= 2


class Interlude:
    """Submits something in the first pause of a long forward, as if it had just come."""

    def __init__(self, engine: Engine, submit: Callable[[], None]) -> None:
        self._loop, self._submit, self._go_on = asyncio.get_running_loop(), submit, engine._let_steps_in
        self._submitted = threading.Event()
        self.pauses = 0
        engine._let_steps_in = self._pause  # type: ignore[method-assign]

    def _pause(self) -> None:
        self.pauses += 1
        if self.pauses == 1:
            self._loop.call_soon_threadsafe(self._act)
            self._submitted.wait()
        self._go_on()

    def _act(self) -> None:
        self._submit()
        self._loop.call_soon(self._submitted.set)  # what was submitted is a task, which runs before


@pytest.mark.parametrize("family", ["local", "alone"])
async def test_a_step_that_comes_during_a_long_forward_is_let_in(request: pytest.FixtureRequest, family: str) -> None:
    whole: Local = request.getfixturevalue(family)
    async with running(whole.cut(), token_budget=128) as engine:
        short, long = Sequence(whole, engine, seed=1), Sequence(whole, engine, seed=2)
        await short.step(5)
        order: list[str] = []

        async def named(name: str, step: Awaitable[Done]) -> Done:
            done = await step
            order.append(name)
            return done

        tasks: list[asyncio.Task[Done]] = []
        interlude = Interlude(engine, lambda: tasks.append(asyncio.ensure_future(named("short", short.step(1)))))
        done = await named("long", long.step(100))
        await tasks[0]
        assert order == ["short", "long"]
        assert interlude.pauses == (2 if engine.packs_sessions else 1) * len(SPAN) - 1
        assert done.compute_s > 0
        await together(short.step(1), long.step(1))
        for sequence in (short, long):
            engine.release(sequence.session)
        assert_all_free(engine)


async def test_who_needs_pages_of_others_is_not_let_in(local: Local) -> None:
    async with running(local.cut(), token_budget=128, cache_tokens=104) as engine:
        older, long = Sequence(local, engine, seed=1), Sequence(local, engine, seed=2)
        await older.step(4)
        tasks: list[asyncio.Task[Done]] = []
        Interlude(engine, lambda: tasks.append(asyncio.ensure_future(older.step(1))))
        await long.step(100)
        await tasks[0]  # in a forward of its own, for which the younger session gave way
        with pytest.raises(Preempted):
            await long.step(1)


async def test_a_session_released_in_a_pause_of_its_forward_keeps_its_pages_until_it_ends(local: Local) -> None:
    async with running(local.cut(), token_budget=128) as engine:
        short, long = Sequence(local, engine, seed=1), Sequence(local, engine, seed=2)
        await short.step(4)
        tasks: list[asyncio.Task[Done]] = []

        def act() -> None:
            engine.release(long.session)
            tasks.append(asyncio.ensure_future(short.step(1)))

        Interlude(engine, act)
        with pytest.raises(SessionReleased):
            await long.step(100)
        await tasks[0]
        await short.step(20)  # no step that could be let in: that forward has ended
        engine.release(short.session)
        assert_all_free(engine)


async def test_an_output_is_the_callers_own(local: Local) -> None:
    async with running(local.cut()) as engine:
        results = await together(*(engine.run(work(new_session(), 0, 100)) for _ in range(2)))
        assert results[0].hidden.untyped_storage().nbytes() == 100 * WIDTH * 4
        assert not results[0].hidden.is_inference()
        assert results[0].compute_s > 0
        assert results[0].queue_s >= 0


async def test_a_gap_is_refused_with_the_held_length(local: Local) -> None:
    async with running(local.cut()) as engine:
        session = new_session()
        await engine.run(work(session, 0, 5))
        with pytest.raises(PositionGap, match="starts at 7, this peer holds 5") as caught:
            await engine.run(work(session, 7, 1))
        assert caught.value.held == 5
        await engine.run(work(session, 2, 1))
        assert engine.held(session) == 3


async def test_positions_of_other_blocks_do_not_count(local: Local) -> None:
    async with running(local.cut()) as engine:
        session = new_session()
        await engine.run(work(session, 0, 5))
        with pytest.raises(PositionGap, match="holds 0"):
            await engine.run(work(session, 5, 1, span=BlockSpan(1, 3)))
        await engine.run(work(session, 0, 2, span=BlockSpan(1, 3)))
        assert engine.held(session) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden": torch.zeros(0, WIDTH)},
        {"hidden": torch.zeros(2, WIDTH + 1)},
        {"hidden": torch.zeros(WIDTH)},
        {"start": -1},
        {"span": BlockSpan(0, 4)},
    ],
)
async def test_a_work_that_makes_no_sense_is_refused(local: Local, wrong: dict[str, Any]) -> None:
    async with running(local.cut()) as engine:
        with pytest.raises(CallerError):
            await engine.run(Work(**{**work_fields(work(new_session(), 0, 1)), **wrong}))
        assert_all_free(engine)


def work_fields(given: Work) -> dict[str, Any]:
    return {name: getattr(given, name) for name in Work.__slots__}


async def test_a_session_that_can_never_fit_is_told_so(local: Local) -> None:
    async with running(local.cut(), cache_tokens=33) as engine:
        with pytest.raises(CacheTooSmall, match=r"33 positions .* 32"):
            await engine.run(work(new_session(), 30, 3))


async def test_a_full_queue_answers_busy(local: Local) -> None:
    model = local.cut()
    async with running(model, max_queued_tokens=100) as engine:
        gate = Gate(engine)
        gate.close()
        accepted = [asyncio.ensure_future(engine.run(work(new_session(), 0, 40))) for _ in range(2)]
        await gate.reached()
        with pytest.raises(Busy) as caught:
            await engine.run(work(new_session(), 0, 40))
        assert caught.value.retry_after_s > 0
        gate.open()
        await together(*accepted)


async def test_a_full_queue_of_one_client_refuses_nobody_elses_step_or_prompt(local: Local) -> None:
    async with running(local.cut(), max_queued_tokens=100) as engine:
        gate, bob = Gate(engine), PeerId("bob")
        gate.close()
        accepted = [asyncio.ensure_future(engine.run(work(new_session(), 0, 50))) for _ in range(2)]
        await gate.reached()
        with pytest.raises(Busy):
            await engine.run(work(new_session(), 0, 50))
        for owner, tokens in ((ALICE, 1), (bob, 1), (bob, 33), (PeerId("carol"), 16)):
            accepted.append(asyncio.ensure_future(engine.run(work(new_session(), 0, tokens, owner=owner))))
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await engine.run(work(new_session(), 0, 33, owner=bob))
        assert engine.stats().queued_tokens == 151
        gate.open()
        assert [len(done.hidden) for done in await together(*accepted)] == [50, 50, 1, 1, 33, 16]


async def test_a_client_comes_back_when_its_own_turn_comes(local: Local) -> None:
    async with running(local.cut(), max_queued_tokens=100) as engine:
        gate, bob = Gate(engine), PeerId("bob")
        gate.close()
        accepted = [asyncio.ensure_future(engine.run(work(new_session(), 0, 50))) for _ in range(2)]
        await gate.reached()
        accepted.append(asyncio.ensure_future(engine.run(work(new_session(), 0, 20, owner=bob))))
        await asyncio.sleep(0)
        engine._tempo.token_s = 0.01
        for owner, after_s in ((ALICE, 1.2), (bob, 0.6)):
            with pytest.raises(Busy) as caught:
                await engine.run(work(new_session(), 0, 40, owner=owner))
            assert caught.value.retry_after_s == pytest.approx(after_s)
        gate.open()
        await together(*accepted)


async def test_a_release_in_the_running_forward_takes_effect_after_it(local: Local) -> None:
    async with running(local.cut()) as engine:
        gate, session, other = Gate(engine), new_session(), new_session()
        gate.close()
        doomed = asyncio.ensure_future(engine.run(work(session, 0, 8)))
        await gate.reached()
        queued = asyncio.ensure_future(engine.run(work(session, 8, 1)))
        neighbour = asyncio.ensure_future(engine.run(work(other, 0, 8)))
        await asyncio.sleep(0)
        engine.release(session)
        engine.release(session)
        assert engine.held(session) == 0
        for failed in (doomed, queued):
            with pytest.raises(SessionReleased):
                await failed
        again = asyncio.ensure_future(engine.run(work(session, 0, 3)))  # a new session under the old id
        gate.open()
        await together(neighbour, again)
        assert engine.held(session) == 3
        for each in (session, other, new_session()):
            engine.release(each)
        assert_all_free(engine)


@pytest.mark.parametrize("pages_after", [(0, 512), (1, 512 - 64)])
async def test_a_cancelled_work_keeps_what_was_computed(local: Local, pages_after: tuple[int, int]) -> None:
    forwards, free = pages_after
    async with running(local.cut()) as engine:
        gate, session = Gate(engine), new_session()
        gate.close()
        blocker = asyncio.ensure_future(engine.run(work(new_session(), 0, 1))) if not forwards else None
        if blocker:
            await gate.reached()
        task = asyncio.ensure_future(engine.run(work(session, 0, 200)))
        await (asyncio.sleep(0) if blocker else gate.reached())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        if blocker:
            await blocker
        marker = new_session()
        await engine.run(work(marker, 0, 1))
        engine.release(marker)
        assert engine.held(session) == 64 * forwards
        assert engine.stats().free_tokens == free - (4 if blocker else 0)


async def test_one_sessions_nan_is_nobody_elses(local: Local) -> None:
    async with running(local.cut()) as engine:
        gate, poisoned, healthy = Gate(engine), new_session(), new_session()
        await together(*(engine.run(work(session, 0, 4)) for session in (poisoned, healthy)))
        expected = await engine.run(work(healthy, 4, 1))
        before = gate.forwards
        gate.close()
        blocker = asyncio.ensure_future(engine.run(work(new_session(), 0, 1)))
        await gate.reached()
        bad = asyncio.ensure_future(engine.run(work(poisoned, 4, 1, hidden=torch.full((1, WIDTH), torch.inf))))
        good = asyncio.ensure_future(engine.run(work(healthy, 4, 1)))
        await asyncio.sleep(0)
        gate.open()
        await blocker
        with pytest.raises(NonFiniteOutput):
            await bad
        assert_same((await good).hidden, expected.hidden)
        assert gate.forwards == before + 2
        assert engine.held(poisoned) == 4
        await engine.run(work(poisoned, 4, 1))


@pytest.mark.parametrize("family", ["llama", "bloom"])
async def test_a_forward_that_raises_fails_its_works_and_nothing_else(
    local: Local, alone: Local, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    subject = local if family == "llama" else alone
    async with running(subject.cut()) as engine:
        sequence = Sequence(subject, engine)
        await sequence.step(6)
        gate = Gate(engine)
        gate.failure = RuntimeError("out of memory")
        with pytest.raises(ComputeFailed):
            await engine.run(work(sequence.session, 6, 9))
        assert "out of memory" in caplog.text
        gate.failure = None
        assert engine.held(sequence.session) == 6
        assert engine.stats().free_tokens == 512 - 8
        await sequence.step(3)


async def test_an_engine_whose_device_does_nothing_any_more_ends(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async with running(local.cut()) as engine:
        Gate(engine).failure = RuntimeError("CUDA error")
        monkeypatch.setattr(torch, "ones", broken)
        with pytest.raises(ComputeFailed):
            await engine.run(work(new_session(), 0, 1))
        with pytest.raises(Unavailable, match=r"computes nothing any more .*illegal memory access"):
            await engine.broken()


@pytest.mark.parametrize("family", ["llama", "bloom"])
async def test_forks_diverge_without_disturbing_each_other(local: Local, alone: Local, family: str) -> None:
    subject = local if family == "llama" else alone
    async with running(subject.cut()) as engine:
        parent = Sequence(subject, engine)
        await parent.step(10)
        children = [parent.fork(length) for length in (10, 10, 8, 7)]
        await together(parent.step(1), *(child.step(2) for child in children))
        grandchild = children[1].fork(9)
        engine.release(parent.session)
        await together(*(child.step(3) for child in children), grandchild.step(1))
        for child in (*children, grandchild):
            engine.release(child.session)
        assert_all_free(engine)


async def test_a_fork_is_of_what_its_parent_holds_when_it_is_submitted(local: Local) -> None:
    async with running(local.cut()) as engine:
        gate, parent = Gate(engine), Sequence(local, engine)
        await parent.step(10)
        with pytest.raises(PositionGap, match="holds 0"):
            await engine.run(work(new_session(), 4, 1, parent=(new_session(), 4)))
        with pytest.raises(PositionGap, match="holds 10"):
            await engine.run(work(new_session(), 11, 1, parent=(parent.session, 11)))
        other = new_session()
        await engine.run(work(other, 0, 1))
        with pytest.raises(CallerError, match="only a new session"):
            await engine.run(work(other, 4, 1, parent=(parent.session, 4)))
        with pytest.raises(CallerError, match="cannot begin"):
            await engine.run(work(other, 4, 1, parent=(other, 4)))
        gate.close()
        blocker = asyncio.ensure_future(engine.run(work(other, 0, 1)))
        await gate.reached()
        child = parent.fork(6)
        forked = asyncio.ensure_future(child.step(1))
        parent.roll_back(3)
        rolled_back = asyncio.ensure_future(parent.step(4))
        await asyncio.sleep(0)
        with pytest.raises(PositionGap, match="holds 3"):
            await engine.run(work(new_session(), 6, 1, parent=(parent.session, 6)))
        engine.release(parent.session)
        gate.open()
        await together(forked, blocker)
        with pytest.raises(SessionReleased):
            await rolled_back


async def test_a_pool_too_small_for_all_sessions_finishes_every_one(local: Local) -> None:
    preempted = 0

    async def generate(sequence: Sequence) -> None:
        nonlocal preempted
        for tokens in (20, *[1] * 6):
            try:
                await sequence.step(tokens)
                continue
            except Preempted:
                preempted += 1
            while True:
                try:
                    await sequence.replay()
                    break
                except Preempted:
                    preempted += 1
        engine.release(sequence.session)

    async with running(local.cut(), cache_tokens=60) as engine:
        await asyncio.gather(
            *(generate(Sequence(local, engine, seed=100 * i, owner=PeerId(f"owner {i % 3}"))) for i in range(5))
        )
        assert preempted
        assert_all_free(engine)


async def test_who_outgrew_what_was_said_of_it_makes_room_for_younger_ones_until_more_is_said(local: Local) -> None:
    async with running(local.cut(), cache_tokens=32, slack=2) as engine:
        old, young = new_session(), new_session()
        await engine.run(work(old, 0, 16, told=14))
        await engine.run(work(young, 0, 12))
        await engine.run(work(old, 16, 1, told=14))
        with pytest.raises(Preempted):
            await engine.run(work(old, 17, 4, told=14))
        await engine.run(work(old, 0, 14, told=14))  # as long as it may be, but it counts as younger all the same
        await engine.run(work(young, 12, 12))
        assert (engine.held(old), engine.held(young)) == (0, 24)
        await engine.run(work(old, 0, 17, told=17))
        assert (engine.held(old), engine.held(young)) == (17, 0)


@pytest.mark.usefixtures("momentary")
async def test_what_a_lone_session_outgrows_where_it_is_computed_counts(local: Local) -> None:
    async with running(local.cut(), cache_tokens=32, slack=2) as engine:
        await engine.prepared()
        old, young = new_session(), new_session()
        await engine.run(work(old, 0, 15, told=14))
        await engine.run(work(old, 15, 1, told=14))
        assert at_once(engine, work(old, 16, 1)) is not None
        await engine.run(work(young, 0, 24))
        assert (engine.held(old), engine.held(young)) == (0, 24)


async def test_a_preempted_session_is_told_to_replay_at_its_next_step(local: Local) -> None:
    async with running(local.cut(), cache_tokens=32) as engine:
        old, young = new_session(), new_session()
        await engine.run(work(old, 0, 8))
        await engine.run(work(young, 0, 24))
        await engine.run(work(old, 8, 1))
        assert engine.held(young) == 0
        with pytest.raises(Preempted) as caught:
            await engine.run(work(young, 24, 1))
        assert caught.value.retry_after_s > 0
        with pytest.raises(Preempted):
            await engine.run(work(new_session(), 4, 1, parent=(young, 4)))
        with pytest.raises(Preempted):  # the older one still needs its pages
            await engine.run(work(young, 0, 25))
        engine.release(old)
        await engine.run(work(young, 0, 25))


async def test_stopping_finishes_what_is_queued_and_refuses_the_rest(local: Local) -> None:
    engine = Engine(local.cut(), EngineConfig(cache_tokens=1024))
    await engine.start()
    gate = Gate(engine)
    gate.close()
    runs = [asyncio.ensure_future(engine.run(work(new_session(), 0, 300))) for _ in range(2)]
    await gate.reached()
    stopping = asyncio.ensure_future(engine.stop())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="shutting down"):
        await engine.run(work(new_session(), 0, 1))
    gate.open()
    await stopping
    assert all(len(run.result().hidden) == 300 for run in runs)


async def test_works_are_answered_while_the_engine_still_prepares_and_the_same_afterwards(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, prepare = threading.Event(), PagedCache.prepare

    def slowly(self: PagedCache) -> Iterator[None]:
        while not gate.is_set():
            yield
        yield from prepare(self)

    monkeypatch.setattr(PagedCache, "prepare", slowly)
    async with running(local.cut()) as engine:
        sequence, waiting = Sequence(local, engine), asyncio.ensure_future(engine.prepared())
        await sequence.step(20)
        await sequence.step(1)
        assert not waiting.done()
        gate.set()
        await waiting
        await sequence.step(1)


async def test_prepared_forwards_run_on_the_layers_that_were_chosen(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[str] = []
    multiply, run = Pool.linear, Pool.run

    def counted(self: Pool, *tensors: Any) -> Tensor:
        products.append("one")
        return multiply(self, *tensors)

    def counted_run(self: Pool, *arguments: Any) -> None:
        products.append("all")
        run(self, *arguments)

    monkeypatch.setattr(linear, "_fastest_s", lambda *_: (0.0, 1.0))  # every layer is the library's
    monkeypatch.setattr(Pool, "linear", counted)
    monkeypatch.setattr(Pool, "run", counted_run)
    monkeypatch.setattr(Tapes, "prepare", lambda _: iter(()))  # else all forwards are tapes
    async with running(local.cut(), token_budget=2 * TOKENS_MAX) as engine:
        await engine.run(work(new_session(), 0, 1))  # before, while or after they are chosen
        await engine.prepared()
        for tokens, expected in ((1, ["all"]), (TOKENS_MAX + 1, ["one"] * 7 * len(SPAN))):  # by a tape, and one by one
            products.clear()
            await engine.run(work(new_session(), 0, tokens))
            assert products == expected


async def test_who_waits_for_an_engine_hears_what_ended_it(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Engine, library: object) -> Iterator[None]:
        raise ValueError("the books are wrong")
        yield

    monkeypatch.setattr(Engine, "_preparation", broken)
    async with running(local.cut()) as engine:
        with pytest.raises(ValueError, match="books"):
            await engine.prepared()


async def test_stopping_gives_up_at_its_deadline(local: Local) -> None:
    engine = Engine(local.cut(), EngineConfig(cache_tokens=512))
    await engine.start()
    gate = Gate(engine)
    gate.close()
    run = asyncio.ensure_future(engine.run(work(new_session(), 0, 1)))
    await gate.reached()
    await engine.stop(deadline_s=0.05)
    with pytest.raises(Unavailable, match="shutting down"):
        await run
    gate.open()


async def test_a_model_that_cannot_run_does_not_start(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    model = local.cut()
    Gate(model).failure = RuntimeError("no such kernel")
    with pytest.raises(RuntimeError, match="no such kernel"):
        await Engine(model, EngineConfig(cache_tokens=512)).start()


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_clients_do_all_pages_come_back(local: Local, seed: int) -> None:
    """Steps, forks, rollbacks, cancellations and releases at random, on a cache that is too small."""
    rng = random.Random(seed)

    async def live(engine: Engine, known: list[SessionId]) -> None:
        session = new_session()
        known.append(session)
        for _ in range(12):
            parent = None
            if rng.random() < 0.2:
                session, origin = new_session(), rng.choice(known)
                known.append(session)
                parent = (origin, rng.randint(0, engine.held(origin) + 1))
            start = parent[1] if parent else max(0, engine.held(session) - rng.randint(0, 2))
            given = work(
                session, start, rng.choice([1, 1, 1, 20, 70]), owner=PeerId(str(rng.randint(0, 2))), parent=parent
            )
            task = asyncio.ensure_future(engine.run(given))
            if rng.random() < 0.2:
                await asyncio.sleep(0)
                task.cancel() if rng.random() < 0.5 else engine.release(rng.choice(known))
            with suppress(Preempted, PositionGap, SessionReleased, CacheTooSmall, asyncio.CancelledError):
                await task  # whatever comes of it, the client goes on with what the engine holds

    async with running(local.cut(), cache_tokens=200, token_budget=128) as engine:
        known: list[SessionId] = []
        await asyncio.gather(*(live(engine, known) for _ in range(8)))
        for session in known:
            engine.release(session)
        assert_all_free(engine)


@pytest.mark.parametrize(
    "wrong",
    [{"cache_tokens": 3}, {"page_size": 0}, {"token_budget": 10}, {"threads": 0}, {"max_queued_tokens": 0}],
)
def test_a_configuration_out_of_range_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"not|at least"):
        EngineConfig(**{"cache_tokens": 64, **wrong})


async def test_larger_forwards_hold_more_works_and_change_nothing_of_what_memory_promises(local: Local) -> None:
    async with running(local.cut(), token_budget=256, cache_tokens=2048) as engine:
        before = engine.stats(), engine.weight(200)
        for budget, forwards in ((256, 2), (512, 1)):
            engine.set_token_budget(budget)
            first, second = Sequence(local, engine, seed=1), Sequence(local, engine, seed=2)
            counted = sum(engine.counts().batch_works.counts)
            await together(first.step(200), second.step(200))
            assert sum(engine.counts().batch_works.counts) == counted + forwards
            for sequence in (first, second):
                engine.release(sequence.session)
        assert (engine.stats(), engine.weight(200)) == before
        with pytest.raises(ValueError, match="at least"):
            engine.set_token_budget(10)


async def test_a_start_that_is_cancelled_says_nothing_to_who_no_longer_waits() -> None:
    engine = Engine(Local("llama", SPAN).cut(), EngineConfig(cache_tokens=64, page_size=4))
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0)  # it has begun
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    starting.cancel()
    await asyncio.wait((starting,))
    await engine.stop()
    await asyncio.sleep(0)
    assert not complaints


@pytest.mark.usefixtures("momentary")
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
async def test_tokens_of_a_lone_session_are_computed_where_they_arrive(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Local(family, SPAN)
    async with running(local.cut(), slack=4) as engine:
        await engine.prepared()
        one, other = Sequence(local, engine), Sequence(local, engine, seed=50)
        assert not one.at_once()
        await one.step(20)
        assert not one.at_once()  # a tape is written by the engine's thread, with its first token
        await one.step(1)
        assert all(one.at_once() for _ in range(30))  # over the ends of pages, and of windows
        await other.step(1)
        assert not one.at_once(), "somebody else's work came between"
        await together(one.step(1), other.step(1))
        assert not one.at_once(), "or with it"
        await one.step(1)
        one.roll_back(one.length - 2)
        assert not one.at_once(), "it is no next token"
        await one.step(1)
        assert one.at_once()
        child = one.fork(one.length - 1)
        await child.step(1)
        await one.step(1)
        assert one.at_once(), "which shares pages with another"
        await child.step(1)
        assert child.at_once()
        monkeypatch.setattr(engine_module, "MOMENT_S", 0.0)
        assert not child.at_once()
        for sequence in (one, other, child):
            engine.release(sequence.session)
        assert_all_free(engine)


@pytest.mark.usefixtures("momentary")
async def test_what_is_known_no_more_or_waits_is_not_computed_where_it_arrives(local: Local) -> None:
    async with running(local.cut()) as engine:
        await engine.prepared()
        session = new_session()
        for start in range(2):
            await engine.run(work(session, start, 1))
        assert at_once(engine, work(session, 2, 1)) is not None
        waiting = asyncio.create_task(engine.run(work(new_session(), 0, 1)))
        await asyncio.sleep(0)
        assert at_once(engine, work(session, 3, 1)) is None
        await waiting
        await engine.run(work(session, 3, 1))
        engine.release(session)
        assert at_once(engine, work(session, 4, 1)) is None


@pytest.mark.usefixtures("momentary")
async def test_a_session_whose_next_page_is_somebody_elses_waits_for_its_turn(local: Local) -> None:
    async with running(local.cut(), cache_tokens=16) as engine:
        await engine.prepared()
        other, session = new_session(), new_session()
        await engine.run(work(other, 0, 9))
        for start in range(3):
            await engine.run(work(session, start, 1))
        assert at_once(engine, work(session, 3, 1)) is not None
        assert at_once(engine, work(session, 4, 1)) is None
        assert engine.held(session) == 4
        with pytest.raises(Preempted):  # who is younger gives way
            await engine.run(work(session, 4, 1))


@pytest.mark.usefixtures("momentary")
async def test_a_work_that_fails_where_it_arrived_fails_alone(local: Local) -> None:
    async with running(local.cut()) as engine:
        await engine.prepared()
        session = new_session()
        for start in range(2):
            await engine.run(work(session, start, 1))
        bad = work(session, 2, 1)
        bad.hidden[:] = torch.nan
        with pytest.raises(NonFiniteOutput):
            at_once(engine, bad)
        assert engine.held(session) == 2
        once, forward = engine._cache.at_once, RuntimeError("no memory")

        def fail(*_: Any) -> None:
            raise forward

        engine._cache.at_once = fail  # type: ignore[method-assign,assignment]
        with pytest.raises(ComputeFailed):
            at_once(engine, work(session, 2, 1))
        engine._cache.at_once = once  # type: ignore[method-assign]
        assert at_once(engine, work(session, 2, 1)) is not None
        assert engine.held(session) == 3
        engine.release(session)
        assert_all_free(engine)

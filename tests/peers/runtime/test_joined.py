"""Engines of several devices as one: the same outputs, the same promises. Two CPU engines stand for two devices."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import torch

from peers.errors import Busy, Preempted
from peers.runtime.engine import Engine
from peers.runtime.joined import JoinedEngine
from peers.runtime.probe import measure
from peers.runtime.works import CacheTooSmall, EngineConfig, PositionGap, SessionReleased, Work
from routing.errors import CallerError
from routing.ids import BlockSpan, PeerId, SessionId
from tests.peers.runtime.spans import ALICE, Local, Sequence, new_session, together

pytestmark = pytest.mark.usefixtures("plain_forwards")

SPAN = BlockSpan(1, 4)
PARTS = (BlockSpan(1, 2), BlockSpan(2, 4))


@pytest.fixture(scope="module", params=["llama", "bloom"])  # in packed forwards, and session by session
def local(request: pytest.FixtureRequest) -> Local:
    return Local(request.param, SPAN)


@asynccontextmanager
async def joined(local: Local, *parts: BlockSpan, **settings: Any) -> AsyncIterator[Any]:
    config = EngineConfig(**{"cache_tokens": 512, "page_size": 4, "token_budget": 64, **settings})
    engine = JoinedEngine([Engine(local.cut(part), config) for part in parts or PARTS])
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.stop)
        await engine.start()
        yield engine


def work(session: SessionId, start: int, tokens: int, **options: Any) -> Work:
    hidden = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(start))
    return Work(**{"session": session, "owner": ALICE, "start": start, "hidden": hidden, "span": SPAN} | options)


def assert_nothing_left(engine: JoinedEngine) -> None:
    assert not engine._lives
    for part in engine._engines:
        assert part.stats().sessions == 0
        assert part.stats().free_tokens == part.stats().total_tokens


async def test_sequences_roll_back_and_fork_as_on_one_device(local: Local) -> None:
    async with joined(local) as engine:
        first, second = (Sequence(local, engine, seed=seed) for seed in (1, 2))
        await together(first.step(20), second.step(7))
        await together(first.step(1), second.step(1))
        first.roll_back(15)
        await first.step(2)
        child = first.fork(16)
        await together(first.step(1), child.step(1), second.step(1))
        for sequence in (first, second, child):
            engine.release(sequence.session)
        assert_nothing_left(engine)


async def test_a_part_of_the_span_runs_on_the_devices_that_hold_it(local: Local) -> None:
    async with joined(local) as engine:
        whole = await engine.run(work(new_session(), 0, 5))
        session = new_session()
        front = await engine.run(work(session, 0, 5, span=PARTS[0]))
        back = await engine.run(work(new_session(), 0, 5, span=PARTS[1], hidden=front.hidden))
        torch.testing.assert_close(whole.hidden, back.hidden)  # one may run as a program, the other not yet
        with pytest.raises(CallerError, match="not served"):
            await engine.run(work(session, 5, 1, span=BlockSpan(0, 2)))


async def test_a_fork_is_of_what_the_parent_held_when_it_was_asked_for(local: Local) -> None:
    async with joined(local) as engine:
        parent, child, control = new_session(), new_session(), new_session()
        for session in (parent, control):
            await engine.run(work(session, 0, 10))
        forked = asyncio.ensure_future(engine.run(work(child, 10, 1, parent=(parent, 10))))
        await asyncio.sleep(0)
        engine.release(parent)
        expected = await engine.run(work(control, 10, 1))
        torch.testing.assert_close((await forked).hidden, expected.hidden)


async def test_a_fork_that_was_refused_may_be_sent_again(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    async with joined(local) as engine:
        parent, child = new_session(), new_session()
        await engine.run(work(parent, 0, 10))
        fork = work(child, 10, 1, parent=(parent, 10))
        with monkeypatch.context() as patch:

            async def busy(work: Work) -> None:
                raise Busy("full", retry_after_s=1.0)

            patch.setattr(engine._engines[1], "run", busy)
            with pytest.raises(Busy):
                await engine.run(fork)
        assert len((await engine.run(fork)).hidden) == 1


async def test_a_session_that_is_released_between_two_devices_leaves_nothing(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with joined(local) as engine:
        session, first = new_session(), engine._engines[0]
        run = first.run

        async def released(work: Work) -> Any:
            done = await run(work)
            engine.release(session)
            return done

        monkeypatch.setattr(first, "run", released)
        with pytest.raises(SessionReleased):
            await engine.run(work(session, 0, 5))
        assert_nothing_left(engine)


async def test_a_prefix_is_as_long_as_every_device_keeps_it() -> None:
    local = Local("llama", SPAN)
    async with joined(local, page_size=16) as engine:
        keys, first, second = [bytes([n]) * 16 for n in range(2)], new_session(), new_session()
        assert engine.open(first, ALICE, SPAN, keys) == 0
        alone = await engine.run(work(first, 0, 160))
        held = engine.open(second, ALICE, SPAN, keys)
        assert held > 0
        rest = await engine.run(work(second, held, 160 - held, hidden=work(first, 0, 160).hidden[held:]))
        torch.testing.assert_close(rest.hidden, alone.hidden[held:])
        stats = engine.stats()
        assert (stats.prefix_hits, stats.prefix_tokens) == (1, held), "on however many devices"


async def test_a_session_began_with_a_prefix_where_all_that_have_its_blocks_kept_it() -> None:
    local, keys = Local("llama", SPAN), [bytes([n]) * 16 for n in range(2)]
    async with joined(local, page_size=16) as engine:

        async def begin(span: BlockSpan) -> bool:
            session, before = new_session(), engine.stats()
            held = engine.open(session, ALICE, span, keys)
            await engine.run(work(session, held, 160 - held, span=span))
            engine.release(session)
            stats = engine.stats()
            assert stats.prefix_tokens - before.prefix_tokens == held
            return bool(stats.prefix_hits - before.prefix_hits)

        first, second = PARTS
        assert [await begin(span) for span in (first, SPAN, SPAN, first, second)] == [False, False, True, True, True]


async def test_the_oldest_session_is_the_same_everywhere_so_all_end_in_a_pool_that_holds_one(local: Local) -> None:
    async def live(engine: JoinedEngine, seed: int) -> None:
        rng, session, owner, held, attempts = random.Random(seed), new_session(), PeerId(str(seed)), 0, 0
        while held < 60:
            tokens = rng.choice([1, 5, 20])
            try:
                await engine.run(work(session, held, tokens, owner=owner))
                held += tokens
            except (Preempted, PositionGap):
                held, attempts = 0, attempts + 1
                assert attempts < 1000
        engine.release(session)

    async with joined(local, cache_tokens=100) as engine:
        await asyncio.gather(*(live(engine, seed) for seed in range(5)))
        assert_nothing_left(engine)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_clients_do_all_pages_come_back(local: Local, seed: int) -> None:
    rng = random.Random(seed)

    async def live(engine: JoinedEngine, known: list[SessionId]) -> None:
        session, held = new_session(), 0
        known.append(session)
        for _ in range(12):
            parent = None
            if rng.random() < 0.2:
                session, origin, held = new_session(), rng.choice(known), rng.randint(0, 30)
                known.append(session)
                parent = (origin, held)
            start, tokens = max(0, held - rng.randint(0, 2)), rng.choice([1, 1, 1, 20])
            start = held if parent else start
            task = asyncio.ensure_future(
                engine.run(work(session, start, tokens, owner=PeerId(str(rng.randint(0, 2))), parent=parent))
            )
            if rng.random() < 0.2:
                await asyncio.sleep(0)
                task.cancel() if rng.random() < 0.5 else engine.release(rng.choice(known))
            try:
                await task
                held = start + tokens
            except (Preempted, PositionGap, SessionReleased, CacheTooSmall, asyncio.CancelledError):
                held = 0

    async with joined(local, cache_tokens=100) as engine:
        known: list[SessionId] = []
        with suppress(CallerError):  # a fork of a session that has begun already
            await asyncio.gather(*(live(engine, known) for _ in range(8)))
        for session in known:
            engine.release(session)
        assert_nothing_left(engine)


async def test_joined_devices_are_measured_together(local: Local) -> None:
    async with joined(local, cache_tokens=4096, page_size=16, token_budget=256) as engine:
        found = await measure(engine, room_bytes=200_000_000)
        assert found.decode_s_per_block > 0
        assert_nothing_left(engine)
        engine.set_token_budget(512)
        assert [each.config.token_budget for each in engine._engines] == [512, 512]

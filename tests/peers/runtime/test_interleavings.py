"""Any order of opening, with a prefix that is known or not, stepping, rolling back, forking, cancelling, preemption and
closing: every output is the whole model's, and pages are neither lost nor made."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import psutil
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peers.errors import Preempted
from peers.runtime.engine import Engine
from peers.runtime.works import BehindWindow, EngineConfig, PositionGap, SessionReleased
from peers.wire.messages import PREFIX_POSITIONS
from routing.ids import BlockSpan, PeerId
from tests.peers.runtime.spans import ALICE, Local, Sequence, assert_same, random_ids

SPAN = BlockSpan(1, 3)
LENGTH_MAX = 140
TOKENS_MAX = 90
SLACK = 10
BOB = PeerId("bob")
TEXT = random_ids(LENGTH_MAX, 7)
KEYS = [b"0" * 16, b"1" * 16]
"""Of the text's blocks."""
LOCAL = Local("llama", SPAN)
OPERATIONS = int(os.environ.get("OPERATIONS", "20000"))
"""Of the long life; so many take ten seconds."""


def configured(local: Local = LOCAL, **others: Any) -> Engine:
    settings = {"cache_tokens": 272, "page_size": 4, "token_budget": 128, "slack": SLACK, **others}
    return Engine(local.cut(), EngineConfig(**settings))


def assert_pages_add_up(engine: Engine) -> None:
    pages = engine._pages
    with engine._wake:  # one that rests lets go of prefixes
        assert pages.free_pages + sum(count > 0 for count in pages._references) == pages.num_pages
    for session in pages._sessions.values():
        for table in session.tables:
            if table.window is not None:
                assert len(table.pages) <= -(-(table.window + SLACK + TOKENS_MAX) // pages.page_size) + 1


async def send(sequence: Sequence, tokens: int) -> None:
    """A checked step; a session that lost its positions sends them again first, one that cannot is as before."""
    before = list(sequence.steps)
    with suppress(Preempted):  # by an older one
        if sequence.engine.held(sequence.session) < sequence.length and sequence.parent is None:
            await sequence.replay()
        await sequence.step(tokens)
        return
    sequence.steps, sequence.parent = before, None


class Interleavings(RuleBasedStateMachine):
    local = LOCAL

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.sequences: list[Sequence] = []

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    @initialize()
    def start(self) -> None:
        self.engine = configured(self.local)
        self.run(self.engine.start())

    def draw(self, data: st.DataObject) -> Sequence:
        return data.draw(st.sampled_from(self.sequences))

    @rule(owner=st.sampled_from([ALICE, BOB]), seed=st.integers(0, 10))
    def open(self, owner: PeerId, seed: int) -> None:
        if len(self.sequences) < 6:
            self.sequences.append(Sequence(self.local, self.engine, seed=seed, owner=owner))

    @rule(owner=st.sampled_from([ALICE, BOB]), blocks=st.sampled_from([1, 1, 2]), more=st.integers(1, 12))
    def open_known(self, owner: PeerId, blocks: int, more: int) -> None:
        """With a text that others began with, and what is kept of it."""
        if len(self.sequences) == 6:
            return
        sequence = Sequence(self.local, self.engine, seed=blocks, owner=owner)
        held = self.engine.open(sequence.session, owner, self.local.span, KEYS[:blocks])
        assert held in {block * PREFIX_POSITIONS for block in range(blocks + 1)}
        sequence.steps = [TEXT[:held]] if held else []
        try:
            for piece in TEXT[held : blocks * PREFIX_POSITIONS + more].split(TOKENS_MAX):
                start = sequence.length
                sequence.steps.append(piece)
                hidden, expected = self.local.follow(sequence.steps)
                assert_same(self.run(self.engine.run(sequence.work(start, hidden))).hidden, expected)
        except Preempted:
            self.engine.release(sequence.session)
        else:
            self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """Several at once, prompts and tokens."""
        chosen = data.draw(st.lists(st.sampled_from(self.sequences), min_size=1, unique_by=id))
        works = []
        for sequence in chosen:
            tokens = data.draw(st.sampled_from([1, 1, 3, 30, TOKENS_MAX]))
            if sequence.length + tokens <= LENGTH_MAX:
                works.append(send(sequence, tokens))

        async def together() -> None:
            await asyncio.gather(*works)

        self.run(together())

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        sequence = self.draw(data)
        sequence.roll_back(data.draw(st.integers(0, sequence.length)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self.draw(data)
        held = min(parent.length, self.engine.held(parent.session))
        if held and len(self.sequences) < 6:
            child = parent.fork(data.draw(st.integers(1, held)))
            self.sequences.append(child)
            self.run(send(child, 1))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.sampled_from([1, 40]))
    def cancel(self, data: st.DataObject, tokens: int) -> None:
        sequence = self.draw(data)
        if sequence.length + tokens > LENGTH_MAX:
            return
        before = list(sequence.steps)

        async def cancelled() -> None:
            task = asyncio.ensure_future(sequence.step(tokens))
            await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError, Preempted, PositionGap, BehindWindow):
                await task
            sequence.steps = before  # whatever came of it, it goes on from there

        self.run(cancelled())

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        sequence = self.draw(data)
        self.sequences.remove(sequence)
        self.engine.release(sequence.session)

    @rule(resting=st.booleans())
    def rest(self, resting: bool) -> None:
        self.engine.rest(resting)

    @invariant()
    def pages_add_up(self) -> None:
        if hasattr(self, "engine"):
            assert_pages_add_up(self.engine)

    def teardown(self) -> None:
        for sequence in self.sequences:
            self.engine.release(sequence.session)
        self.run(self.engine.stop())  # what was cancelled may still be in a forward, and frees its pages when that ends
        stats = self.engine.stats()
        assert (stats.free_tokens, stats.queued_tokens, stats.sessions) == (stats.total_tokens, 0, 0)
        self.loop.close()


class SlidingInterleavings(Interleavings):
    local = Local("mistral", SPAN)


class HybridInterleavings(Interleavings):
    local = Local("gemma3", BlockSpan(0, 3))


class UnlikeInterleavings(Interleavings):
    local = Local("gemma4-moe", BlockSpan(0, 3))


Interleavings.TestCase.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
SlidingInterleavings.TestCase.settings = settings(max_examples=3, stateful_step_count=25, deadline=None)
HybridInterleavings.TestCase.settings = settings(max_examples=5, stateful_step_count=25, deadline=None)
UnlikeInterleavings.TestCase.settings = settings(max_examples=4, stateful_step_count=25, deadline=None)
TestInterleavings = Interleavings.TestCase
TestSlidingInterleavings = SlidingInterleavings.TestCase
TestHybridInterleavings = HybridInterleavings.TestCase
TestUnlikeInterleavings = UnlikeInterleavings.TestCase


@pytest.mark.timeout(600)
async def test_a_long_life_leaks_no_page_no_session_and_no_memory() -> None:
    """Operations of eight clients, with prefixes; memory is compared between the ends of the second and the last
    quarter."""
    rng = random.Random(0)
    engine = configured(cache_tokens=600)
    await engine.start()
    left = OPERATIONS
    resident_bytes: list[int] = []

    async def live(owner: PeerId) -> None:
        nonlocal left
        sequence: Sequence | None = None
        while left > 0:
            left -= 1
            if left % (OPERATIONS // 4) == 0:
                gc.collect()
                resident_bytes.append(psutil.Process().memory_info().rss)
            if sequence is None:
                sequence = Sequence(LOCAL, engine, owner=owner)
                engine.open(sequence.session, owner, SPAN, KEYS[: rng.randint(0, 2)])
            held = engine.held(sequence.session)
            tokens = rng.choice([1, 1, 1, 1, 1, 1, 5, 20, 80])
            dice = rng.random()
            if dice < 0.05 or held + tokens > LENGTH_MAX:
                engine.release(sequence.session)
                sequence = None
                continue
            old = sequence.session
            if dice < 0.1 and held:
                sequence = Sequence(LOCAL, engine, owner=owner)
                sequence.parent = old, held
            start = max(0, held - rng.randint(1, 4)) if 0.1 <= dice < 0.2 else held
            task = asyncio.ensure_future(engine.run(sequence.work(start, rows[:tokens])))
            sequence.parent = None
            if 0.2 <= dice < 0.25:
                await asyncio.sleep(0)
                task.cancel()
            with suppress(Preempted, PositionGap, SessionReleased, asyncio.CancelledError):
                await task
            if old != sequence.session:
                engine.release(old)

    rows, _ = LOCAL.follow([random_ids(80, seed=0)])
    await asyncio.gather(*(live(PeerId(f"client {number}")) for number in range(8)))
    for session in list(engine._sessions):
        engine.release(session)
    assert_pages_add_up(engine)
    stats = engine.stats()
    assert (stats.free_tokens, stats.queued_tokens, stats.sessions) == (stats.total_tokens, 0, 0)
    assert not engine._by_number
    assert not engine._tickets
    await engine.stop()
    assert engine.stats().prefix_hits > 0
    assert resident_bytes[-1] - resident_bytes[1] < 20_000_000, resident_bytes

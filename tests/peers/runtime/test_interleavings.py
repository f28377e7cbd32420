"""Any order of opening, with a prefix that is known or not, stepping, rolling back, forking, cancelling, preemption and
closing, whichever way forwards are computed: every output is the whole model's (in float32 as near as makes the same
ids, in bfloat16 within the bound that `spans.ERRORS` states), and pages are neither lost nor made."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor
from torch.nn.attention import flex_attention

from peers.errors import Preempted
from peers.model.cutting import SpanModel
from peers.model.kernels import linear
from peers.runtime import engine as engine_module
from peers.runtime import flex, graphs
from peers.runtime.cache import PagedCache
from peers.runtime.engine import Engine
from peers.runtime.flex import Flex
from peers.runtime.graphs import Graphs
from peers.runtime.program import Programs
from peers.runtime.scheduler import Pace, Tempo
from peers.runtime.tape import Tapes
from peers.runtime.works import BehindWindow, EngineConfig, PositionGap, SessionReleased
from peers.wire.messages import PREFIX_POSITIONS
from routing.ids import BlockSpan, PeerId
from tests.peers.runtime.spans import ALICE, Local, Sequence, assert_pages_add_up, random_ids
from tests.peers.runtime.test_engine import Interlude
from tests.peers.runtime.test_graphs import again

SPAN = BlockSpan(1, 4)
"""To the last block, of which a head would make ids."""
LENGTH_MAX = 140
TOKENS_MAX = 90
SLACK = 10
LONG_TOKENS = 24
"""A forward of more pauses between blocks, and in them."""
PLACES = st.integers(0, 5)
FURTHER = st.integers(1, 5)
"""From one place to another."""
BACK = st.one_of(st.integers(1, SLACK), st.integers(1, LENGTH_MAX))
BOB = PeerId("bob")
TEXT = random_ids(LENGTH_MAX, 7)
KEYS = [b"0" * 16, b"1" * 16]
"""Of the text's blocks."""


def assert_tables_are_short(engine: Engine) -> None:
    """Where layers slide."""
    with engine.gathering():
        pages = engine._pages
        for table in (table for session in pages._sessions.values() for table in session.tables):
            if table.window is not None:
                assert len(table.pages) <= -(-(table.window + SLACK + TOKENS_MAX) // pages.page_size) + 1


class Whole(Local):
    """Runs everything in one forward, without a cache."""

    def follow(self, steps: list[Tensor]) -> tuple[Tensor, Tensor]:
        entered, left = super().follow([torch.cat(steps)])
        return entered[-len(steps[-1]) :], left[-len(steps[-1]) :]


class Decoded(Sequence):
    """In float32 also the id that the whole model's head makes of the last position is the same."""

    def check(self, output: Tensor, expected: Tensor) -> None:
        super().check(output, expected)
        if output.dtype == torch.float32:
            assert self._decoded(output) == self._decoded(expected)

    @torch.no_grad()
    def _decoded(self, hidden_TH: Tensor) -> int:
        model = self.local.model
        return int(model.lm_head(model.model.norm(hidden_TH[-1])).argmax())


async def send(sequence: Sequence, tokens: int) -> None:
    """A checked step; a session that lost its positions sends them again first, one that cannot is as before."""
    before = list(sequence.steps)
    with suppress(Preempted):  # by an older one
        if sequence.engine.held(sequence.session) < sequence.length and sequence.parent is None:
            await sequence.replay()
        await sequence.step(tokens)
        return
    sequence.steps, sequence.parent = before, None


def own_code(patch: pytest.MonkeyPatch) -> None:
    """Whatever is forwarded, the model does it."""
    patch.setattr(PagedCache, "prepare", lambda _: iter(()))


def programs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine_module, "pool_for", lambda *_: None)


def tapes(patch: pytest.MonkeyPatch) -> None:
    """Of one call, which takes but a moment, so that a lone session's next token is computed where it arrives."""
    patch.setattr(linear, "_fastest_s", lambda *_: (0.0, 1.0))
    patch.setattr(engine_module, "MOMENT_S", 1e9)


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """What stands for a graph runs again; sessions attend at once, by the definition of what is compiled there."""
    programs(patch)
    patch.setattr(engine_module, "recorder_for", lambda _: again)
    patch.setattr(graphs, "COUNTS", (1, 2, 4))
    patch.setattr(graphs, "REACHES", (8, 64, 256))
    patch.setattr(graphs, "fastest_s", lambda *_: 0.0)
    patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    patch.setattr(flex, "BLOCK", 16)


def as_they_come(patch: pytest.MonkeyPatch) -> None:
    """As long as the engine prepares itself by its own code, then by whatever it finds best."""


Way = Callable[[pytest.MonkeyPatch], None]
WAYS: tuple[Way, ...] = (tapes, programs, as_on_a_gpu, own_code, as_they_come)
PARTS: dict[str, Any] = {"a tape": Tapes, "a program": Programs, "a graph": Graphs, "one kernel": Flex}
"""What may compute a forward, or attend in it."""


class Watched(Engine):
    """Notes what its forwards are."""

    def __init__(self, model: SpanModel, config: EngineConfig, seen: Counter[str]) -> None:
        super().__init__(model, config)
        self.seen = seen

    def _run_batch(self, batch: Any, *, beside: bool = False) -> None:
        self.seen["beside another"] += beside
        self.seen["in company"] += len(batch) > 1
        self.seen["in pieces"] += any(pick.tokens < ticket.item.tokens for ticket, pick in batch)
        super()._run_batch(batch, beside=beside)


class Interleavings(RuleBasedStateMachine):
    """Six places for sessions, of which the last two are another client's. What is drawn depends on nothing that the
    engine does, which has a thread of its own."""

    local: ClassVar[Local]
    way: ClassVar[Way]
    caches: ClassVar[tuple[int, int]]
    """Positions."""
    seen: ClassVar[Counter[str]]
    """What happened in all runs."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.patch = pytest.MonkeyPatch()
        self.sequences: dict[int, Sequence] = {}
        self.opened = 0

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    @initialize(cache=st.integers(0, 1), beside=st.sampled_from([0, 16]), alone=st.sampled_from([32, 128]))
    def start(self, cache: int, beside: int, alone: int) -> None:
        """Prompts have so many positions in a forward."""
        type(self).way(self.patch)
        self.patch.setattr(Tempo, "pace", lambda *_, **__: Pace(beside_steps=beside, alone=alone))
        self.patch.setattr(Tempo, "is_long", lambda _, tokens: tokens > LONG_TOKENS)
        for name, part in PARTS.items():
            self.patch.setattr(part, "__call__", self.noting(name, part.__call__))
        config = EngineConfig(cache_tokens=self.caches[cache], page_size=4, token_budget=128, slack=SLACK)
        self.engine = Watched(self.local.cut(), config, self.seen)
        self.run(self.engine.start())
        if type(self).way is as_on_a_gpu:
            assert isinstance(self.engine._cache, PagedCache)
            self.engine._cache._whole = Flex(flex_attention.flex_attention)
        if type(self).way is not as_they_come:
            self.run(self.engine.prepared())

    def noting(self, name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(part)
        def noted(*args: Any, **kwargs: Any) -> Any:
            result = part(*args, **kwargs)
            if self.engine._running:  # else the engine prepares itself
                self.seen[name] += result is not None
            return result

        return noted

    def put(self, place: int) -> Sequence:
        """A new session."""
        self.forget(place)
        self.opened += 1
        self.sequences[place] = Decoded(
            self.local, self.engine, seed=10_000 * self.opened, owner=ALICE if place < 4 else BOB
        )
        return self.sequences[place]

    def at(self, place: int, room: int = 0) -> Sequence:
        """The session there, if it has room for so many positions, else a new one."""
        sequence = self.sequences.get(place)
        return self.put(place) if sequence is None or sequence.length + room > LENGTH_MAX else sequence

    def forget(self, place: int) -> None:
        if (sequence := self.sequences.pop(place, None)) is not None:
            self.engine.release(sequence.session)
            self.seen["sent again from behind a window"] += sequence.replays

    @rule(works=st.dictionaries(PLACES, st.sampled_from([1, 1, 3, 30, TOKENS_MAX]), min_size=1))
    def step(self, works: dict[int, int]) -> None:
        """Several at once, prompts and tokens."""

        async def together() -> None:
            await asyncio.gather(*(send(self.at(place, tokens), tokens) for place, tokens in works.items()))

        self.run(together())

    @rule(place=PLACES, tokens=st.integers(1, 9))
    def decode(self, place: int, tokens: int) -> None:
        """A token through the engine's thread, and more where they arrive, if they may."""
        sequence = self.at(place, 1 + tokens)
        self.run(send(sequence, 1))
        self.seen["at once"] += sum(sequence.at_once() for _ in range(tokens))

    @rule(place=PLACES, blocks=st.sampled_from([1, 1, 2]), more=st.integers(1, 12))
    def open_known(self, place: int, blocks: int, more: int) -> None:
        """With a text that others began with, and what is kept of it."""
        sequence = self.put(place)
        held = self.engine.open(sequence.session, sequence.owner, self.local.span, KEYS[:blocks])
        assert held in {block * PREFIX_POSITIONS for block in range(blocks + 1)}
        sequence.steps = [TEXT[:held]] if held else []
        try:
            for piece in TEXT[held : blocks * PREFIX_POSITIONS + more].split(TOKENS_MAX):
                start = sequence.length
                sequence.steps.append(piece)
                hidden, expected = self.local.follow(sequence.steps)
                sequence.check(self.run(self.engine.run(sequence.work(start, hidden))).hidden, expected)
        except Preempted:
            self.forget(place)
        else:
            self.seen["behind a prefix"] += held > 0

    @rule(place=PLACES, further=FURTHER)
    def crowd(self, place: int, further: int) -> None:
        """Two become as long as they may, for which others give way, or one of them."""
        for each in (place, (place + further) % 6):
            sequence = self.at(each, 1)
            for tokens in (TOKENS_MAX, LENGTH_MAX):
                if tokens := min(tokens, LENGTH_MAX - sequence.length, TOKENS_MAX):
                    self.run(send(sequence, tokens))

    @rule(place=PLACES, further=FURTHER, what=st.sampled_from(["step", "cancel", "close"]))
    def meanwhile(self, place: int, further: int, what: str) -> None:
        """In the middle of a long forward another session steps, or it is cancelled, or closed."""
        long, other = self.at(place, TOKENS_MAX), self.at((place + further) % 6, 1)
        before = list(long.steps)

        async def both() -> None:
            forward, others = asyncio.ensure_future(send(long, TOKENS_MAX)), []

            def act() -> None:
                self.seen[f"{what} in a forward"] += 1
                if what == "step":
                    others.append(asyncio.ensure_future(send(other, 1)))
                elif what == "cancel":
                    forward.cancel()
                else:
                    self.forget(place)

            Interlude(self.engine, act)
            await asyncio.wait((forward,))
            del self.engine._let_steps_in
            await asyncio.gather(*others)
            if forward.cancelled():
                long.steps = before
            elif place in self.sequences:
                await forward
            else:
                assert isinstance(forward.exception(), SessionReleased)

        self.run(both())

    @rule(place=PLACES, back=BACK, tokens=st.integers(0, 3))
    def roll_back(self, place: int, back: int, tokens: int) -> None:
        """And go on at once, or whenever it is asked to."""
        sequence = self.at(place, 3)
        sequence.roll_back(max(0, sequence.length - back))
        if tokens:
            self.run(send(sequence, tokens))

    @rule(place=PLACES, further=FURTHER, back=BACK)
    def fork(self, place: int, further: int, back: int) -> None:
        parent, into = self.at(place), (place + further) % 6
        if held := min(parent.length, self.engine.held(parent.session)):
            self.forget(into)
            child = self.sequences[into] = parent.fork(max(1, held - back))
            self.run(send(child, 1))
            self.seen["a fork"] += 1

    @rule(place=PLACES, tokens=st.sampled_from([1, 40]))
    def cancel(self, place: int, tokens: int) -> None:
        sequence = self.at(place, tokens)
        before = list(sequence.steps)

        async def cancelled() -> None:
            task = asyncio.ensure_future(sequence.step(tokens))
            await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError, Preempted, PositionGap, BehindWindow):
                await task
            sequence.steps = before  # whatever came of it, it goes on from there

        self.run(cancelled())

    @rule(place=PLACES)
    def close(self, place: int) -> None:
        self.forget(place)

    @rule(resting=st.booleans())
    def rest(self, resting: bool) -> None:
        self.engine.rest(resting)

    @invariant()
    def pages_add_up(self) -> None:
        if hasattr(self, "engine"):
            assert_pages_add_up(self.engine)
            assert_tables_are_short(self.engine)

    def teardown(self) -> None:
        try:
            for place in range(6):
                self.forget(place)
            self.run(self.engine.stop())  # what was cancelled may still be in a forward, and frees its pages then
            assert_pages_add_up(self.engine)
            stats = self.engine.stats()
            assert (stats.free_tokens, stats.queued_tokens, stats.sessions) == (stats.total_tokens, 0, 0)
            self.seen["preempted"] += self.engine.counts().preemptions
        finally:
            self.loop.close()
            self.patch.undo()


EVERYTHING = {
    *PARTS,
    *("at once", "in company", "in pieces", "beside another", "behind a prefix", "a fork", "preempted"),
    *("step in a forward", "cancel in a forward", "close in a forward", "sent again from behind a window"),
}
FULL, OUTSIDE = {"sent again from behind a window"}, {"at once"}
"""What cannot happen where no layer slides, and where some operations are not the library's."""


@pytest.mark.parametrize(
    ("family", "dtype", "caches", "never"),
    [
        ("llama", torch.float32, (160, 272), FULL),
        ("mistral", torch.float32, (112, 160), set()),
        ("gemma3", torch.float32, (160, 272), set()),
        ("gemma4-moe", torch.float32, (272, 272), OUTSIDE),
        ("llama", torch.bfloat16, (160, 272), FULL),
        ("gemma3", torch.bfloat16, (160, 272), set()),
    ],
)
def test_any_order_of_operations_says_what_the_whole_model_says(
    family: str, dtype: torch.dtype, caches: tuple[int, int], never: set[str]
) -> None:
    """And everything that may happen did, in each of these machines."""
    local, seen = Whole(family, SPAN, dtype=dtype), Counter[str]()
    for way in WAYS:
        given = {"local": local, "way": staticmethod(way), "caches": caches, "seen": seen}
        machine = type(f"{family} in {dtype} by {way.__name__}", (Interleavings,), given)  # examples go by the name
        run_state_machine_as_test(machine, settings=settings(max_examples=5, stateful_step_count=25, deadline=None))
    assert (+seen).keys() == EVERYTHING - never

"""A span of a tiny model, and the whole local model beside it to say what should come out."""

from __future__ import annotations

import asyncio
import copy
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from peers.model.cutting import SpanModel
from peers.model.support import examine
from peers.runtime.cache import Chunk, PagedCache
from peers.runtime.engine import Engine
from peers.runtime.joined import AnyEngine
from peers.runtime.works import BehindWindow, Done, EngineConfig, Work
from peers.wire import tensors
from routing.ids import BlockSpan, PeerId, SessionId
from tests.helpers.families import FAMILIES, VOCABULARY, random_model

ALICE = PeerId("alice")
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps}
"""By which an output may differ from the plain model's, of the largest value; of bfloat16 that is eight roundings in a
row, as other shapes mean other orders of summing up. 1e-6, and four, were seen in 1,500 outputs of each at random."""


def new_session() -> SessionId:
    return SessionId(os.urandom(16))


class Local:
    """A whole model that notes what enters and leaves the blocks `span`; makes spans that should do the same."""

    def __init__(self, family: str, span: BlockSpan, *, dtype: torch.dtype = torch.float32) -> None:
        config = FAMILIES[family].config()
        self.model = random_model(config).to(dtype)
        self.error = ERRORS[dtype]
        self.span = span
        self.anatomy = examine(config)
        self._seen: dict[str, Tensor] = {}
        self._pristine = copy.deepcopy(self.model)
        layers = list(self.model.get_submodule(self.anatomy.layers_path).children())
        layers[span.start].register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[span.end - 1].register_forward_hook(self._leave)

    def cut(self, span: BlockSpan | None = None) -> SpanModel:
        return SpanModel(copy.deepcopy(self._pristine), self.anatomy, span or self.span)

    def _enter(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen["enters"] = args[0] if args else kwargs["hidden_states"]

    def _leave(self, _: Any, __: Any, output: Any) -> None:
        self._seen["leaves"] = output[0] if isinstance(output, tuple) else output

    def follow(self, steps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What enters and what leaves the span at the last of these steps (token ids) of one sequence, [n, H] each."""
        cache = DynamicCache(config=self.model.config)
        for module in self.model.modules():
            if getattr(module, "rope_type", None) == "dynamic":  # it remembers the last sequence
                module.max_seq_len_cached, module.inv_freq = module.original_max_seq_len, module.original_inv_freq
        for ids in steps:
            entered, left = self.run(ids, cache)
        return entered, left

    @torch.no_grad()
    def run(self, ids: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """What enters and what leaves the span at these tokens behind those in `cache`, which they join."""
        self.model(ids[None], past_key_values=cache, use_cache=True)
        return self._seen["enters"][0], self._seen["leaves"][0]


def random_ids(tokens: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


def assert_same(output: Tensor, expected: Tensor, error: float = ERRORS[torch.float32]) -> None:
    """Equal to `error` of the largest value."""
    torch.testing.assert_close(output, expected, atol=error * float(expected.abs().max()), rtol=0)


@torch.inference_mode()
def assert_graphs_say_the_same(cache: PagedCache, most: int) -> None:
    """Sessions that grow by a token, or some by a few, in any company: of at most `most` there are graphs."""
    rng, model, graphs = random.Random(most), cache._model, cache._graphs
    lengths = dict.fromkeys(range(most + 1), 0)
    for session in lengths:
        cache._pages.open(session)
    for turn in range(20):
        chunks = []
        for session in rng.sample(sorted(lengths), rng.randint(1, len(lengths))):
            tokens = rng.choice([1, 1, 1, 7]) if turn < 8 else 1
            cache._pages.grow(session, lengths[session] + tokens)
            chunks.append(Chunk(session=session, start=lengths[session], tokens=tokens))
            lengths[session] += tokens
        total = sum(chunk.tokens for chunk in chunks)
        hidden_TH = torch.randn(total, model.hidden_size, generator=torch.Generator().manual_seed(turn))
        outputs = []
        for some in (None, graphs):
            cache._graphs = some
            outputs.append(cache.forward(chunks, hidden_TH.to(model.device), model.span, 0).clone())
        program, graph = outputs
        torch.testing.assert_close(graph, program, atol=2e-5, rtol=1e-4)


@asynccontextmanager
async def running(model: SpanModel, **settings: Any) -> AsyncIterator[Engine]:
    engine = Engine(model, EngineConfig(**{"cache_tokens": 512, "page_size": 4, "token_budget": 64, **settings}))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


class Sequence:
    """One sequence, at the engine and locally: every step is checked against the whole model."""

    def __init__(self, local: Local, engine: Engine, *, seed: int = 0, owner: PeerId = ALICE) -> None:
        self.local, self.engine, self.owner, self.seed = local, engine, owner, seed
        self.session = new_session()
        self.steps: list[Tensor] = []
        self.parent: tuple[SessionId, int] | None = None
        self.replays = 0
        """How often it went back further than layers with a window keep."""
        self.slid_at = 0
        """The furthest position where a work began: behind that, less the slack, nothing need be kept."""

    @property
    def length(self) -> int:
        return sum(len(step) for step in self.steps)

    def roll_back(self, length: int) -> None:
        """Forget positions from `length` on; the engine learns it from the next step."""
        while self.length > length:
            last = self.steps.pop()
            if self.length < length:
                self.steps.append(last[: length - self.length])

    def fork(self, length: int) -> Sequence:
        child = type(self)(self.local, self.engine, seed=self.seed + 1000, owner=self.owner)
        child.steps = list(self.steps)
        child.roll_back(length)
        child.parent, child.slid_at = (self.session, length), self.slid_at
        return child

    def check(self, output: Tensor, expected: Tensor) -> None:
        assert_same(output, expected, self.local.error)

    async def step(self, tokens: int) -> Done:
        """Run new tokens, each sequence its own, and check the output."""
        start = self.length
        self.seed += 1
        self.steps.append(random_ids(tokens, self.seed))
        hidden, expected = self.local.follow(self.steps)
        try:
            done = await self.engine.run(self.work(start, hidden))
        except BehindWindow:
            assert start < self.slid_at - self.engine.config.slack
            self.replays, self.parent = self.replays + 1, None
            return await self.replay()
        self.parent = None
        self.check(done.hidden, expected)
        return done

    def at_once(self, tokens: int = 1) -> bool:
        """Run new tokens in this call, if the engine does, and check the output; else nothing has happened."""
        start = self.length
        self.seed += 1
        self.steps.append(random_ids(tokens, self.seed))
        hidden, expected = self.local.follow(self.steps)
        output = at_once(self.engine, self.work(start, hidden))
        if output is None:
            self.steps.pop()
            return False
        self.check(output, expected)
        return True

    async def replay(self) -> Done:
        """Send everything again from position 0, step by step, to a session that lost it; returns the last answer."""
        for count, step in enumerate(self.steps, start=1):
            hidden, expected = self.local.follow(self.steps[:count])
            done = await self.engine.run(self.work(sum(len(s) for s in self.steps[:count]) - len(step), hidden))
            self.check(done.hidden, expected)
        return done

    def work(self, start: int, hidden: Tensor) -> Work:
        self.slid_at = max(self.slid_at, start) if start else 0
        return Work(
            session=self.session,
            owner=self.owner,
            start=start,
            hidden=hidden,
            span=self.local.span,
            parent=self.parent,
        )


def assert_pages_add_up(engine: Engine) -> None:
    """Each is free, or referred to by every table and every kept block that holds it, and by nothing else."""
    with engine.gathering():
        pages = engine._pages
        tables = [table.pages for session in pages._sessions.values() for table in session.tables]
        holders = Counter(chain.from_iterable(chain(tables, *engine._prefixes._blocks.values())))
        assert pages._references == [holders[page] for page in range(pages.num_pages)]
        assert list(pages._is_free) == [not count for count in pages._references]
        assert pages.free_pages + len(holders) == pages.num_pages


def at_once(engine: AnyEngine, work: Work) -> Tensor | None:
    """What the engine makes of a work in this call, if it does."""
    rows = tensors.pack(work.hidden, engine.dtype)
    done = engine.at_once(work.session, work.start, rows, work.span, work.regime_length)
    shape = {"count": len(work.hidden), "hidden": engine.model.hidden_size}
    return None if done is None else tensors.unpack(done[0], dtype=engine.dtype, **shape)


async def together(*steps: Any) -> list[Any]:
    return list(await asyncio.gather(*steps))

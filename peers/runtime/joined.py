"""The engines of one peer, chained: to others they are one engine that runs their spans one after another.

There is one for each device that shares in a span, and one for each of the spans that a peer serves, with blocks of
other peers between them.

Owns which part of a work runs where, and that all of them know the same sessions in the same order: who is older is
older everywhere, so that the session that nobody may preempt is the same one in each engine. Hidden states travel
between devices through this machine's memory. A session holds what every engine in its span holds of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from peers.runtime.cost import ForwardCost
from peers.runtime.engine import Engine
from peers.runtime.works import Done, EngineConfig, EngineCounts, EngineStats, SessionKey, SessionReleased, Work
from peers.tally import Tally
from routing.errors import CallerError, SwarmError
from routing.ids import BlockSpan, PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedModel:
    """What others ask of an engine's model."""

    span: BlockSpan
    """From the first block to the last."""
    hidden_size: int
    max_positions: int
    device: torch.device
    """The first one."""


class JoinedEngine:
    """What `Engine` is, over engines in the order of their spans.

    A work over a hole between two spans passes it by: good for measuring all engines at once, and for nothing else.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        first, last = engines[0].model, engines[-1].model
        assert all(a.model.span.end <= b.model.span.start for a, b in pairwise(engines))
        self.model = JoinedModel(
            span=BlockSpan(first.span.start, last.span.end),
            hidden_size=first.hidden_size,
            max_positions=first.max_positions,
            device=first.device,
        )
        self._engines = tuple(engines)
        self._lives: dict[SessionKey, object] = {}
        """A token for each session; another one when it begins again after a release."""
        self._prefix_hits = self._prefix_tokens = 0

    @property
    def config(self) -> EngineConfig:
        return self._engines[0].config

    @property
    def num_blocks(self) -> int:
        return sum(engine.num_blocks for engine in self._engines)

    @property
    def packs_sessions(self) -> bool:
        return all(engine.packs_sessions for engine in self._engines)

    async def start(self) -> None:
        """Raises what starting one of them raises; `stop` ends the others."""
        for engine in self._engines:
            await engine.start()

    async def prepared(self) -> None:
        await asyncio.gather(*(engine.prepared() for engine in self._engines))

    async def broken(self) -> None:
        """Never returns; raises what ended a thread."""
        await asyncio.gather(*(engine.broken() for engine in self._engines))

    async def stop(self, *, deadline_s: float = 10.0) -> None:
        await asyncio.gather(*(engine.stop(deadline_s=deadline_s) for engine in self._engines))

    @contextmanager
    def gathering(self) -> Iterator[None]:
        with self._engines[0].gathering():
            yield

    def open(
        self,
        session: SessionKey,
        owner: PeerId,
        span: BlockSpan,
        keys: Sequence[bytes],
        adapter: bytes | None = None,
    ) -> int:
        assert session not in self._lives
        held = min(engine.open(session, owner, part, keys, adapter) for engine, part in self.parts(span))
        self._admit(session, owner)
        self._prefix_hits += held > 0  # an engine cannot tell: it has not every session, and others may keep less
        self._prefix_tokens += held
        return held

    async def run(self, work: Work) -> Done:
        """As `Engine.run`. A work that began a fork and failed leaves no session behind: it may be sent again."""
        if not self.model.span.covers(work.span):
            raise CallerError(f"blocks {work.span} are not served here")
        life = self._admit(work.session, work.owner)
        try:
            if work.parent is not None:
                # all at once: what becomes of the parent meanwhile is its own affair
                for engine, _ in self.parts(work.span):
                    engine.admit(work.session, work.owner, work.parent)
            done = Done(hidden=work.hidden, queue_s=0.0, compute_s=0.0)
            for engine, part in self.parts(work.span):
                if self._lives.get(work.session) is not life:
                    raise SessionReleased(f"session {work.session} was released")
                before = done
                done = await engine.run(replace(work, span=part, hidden=before.hidden, parent=None))
                done = replace(done, queue_s=before.queue_s + done.queue_s, compute_s=before.compute_s + done.compute_s)
        except SwarmError:
            if work.parent is not None and self._lives.get(work.session) is life:
                self.release(work.session)
            raise
        return done

    @property
    def dtype(self) -> str:
        return self._engines[0].dtype

    def at_once(
        self, session: SessionKey, start: int, rows: memoryview, span: BlockSpan, regime_length: int
    ) -> tuple[memoryview, float] | None:
        """As `Engine.at_once`, where one engine has all of these blocks."""
        parts = self.parts(span)
        if len(parts) != 1 or session not in self._lives:
            return None
        return parts[0][0].at_once(session, start, rows, span, regime_length)

    def release(self, session: SessionKey) -> None:
        self._lives.pop(session, None)
        for engine in self._engines:
            engine.release(session)

    def rest(self, resting: bool) -> None:
        for engine in self._engines:
            engine.rest(resting)

    def set_token_budget(self, tokens: int) -> None:
        for engine in self._engines:
            engine.set_token_budget(tokens)

    def times(self, block_cost: ForwardCost) -> float | None:
        """As `Engine.times`, on average over blocks: a fast device makes up for a slow one, as in what was measured."""
        times = [(engine.times(block_cost), engine.num_blocks) for engine in self._engines]
        known = [one * blocks for one, blocks in times if one is not None]
        return sum(known) / self.num_blocks if len(known) == len(times) else None

    def forget_lately(self) -> None:
        for engine in self._engines:
            engine.forget_lately()

    def weight(self, length: int) -> int:
        """On whichever device it is most."""
        return max(engine.weight(length) for engine in self._engines)

    def stats(self) -> EngineStats:
        """Of whichever engine has least left: a session may have a part in any of them."""
        all_stats = [engine.stats() for engine in self._engines]
        return replace(
            all_stats[0],
            total_tokens=min(stats.total_tokens for stats in all_stats),
            free_tokens=min(stats.free_tokens for stats in all_stats),
            longest_tokens=min(stats.longest_tokens for stats in all_stats),
            room_tokens=min(stats.room_tokens for stats in all_stats),
            kept_tokens=min(stats.kept_tokens for stats in all_stats),
            queued_tokens=sum(stats.queued_tokens for stats in all_stats),
            pages=sum(stats.pages for stats in all_stats),
            free_pages=sum(stats.free_pages for stats in all_stats),
            kept_pages=sum(stats.kept_pages for stats in all_stats),
            prefix_hits=self._prefix_hits,
            prefix_tokens=self._prefix_tokens,
        )

    def counts(self) -> EngineCounts:
        """Of all of them together."""
        all_counts = [engine.counts() for engine in self._engines]
        return EngineCounts(
            works=sum(counts.works for counts in all_counts),
            preemptions=sum(counts.preemptions for counts in all_counts),
            batch_works=Tally.of(counts.batch_works for counts in all_counts),
            batch_tokens=Tally.of(counts.batch_tokens for counts in all_counts),
        )

    def _admit(self, session: SessionKey, owner: PeerId) -> object:
        """Known to every engine, in the order in which it came here."""
        if session not in self._lives:
            self._lives[session] = object()
            for engine in self._engines:
                engine.admit(session, owner)
        return self._lives[session]

    def parts(self, span: BlockSpan) -> list[tuple[Engine, BlockSpan]]:
        """Which engine runs which blocks of `span`, in order."""
        parts = []
        for engine in self._engines:
            start, end = max(span.start, engine.model.span.start), min(span.end, engine.model.span.end)
            if start < end:
                parts.append((engine, BlockSpan(start, end)))
        return parts


AnyEngine = Engine | JoinedEngine

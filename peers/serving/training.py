"""One peer's side of training: works of many clients in, outputs and gradients back on the link that each came by.

Owns what is kept for backwards that are still to come, and how much is taken in at once; what is computed is
`runtime.gradients`', between the engine's forwards. Nobody else's session feels it: no page is used, and a client that
does not come back leaves nothing behind its lease.

A forward keeps its graph where there is room for it, else its input, else nothing: a backward uses the graph, runs the
forward again from the input, or answers `forgotten`, and is then sent the input with the gradient. All three say the
same, so a work may be sent again, here or elsewhere, whatever became of it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from msgspec import structs

from peers.errors import Busy, ProtocolError, Refused
from peers.model.adapters import Adapter, Dropout, as_rows
from peers.runtime import gradients
from peers.runtime.engine import Engine
from peers.runtime.gradients import Graph, Outcome, Passage, positions_of
from peers.runtime.works import NonFiniteOutput
from peers.serving.handler import Handler, code_of
from peers.serving.shelves import Shelf, TrainingLimits
from peers.transport.links import Link, Links
from peers.transport.tasks import Tasks
from peers.wire import parts, tensors
from peers.wire.messages import AdapterGradient, Code, Forget, Train, Trained, Untrained
from routing.errors import CallerError, PeerError, SwarmError, Unavailable
from routing.ids import BlockSpan, PeerId

logger = logging.getLogger(__name__)

SWEEP_S = 5.0
"""How often leases are looked at."""
RETRY_S_MIN = 0.1
RETRY_S_MAX = 5.0


@dataclass(slots=True)
class TrainingCounts:
    """What was done so far."""

    forwards: int = 0
    backwards: int = 0
    kept: int = 0
    """Forwards whose graph was kept."""
    recomputed: int = 0
    """Backwards that had no graph to use."""
    tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """By code."""


_Answer = tuple[torch.Tensor, float, torch.Tensor | None]
"""Rows, seconds of compute, and the gradient of the adapter's values."""


@dataclass(slots=True, eq=False)
class _Arriving:
    """A work of which some rows have come."""

    head: Train
    gathering: parts.Gathering
    num_bytes: int
    began_s: float
    finished: bool = False


class Training:
    """Serves `Train` and `Forget` beside a handler, under its pauses and its accounts."""

    def __init__(
        self,
        *,
        links: Links,
        handler: Handler,
        limits: TrainingLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shelf = Shelf(limits)
        self.counts = TrainingCounts()
        self._handler = handler
        self._clock = clock
        self._arriving: dict[tuple[Link, bytes, bool], _Arriving] = {}
        self._tokens = 0
        self._tokens_of: Counter[PeerId] = Counter()
        """Waiting or being computed."""
        self._token_s = 0.0
        """What one position took lately, through whatever blocks."""
        self._graph_bytes: dict[BlockSpan, float] = {}
        """Of one position, by the blocks of an engine, as measured."""
        self._busy: Counter[Link] = Counter()
        """Links on which works wait for answers."""
        self._tasks = Tasks()
        self._works: dict[asyncio.Task[None], Link] = {}
        links.handle(Train, self._train)
        links.handle(Forget, self._forget)
        links.on_lost(self._link_lost)
        links.keep(lambda: (*self.shelf.links(), *self._busy))

    @property
    def waiting_tokens(self) -> int:
        """Positions of all clients that wait or are computed."""
        return self._tokens

    @property
    def _limits(self) -> TrainingLimits:
        return self.shelf.limits

    async def run(self) -> None:
        """Drop what nobody came back for, until cancelled; raises what no message handler expected."""
        self._tasks.spawn(self._sweep(), name="sweep what is kept for training")
        try:
            await self._tasks.failed()
        finally:
            await self._tasks.close()

    def vacate(self) -> None:
        """Other blocks will be served: nothing is kept of these."""
        self.shelf.clear()

    # --- messages ---

    async def _train(self, link: Link, message: Train, payload: memoryview) -> None:
        key = (link, message.work, message.backward)
        try:
            if message.first == 0:
                self._discard(key)
                self._arriving[key] = self._begin(link, message)
            arriving = self._arriving.get(key)
            if arriving is None:
                return  # it was declined when its first part came
            if _whole(message) != _whole(arriving.head):
                raise ProtocolError("parts of one work that do not agree on it")
            if not arriving.gathering.add(message.first, message.count, message.dtype, payload):
                return
        except (Busy, Refused, ProtocolError) as error:
            self._discard(key)
            await self._decline(link, message, error)
            return
        del self._arriving[key]
        task = self._tasks.spawn(self._work(link, arriving), name=f"train {message.work.hex()[:12]}")
        self._works[task] = link

        def ended(task: asyncio.Task[None]) -> None:
            del self._works[task]
            self._finish(link, arriving)  # one that is cancelled before it begins does not do so itself

        task.add_done_callback(ended)

    def _begin(self, link: Link, head: Train) -> _Arriving:
        """Raises Busy, Refused, ProtocolError."""
        if not self._limits.max_bytes:
            raise Refused("this peer computes no gradients", code=Code.NO_TRAINING)
        handler = self._handler
        handler.check(head)
        if head.hidden != handler.served.hidden_size:
            raise ProtocolError(f"rows of {head.hidden}, this model's hidden size is {handler.served.hidden_size}")
        tokens = sum(head.lengths)
        self._adapter_of(link, head)
        engine = handler.engine
        if engine is None:
            raise Refused("this peer is loading other blocks", code=Code.DRAINING)
        if tokens > self._limits.max_tokens_per_peer:
            raise Refused(
                f"{tokens} positions in one work; this peer takes {self._limits.max_tokens_per_peer}",
                code=Code.TOO_LONG,
            )
        jumping = [row for row, _ in head.jumps]
        if any(row >= after for row, after in pairwise((*jumping, tokens))):
            raise ProtocolError("jumps that are out of order, or of rows that are not there")
        end = int(positions_of(head.lengths, head.jumps).max()) + 1
        if end > engine.model.max_positions:
            raise Refused(
                f"a sequence of {end} positions; this model has {engine.model.max_positions}", code=Code.TOO_LONG
            )
        longest = max(head.lengths)
        for engine_, part in engine.parts(BlockSpan(head.start, head.end)):
            needed_bytes = longest * self._graph_bytes.get(part, 0.0)
            if needed_bytes > self._limits.max_bytes:
                raise Refused(
                    f"a sequence of {longest} takes {int(needed_bytes) >> 20} MiB through blocks {part} on "
                    f"{engine_.model.device}, this peer lends training {self._limits.max_bytes >> 20}",
                    code=Code.TOO_LONG,
                )
        mine = self._tokens_of[link.remote] + tokens
        if mine > self._limits.max_tokens_per_peer or self._tokens + tokens > self._limits.max_tokens:
            handler.admission.account(link.remote).refused += 1
            raise self._busy_with(self._tokens)
        gathering = parts.Gathering(tokens * (2 if head.again else 1), head.hidden, head.dtype)
        most_bytes = handler.admission.limits.max_bytes_in_flight_per_peer
        if gathering.rows.nbytes > most_bytes:
            raise Refused(
                f"a work of {gathering.rows.nbytes >> 20} MiB; this peer takes {most_bytes >> 20}", code=Code.TOO_LONG
            )
        handler.admission.admit(link.remote, gathering.rows.nbytes)
        self._count(link, tokens, 1)
        return _Arriving(head, gathering, gathering.rows.nbytes, self._clock())

    def _adapter_of(self, link: Link, head: Train) -> Adapter | None:
        """Raises Refused, ProtocolError, or what was wrong with the adapter."""
        if head.adapter is None:
            return None
        return self._handler.adapters.take(link, head.adapter, BlockSpan(head.start, head.end))

    async def _forget(self, link: Link, message: Forget, _: memoryview) -> None:
        self.shelf.drop_works(link.remote, set(message.works))

    def _link_lost(self, link: Link) -> None:
        self.shelf.drop_link(link)
        for task in [task for task, own in self._works.items() if own is link]:
            task.cancel()  # nobody would hear the answer
        for key in [key for key in self._arriving if key[0] is link]:
            self._discard(key)

    # --- works ---

    async def _work(self, link: Link, arriving: _Arriving) -> None:
        head = arriving.head
        began_s = self._clock()
        try:
            compute = self._backward if head.backward else self._forward
            adapter = self._adapter_of(link, head)
            rows, compute_s, added = await compute(link, head, arriving.gathering.rows, adapter)
            if not tensors.finite(rows) or (added is not None and not tensors.finite(added)):
                raise NonFiniteOutput("the model made NaN or infinity of this work")
            rows = rows.to(tensors.DTYPES[head.dtype])
            if not tensors.finite(rows):
                raise Refused(f"the answer has values beyond the range of {head.dtype}", code=Code.MALFORMED)
        except (CallerError, PeerError, Unavailable) as error:
            await self._decline(link, head, error)
            return
        finally:
            self._finish(link, arriving)
        tokens = sum(head.lengths)
        self._token_s += 0.3 * (compute_s / tokens - self._token_s) if self._token_s else compute_s / tokens
        self.counts.tokens += tokens
        self._handler.admission.charge(link.remote, positions=tokens, compute_s=compute_s, trained=True)
        queue_s = max(0.0, self._clock() - began_s - compute_s)
        summed = None if added is None else self._summed(link, head, added)
        with suppress(PeerError):  # the client is gone, and what was kept for it with its link
            for first, count, payload in parts.cut(rows, head.dtype):  # first: others wait for these
                answer = Trained(
                    work=head.work,
                    backward=head.backward,
                    first=first,
                    count=count,
                    dtype=head.dtype,
                    hidden=head.hidden,
                    queue_s=queue_s,
                    compute_s=compute_s,
                )
                await link.send(answer, payload, bulk=True)
            if summed is not None:
                works, total = summed
                for first, count, payload in parts.cut(as_rows(total), "float32"):
                    gradient = AdapterGradient(sum=head.sum or head.work, works=works, first=first, count=count)
                    await link.send(gradient, payload, bulk=True)

    def _summed(self, link: Link, head: Train, added: torch.Tensor) -> tuple[tuple[bytes, ...], torch.Tensor] | None:
        """What is to be sent of the adapter's gradient now: of the works in which it is."""
        if head.sum is None or link.closed:
            return (head.work,), added
        key = (link.remote, head.sum)
        if not self.shelf.add(key, link, head.work, added, self._clock()):
            return (head.work,), added
        return self.shelf.collect(key) if head.collect else None

    async def _forward(self, link: Link, head: Train, rows: torch.Tensor, adapter: Adapter | None) -> _Answer:
        total_s = 0.0
        for engine, part in self._parts(head):
            passage = _passage(head, part, rows, adapter)
            keep = head.keep and self._expected_bytes(part, passage) <= self.shelf.room(link.remote)
            job = functools.partial(_forward_job, engine, passage, keep)
            outcome, compute_s = await engine.run_between(link.remote, job)
            self._learn(part, outcome)
            if head.keep and not link.closed:
                key = (link.remote, head.work, part.start)
                self.counts.kept += self.shelf.put(key, link, passage, outcome.graph, self._clock())
            rows, total_s = outcome.rows_TH, total_s + compute_s
        self.counts.forwards += 1
        return rows, total_s, None

    async def _backward(self, link: Link, head: Train, rows: torch.Tensor, adapter: Adapter | None) -> _Answer:
        total_s, tokens = 0.0, sum(head.lengths)
        found: list[tuple[Engine, BlockSpan, Passage, Graph | None]] = []
        engines = self._parts(head)
        if head.again:
            given, rows = rows[:tokens], rows[tokens:]
            for engine, part in engines:
                passage = _passage(head, part, given, adapter)
                found.append((engine, part, passage, None))
                if len(found) < len(engines):
                    outcome, compute_s = await engine.run_between(
                        link.remote, functools.partial(_forward_job, engine, passage, False)
                    )
                    given, total_s = outcome.rows_TH, total_s + compute_s
        else:
            for engine, part in engines:
                kept = self.shelf.take((link.remote, head.work, part.start))
                if kept is None or kept[0].span != part or tuple(kept[0].lengths) != head.lengths:
                    raise Refused("nothing is kept of this work here", code=Code.FORGOTTEN)
                found.append((engine, part, *kept))
        added: list[torch.Tensor] = []
        for engine, part, passage, graph in reversed(found):
            self.counts.recomputed += graph is None
            job = functools.partial(_backward_job, engine, passage, rows, graph)
            outcome, compute_s = await engine.run_between(link.remote, job)
            self._learn(part, outcome)
            rows, total_s = outcome.rows_TH, total_s + compute_s
            if outcome.adapter_gradient is not None:
                added.insert(0, outcome.adapter_gradient)
        self.counts.backwards += 1
        return rows, total_s, torch.cat(added) if added else None

    def _parts(self, head: Train) -> list[tuple[Engine, BlockSpan]]:
        engine = self._handler.engine
        if engine is None:
            raise Refused("this peer is loading other blocks", code=Code.DRAINING)
        return engine.parts(BlockSpan(head.start, head.end))

    def _expected_bytes(self, part: BlockSpan, passage: Passage) -> float:
        return passage.input_TH.nbytes + passage.tokens * self._graph_bytes.get(part, 0.0)

    def _learn(self, part: BlockSpan, outcome: Outcome) -> None:
        if outcome.bytes_per_token:
            if len(self._graph_bytes) >= 64 and part not in self._graph_bytes:  # strangers choose them
                del self._graph_bytes[next(iter(self._graph_bytes))]
            self._graph_bytes[part] = outcome.bytes_per_token

    # --- the rest ---

    async def _decline(self, link: Link, head: Train, error: SwarmError) -> None:
        code = code_of(error)
        self.counts.failures[code] += 1
        logger.info("training work %s from %s: %s", head.work.hex()[:12], link.remote, error)
        answer = Untrained(
            work=head.work,
            backward=head.backward,
            code=code,
            message=str(error)[:1000],
            retry_after_s=getattr(error, "retry_after_s", 0.0),
        )
        with suppress(PeerError, Unavailable):  # nobody is there to hear it
            await link.send(answer)

    def _busy_with(self, tokens: int) -> Busy:
        wait_s = min(max(tokens * self._token_s, RETRY_S_MIN), RETRY_S_MAX)
        return Busy(f"{tokens} positions of training wait here", retry_after_s=wait_s)

    def _discard(self, key: tuple[Link, bytes, bool]) -> None:
        if (arriving := self._arriving.pop(key, None)) is not None:
            self._finish(key[0], arriving)

    def _finish(self, link: Link, arriving: _Arriving) -> None:
        """Idempotent."""
        if arriving.finished:
            return
        arriving.finished = True
        self._handler.admission.finish(link.remote, arriving.num_bytes)
        self._count(link, sum(arriving.head.lengths), -1)

    def _count(self, link: Link, tokens: int, sign: int) -> None:
        self._tokens += sign * tokens
        self._tokens_of[link.remote] += sign * tokens
        if not self._tokens_of[link.remote]:
            del self._tokens_of[link.remote]
        self._busy[link] += sign
        if not self._busy[link]:
            del self._busy[link]

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.shelf.expire(self._clock())
            before_s = self._clock() - self._limits.lease_s
            for key in [key for key, arriving in self._arriving.items() if arriving.began_s <= before_s]:
                self._discard(key)


def _whole(message: Train) -> Train:
    """The work that it is a part of."""
    return structs.replace(message, first=0, count=0)


def _passage(head: Train, part: BlockSpan, rows: torch.Tensor, adapter: Adapter | None) -> Passage:
    return Passage(
        span=part,
        lengths=head.lengths,
        jumps=head.jumps,
        regime_length=head.regime_length,
        input_TH=rows,
        adapter=None if adapter is None else adapter.within(part),
        dropout=Dropout(head.dropout, head.seed) if head.dropout else None,
        sequence=head.sequence,
    )


def _forward_job(engine: Engine, passage: Passage, keep: bool, positions: int) -> gradients.Pieces:
    return gradients.forward(engine.model, passage, packs=engine.packs_sessions, keep=keep, positions=positions)


def _backward_job(
    engine: Engine, passage: Passage, gradient: torch.Tensor, graph: Graph | None, positions: int
) -> gradients.Pieces:
    packs = engine.packs_sessions
    return gradients.backward(engine.model, passage, gradient, graph, packs=packs, positions=positions)

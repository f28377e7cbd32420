"""The one place where a peer computes: a thread that runs works of many sessions, several to a forward.

Owns the sessions' positions, the queue and the thread; decisions are taken by `scheduler`, `pages` and `pressure`, the
forward is `cache`'s. Knows no network, no step ids and no leases.

The event loop posts works and awaits them; the thread takes what is queued, runs it, and posts the results back. Both
sides touch the books only under one lock, which is never held while the thread runs the model, so that a release or a
cancellation takes effect at once, or, for what is in the running forward, when that ends.

One kind of work runs in the event loop itself (`Engine.at_once`): the next token of a session that nobody else's work
came between, where that is a moment in the library. Two threads that wake each other would take a good part of it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from peers.errors import Busy, Preempted
from peers.model.adapters import prefix_length
from peers.model.cutting import SpanModel
from peers.model.kernels import Pool, accelerate_by_torch, accelerating, accelerating_by_torch, pool_for
from peers.model.support import one_line
from peers.runtime.cache import Chunk, SpanCache, open_cache
from peers.runtime.cores import Cores
from peers.runtime.cost import ForwardCost, Lately, Sample, token_pasts
from peers.runtime.errands import Errand, Errands, Job
from peers.runtime.graphs import recorder_for
from peers.runtime.pages import PagePool
from peers.runtime.prefixes import PrefixIndex
from peers.runtime.pressure import grow_or_preempt
from peers.runtime.program import TOKENS_MAX
from peers.runtime.scheduler import STEP_TOKENS, Item, Pace, Pick, Scheduler, Tempo, claim_of
from peers.runtime.works import (
    BehindWindow,
    CacheTooSmall,
    ComputeFailed,
    Done,
    EngineConfig,
    EngineCounts,
    EngineStats,
    NonFiniteOutput,
    PositionGap,
    SessionKey,
    SessionReleased,
    Work,
)
from peers.tally import Tally
from peers.wire.messages import MAX_POSITIONS
from peers.wire.tensors import NAMES, finite, finite_in
from routing.errors import CallerError, SwarmError, Unavailable
from routing.ids import BlockSpan, PeerId

logger = logging.getLogger(__name__)

DECODING_S = 1.0
"""A step so long ago says that others will follow."""
MOMENT_S = 0.025
"""For so long the event loop may compute. What waits meanwhile: somebody else's first frame, whose work would wait for
the thread's forward as well; a ping, which so tells what a step would wait; and what has a deadline of seconds."""
RETRY_AFTER_S_MIN = 0.05
RETRY_AFTER_S_MAX = 5.0
BATCH_STEPS = (1, 2, 4, 8, 16, 32, 64)
BATCH_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_END = object()
T = TypeVar("T")


@dataclass(slots=True, kw_only=True, eq=False)
class _Session:
    number: int
    """Counts first arrivals: the session's age, and its name in pages, cache and scheduler."""
    owner: PeerId
    span: BlockSpan | None = None
    """The blocks for which positions are held."""
    held: int = 0
    before: int = 0
    """Positions of a prefix, which stand in its pages before those."""
    told: int = MAX_POSITIONS
    """How many it may hold by its client's word."""
    outgrew: bool = False
    """Whether it ever held more, or tried to, since that was said."""
    preempted: bool = False
    """Its positions were taken away and it has not begun again."""
    released: bool = False
    stepped_at_s: float = -DECODING_S
    """When its last step was done."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Ticket:
    number: int
    item: Item
    work: Work
    session: _Session
    future: asyncio.Future[Done]
    submitted_s: float
    before: int
    """See `_Session`."""
    compute_s: float = 0.0
    result: Tensor | None = None
    begun: bool = False
    settled: bool = False
    """Nobody waits for it any more: answered, failed or cancelled."""


_Batch = list[tuple[_Ticket, Pick]]


class Engine:
    """Runs works of many sessions over one span. All methods are called on the event loop of `start`."""

    def __init__(self, model: SpanModel, config: EngineConfig, library: Pool | None = None) -> None:
        """`library`: threads that it shares with other engines, instead of having its own."""
        self.model = model
        self._library = library
        self.config = config
        self.dtype = NAMES[model.dtype]
        """By its name."""
        self._row_bytes = model.hidden_size * model.dtype.itemsize
        self._pages: PagePool
        self._prefixes: PrefixIndex
        self._scheduler = Scheduler(config.token_budget)
        self._errands = Errands()
        self._sessions: dict[SessionKey, _Session] = {}
        self._by_number: dict[int, _Session] = {}
        self._tickets: dict[int, _Ticket] = {}
        self._running: set[int] = set()
        self._count = 0
        self._preemptions = 0
        self._batch_works, self._batch_tokens = Tally(BATCH_STEPS), Tally(BATCH_TOKENS)
        # on an accelerator blocks are queued, not run, by the time that the next one begins
        slices = len(model.span) if model.device.type == "cpu" else 1
        self._tempo = Tempo(slices, len(model.span) / model.num_blocks)
        self._lately = Lately()
        self._last_step_s = -DECODING_S
        self._paused_s = 0.0
        """What the running forward has left to others so far."""
        self._accelerated = False
        self._prepared = False
        """Whether the cache has nothing more to prepare."""
        self._alone = False
        """Whether torch computes in this thread alone, which is when the library's threads have the other cores."""
        self._cores = Cores()
        self._last_session: int | None = None
        """Whose work was the last forward, where it had one to itself."""
        self._arriving = False
        """Whether the works of this turn of the event loop are not all there yet."""
        self._stopping = False
        self._resting = False
        self._touched = False
        """Whether the cache took memory since it last gave it back."""
        self._wake = threading.Condition()  # guards everything above
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._broken: asyncio.Future[None]
        self._faster: asyncio.Future[None]
        self._cache: SpanCache

    async def start(self) -> None:
        """Probe the model's attention, allocate the cache and start the thread. Raises what the probe raises."""
        assert self._thread is None
        self._loop = asyncio.get_running_loop()
        self._broken, self._faster = self._loop.create_future(), self._loop.create_future()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        await ready

    async def broken(self) -> None:
        """Never returns; raises what ended the thread. A forward that fails does not: see ComputeFailed."""
        await asyncio.shield(self._broken)

    async def prepared(self) -> None:
        """Wait until forwards are as fast as they will be: about a second after `start`, if nobody sends works."""
        await asyncio.wait((self._faster, self._broken), return_when=asyncio.FIRST_COMPLETED)
        if self._broken.done():
            await self._broken

    async def stop(self, *, deadline_s: float = 10.0) -> None:
        """Refuse new works, finish queued ones for up to `deadline_s`, fail the rest, end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
            waiting = [ticket.future for ticket in self._tickets.values()]
            self._fail_errands()
        if waiting:
            await asyncio.wait(waiting, timeout=deadline_s)
        with self._wake:
            for ticket in list(self._tickets.values()):
                self._fail(ticket, Unavailable("this peer is shutting down"))
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, deadline_s)
            _settle(self._faster)  # they will never be

    def open(
        self,
        session: SessionKey,
        owner: PeerId,
        span: BlockSpan,
        keys: Sequence[bytes],
        adapter: bytes | None = None,
    ) -> int:
        """Begin a new session with what is kept of the prefix that `keys` name; returns how many positions it holds.

        Key i stands for everything that decides positions `[0, (i + 1) · PREFIX_POSITIONS)` of the session here, but
        for the `adapter` of its works: what one computed is never another's. What its works compute in that order from
        now on is kept under the keys, also after its release.
        """
        with self._wake:
            assert session not in self._sessions
            if not keys or not self._cache.shares_pages:
                return 0
            state = self._admit(session, owner)
            state.span = span
            state.held = self._prefixes.open(state.number, self.config.scope(owner, span, adapter), keys)
            return state.held

    def admit(self, session: SessionKey, owner: PeerId, parent: tuple[SessionKey, int] | None = None) -> None:
        """Know the session from now on, with `parent` as a fork (see `Work.parent`). Who is known first is older.

        Raises PositionGap, BehindWindow, Preempted, CallerError.
        """
        with self._wake:
            state = self._sessions.get(session)
            if parent is not None:
                self._check_fork(state, *parent)
            if state is None:
                state = self._admit(session, owner)
            if parent is not None:
                self._fork(self._sessions[parent[0]], state, parent[1])

    async def run(self, work: Work) -> Done:
        """Run one work and return its output.

        Works of one session run in submission order. A work that starts before the held length rolls the session back
        first. Cancelling leaves the session with what was computed until then.

        Raises Busy (queue full), Preempted (replay from position 0), PositionGap, BehindWindow, SessionReleased,
        CacheTooSmall, ComputeFailed, NonFiniteOutput, Unavailable (stopping), CallerError (a work that makes no sense).
        """
        self._check(work)
        with self._wake:
            ticket = self._submit(work)
            if not self._arriving:  # the others of this turn, as of one frame, are to share its forward
                self._arriving = True
                self._loop.call_soon(self._arrived)
        try:
            return await ticket.future
        except asyncio.CancelledError:
            with self._wake:
                self._retire(ticket)
            raise

    def _arrived(self) -> None:
        with self._wake:
            self._arriving = False
            self._wake.notify()

    def at_once(
        self, session: SessionKey, start: int, rows: memoryview, span: BlockSpan, regime_length: int
    ) -> tuple[memoryview, float] | None:
        """What `run` would make of an interactive work without adapter or parent, computed in this call, with the
        seconds that it took; `rows` and result as bytes in `dtype`. None, and nothing has happened, unless they are the
        next token, or a few, of the session that had the last forward to itself, nobody waits, and it is soon done.

        Raises ComputeFailed, NonFiniteOutput, Unavailable.
        """
        with self._wake:  # the thread sleeps: what it could be doing was asked first
            state, tokens = self._sessions.get(session), len(rows) // self._row_bytes
            if state is None or not (self._is_moment(tokens) and self._goes_on(state, start, span)):
                return None
            try:
                return self._step_here(
                    state, Chunk(session=state.number, start=start, tokens=tokens), rows, regime_length
                )
            except SwarmError:
                raise
            except Exception as error:  # the books are wrong
                logger.exception("the engine ends")
                self._break(error)
                raise Unavailable("this peer is shutting down") from error

    async def run_between(self, owner: PeerId, job: Job[T]) -> tuple[T, float]:
        """Run a long job piece by piece, in the engine's thread, where forwards leave room (see `errands`): its result
        and the seconds that it took. In a piece autograd works, and torch has all threads.

        Raises what the job raises, ComputeFailed for what is no SwarmError, Unavailable when stopping.
        """
        errand: Errand[T] = Errand(owner, job, self._loop.create_future())
        with self._wake:
            if self._stopping:
                raise Unavailable("this peer is shutting down")
            self._errands.add(errand)
            self._wake.notify()
        try:
            return await errand.future
        finally:
            errand.dropped = True

    def parts(self, span: BlockSpan) -> list[tuple[Engine, BlockSpan]]:
        """Which engine runs which blocks of `span`."""
        return [(self, span)]

    @property
    def num_blocks(self) -> int:
        return len(self.model.span)

    def linear_shape(self, block: int, path: str) -> tuple[int, int] | None:
        """Inputs and outputs of the linear layer at `path` of a block; None where there is none to which an adapter
        could add."""
        return self.model.linear_shape(block, path) if (block, path) in self._cache.adaptable else None

    @property
    def packs_sessions(self) -> bool:
        """Whether one forward may hold several sessions."""
        return self._cache.packs_sessions

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Within, no forward begins: what is submitted meanwhile is there when the next one is chosen. For moments."""
        with self._wake:
            yield

    def release(self, session: SessionKey) -> None:
        """Forget a session and its age, fail its works, free its pages (after the running forward, if it is in it)."""
        with self._wake:
            state = self._sessions.pop(session, None)
            if state is not None:
                state.released = True
                self._fail_all(state, SessionReleased(f"session {session} was released"))
                self._reap(state)
                if self._resting:
                    self._wake.notify()

    def rest(self, resting: bool) -> None:
        """While resting, the machine has back what keys and values took of its memory on the CPU, kept prefixes too,
        whenever no session holds any."""
        with self._wake:
            self._resting = resting
            self._wake.notify()

    def held(self, session: SessionKey) -> int:
        """Positions that this session holds here; 0 for an unknown one."""
        with self._wake:
            state = self._sessions.get(session)
            return 0 if state is None else state.held

    def set_token_budget(self, tokens: int) -> None:
        """Positions per forward, at most, from the next one on; see `EngineConfig.token_budget`, and for its errors."""
        with self._wake:
            self.config = replace(self.config, token_budget=tokens)
            self._scheduler.token_budget = tokens

    def times(self, block_cost: ForwardCost) -> float | None:
        """How many times as long as by this cost of a block forwards take lately; see `Lately.times`."""
        with self._wake:
            return self._lately.times(block_cost)

    def forget_lately(self) -> None:
        """What forwards took says nothing of what they take now."""
        with self._wake:
            self._lately.forget()

    def weight(self, length: int) -> int:
        """What a session of that length takes of `EngineStats.total_tokens`: less than that where layers slide."""
        return self._pages.weight(length, self.config.work_tokens)

    def stats(self) -> EngineStats:
        with self._wake:
            pages, idle_pages = self._pages, self._pages.idle_pages
            unused_pages, work = pages.free_pages + idle_pages, self.config.work_tokens
            kept_tokens = pages.tokens(idle_pages)
            return EngineStats(
                total_tokens=pages.tokens(pages.num_pages),
                free_tokens=pages.tokens(unused_pages),
                longest_tokens=pages.longest(pages.num_pages, work, self.model.max_positions),
                room_tokens=pages.longest(unused_pages, work, self.model.max_positions),
                queued_tokens=self._scheduler.queued_tokens,
                sessions=len(self._sessions),
                kept_tokens=kept_tokens,
                prefix_hits=self._prefixes.hits,
                prefix_tokens=self._prefixes.hit_positions,
                pages=pages.num_pages,
                free_pages=unused_pages,
                kept_pages=idle_pages,
            )

    def counts(self) -> EngineCounts:
        with self._wake:
            return EngineCounts(
                works=len(self._tickets),
                preemptions=self._preemptions,
                batch_works=Tally.of([self._batch_works]),
                batch_tokens=Tally.of([self._batch_tokens]),
            )

    # On the event loop, under the lock

    def _check(self, work: Work) -> None:
        if work.hidden.dim() != 2 or len(work.hidden) == 0 or work.hidden.shape[1] != self.model.hidden_size:
            raise CallerError(f"hidden states are [n, {self.model.hidden_size}], not {list(work.hidden.shape)}")
        if work.start < 0 or not self.model.span.covers(work.span):
            raise CallerError(f"position {work.start} of blocks {work.span} is not served here")
        if work.parent is not None and (work.parent[0] == work.session or work.parent[1] < 0):
            raise CallerError(f"session {work.session} cannot begin as session {work.parent[0]} up to {work.parent[1]}")
        before = prefix_length(work.adapter, work.span)
        if before and not self._cache.shares_pages:
            raise CallerError(f"a prefix in {self.model.config.model_type} models, whose attention is their own")
        if self._pages.needed(before + work.start, before + work.end) > self._pages.num_pages:
            capacity = self._pages.tokens(self._pages.num_pages)
            raise CacheTooSmall(f"a session of {work.end} positions does not fit this peer's cache of {capacity}")

    def _submit(self, work: Work) -> _Ticket:
        if self._stopping:
            raise Unavailable("this peer is shutting down")
        claim, tokens = claim_of(work.owner, len(work.hidden), work.urgency), len(work.hidden)
        if not self._scheduler.has_room(claim, tokens, self.config.max_queued_tokens):
            retry_after_s = self._retry_after_s(self._scheduler.ahead(claim, tokens))
            raise Busy(f"{self._scheduler.queued_tokens} positions are queued here", retry_after_s=retry_after_s)
        self.admit(work.session, work.owner, work.parent)
        session = self._sessions[work.session]
        number = self._next()
        regime = self.model.regime.key(work.longest)
        item = Item(
            work=number,
            session=session.number,
            owner=work.owner,
            tokens=tokens,
            group=(work.span, regime, None if self._cache.packs_sessions else session.number),
            urgency=work.urgency,
        )
        ticket = self._tickets[number] = _Ticket(
            number=number,
            item=item,
            work=work,
            session=session,
            future=self._loop.create_future(),
            submitted_s=time.perf_counter(),
            before=prefix_length(work.adapter, work.span),
        )
        self._scheduler.submit(item)
        return ticket

    def _admit(self, session: SessionKey, owner: PeerId) -> _Session:
        state = self._sessions[session] = _Session(number=self._next(), owner=owner)
        self._by_number[state.number] = state
        return state

    def _check_fork(self, child: _Session | None, parent_id: SessionKey, position: int) -> None:
        if child is not None and (child.held or self._scheduler.works_of(child.number)):
            raise CallerError("only a new session can begin as a fork of another")
        parent = self._sessions.get(parent_id)
        if parent is None:
            raise PositionGap(position, 0)
        if parent.preempted:
            raise self._preemption()
        queued = [self._tickets[number] for number in self._scheduler.works_of(parent.number)]
        kept = min([parent.held, *(ticket.work.start for ticket in queued if not ticket.begun)])
        if position > kept:  # also when the parent is about to be rolled back further
            raise PositionGap(position, kept)
        if position and self._cache.shares_pages and not self._pages.reaches(parent.number, parent.before + position):
            raise BehindWindow(position)

    def _fork(self, parent: _Session, child: _Session, position: int) -> None:
        """Needs no page and touches nothing that a running forward reads or writes, so it is done at once."""
        self._drop_pages(child)
        if position:
            if self._cache.shares_pages:
                self._pages.fork(parent.number, child.number, parent.before + position)
            self._cache.fork(parent.number, child.number, position)
        child.span, child.held, child.before, child.preempted = parent.span, position, parent.before, False
        child.told, child.outgrew = parent.told, parent.outgrew

    def _is_moment(self, tokens: int) -> bool:
        """Whether a work of so many would be the only one, and soon done without torch's threads."""
        return (
            self._prepared
            and not (self._tickets or self._running or self._errands or self._stopping)
            and 0 < tokens <= STEP_TOKENS
            and self._tempo.step_s <= MOMENT_S
            and not self._tempo.is_long(tokens)
        )

    def _goes_on(self, session: _Session, start: int, span: BlockSpan) -> bool:
        """Whether a work goes on where the last forward ended, with nothing to be undone or checked."""
        return (
            session.number == self._last_session
            and session.span == span
            and session.before == 0
            and 0 < session.held == start == self._pages.length(session.number)
        )

    def _step_here(
        self, session: _Session, chunk: Chunk, rows: memoryview, regime_length: int
    ) -> tuple[memoryview, float] | None:
        began_s = time.perf_counter()
        number, start, tokens = chunk.session, chunk.start, chunk.tokens
        end = start + tokens
        assert session.span is not None
        self._pages.slide(number)
        if (copies := self._pages.grow(number, end)) is None:
            return None  # others must give way
        try:
            self._cache.copy(copies)
            output = self._cache.at_once(chunk, rows, session.span, max(regime_length, end))
        except Exception as error:  # this work fails, the engine lives on
            logger.exception("a forward failed")
            self._shorten(session)
            raise ComputeFailed("this peer failed to compute the step") from error
        if output is None:
            self._shorten(session)
            return None
        ended_s = time.perf_counter()
        # when the output has left
        self._loop.call_soon(self._note_moment, session, chunk, session.span, began_s, ended_s)
        self._prefixes.begun(number, start, end)
        if not finite_in(output, self.dtype):
            self._shorten(session)
            raise _non_finite()
        session.held = end
        session.outgrew = session.outgrew or end > session.told + self.config.slack
        self._prefixes.computed(number, end)
        return output, ended_s - began_s

    def _note_moment(self, session: _Session, chunk: Chunk, span: BlockSpan, began_s: float, ended_s: float) -> None:
        with self._wake:
            self._note_forward([(chunk.start, chunk.tokens)], span, ended_s - began_s, steps=chunk.tokens)
            self._note_steps([(session, began_s)], ended_s)

    def _next(self) -> int:
        self._count += 1
        return self._count

    # On either side, under the lock

    def _retry_after_s(self, tokens: int) -> float:
        """About when so many positions of today's queue will have been worked off."""
        return min(max((self._tempo.token_s or self._tempo.step_s) * tokens, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)

    def _retire(self, ticket: _Ticket) -> None:
        """Take a work off the books. Its session keeps the positions that were computed, and no pages beyond them."""
        if ticket.settled:
            return
        ticket.settled = True
        del self._tickets[ticket.number]
        self._scheduler.remove(ticket.number)
        if ticket.begun and ticket.session.number not in self._running:
            self._shorten(ticket.session)
        self._reap(ticket.session)

    def _fail(self, ticket: _Ticket, error: SwarmError) -> None:
        self._retire(ticket)
        self._loop.call_soon_threadsafe(_answer, ticket.future, error)

    def _fail_all(self, session: _Session, error: SwarmError) -> None:
        for number in self._scheduler.works_of(session.number):
            self._fail(self._tickets[number], error)

    def _fail_errands(self) -> None:
        for errand in self._errands.clear():
            self._loop.call_soon_threadsafe(_answer, errand.future, Unavailable("this peer is shutting down"))

    def _break(self, error: Exception) -> None:
        """Nothing runs here any more: whoever awaits `broken` ends the peer."""
        with self._wake:
            self._stopping = True
            for ticket in self._tickets.values():
                self._loop.call_soon_threadsafe(_answer, ticket.future, Unavailable("this peer is shutting down"))
            self._tickets.clear()
            self._fail_errands()
        self._loop.call_soon_threadsafe(self._broken.set_exception, error)

    def _shorten(self, session: _Session) -> None:
        """Give back what is reserved or half-written beyond the held positions."""
        if session.number in self._pages.sessions:
            held = session.before + session.held
            self._pages.truncate(session.number, min(held, self._pages.length(session.number)))
            self._cache.truncate(session.number, held)

    def _reap(self, session: _Session) -> None:
        """Free a released session, once it is in no forward."""
        if session.released and session.number not in self._running:
            self._drop_pages(session)
            self._by_number.pop(session.number, None)

    def _drop_pages(self, session: _Session) -> None:
        if session.number in self._pages.sessions:
            self._pages.release(session.number)
        self._prefixes.close(session.number)
        self._cache.release(session.number)

    # In the engine's thread

    def _main(self, ready: asyncio.Future[None]) -> None:
        torch.set_num_threads(self.config.threads)
        try:
            library = self._library or pool_for(self.model.device, self.config.threads)
            num_pages, size = self.config.cache_tokens // self.config.page_size, self.config.page_size
            self._cache, self._pages = open_cache(
                self.model,
                num_pages,
                size,
                library,
                recorder_for(self.model.device),
                slack=self.config.slack,
                graph_bytes=self.config.graph_bytes,
            )
            self._prefixes = PrefixIndex(self._pages)
        except Exception as error:  # whatever it is, `start` raises it
            logger.debug("the engine does not start", exc_info=True)
            self._loop.call_soon_threadsafe(_answer, ready, error)
            return
        self._loop.call_soon_threadsafe(_settle, ready)
        try:
            with torch.inference_mode():
                preparing = self._preparation(library)
                while (batch := self._wait_for_batch()) is not None:
                    if batch:
                        self._run_batch(batch)
                    elif self._spares:
                        self._give_back()
                    elif self._pause_s() == 0:
                        self._run_errand()
                    if self._prepared and not self._cache.prepared:
                        preparing = self._cache.prepare()
                        self._prepared = False
                    if not self._prepared:
                        self._prepare(preparing)
        except Exception as error:  # the books are wrong
            logger.exception("the engine ends")
            self._break(error)

    def _preparation(self, library: Pool | None) -> Iterator[None]:
        """What a peer need not wait for before it announces itself."""
        if library is not None:
            changed = yield from accelerating(self.model.module, library)
            self._accelerated = changed > 0
        elif self.model.device.type != "cuda":
            yield from accelerating_by_torch(self.model.module)
        else:  # a compiler takes its time, for which nobody waits
            compiling = threading.Thread(
                target=accelerate_by_torch, args=(self.model.module,), name="compile", daemon=True
            )
            compiling.start()
            while compiling.is_alive():
                compiling.join(MOMENT_S)
                yield
        self.model.forget_views()
        yield
        yield from self._cache.prepare()

    def _prepare(self, preparing: Iterator[None]) -> None:
        """One more step of it, after each forward and while there is none to run."""
        self._prepared = self._stopping or next(preparing, _END) is _END
        if self._prepared and not self._stopping:
            self._loop.call_soon_threadsafe(_settle, self._faster)

    def _run_batch(self, batch: _Batch, *, beside: bool = False) -> None:
        """`beside`: while another forward, which goes on afterwards, pauses."""
        began_s, paused_s = time.perf_counter(), self._paused_s
        try:
            output_TH = self._forward(batch, beside=beside)
        except Exception:  # its works fail, the thread lives on as long as the device does
            logger.exception("a forward of %s works failed", len(batch))
            with self._wake:
                self._leave(batch)
                for ticket, _ in batch:
                    self._fail_late(ticket, ComputeFailed("this peer failed to compute the step"))
            _require(self.model.device)
        else:
            elapsed_s = time.perf_counter() - began_s
            compute_s = elapsed_s - (self._paused_s - paused_s)
            self._settle(batch, output_TH, compute_s)
            if beside:
                self._paused_s = paused_s + elapsed_s
            elif len(output_TH) > TOKENS_MAX:
                self._cores.measured(len(output_TH), alone=self._alone, seconds=compute_s)

    def _wait_for_batch(self) -> _Batch | None:
        """The next forward's works; empty when there are none and the engine is not prepared yet or to give memory
        back, or when a job's piece goes first; None when it is stopping and nothing is left to do."""
        with self._wake:
            while self._tickets or self._errands or self._spares or not self._stopping:
                if self._arriving:
                    if not self._wake.wait(MOMENT_S):
                        self._arriving = False  # the loop is late: what is there runs
                elif self._errand_first() or not (picks := self._scheduler.next_batch(self._pace())):
                    pause_s = self._pause_s()
                    if not self._prepared or pause_s == 0 or self._spares:
                        return []
                    self._wake.wait(pause_s)
                elif batch := self._begin_all([(self._tickets[pick.work], pick) for pick in picks]):
                    self._errands.passed_over()
                    self._running = {ticket.session.number for ticket, _ in batch}
                    return batch
            return None

    @property
    def _spares(self) -> bool:
        """Whether the cache's memory is to be given back."""
        return self._resting and self._touched and not self._pages.sessions

    def _give_back(self) -> None:
        with self._wake:
            if not self._spares:
                return
            self._prefixes.clear()
            self._touched = False
        self._cache.give_back()  # only this thread takes pages

    def _errand_first(self) -> bool:
        """Whether a piece of a job goes before the forward that could be run, if any."""
        return self._errands.due or (
            self._errands.before_background and self._scheduler.only_background and self._pause_s() == 0
        )

    def _pause_s(self) -> float | None:
        """How long the next piece of a job is to wait, if nothing comes; None where there is no job."""
        if not self._errands:
            return None
        if self._errands.due or not self._tempo.late:
            return 0.0
        return max(0.0, self._last_step_s + DECODING_S - time.perf_counter())

    def _pace(self) -> Pace:
        decoding = time.perf_counter() - self._last_step_s < DECODING_S
        return self._tempo.pace(self.config.token_budget, decoding=decoding)

    def _run_errand(self) -> None:
        """One piece of a job."""
        with self._wake:
            errand, positions = self._errands.next(), min(self._pace().alone, self.config.work_tokens)
        if errand is None:
            return
        self._share_cores(False)
        began_s = time.perf_counter()
        error: SwarmError | None = None
        try:
            with torch.inference_mode(False), torch.enable_grad():
                over = errand.advance(positions)
        except SwarmError as known:
            over, error = True, known
        except Exception:  # the job fails, the thread lives on
            logger.exception("a job failed")
            over, error = True, ComputeFailed("this peer failed to compute it")
        errand.compute_s += time.perf_counter() - began_s
        if over:
            with self._wake:
                self._errands.ended()
            if error is not None:
                self._loop.call_soon_threadsafe(_answer, errand.future, error)
            else:
                self._loop.call_soon_threadsafe(_answer_errand, errand)

    def _let_steps_in(self) -> None:
        """In a pause of a long forward: run the steps that came meanwhile and need nobody's pages."""
        with self._wake:
            picks = self._scheduler.steps_beside(self._running, lambda work: self._finds_room(self._tickets[work]))
            batch = self._begin_all([(self._tickets[pick.work], pick) for pick in picks], beside=True)
            if not batch:
                return
            self._scheduler.ran_beside(ticket.number for ticket, _ in batch)
            self._running |= {ticket.session.number for ticket, _ in batch}
        self._run_batch(batch, beside=True)

    def _begin_all(self, chosen: _Batch, *, beside: bool = False) -> _Batch:
        """What can run of the scheduler's choice: not what cannot begin, nor whose pages an older session took.

        `beside` a running forward nobody gives way: who needs more pages than are free waits for the next one.
        """
        for ticket, _ in sorted(chosen, key=lambda pair: pair[0].session.number):
            if not (ticket.begun or ticket.settled or (beside and not self._finds_room(ticket))):
                try:
                    self._begin(ticket)
                except SwarmError as error:
                    self._fail(ticket, error)
        return [(ticket, pick) for ticket, pick in chosen if ticket.begun and not ticket.settled]

    def _finds_room(self, ticket: _Ticket) -> bool:
        number, end = ticket.session.number, ticket.before + ticket.work.end
        if number not in self._pages.sessions:
            return self._pages.needed(0, end) <= self._pages.free_pages
        return end <= self._pages.length(number) or self._pages.missing(number, end) <= 0

    def _begin(self, ticket: _Ticket) -> None:
        """Roll back and reserve pages for the whole work. Raises PositionGap, BehindWindow or Preempted."""
        work, session = ticket.work, ticket.session
        before = ticket.before
        held = session.held if (session.span, session.before) == (work.span, before) else 0
        if work.start > held:
            if session.preempted:
                raise self._preemption()
            raise PositionGap(work.start, held)
        begins = work.start == 0 and (before or session.before)
        if begins:  # its prefix may have been another, or is gone behind a window
            self._drop_pages(session)
        if session.number in self._pages.sessions and not self._pages.reaches(session.number, before + work.start):
            raise BehindWindow(work.start)
        ticket.begun = self._touched = True
        if session.span != work.span:
            self._prefixes.close(session.number)
        self._prefixes.begun(session.number, work.start, ticket.work.end)
        session.span, session.held, session.before, session.preempted = work.span, work.start, before, False
        self._note_word(session, work)
        if session.number not in self._pages.sessions:
            self._pages.open(session.number)
        self._shorten(session)
        self._pages.slide(session.number)
        copies, victims = grow_or_preempt(
            self._pages,
            self._prefixes,
            session.number,
            before + ticket.work.end,
            owner_of=lambda number: self._by_number[number].owner,
            outgrew=lambda number: self._by_number[number].outgrew,
        )
        for victim in victims:
            self._preempt(self._by_number[victim])
        if copies is not None:
            self._cache.copy(copies)
            if begins and before and work.adapter is not None:
                self._cache.begin(session.number, work.adapter, before)

    def _note_word(self, session: _Session, work: Work) -> None:
        """Speculation runs ahead of what anybody asked for, and back."""
        kept = session.outgrew and work.told <= session.told
        session.told, session.outgrew = work.told, kept or work.end > work.told + self.config.slack

    def _preempt(self, session: _Session) -> None:
        """Its pages are gone already; tell those who wait for it. Its age stays until it is released."""
        self._prefixes.close(session.number)
        self._cache.release(session.number)
        session.held, session.preempted = 0, True
        self._preemptions += 1
        self._fail_all(session, self._preemption())

    def _preemption(self) -> Preempted:
        return Preempted(
            "the session's cache was given to another", retry_after_s=self._retry_after_s(self._scheduler.queued_tokens)
        )

    def _forward(self, batch: _Batch, *, beside: bool) -> Tensor:
        chunks, inputs = [], []
        for ticket, pick in batch:
            start = ticket.before + ticket.work.start + pick.offset
            adapter = ticket.work.adapter
            chunks.append(Chunk(session=ticket.session.number, start=start, tokens=pick.tokens, adapter=adapter))
            inputs.append(ticket.work.hidden[pick.offset : pick.offset + pick.tokens].to(self.model.dtype))
        hidden_TH = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        alone = self._alone
        # in a short forward torch has little to share out, and its helpers would stand in the way of the library's
        self._share_cores(self._accelerated and (len(hidden_TH) <= TOKENS_MAX or self._cores.alone(len(hidden_TH))))
        try:
            return self._cache.forward(
                chunks,
                hidden_TH.to(self.model.device, non_blocking=True),
                batch[0][0].work.span,
                max(ticket.work.longest for ticket, _ in batch),
                self._let_steps_in if not beside and self._tempo.is_long(len(hidden_TH)) else None,
            ).cpu()
        finally:
            if beside:
                self._share_cores(alone)

    def _share_cores(self, alone: bool) -> None:
        if self._alone != alone:
            self._alone = alone
            torch.set_num_threads(1 if alone else self.config.threads)

    def _leave(self, batch: _Batch) -> None:
        """These sessions are in no forward any more."""
        self._running -= {ticket.session.number for ticket, _ in batch}

    def _settle(self, batch: _Batch, output_TH: Tensor, compute_s: float) -> None:
        outputs = (output_TH,) if len(batch) == 1 else torch.split(output_TH, [pick.tokens for _, pick in batch])
        all_finite = finite(output_TH)
        answers: list[tuple[asyncio.Future[Done], Done]] = []
        with self._wake:
            self._leave(batch)
            self._last_session = batch[0][0].session.number if len(batch) == 1 else None
            steps = sum(pick.tokens for ticket, pick in batch if ticket.item.is_step)
            chunks = [(ticket.before + ticket.work.start + pick.offset, pick.tokens) for ticket, pick in batch]
            self._note_forward(chunks, batch[0][0].work.span, compute_s, steps=steps)
            now_s = time.perf_counter()
            if steps:
                self._note_steps([(t.session, t.submitted_s) for t, _ in batch if t.item.is_step], now_s)
            for (ticket, pick), output in zip(batch, outputs, strict=True):
                if not all_finite and not finite(output):
                    self._fail_late(ticket, _non_finite())
                    continue
                ticket.compute_s += compute_s
                result = ticket.result = _filled(ticket.result, pick.offset, output, len(ticket.work.hidden))
                ticket.session.held = ticket.work.start + pick.offset + pick.tokens
                self._prefixes.computed(ticket.session.number, ticket.session.held)
                if ticket.settled:  # cancelled or released meanwhile
                    self._shorten(ticket.session)
                    self._reap(ticket.session)
                elif self._scheduler.advance(ticket.number, pick.tokens):
                    ticket.settled = True
                    del self._tickets[ticket.number]
                    queue_s = max(0.0, now_s - ticket.submitted_s - ticket.compute_s)
                    done = Done(hidden=result, queue_s=queue_s, compute_s=ticket.compute_s)
                    answers.append((ticket.future, done))
        if answers:
            self._loop.call_soon_threadsafe(_answer_all, answers)

    def _note_forward(
        self, chunks: Sequence[tuple[int, int]], span: BlockSpan, compute_s: float, *, steps: int
    ) -> None:
        """`chunks`: where in their sessions they start, and of how many tokens; `steps`: how many of these are of
        steps."""
        tokens = sum(count for _, count in chunks)
        self._batch_works.add(len(chunks))
        self._batch_tokens.add(tokens)
        self._tempo.measured(compute_s, steps=steps, longer=tokens - steps)
        pasts = sum(token_pasts(*chunk) for chunk in chunks)
        self._lately.add(Sample(tokens=tokens, token_pasts=pasts, seconds=compute_s / len(span)), time.perf_counter())

    def _note_steps(self, steps: Sequence[tuple[_Session, float]], now_s: float) -> None:
        """These steps are done: of whom, and when they had come."""
        self._last_step_s = now_s
        gap_s = min(now_s - session.stepped_at_s for session, _ in steps)
        longest_s = now_s - min(submitted_s for _, submitted_s in steps)
        self._tempo.answered(longest_s, gap_s if gap_s < DECODING_S else None)
        for session, _ in steps:
            session.stepped_at_s = now_s

    def _fail_late(self, ticket: _Ticket, error: SwarmError) -> None:
        """Fail a work of the forward that just ended, unless it was settled meanwhile."""
        self._shorten(ticket.session)
        if ticket.settled:
            self._reap(ticket.session)
        else:
            self._fail(ticket, error)


def _require(device: torch.device) -> None:
    """Raises Unavailable where the device does nothing any more, as for the rest of a process after most errors of a
    GPU: whoever went on would fail everybody."""
    try:
        torch.ones(1, device=device).sum().item()
    except torch.OutOfMemoryError:
        pass  # full, and not broken
    except RuntimeError as error:
        raise Unavailable(
            f"{device} computes nothing any more ({one_line(error)})",
            hint="start this peer again; where that does not help, the machine",
        ) from error


def _filled(result: Tensor | None, offset: int, output: Tensor, length: int) -> Tensor:
    """`result` with `output` at `offset`; a tensor like any other, not one of inference mode, as others will use it."""
    if len(output) == length:
        with torch.inference_mode(False):
            return output.clone()
    if result is None:
        with torch.inference_mode(False):
            result = torch.empty(length, output.shape[1], dtype=output.dtype)
    result[offset : offset + len(output)] = output
    return result


def _non_finite() -> NonFiniteOutput:
    return NonFiniteOutput("the model made NaN or infinity of this session's input")


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():  # whoever waited may have been cancelled
        future.set_result(None)


def _answer(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _answer_errand(errand: Errand[Any]) -> None:
    if not errand.future.done():
        errand.future.set_result((errand.result, errand.compute_s))


def _answer_all(answers: Sequence[tuple[asyncio.Future[Done], Done]]) -> None:
    for future, done in answers:
        if not future.done():
            future.set_result(done)

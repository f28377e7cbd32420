"""One peer's side of every session: messages in, engine works out, answers pushed on.

The thin driver around `ledger` (who may do what), `admission` (how much) and the engine (the computation). Owns no
decision of its own but the translation of errors into codes, and no tensor longer than a step lives.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakValueDictionary

from msgspec.structs import replace

from peers.errors import Busy, Paused, PeerUnreachable, Preempted, ProtocolError, Refused
from peers.model.adapters import prefix_length
from peers.runtime.joined import AnyEngine
from peers.runtime.scheduler import STEP_TOKENS
from peers.runtime.works import BehindWindow, CacheTooSmall, EngineStats, PositionGap, SessionReleased, Work
from peers.serving.adapters import AdapterLimits, Adapters
from peers.serving.admission import Admission
from peers.serving.journal import Journal, JournalLimits
from peers.serving.ledger import Entry, Ledger, Repeat, Run
from peers.serving.push import Delivery, Pusher
from peers.tally import StepTimes, kind_of
from peers.transport.base import MAX_FRAME_BYTES, Rest
from peers.transport.links import Link, Links
from peers.transport.pacer import Pacer
from peers.transport.tasks import Tasks
from peers.wire import tensors
from peers.wire.codec import OVERHEAD_BYTES
from peers.wire.messages import (
    MAX_HOPS,
    MAX_POSITIONS,
    PREFIX,
    Adapter,
    Close,
    Code,
    Failed,
    Open,
    Opened,
    Pong,
    Replay,
    Result,
    Step,
    Trace,
    Traced,
    Train,
    Urgency,
)
from routing.errors import CallerError, PeerError, SwarmError, Unavailable
from routing.estimates import StepEstimates
from routing.ids import BlockSpan, BlockSpans, ModelId, PeerId, Place, SessionId, StepId
from routing.records import RECORD_RENEW_S

logger = logging.getLogger(__name__)

SWEEP_S = 5.0
"""How often leases are looked at."""
PAUSED_RETRY_S = 2 * RECORD_RENEW_S
"""By then clients know from the record whether this peer is back."""
MAX_TELLING = 16
"""Failures of a successor that wait for one session's client; it learns of more from its own deadlines."""
MAX_PATIENCE_S = 10.0
"""A successor is asked for no longer whether it is there."""
LOST_S = 10.0
"""What was sent longer ago when the link ends has arrived, or its client has asked for it."""
MAX_BACKLOG_S = 5.0
"""Where bandwidth is bounded: a peer with more than this waiting in memory to go out takes no further steps; with more
than this waiting to be read, no further sessions."""
SPARE_SHARE = 0.25
"""Of the cache: while less is free, standbys do not grow; once half as little is, they go."""
MAX_PAYLOAD_BYTES = MAX_FRAME_BYTES - OVERHEAD_BYTES
"""What came in must also go out, under a header that has grown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What this peer serves, as far as a handler has to check requests against it."""

    model: ModelId
    spans: BlockSpans
    hidden_size: int


@dataclass(slots=True)
class HandlerCounts:
    """What was done for sessions so far."""

    steps: StepTimes = field(default_factory=lambda: StepTimes(("queue", "compute", "send")))
    tokens: Counter[str] = field(default_factory=Counter)
    """Positions that were computed, by kind of step."""
    opened: int = 0
    """Sessions that began here."""
    resumed: int = 0
    """Sessions that went on here over another route."""
    replays: int = 0
    replayed_positions: int = 0
    """Sent again from the journal."""
    failures: Counter[str] = field(default_factory=Counter)
    """Told to others, by code."""


class Handler:
    """Serves `Open`, `Step`, `Replay`, `Close`, `Trace` and forwards a successor's `Failed` to the client."""

    def __init__(
        self,
        *,
        links: Links,
        engine: AnyEngine,
        served: Served,
        ledger: Ledger[Delivery, Link],
        admission: Admission,
        journal: Journal | None = None,
        adapters: AdapterLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.adapters = Adapters(
            links=links, check=self._check_adapter, limits=adapters or AdapterLimits(), clock=clock
        )
        self.served = served
        self.ledger = ledger
        self.admission = admission
        self.journal = Journal(JournalLimits()) if journal is None else journal
        self.pusher = Pusher(links, clock)
        self.counts = HandlerCounts()
        self.paused = False
        self._links = links
        self._peer = links.transport.peer_id
        self._engine = engine
        self._clock = clock
        self._steps = Tasks()
        self._tasks = Tasks()
        self._works = Works()
        self._replays: WeakValueDictionary[Place, asyncio.Lock] = WeakValueDictionary()
        """Replays of one session leave in the order in which they were asked for."""
        self._tracing: set[Place] = set()
        self._repeating: set[tuple[Place, int]] = set()
        self._telling: Counter[Place] = Counter()
        """Failures of its successor, for a client that reads slowly."""
        self._draining = False
        self._released = asyncio.Event()
        """Some session ended."""
        self._vacant = False
        self.speeds = StepEstimates()
        links.handle(Open, self._open)
        links.handle_at_once(Step, self._step)
        links.handle(Replay, self._replay)
        links.handle(Close, self._close)
        links.handle(Failed, self._forward_failure)
        links.handle(Trace, self._trace)
        links.on_lost(self._link_lost)
        links.keep(lambda: self.ledger.owner_links())
        links.pong = self._pong

    async def run(self) -> None:
        """Sweep expired leases until cancelled; raises what no message handler expected."""
        self._tasks.spawn(self._sweep(), name="sweep leases")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._tasks.failed())
                group.create_task(self._steps.failed())
        finally:
            await self._steps.close()
            await self._tasks.close()

    async def drain(self, *, timeout_s: float) -> None:
        """Take no new session, tell the clients of the others that this peer leaves, and serve these until they have
        gone elsewhere, at most for `timeout_s`."""
        self._draining = True
        self._hand_over(Refused("this peer is leaving", code=Code.DRAINING))
        await self.settled(timeout_s=timeout_s)

    async def settled(self, *, timeout_s: float) -> None:
        """Wait until no session is here and no step runs, at most for `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while len(self.ledger):
                    self._released.clear()
                    await self._released.wait()
                await self._steps.settled(timeout_s=timeout_s)

    def pause(self, paused: bool) -> None:
        """From now on finish what runs and take nothing else, or everything again. Sessions stay until their clients,
        who are told, have gone elsewhere; then the machine has their memory back, and that of prefixes."""
        self.paused = paused
        if paused:
            self._hand_over(self._paused())
        self._spare_prefixes()
        if not self._vacant:
            self._engine.rest(paused)

    def _spare_prefixes(self) -> None:
        """The engine's go likewise."""
        if self.paused and not len(self.ledger):
            self.journal.forget_prefixes()

    def _hand_over(self, reason: Paused | Refused) -> None:
        """Tell the client of each session why it should go elsewhere."""
        for entry in self.ledger.entries():
            place = entry.place
            farewell = self._failure(reason, place.session.raw, place.block, entry.epoch)
            self._tasks.spawn(_tell(entry.owner_link, farewell), name=f"hand over {place}")

    def vacate(self) -> None:
        """After `drain` or a pause, before the engine is left: no session is known any more, and clients go
        elsewhere."""
        for place in self.ledger.expire(math.inf):
            self.release(place)
        self.adapters.clear()

    def leave_engine(self) -> None:
        """After `vacate` and the end of every step: let go of what it holds; until `settle`, everything is refused."""
        self._vacant = True
        self.adapters.hosted = {}
        del self._engine

    def settle(self, *, engine: AnyEngine, served: Served, ledger: Ledger[Delivery, Link]) -> None:
        """Serve these blocks from now on."""
        self._engine, self.served, self.ledger = engine, served, ledger
        self.speeds = StepEstimates()
        self._draining = self._vacant = False
        engine.rest(self.paused)

    @property
    def queue_s(self) -> float:
        """What steps waited before they were computed, lately."""
        return self.speeds.queue_s.value(0.0, self._clock())

    @property
    def engine(self) -> AnyEngine | None:
        """None while blocks are being loaded, or wait until the owner can spare the memory."""
        return None if self._vacant else self._engine

    # --- messages ---

    async def _open(self, link: Link, message: Open, _: memoryview) -> None:
        try:
            self.check(message)
            if message.adapter is not None:
                message = self._with_adapter(link, message, message.adapter)
            self._make_room(standby=message.standby)
            entry = self.ledger.resume(link.remote, link, message, self._clock())
            if entry is not None:
                self.counts.resumed += 1
                self._tasks.spawn(self._resume(link, entry), name=f"resume {entry.place}")
                return
            entry = self.ledger.open(link.remote, link, message, self._clock())
        except (Busy, Refused, ProtocolError) as error:
            await link.send(self._failure(error, message.session, message.start, message.epoch))
            return
        self.counts.opened += 1
        self.release(entry.place)  # a new route starts from nothing but a prefix that is kept here
        entry.positions = self._engine.open(entry.place, entry.owner, entry.span, message.prefix, message.adapter)
        if entry.next is not None:
            scope = self._engine.config.scope(entry.owner, entry.span, message.adapter)
            self.journal.open(entry.place, entry.owner, scope, message.prefix, entry.positions)
        await self._opened(link, entry)

    def _with_adapter(self, link: Link, message: Open, name: bytes) -> Open:
        """What is to be opened, once its adapter is known to do. Raises Refused, ProtocolError."""
        span = BlockSpan(message.start, message.end)
        if not prefix_length(self.adapters.take(link, name, span), span):
            return message
        if not self._engine.packs_sessions:
            raise Refused("a prefix before blocks whose attention is their own", code=Code.MALFORMED)
        return replace(message, prefix=())  # positions are kept for others by pages, of which a prefix takes a part

    async def _resume(self, link: Link, entry: Entry[Delivery, Link]) -> None:
        """Say what the session goes on with, once what runs for its older route has ended: that counts too."""
        epoch = entry.epoch
        await self._works.ended(entry.place, timeout_s=self.ledger.limits.lease_s)
        if self.ledger.get(entry.place) is entry and entry.epoch == epoch:
            with suppress(PeerError):  # its sessions go with the link
                await self._opened(link, entry)

    async def _opened(self, link: Link, entry: Entry[Delivery, Link]) -> None:
        if entry.next is not None:
            self._tasks.spawn(self.pusher.warm(entry), name=f"warm {entry.place}")
        held = entry.positions
        opened = Opened(
            session=entry.place.session.raw,
            start=entry.place.block,
            epoch=entry.epoch,
            lease_s=self.ledger.limits.lease_s,
            held=held,
            journal=self.journal.start(entry.place, held),
        )
        await link.send(opened)

    def _step(self, link: Link, message: Step, payload: memoryview) -> Rest | None:
        payload_bytes = len(payload)
        try:
            self._check_comfort(self._links.upload)
            if message.hidden != self.served.hidden_size:
                raise ProtocolError(f"rows of {message.hidden}, this model's hidden size is {self.served.hidden_size}")
            if payload_bytes > MAX_PAYLOAD_BYTES or len(message.hops) >= MAX_HOPS:
                raise ProtocolError("a step too large, or with too many hops behind it, to be passed on from here")
            tensors.check(payload, dtype=message.dtype, count=message.count, hidden=message.hidden)
            if self.ledger.standbys:
                self._make_room(standby=Place(SessionId(message.session), message.block) in self.ledger.standbys)
            owner = self.ledger.answerable(link.remote, message)
            self.admission.admit(owner, payload_bytes, link.remote)
            try:
                entry, verdict = self.ledger.step(link.remote, message, self._clock())
            except SwarmError:
                self.admission.finish(owner, payload_bytes, link.remote)
                raise
        except (ProtocolError, Busy, Refused) as error:
            logger.info("step %s of %s from %s: %s", message.step, message.session.hex()[:12], link.remote, error)
            # to whoever sent it: the client itself, or the predecessor, which tells its client
            failure = self._failure(error, message.session, message.block, message.epoch, message.step)
            return partial(link.send, failure)
        if isinstance(verdict, Run):
            if verdict.forks and message.parent:
                self.journal.fork(Place(SessionId(message.parent), message.block), entry.place, message.first)
            if not self._compute_now(link, entry, message, verdict, payload):
                work = self._compute(link, entry, message, verdict, payload)
                self._steps.spawn(work, name=f"step {entry.place}")
            return None
        self.admission.finish(owner, payload_bytes, link.remote)
        if isinstance(verdict, Repeat):
            answer = _marked(verdict.answer, again=message.again)
            if not self.pusher.deliver_now(entry, answer):
                self._steps.spawn(self._repeat(entry, answer), name=f"repeat {entry.place}")
        return None

    async def _repeat(self, entry: Entry[Delivery, Link], answer: Delivery) -> None:
        """Not in the lane in which it was asked for: that is everybody's, and who it is for may read nothing."""
        repeat = (entry.place, answer.message.step)
        if repeat not in self._repeating:  # else it is on its way
            self._repeating.add(repeat)
            try:
                await self._deliver(entry, answer)
            finally:
                self._repeating.discard(repeat)

    def _compute_now(self, link: Link, entry: Entry[Delivery, Link], step: Step, run: Run, payload: memoryview) -> bool:
        """A lone session's next token, from its coming to its going without a wait, and so without a task; False where
        it is not that, and nothing has happened."""
        if step.count > STEP_TOKENS or step.urgency != Urgency.INTERACTIVE or entry.adapter is not None or run.forks:
            return False
        if len(entry.running) > 1 or step.expects:
            return False  # one before it may be computed and not sent yet, or the engine is to know of the new length
        dtype, hidden = self._engine.dtype, step.hidden
        try:
            rows = tensors.converted(payload, dtype=step.dtype, to=dtype, hidden=hidden)
            done = self._engine.at_once(entry.place, step.first, rows, entry.span, step.regime_length)
        except (PeerError, Unavailable) as error:
            self.admission.finish(entry.owner, len(payload), link.remote)
            if (failure := self._failed(entry, step, run, error)) is not None:
                self._steps.spawn(_tell(entry.owner_link, failure), name=f"step {entry.place}")
            return True
        if done is None:
            return False
        output, took = tensors.converted(done[0], dtype=dtype, to=step.dtype, hidden=hidden), (0.0, done[1])
        delivery = self._wanted(entry, step, run, output, took)
        left = delivery is None or self.pusher.deliver_now(entry, delivery)
        # the next hop has something to do by now: nobody waits for what else there is
        self.admission.finish(entry.owner, len(payload), link.remote)
        self._account(entry, step, took, None if delivery is None else output)
        if delivery is not None and not left:
            self._steps.spawn(self._send(entry, step, took, delivery), name=f"step {entry.place}")
        else:
            self.counts.steps.add(step.count, *took, 0.0)
        return True

    async def _compute(
        self, link: Link, entry: Entry[Delivery, Link], step: Step, run: Run, payload: memoryview
    ) -> None:
        try:
            if self.ledger.get(entry.place) is not entry:
                return  # closed or on another route before it began: the engine must not hear of it again
            work = Work(
                session=entry.place,
                owner=entry.owner,
                start=step.first,
                hidden=tensors.rows_in(payload, dtype=step.dtype, count=step.count, hidden=step.hidden),
                span=entry.span,
                regime_length=step.regime_length,
                adapter=None if entry.adapter is None else self.adapters.again(entry.owner, entry.adapter),
                told=entry.told,
                parent=_parent(step) if run.forks else None,
                urgency=step.urgency,
            )
            with self._works.one(entry.place):
                done = await self._engine.run(work)
        except (CallerError, PeerError, Unavailable) as error:
            if (failure := self._failed(entry, step, run, error)) is not None:
                await _tell(entry.owner_link, failure)
            return
        finally:
            self.admission.finish(entry.owner, len(payload), link.remote)
            if self.ledger.get(entry.place) is None:
                self.release(entry.place)
        output, took = tensors.pack(done.hidden, step.dtype), (done.queue_s, done.compute_s)
        delivery = self._wanted(entry, step, run, output, took)
        self._account(entry, step, took, None if delivery is None else output)
        if delivery is not None:
            await self._send(entry, step, took, delivery)

    def _failed(self, entry: Entry[Delivery, Link], step: Step, run: Run, error: SwarmError) -> Failed | None:
        """What the client is told, if it still wants to know."""
        logger.info("step %s of %s: %s", step.step, entry.place, error)
        if not self.ledger.failed(entry, run):
            return None
        return self._failure(error, step.session, step.block, step.epoch, step.step)

    def _wanted(
        self, entry: Entry[Delivery, Link], step: Step, run: Run, output: memoryview, took: tuple[float, float]
    ) -> Delivery | None:
        """What is to be sent for a step that was computed, if anybody still wants it. `took`: in queue and compute."""
        delivery = _delivery(entry, step, output, (*step.hops, took))
        wanted = self.ledger.completed(entry, run, delivery, len(delivery.payload), self._clock())
        return delivery if wanted else None

    def _account(
        self, entry: Entry[Delivery, Link], step: Step, took: tuple[float, float], output: memoryview | None
    ) -> None:
        """A step was computed, and `output` is, or was, sent on. In the turn of the event loop in which it was
        `_wanted`: whoever asks for a replay later finds it in the journal."""
        if output is not None and entry.next is not None:
            self.journal.append(entry.place, step.first, step.count, step.dtype, output)
        queue_s, compute_s = took
        self.speeds.add(len(entry.span), step.count, compute_s, queue_s, self._clock())
        self.admission.charge(entry.owner, positions=step.count, compute_s=compute_s)
        self.counts.tokens[kind_of(step.count)] += step.count

    async def _send(
        self, entry: Entry[Delivery, Link], step: Step, took: tuple[float, float], delivery: Delivery
    ) -> None:
        computed_s, send_s = self._clock(), 0.0
        if step.epoch == entry.epoch:  # else it is on another route by now, which asks for the output itself
            await self._deliver(entry, delivery)
            send_s = self._clock() - computed_s
        self.counts.steps.add(step.count, *took, send_s)

    async def _deliver(self, entry: Entry[Delivery, Link], delivery: Delivery, *, asked: bool = True) -> None:
        """While it waits for a slow reader, it counts among what its client has here; who has too much here is told so
        where he `asked` for it."""
        size, message = len(delivery.payload), delivery.message
        try:
            self.admission.hold(entry.owner, size)
        except Busy as error:  # the journal and the ledger keep it: its client asks for it again
            logger.info("step %s of %s is not sent: %s", message.step, entry.place, error)
            # who does not read this either asks when he has not been answered for too long
            if asked:
                failure = self._failure(error, message.session, entry.place.block, message.epoch, message.step)
                entry.owner_link.send_now(failure)
            return
        try:
            await self.pusher.deliver(entry, delivery)
        finally:
            self.admission.finish(entry.owner, size)

    async def _replay(self, link: Link, message: Replay, _: memoryview) -> None:
        try:
            self._check_comfort(self._links.upload)
            entry = self.ledger.replay(link.remote, message, self._clock())
            kept = self.journal.read(entry.place, message.first, message.first + message.count)
            if kept is None or len(kept[1]) > MAX_PAYLOAD_BYTES:
                raise Refused(f"positions from {message.first} on are not kept here", code=Code.NOT_JOURNALLED)
            self.admission.admit(link.remote, len(kept[1]))
        except (Busy, Refused) as error:
            logger.info("replay %s of %s: %s", message.step, message.session.hex()[:12], error)
            await link.send(self._failure(error, message.session, message.block, message.epoch, message.step))
            return
        step = Step(
            session=message.session,
            block=entry.span.end,
            epoch=message.epoch,
            step=message.step,
            first=message.first,
            count=message.count,
            want_from=message.want_from,
            regime_length=message.regime_length,
            dtype=kept[0],
            hidden=self.served.hidden_size,
            bulk=message.bulk,
            urgency=message.urgency,
            stop=message.stop,
        )
        delivery = Delivery(step, kept[1], step.bulk)
        if message.to is None:
            work = self._send_again(link.remote, entry, delivery)
        else:
            work = self._feed(link, entry, delivery, message)
        self._tasks.spawn(work, name=f"replay {entry.place}")

    async def _feed(self, link: Link, entry: Entry[Delivery, Link], delivery: Delivery, message: Replay) -> None:
        """One at a time for each standby, as its client waits for the answer; so nothing need be put in order."""
        assert message.to is not None
        try:
            await self.pusher.feed(entry, delivery, PeerId(message.to), message.to_addresses)
        except (Busy, PeerError, Unavailable) as error:
            refused = error if isinstance(error, Busy) else Refused(str(error), code=Code.UNREACHABLE)
            await _tell(link, self._failure(refused, message.session, message.block, message.epoch, message.step))
        finally:
            self.admission.finish(link.remote, len(delivery.payload))

    async def _send_again(self, owner: PeerId, entry: Entry[Delivery, Link], delivery: Delivery) -> None:
        try:
            async with self._replays.setdefault(entry.place, asyncio.Lock()):
                if self.ledger.get(entry.place) is entry and entry.epoch == delivery.message.epoch:
                    self.counts.replays += 1
                    self.counts.replayed_positions += delivery.message.count
                    await self.pusher.deliver(entry, delivery)
        finally:
            self.admission.finish(owner, len(delivery.payload))

    async def _close(self, link: Link, message: Close, _: memoryview) -> None:
        for place in self.ledger.close(link.remote, map(SessionId, message.sessions)):
            self.release(place)

    async def _forward_failure(self, link: Link, message: Failed, _: memoryview) -> None:
        entry = self.ledger.before(Place(SessionId(message.session), message.block))
        follows = entry is not None and link.remote in (entry.next, entry.feeds) and link.remote == message.peer
        if entry is None or not follows or entry.epoch != message.epoch or entry.owner_link.send_now(message):
            return
        if self._telling[entry.place] < MAX_TELLING:  # this lane is everybody's: it does not wait for one client
            self._telling[entry.place] += 1
            self._tasks.spawn(self._pass_on(entry, message), name=f"failure of {entry.place}")

    async def _pass_on(self, entry: Entry[Delivery, Link], message: Failed) -> None:
        try:
            await _tell(entry.owner_link, message)
        finally:
            self._telling[entry.place] -= 1
            self._telling = +self._telling

    async def _trace(self, link: Link, message: Trace, _: memoryview) -> None:
        entry = self.ledger.get(Place(SessionId(message.session), message.block))
        if entry is None or entry.owner != link.remote or entry.place in self._tracing:
            await link.send(Traced(nonce=message.nonce))
            return
        self._tracing.add(entry.place)  # one at a time: each asks the successor
        self._tasks.spawn(self._traced(link, entry, message), name=f"trace {entry.place}")

    async def _traced(self, link: Link, entry: Entry[Delivery, Link], message: Trace) -> None:
        try:
            patience_s = min(message.patience_s, MAX_PATIENCE_S)
            reaches, arrived = await asyncio.gather(
                self.pusher.reaches(entry, timeout_s=patience_s), self.pusher.arrived(entry, timeout_s=patience_s)
            )
            running = self._works.running(entry.place)
            traced = Traced(nonce=message.nonce, running=running, next_silent=not reaches, moving=not arrived)
            with suppress(PeerError):  # nobody is there to hear it
                await link.send(traced)
        finally:
            self._tracing.discard(entry.place)

    def _link_lost(self, link: Link) -> None:
        for place in self.ledger.link_lost(link):
            logger.info("session %s: its client went away", place)
            self.release(place)
        lost: dict[PeerId, list[tuple[Entry[Delivery, Link], Delivery]]] = {}
        if link.outbound and link.wanted:
            for entry, last in self.ledger.last_answers(link.remote, self._clock() - LOST_S):
                lost.setdefault(entry.owner, []).append((entry, last))
        for owner, outputs in lost.items():  # perhaps; and of a connection that is idle nobody learns that it is gone
            self._steps.spawn(self._once_more(outputs), name=f"once more for {owner[-8:]}")

    async def _once_more(self, lost: Sequence[tuple[Entry[Delivery, Link], Delivery]]) -> None:
        """Over a new link, or by the client, who learns then that the successor is gone; who has the step repeats his
        answer. Each step once: where that link ends as well, its client carries it."""
        error: SwarmError | None = None
        for entry, last in lost:
            message, known = last.message, self.ledger.get(entry.place) is entry
            if not (known and isinstance(message, Step) and message.epoch == entry.epoch):
                continue
            if entry.relay_until_s > self._clock():
                continue  # it went through the client
            if error is None and entry.once_more == message.step:
                error = PeerUnreachable(f"{entry.next} ends every link")
            if error is not None:
                self.pusher.relay_for_now(entry, error)
            entry.once_more = StepId(message.step)
            await self._deliver(entry, _marked(last, again=True), asked=False)
            if error is None and entry.relay_until_s > self._clock():
                error = PeerUnreachable(f"{entry.next} could not be reached a moment ago")

    # --- the rest ---

    def release(self, place: Place) -> None:
        """Forget what the ledger does not know any more: the session's positions, and what was sent for them."""
        self.journal.release(place)
        self._spare_prefixes()
        if not self._vacant:  # else a step ends whose client was slow to hear that it failed
            self._engine.release(place)
        self._released.set()

    def _failure(self, error: SwarmError, session: bytes, block: int, epoch: int, step: int | None = None) -> Failed:
        code = code_of(error)
        self.counts.failures[code] += 1
        return Failed(
            peer=self._peer,
            session=session,
            block=block,
            epoch=epoch,
            step=step,
            code=code,
            message=str(error)[:1000],
            retry_after_s=getattr(error, "retry_after_s", 0.0),
        )

    def _check_comfort(self, *pacers: Pacer | None) -> None:
        if self.paused:
            raise self._paused()
        backlog_s = max((pacer.backlog_s for pacer in pacers if pacer is not None), default=0.0)
        if backlog_s > MAX_BACKLOG_S:
            raise Busy(f"{backlog_s:.0f} s of frames wait for bandwidth here", retry_after_s=backlog_s)

    def _make_room(self, *, standby: bool) -> None:
        """Standbys take of the spare room only, and go while there is still some. Raises Busy for one of them."""
        if not (standby or self.ledger.standbys) or self._vacant:
            return
        stats = self._engine.stats()
        if standby and stats.free_tokens < SPARE_SHARE * stats.total_tokens:
            raise Busy("no spare room for a standby here", retry_after_s=PAUSED_RETRY_S)
        if not standby and stats.free_tokens < SPARE_SHARE / 2 * stats.total_tokens:
            for place in tuple(self.ledger.standbys):
                self._let_go(place, Preempted("a standby gives way", retry_after_s=PAUSED_RETRY_S))

    def _let_go(self, place: Place, reason: SwarmError) -> None:
        entry = self.ledger.drop(place)
        self.release(place)
        farewell = self._failure(reason, place.session.raw, place.block, entry.epoch)
        self._tasks.spawn(_tell(entry.owner_link, farewell), name=f"let go {place}")

    def check(self, message: Open | Train | Adapter) -> None:
        """Whether these blocks may be asked for now. Raises Busy, Refused."""
        self._check_open(message)
        self._check_comfort(self._links.upload, self._links.download)

    @staticmethod
    def _paused() -> Paused:
        return Paused("its owner needs the machine", retry_after_s=PAUSED_RETRY_S)

    def _check_adapter(self, message: Adapter) -> None:
        """Raises Busy, Refused, ProtocolError."""
        self.check(message)
        engine = self.engine
        if engine is None:
            raise Refused("this peer is loading other blocks", code=Code.DRAINING)
        for part_engine, part in engine.parts(BlockSpan(message.start, message.end)):
            for target in message.targets:
                if target.block in part:
                    shape: tuple[int, int] | None
                    if target.module == PREFIX:
                        what, shape = "keys and values", part_engine.model.prefix_shape(target.block)
                    else:
                        what = f"linear layer {target.module}"
                        shape = part_engine.linear_shape(target.block, target.module)
                    if shape != (target.inputs, target.outputs):
                        raise ProtocolError(f"block {target.block} has no {what} of that shape")

    def _check_open(self, message: Open | Train | Adapter) -> None:
        if self._draining:
            raise Refused("this peer is leaving", code=Code.DRAINING)
        if message.model != self.served.model.digest:
            raise Refused(
                f"this peer serves model {self.served.model}, not {ModelId(message.model)}", code=Code.WRONG_MODEL
            )
        if not (message.start < message.end and self.served.spans.covers(BlockSpan(message.start, message.end))):
            raise Refused(
                f"this peer serves blocks {self.served.spans}, not {message.start}:{message.end}", code=Code.WRONG_MODEL
            )

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.adapters.expire()
            for place in self.ledger.expire(self._clock()):
                logger.info("session %s: lease expired", place)
                self.release(place)

    def stats(self) -> EngineStats | None:
        """Of the engine; None while there is none."""
        return None if self._vacant else self._engine.stats()

    @property
    def room_tokens(self) -> int:
        """What one session more may be promised; 0 while there is no engine."""
        stats = self.stats()
        return 0 if stats is None else max(0, stats.room_tokens - self.ledger.owed(self._clock()))

    def _pong(self, nonce: int) -> Pong:
        stats = self.stats()
        if stats is None:
            return Pong(nonce=nonce)
        return Pong(
            nonce=nonce,
            free_tokens=min(self.room_tokens, MAX_POSITIONS),
            queued_tokens=stats.queued_tokens,
            sessions=len(self.ledger),
        )


def _parent(step: Step) -> tuple[Place, int] | None:
    return None if step.parent is None else (Place(SessionId(step.parent), step.block), step.first)


class Works:
    """How many works of each session are in the engine, and a way to wait until they have ended."""

    def __init__(self) -> None:
        self._counts: Counter[Place] = Counter()
        self._last: dict[Place, asyncio.Event] = {}

    @contextmanager
    def one(self, place: Place) -> Iterator[None]:
        self._counts[place] += 1
        self._last.setdefault(place, asyncio.Event())
        try:
            yield
        finally:
            self._counts[place] -= 1
            if not self._counts[place]:
                del self._counts[place]
                self._last.pop(place).set()

    def running(self, place: Place) -> int:
        return self._counts[place]

    async def ended(self, place: Place, *, timeout_s: float) -> None:
        if (last := self._last.get(place)) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await last.wait()
            # whoever awaited the last work goes on in its own turn: it is before ours


def _delivery(
    entry: Entry[Delivery, Link], step: Step, output: memoryview, hops: tuple[tuple[float, float], ...]
) -> Delivery:
    if entry.next is not None and not 0 < step.stop <= entry.span.end:
        return Delivery(replace(step, block=entry.span.end, hops=hops), output, step.bulk)
    if step.want_from:  # the answer is kept; the rows that nobody wants are not
        output = memoryview(bytes(output[len(output) // step.count * step.want_from :]))
    result = Result(
        session=step.session,
        epoch=step.epoch,
        step=step.step,
        count=step.count - step.want_from,
        dtype=step.dtype,
        hidden=step.hidden,
        hops=hops,
    )
    return Delivery(result, output, step.bulk)


def _marked(delivery: Delivery, *, again: bool) -> Delivery:
    """As the step is for which it is sent now: what comes again does so at all hops that follow."""
    message = delivery.message
    if isinstance(message, Result) or message.again == again:
        return delivery
    return Delivery(replace(message, again=again), delivery.payload, delivery.bulk)


def code_of(error: SwarmError) -> str:
    """What others are told for it."""
    match error:
        case Preempted():
            return Code.PREEMPTED
        case Paused():
            return Code.PAUSED
        case Busy():
            return Code.BUSY
        case Unavailable():
            return Code.DRAINING
        case Refused():
            return error.code
        case ProtocolError():
            return Code.MALFORMED
        case PositionGap():
            return Code.GAP
        case BehindWindow():
            return Code.REPLAY
        case SessionReleased():
            return Code.UNKNOWN_SESSION
        case CacheTooSmall():
            return Code.TOO_LONG
        case _:
            return Code.INTERNAL


async def _tell(link: Link, message: Failed) -> None:
    try:
        await link.send(message)
    except (PeerError, Unavailable) as error:  # Unavailable: a client that we dialled, and no lane can be opened
        logger.debug("could not tell %r: %s", link, error)  # its sessions go with the link

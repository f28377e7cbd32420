"""Carries out what session cores decide: plans, opens, sends, replays, waits. One `SwarmRemote` per model and network.

Owns the client's sessions, their histories and deadlines, all inside the network's event loop; models enter from any
thread through the `Remote` protocol. Knows no kernels and no server.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from msgspec.structs import replace as replace_fields

from peers.errors import PeerSilent, PeerUnreachable, StreamClosed
from peers.model.adapters import Adapter
from peers.tally import STEP_POSITIONS
from peers.transport.tasks import Tasks
from peers.wire import tensors
from peers.wire.messages import Urgency
from routing.errors import CallerError, NoRoute, SwarmError, Unavailable
from routing.health import ModelHealth, coverage
from routing.ids import PeerId, SessionId
from routing.routes import Route
from swarm.errors import SessionClosed
from swarm.network import Answer, ClientNode, Entrance, NetworkThread, enter
from swarm.session.actions import (
    Action,
    Fail,
    Feed,
    NeedRoute,
    NeedStandbys,
    OpenHops,
    OpenStandby,
    Release,
    SendStep,
    Skip,
    StepDone,
    Wait,
)
from swarm.session.callers import Callers
from swarm.session.calls import Call
from swarm.session.core import PIECE_POSITIONS_MIN, SessionConfig, SessionCore
from swarm.session.departures import Departures
from swarm.session.history import Segment
from swarm.session.inbox import Inbox
from swarm.session.installing import Installer
from swarm.session.live import MAX_CLAIM_S, HopTiming, LiveSession, Observer, RemoteModel, Sessions, Traffic
from swarm.session.planning import Planner
from swarm.session.prompts import Prompts
from swarm.session.remote import Embed, RemoteSession, Resilience, RowStep
from swarm.session.review import REVIEW_S_MIN
from swarm.session.sending import Sender
from swarm.session.steps import PendingStep
from swarm.session.training import TrainingConfig, TrainingRoute
from swarm.session.trial import Trials
from swarm.session.uploads import Uploads
from swarm.session.watch import Watch

logger = logging.getLogger(__name__)
T = TypeVar("T")

SHARED = 0.7
"""Of a forward: what it takes however many rows there are."""
LOOK_TIMEOUT_S = 2.0
"""How long somebody who only looks waits for the network's thread."""


class SwarmRemote:
    """Implements `swarm.session.remote.Remote` over a network."""

    def __init__(
        self,
        network: NetworkThread,
        model: RemoteModel,
        embed: Embed,
        *,
        config: SessionConfig | None = None,
        owns_network: bool = True,
        rng: random.Random | None = None,
        prefix_secret: bytes | None = None,
        urgency: Urgency = Urgency.INTERACTIVE,
        training: TrainingConfig | None = None,
    ) -> None:
        """`owns_network`: `close` ends the network too. `rng` spreads retries. Sessions of remotes with the same
        `prefix_secret` (16 to 64 bytes; by default random) can share what peers hold of their prompts."""
        self.model = model
        self.callers = Callers()
        self._departures = Departures(self.callers, self._gain_s)
        self.uploads = Uploads(network.client.links, model.model)
        self.training = None if model.adapter else TrainingRoute(network, model, self.uploads, training)
        """None with an adapter that peers host: they compute no gradients through one."""
        self._rng = rng or random.Random()
        self._network = network
        self._client: ClientNode = network.client
        self._sessions = Sessions(model=model, client=network.client, uploads=self.uploads)
        self._prompts = Prompts(self._sessions)
        self._planner = Planner(self._sessions, self._prompts, turn=self._rng.random())
        self._installer = Installer(self._sessions, self)
        self._config = config or SessionConfig()
        self._owns_network = owns_network
        self._prefix_secret = prefix_secret or secrets.token_bytes(32)
        self._tasks = Tasks()
        self._sender = Sender(self._sessions, self, self._installer, tasks=self._tasks, embed=embed, urgency=urgency)
        self._guard = Tasks()
        self._covered: ModelHealth | None = None
        """What `coverage` said last."""
        self._failure: SwarmError | None = None
        """Why nothing can be run any more, should this client's own node have ended."""
        self._closed = False
        network.call(self._start())

    # --- the Remote protocol: any thread ---

    def open(
        self,
        parent: RemoteSession | None = None,
        position: int = 0,
        *,
        resilience: Resilience | None = None,
        adapter: Adapter | None = None,
        prefix_secret: bytes | None = None,
    ) -> RemoteSession:
        """`prefix_secret`: 16 to 64 bytes in place of this remote's own, for one of several users behind it."""
        if adapter is not None and not tensors.finite(adapter.values):
            raise CallerError("the adapter's weights are not finite (NaN or infinity)", hint="load or train it again")
        if adapter is not None and self.model.adapter:
            raise CallerError(
                f"an adapter of your own, and adapter {self.model.adapter} that peers host, at the same time",
                hint="disable yours, or load the model without an adapter's name",
            )
        assert parent is None or isinstance(parent, LiveSession)
        standby = self._config.standby if parent is None else parent.standby
        if resilience is not None:
            standby = resilience == "standby"
        fork = None if parent is None else (parent, position)
        return LiveSession(fork, prefix_secret or self._prefix_secret, standby=standby, adapter=adapter)

    def run(self, steps: Sequence[RowStep]) -> list[torch.Tensor]:
        if self._closed:
            raise SessionClosed("this model's connection to the swarm was closed")
        prepared, caller = [_on_cpu(step) for step in steps], threading.get_ident()

        def begin(answer: Answer[list[torch.Tensor]]) -> None:
            def give(outputs: list[torch.Tensor]) -> None:
                self.callers.answered(caller, time.perf_counter())
                self._tell(answer.give, outputs)

            if any(len(step.hidden_TD) > STEP_POSITIONS for step in prepared):  # it takes a forward of its own anyway
                self.callers.left(caller)
                self._begin(prepared, give, answer.fail)
            else:
                self._departures.leave(caller, lambda: self._begin(prepared, give, answer.fail))

        try:
            results = self._network.ask(begin)
        except KeyboardInterrupt:  # no row may go on in the background
            self.release([step.session for step in steps])
            raise
        return [_like(step.hidden_TD, result) for step, result in zip(steps, results, strict=True)]

    def start(self, steps: Sequence[RowStep], done: Callable[[RowStep, torch.Tensor | SwarmError], None]) -> None:
        """Run each step by itself, without waiting; `done` is told each result, or why there is none, in the network's
        loop. Releasing a session ends its step with SessionClosed. After `close` nothing is told. From any thread."""
        if not self._closed:
            self._network.post(self._start_each, [(step, _on_cpu(step)) for step in steps], done)

    def release(self, sessions: Sequence[RemoteSession]) -> None:
        self.callers.left(threading.get_ident())
        if not self._closed:
            self._network.post(self._release, tuple(sessions))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if not self._network.closed:
                self._network.call(self._stop())
            if self._owns_network:
                self._network.close()

    def observe(self, observer: Observer | None) -> None:
        """Tell `observer` what happens from now on, or nobody."""
        self._sessions.observer = observer

    @property
    def failure(self) -> SwarmError | None:
        """Why nothing can be run any more, should this client's own node have ended."""
        return self._failure

    @property
    def traffic(self) -> Traffic:
        """What was sent and heard for this model so far."""
        return self._sessions.traffic

    def coverage(self) -> ModelHealth | None:
        """Who serves the model now, or did as far as was known last, where the network's thread is late; None where
        nobody announces it, or the network is closed. Any thread but its own."""
        if self._closed or self._network.closed:
            return None
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self._covered = self._network.call(self._coverage(), timeout_s=LOOK_TIMEOUT_S)
        return self._covered

    @property
    def waited_for(self) -> NoRoute | None:
        """Why some answer has been waiting for a route, and not for a moment only. Any thread."""
        return self._client.discovery.waited_for(self.model.model)

    async def _coverage(self) -> ModelHealth | None:
        if (known := self._known_coverage()) is not None:
            return known
        await self._client.discovery.refresh()  # nobody was looked for so far, or nobody is there
        return self._known_coverage()

    def _known_coverage(self) -> ModelHealth | None:
        snapshot = self._client.router.snapshot(self._client.discovery.now_s())
        return coverage(snapshot, self.model.model, num_blocks=self.model.num_blocks)

    @property
    def route(self) -> Route | None:
        """The route that was installed last."""
        return self._sessions.last_route

    @property
    def hop_timings(self) -> tuple[HopTiming, ...]:
        """Of the step that was answered last, one per hop."""
        return self._sessions.last_hops

    def timings_of(self, session: RemoteSession) -> tuple[HopTiming, ...]:
        """What the hops reported of the call that this session's last result ended, in the order of their blocks; where
        that took several steps, the sums. In the network's loop."""
        assert isinstance(session, LiveSession)
        return tuple(sorted(session.timings.values(), key=lambda hop: hop.span.start))

    # --- inside the loop ---

    async def _start(self) -> None:
        Inbox(self._sessions, self, self._sender)
        if self.training is not None:
            self.training.install()
        self._client.discovery.watch(self.model.model)
        self._tasks.spawn(Watch(self._sessions, self, self._planner, self._tasks).run(), name="watch sessions")
        self._tasks.spawn(Trials(self._sessions).run(), name="try peers again")
        self._guard.spawn(self._end_with_network(), name="end with the network")

    async def _stop(self) -> None:
        self._departures.flush()
        self._release(tuple(self._sessions.by_id.values()))
        await self._installer.close()
        await self._guard.close()
        if self.training is not None:
            await self.training.close()
        await self._tasks.close()

    async def _end_with_network(self) -> None:
        """Fail every session, now and later, once a part of this client ended: nobody would answer them any more."""
        parts = [asyncio.ensure_future(part) for part in (self._client.failed(), self._tasks.failed())]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            error = next(iter(done)).exception()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
        self._failure = error = _known(error)
        logger.error("%s", error)
        for session in tuple(self._sessions.by_id.values()):
            if session.core is not None:
                self.perform(session, session.core.give_up(error))

    def _start_each(
        self, steps: Sequence[tuple[RowStep, RowStep]], done: Callable[[RowStep, torch.Tensor | SwarmError], None]
    ) -> None:
        for step, prepared in steps:

            def answered(outputs: list[torch.Tensor], step: RowStep = step) -> None:
                self._tell(functools.partial(done, step), outputs[0])

            def failed(error: BaseException, step: RowStep = step) -> None:
                done(step, _known(error))

            self._begin((prepared,), answered, failed)

    def _tell(self, done: Callable[[T], None], outputs: T) -> None:
        """Who is answered in one turn of the loop, as by one frame, is known to be before the first of them goes on."""
        if len(self._sessions.by_id) == 1:
            done(outputs)
        else:
            asyncio.get_running_loop().call_soon(done, outputs)

    def _gain_s(self) -> float:
        """About what a step saves somebody by sharing forwards: what does not grow with their rows, where it is most.
        Elsewhere it saves others a forward, but nobody waits for it."""
        return SHARED * min(MAX_CLAIM_S, max((hop.compute_s for hop in self._sessions.last_hops), default=0.0))

    def _begin(
        self,
        steps: Sequence[RowStep],
        done: Callable[[list[torch.Tensor]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Ask for all of these steps; what can be sent without a wait leaves at once, as somebody's next token does.
        `done` and `failed` as of a `Call`."""

        def ended(error: BaseException) -> None:
            self._release([step.session for step in steps])  # no row may go on in the background
            failed(error)

        call = Call(steps, done, ended)
        if self._failure is not None:
            call.fail(self._failure)
            return
        try:
            for step in steps:
                self._resolve(step)
            for row, step in enumerate(steps):
                self._submit(call, row, step)
        except BaseException as error:  # a mistake: who waits is told, and the log
            call.fail(error)
            raise
        call.begun()

    def _resolve(self, step: RowStep) -> None:
        """Give the session of a step a live core: its parent's fork, or a new one under a new id."""
        session = step.session
        assert isinstance(session, LiveSession)
        if session.core is not None and session.core.alive:
            return
        session_id = SessionId(secrets.token_bytes(16))

        def cuts(end: int) -> list[int]:
            return session.history.cuts(end, self.model.regime_key)

        parent, session.parent = session.parent, None
        if parent is not None:
            source, position = parent
            session.history = source.history.fork(position)
            if source.core is not None and source.core.alive and step.start == position:
                session.core = source.core.fork(session_id, cuts)
        if session.core is None or not session.core.alive:
            row_bytes = step.hidden_TD[:1].nbytes
            config = replace(self._config, standby=session.standby, position_bytes=row_bytes)
            session.core = SessionCore(session_id, config, cuts)
        self._sessions.by_id[session_id] = session

    def _submit(self, call: Call, row: int, step: RowStep) -> None:
        session, hidden_TD, token_ids_T = step.session, step.hidden_TD, step.token_ids_T
        assert isinstance(session, LiveSession)
        assert session.core is not None
        session.dtype, session.expects = tensors.NAMES[hidden_TD.dtype], step.expects
        count, want_from = hidden_TD.shape[0], step.want_from
        session.timings.clear()
        if count > PIECE_POSITIONS_MIN:
            session.core.crowd = self._sessions.crowd(session)
        hops = functools.partial(self._planner.expected, session)
        chunk = session.core.config.chunk(count, hops, session.core.crowd)
        segments = []
        for at in range(0, count, chunk):
            rows_TD, ids_T, size = hidden_TD, token_ids_T, min(chunk, count - at)
            if count > chunk:
                rows_TD, ids_T = rows_TD[at : at + chunk], None if ids_T is None else ids_T[at : at + chunk]
            segments.append(
                Segment(
                    first=step.start + at,
                    count=size,
                    token_ids=ids_T,
                    hidden=rows_TD if ids_T is None else None,
                    position_offset=step.position_offset,
                    regime_length=step.regime_length,
                )
            )
            want = min(max(want_from - at, 0), size)
            step_id, actions = session.core.submit(step.start + at, size, want)
            session.rows[step_id] = (rows_TD, step.regime_length)
            session.pieces[step_id] = call.expect(row)
            self.perform(session, actions, defer_sending=True)
        self._sender.send_pending(session)
        session.note_waiting()
        for segment in segments:  # once they are on their way: in this turn nobody asks what was sent
            session.history.append(segment)
        session.room = tensors.Room(1, hidden_TD.shape[1], hidden_TD.dtype) if want_from == count - 1 else None

    def _release(self, sessions: Sequence[RemoteSession]) -> None:
        self._departures.flush()  # who is released may be waiting there: what has not begun cannot be ended
        for session in sessions:
            assert isinstance(session, LiveSession)
            session.parent = None
            if session.core is not None:
                self._prompts.ended(session)
                self.perform(session, session.core.close())
                self._forget(session, SessionClosed("the session was released"))

    def _forget(self, session: LiveSession, error: SwarmError) -> None:
        assert session.core is not None
        self._sessions.by_id.pop(session.core.session, None)
        self._client.router.on_ended(session.core.session)
        session.outbox.clear()
        session.relays.clear()
        session.rows.clear()
        pieces, session.pieces = session.pieces, {}
        for piece in pieces.values():
            piece.fail(error)

    # --- actions ---

    def perform(
        self,
        session: LiveSession,
        actions: Sequence[Action],
        *,
        rows: torch.Tensor | None = None,
        defer_sending: bool = False,
    ) -> None:
        """`rows`: the result that the actions follow from."""
        core = session.core
        assert core is not None
        for action in actions:
            if self._sessions.observer is not None:
                self._sessions.observer.acted(core.session, action)
            match action:
                case SendStep():
                    session.outbox.append(action)
                case StepDone():
                    assert rows is not None
                    self._done(session, action.step, rows)
                case NeedRoute():
                    session.outbox.clear()
                    self._tasks.spawn(self._plan(session, action), name=f"plan {core.session}")
                case OpenHops():
                    self.traffic.switches += _switches(session.route, action)
                    self.traffic.rebuilds += action.epoch > 1 and action.route is not session.route
                    self._sessions.last_route = action.route
                    core.crowd = self._sessions.crowd(session)
                    session.begin(action.route, review_in_s=REVIEW_S_MIN)
                    for index, prefix in enumerate(self._prompts.offer(session, action)):
                        work = self._installer.open_hop(session, action, index, prefix)
                        self._tasks.spawn(work, name=f"open {core.session}")
                case Skip():
                    self.traffic.prefix_positions += action.positions
                    for step in action.steps:
                        self._done(session, step, session.rows[step.step][0][:0])
                case Release():
                    self._installer.close_hops(action.hops, core.session)
                case Wait():
                    delay_s = action.delay_s * self._rng.uniform(1.0, 1.5)
                    self._tasks.spawn(self._wait(session, delay_s), name=f"wait {core.session}")
                case Fail():
                    self._forget(session, action.error)
                case NeedStandbys():
                    assert core.route is not None
                    found = self._planner.standbys(session, core.route, action)
                    self.perform(session, core.standbys_found(core.epoch, found))
                case OpenStandby():
                    session.asked_at_s[action.hop.peer_id] = asyncio.get_running_loop().time()
                    work = self._installer.open_standby(session, action)
                    self._tasks.spawn(work, name=f"open standby {core.session}")
                case Feed():
                    session.asked_at_s[action.to.peer_id] = asyncio.get_running_loop().time()
                    self._tasks.spawn(self._sender.feed(session, action), name=f"feed {core.session}")
        if not defer_sending:
            self._sender.send_pending(session)
            session.note_waiting()

    def _done(self, session: LiveSession, step: PendingStep, rows: torch.Tensor) -> None:
        self._prompts.answered(session)
        session.rows.pop(step.step, None)
        piece = session.pieces.pop(step.step, None)
        if piece is not None:
            piece.answer(rows)

    async def _plan(self, session: LiveSession, need: NeedRoute) -> None:
        core = session.core
        assert core is not None
        try:
            route = await self._planner.route(session, core, need)
        except (CallerError, Unavailable) as error:  # no route, or this node has ended
            self.perform(session, core.no_route(error))
        else:
            self.perform(session, core.route_ready(route))
            if not core.alive:  # released meanwhile
                self._client.router.on_ended(core.session)

    def reconsider(self, session: LiveSession) -> None:
        """Let go of a hop, between two steps and without blame, where a step is clearly faster with another."""
        core = session.core
        if core is not None and (slowest := self._planner.to_leave(session, core)) is not None:
            error = PeerUnreachable(f"{slowest}, or the way there, has become slow")
            logger.info("session %s: %s", core.session, error)
            self.perform(session, core.hop_leaves(slowest, core.epoch, error, answers=True))

    async def _wait(self, session: LiveSession, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        assert session.core is not None
        self.perform(session, session.core.timer())

    # --- blame ---

    def lose(self, session: LiveSession, peer: PeerId, error: SwarmError) -> None:
        """A hop of this session failed it."""
        assert session.core is not None
        self.blame(peer, error)
        self.perform(session, session.core.hop_lost(peer, error))

    def blame(self, peer: PeerId, error: SwarmError) -> None:
        logger.warning("peer %s: %s", peer, error)
        self.traffic.failures["lost"] += 1
        if self._sessions.observer is not None:
            self._sessions.observer.lost(peer)
        unreachable = isinstance(error, PeerUnreachable | StreamClosed)
        now_s = self._client.discovery.now_s()
        late = isinstance(error, PeerSilent)
        self._client.router.on_failure(peer, now_s, str(error), unreachable=unreachable, late=late)


def _switches(before: Route | None, action: OpenHops) -> int:
    """How many hops of the route were standbys until now."""
    if before is None:  # a fork's first route of its own
        return 0
    known = {(hop.peer_id, hop.span) for hop in before.hops}
    hops = zip(action.route.hops, action.keep, strict=True)
    return sum(keep > 0 and (hop.peer_id, hop.span) not in known for hop, keep in hops)


def _known(error: BaseException | None) -> SwarmError:
    """What became of whoever waited."""
    if isinstance(error, SwarmError):
        return error
    return Unavailable(f"this client failed: {type(error).__name__}: {error}", hint="make the model again")


def _on_cpu(step: RowStep) -> RowStep:
    """As it travels, and is kept."""
    hidden_TD, ids_T = step.hidden_TD, step.token_ids_T
    if hidden_TD.is_cpu and not hidden_TD.requires_grad and (ids_T is None or ids_T.is_cpu):
        return step
    return replace_fields(
        step, hidden_TD=hidden_TD.detach().to("cpu"), token_ids_T=None if ids_T is None else ids_T.to("cpu")
    )


def _like(hidden_TD: torch.Tensor, result_TD: torch.Tensor) -> torch.Tensor:
    """Where and as the input was."""
    if hidden_TD.is_cpu and hidden_TD.dtype is result_TD.dtype:
        return result_TD
    return result_TD.to(device=hidden_TD.device, dtype=hidden_TD.dtype)


def connect(
    entrance: Entrance,
    model: RemoteModel,
    embed: Embed,
    *,
    prefix_secret: bytes | None = None,
    urgency: Urgency = Urgency.INTERACTIVE,
    resilience: Resilience = "replay",
    training: TrainingConfig | None = None,
) -> SwarmRemote:
    """Enter a network in a thread of its own and drive one model through it. Raises SwarmError."""
    network = NetworkThread(lambda: enter(entrance))
    try:
        config = SessionConfig(standby=resilience == "standby")
        return SwarmRemote(
            network, model, embed, config=config, prefix_secret=prefix_secret, urgency=urgency, training=training
        )
    except BaseException:  # also an interrupt: the thread must not stay behind
        network.close()
        raise

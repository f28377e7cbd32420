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
from peers.transport.links import BULK_BYTES, Link
from peers.transport.tasks import Tasks
from peers.wire import tensors
from peers.wire.messages import PREFIX_POSITIONS, PROTOCOL_VERSION, Close, Open, Replay, Step, Urgency
from routing.errors import CallerError, NoRoute, PeerError, SwarmError, Unavailable
from routing.flow import GOLDEN
from routing.health import ModelHealth, coverage
from routing.hosting import find_adapter
from routing.ids import PeerId, SessionId
from routing.records import HostedAdapter
from routing.router import Hop, Kept, Route, RouteRequest
from swarm.errors import SessionClosed
from swarm.network import Answer, ClientNode, Entrance, NetworkThread, enter
from swarm.session.callers import Callers
from swarm.session.calls import Call
from swarm.session.core import (
    Action,
    Fail,
    Feed,
    NeedRoute,
    NeedStandbys,
    OpenHops,
    OpenStandby,
    PendingStep,
    Release,
    SendStep,
    SessionConfig,
    SessionCore,
    Skip,
    State,
    StepDone,
    Wait,
)
from swarm.session.departures import Departures
from swarm.session.history import Segment
from swarm.session.inbox import Inbox
from swarm.session.live import MAX_CLAIM_S, HopTiming, LiveSession, Observer, RemoteModel, Sessions, Traffic
from swarm.session.prefix import describe_blocks, prefix_keys
from swarm.session.remote import Embed, RemoteSession, Resilience, RowStep
from swarm.session.review import REVIEW_S_MIN, next_review_s, usual_saving, usual_tokens, worth_leaving
from swarm.session.training import TrainingConfig, TrainingRoute
from swarm.session.trial import Trials
from swarm.session.uploads import Uploads
from swarm.session.watch import Watch

logger = logging.getLogger(__name__)
T = TypeVar("T")

RECONSIDER_S_MIN, RECONSIDER_S = 0.5, 5.0
"""Between two looks for a better route for a session whose steps have become slow: twice as long each time."""
SHARED = 0.7
"""Of a forward: what it takes however many rows there are."""
LOOK_TIMEOUT_S = 2.0
"""How long somebody who only looks waits for the network's thread."""
_NOTHING = memoryview(b"")
GOODBYE_TIMEOUT_S = 2.0
"""How long closing waits for "close" messages to leave; a hop that misses one frees its pages with the link."""


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
        self._hosted: HostedAdapter | None = None
        """Which one that is, once it is known."""
        self._network = network
        self._client: ClientNode = network.client
        self._sessions = Sessions(model=model, client=network.client, uploads=self.uploads)
        self._embed = embed
        self._config = config or SessionConfig()
        self._owns_network = owns_network
        self._rng = rng or random.Random()
        self._urgency = urgency
        self._turn = self._rng.random()
        self._prefix_secret = prefix_secret or secrets.token_bytes(32)
        self._tasks = Tasks()
        self._goodbyes = Tasks()
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
        return [
            result.to(device=step.hidden_TD.device, dtype=step.hidden_TD.dtype)
            for step, result in zip(steps, results, strict=True)
        ]

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
        Inbox(self._sessions, self)
        if self.training is not None:
            self.training.install()
        self._client.discovery.watch(self.model.model)
        self._tasks.spawn(Watch(self._sessions, self, self._tasks).run(), name="watch sessions")
        self._tasks.spawn(Trials(self._sessions).run(), name="try peers again")
        self._guard.spawn(self._end_with_network(), name="end with the network")

    async def _stop(self) -> None:
        self._departures.flush()
        self._release(tuple(self._sessions.by_id.values()))
        await self._goodbyes.settled(timeout_s=GOODBYE_TIMEOUT_S)
        await self._goodbyes.close()
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
            session.core = SessionCore(session_id, replace(self._config, standby=session.standby), cuts)
        self._sessions.by_id[session_id] = session

    def _submit(self, call: Call, row: int, step: RowStep) -> None:
        session, hidden_TD, token_ids_T = step.session, step.hidden_TD, step.token_ids_T
        assert isinstance(session, LiveSession)
        assert session.core is not None
        session.dtype = tensors.NAMES[hidden_TD.dtype]
        count, want_from = len(hidden_TD), step.want_from
        session.timings.clear()
        chunk = self._config.chunk(count)
        for at in range(0, count, chunk):
            rows_TD, ids_T = hidden_TD, token_ids_T
            if count > chunk:
                rows_TD, ids_T = rows_TD[at : at + chunk], None if ids_T is None else ids_T[at : at + chunk]
            session.history.append(
                Segment(
                    first=step.start + at,
                    count=len(rows_TD),
                    token_ids=ids_T,
                    hidden=rows_TD if ids_T is None else None,
                    position_offset=step.position_offset,
                    regime_length=step.regime_length,
                )
            )
            want = min(max(want_from - at, 0), len(rows_TD))
            step_id, actions = session.core.submit(step.start + at, len(rows_TD), want)
            session.rows[step_id] = (rows_TD, step.regime_length)
            session.pieces[step_id] = call.expect(row)
            self.perform(session, actions, defer_sending=True)
        self._send_pending(session)

    def _release(self, sessions: Sequence[RemoteSession]) -> None:
        self._departures.flush()  # who is released may be waiting there: what has not begun cannot be ended
        for session in sessions:
            assert isinstance(session, LiveSession)
            session.parent = None
            if session.core is not None:
                if session.route is not None and not session.prompt_keys:  # something was answered
                    keys = self._keys(session, (), self._blocks(session, session.length))
                    self._sessions.kept.add(keys, session.route.hops)
                self.perform(session, session.core.close())
                self._forget(session, SessionClosed("the session was released"))

    def _forget(self, session: LiveSession, error: SwarmError) -> None:
        assert session.core is not None
        self._sessions.by_id.pop(session.core.session, None)
        self._client.router.on_ended(session.core.session)
        session.outbox.clear()
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
        if core.outstanding and not session.waiting:
            session.renew_deadline()
        session.waiting = core.outstanding
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
                    session.begin(action.route, review_in_s=REVIEW_S_MIN)
                    for index, prefix in enumerate(self._offer(session, action)):
                        work = self._open_hop(session, action, index, prefix)
                        self._tasks.spawn(work, name=f"open {core.session}")
                case Skip():
                    self.traffic.prefix_positions += action.positions
                    for step in action.steps:
                        self._done(session, step, session.rows[step.step][0][:0])
                case Release():
                    self._close_hops(action.hops, core.session)
                case Wait():
                    delay_s = action.delay_s * self._rng.uniform(1.0, 1.5)
                    self._tasks.spawn(self._wait(session, delay_s), name=f"wait {core.session}")
                case Fail():
                    self._forget(session, action.error)
                case NeedStandbys():
                    found = self._find_standbys(session, action)
                    self.perform(session, core.standbys_found(core.epoch, found))
                case OpenStandby():
                    session.asked_at_s[action.hop.peer_id] = asyncio.get_running_loop().time()
                    self._tasks.spawn(self._open_standby(session, action), name=f"open standby {core.session}")
                case Feed():
                    session.asked_at_s[action.to.peer_id] = asyncio.get_running_loop().time()
                    self._tasks.spawn(self._feed(session, action), name=f"feed {core.session}")
        if not defer_sending:
            self._send_pending(session)

    def _offer(self, session: LiveSession, action: OpenHops) -> list[tuple[bytes, ...]]:
        """The keys to offer, for each hop of the route."""
        assert session.core is not None
        hops = action.route.hops
        blocks = self._blocks(session, action.offer)
        session.offered = max(len(blocks) * PREFIX_POSITIONS, *action.keep)
        return [
            self._keys(session, hops[:index], blocks) if action.forgot or not keep else ()
            for index, keep in enumerate(action.keep)
        ]

    def _blocks(self, session: LiveSession, end: int) -> list[bytes]:
        """What the positions before `end` are, for their keys."""
        return describe_blocks(session.history.between(0, end, self.model.regime_key), self.model.regime_key)

    def _keys(self, session: LiveSession, upstream: Sequence[Hop], blocks: Sequence[bytes]) -> tuple[bytes, ...]:
        adapter = self._hosted.digest if self._hosted else None if session.adapter is None else session.adapter.name
        return prefix_keys(session.prefix_secret, self.model.model, session.dtype, upstream, blocks, adapter)

    def _done(self, session: LiveSession, step: PendingStep, rows: torch.Tensor) -> None:
        if session.prompt_keys and session.route is not None:
            self._sessions.kept.add(session.prompt_keys, session.route.hops)
            session.prompt_keys = ()
        session.rows.pop(step.step, None)
        piece = session.pieces.pop(step.step, None)
        if piece is not None:
            piece.answer(rows)

    async def _plan(self, session: LiveSession, need: NeedRoute) -> None:
        core = session.core
        assert core is not None
        pending = core.pending
        length = max((step.first + step.count for step in pending), default=0)
        try:
            await self._find_hosted()
        except SwarmError as error:
            self.perform(session, core.no_route(error))
            return
        self._turn = (self._turn + GOLDEN) % 1.0
        request = replace(
            self._request(need.avoid, session.route, length),
            tokens=usual_tokens([step.count for step in pending]),
            keep=need.keep,
            kept=None if session.route is not None else self._kept(session, pending, length),
            spread=self._turn,
            session=core.session,
        )
        try:
            route = await self._client.discovery.route(request)
        except Unavailable as error:  # no route, or this node has ended
            self.perform(session, core.no_route(error))
        else:
            self.perform(session, core.route_ready(route))
            if not core.alive:  # released meanwhile
                self._client.router.on_ended(core.session)

    def _kept(self, session: LiveSession, pending: Sequence[PendingStep], length: int) -> Kept | None:
        """Where a session before this one had the longest part of its prompt."""
        session.prompt_keys = self._keys(session, (), self._blocks(session, length))
        count, hops = self._sessions.kept.find(session.prompt_keys)
        saves = usual_saving([step.count for step in pending], count * PREFIX_POSITIONS)
        return Kept(hops=hops, saves=saves) if count else None

    async def _find_hosted(self) -> None:
        """The adapter that the model is to have, among those that peers announce. Raises CallerError, NoRoute."""
        if self.model.adapter is None or self._hosted is not None:
            return
        if (found := self._known_hosted(self.model.adapter)) is None:
            await self._client.discovery.refresh()
            found = self._known_hosted(self.model.adapter)
        self._hosted = found
        if found is not None:
            return
        raise NoRoute(
            f"no peer hosts adapter {self.model.adapter} of model {self.model.model}",
            missing=[(0, self.model.num_blocks)],
            hint="`swarm status` shows which there are; host one with `swarm join MODEL --adapter NAME=FOLDER`",
        )

    def _known_hosted(self, asked: str) -> HostedAdapter | None:
        snapshot = self._client.router.snapshot(self._client.discovery.now_s())
        return find_adapter(snapshot.of_model(self.model.model), asked)

    def _request(self, avoid: frozenset[PeerId], previous: Route | None, length: int) -> RouteRequest:
        """For a step of one position."""
        return RouteRequest(
            model=self.model.model,
            num_blocks=self.model.num_blocks,
            avoid=avoid,
            bytes_per_token=self.model.hidden_size * 4,
            cache_tokens=length,
            protocol=PROTOCOL_VERSION,
            min_precision=self.model.min_precision,
            adapter=self._hosted,
            previous=previous,
        )

    def reconsider(self, session: LiveSession) -> None:
        """Let go of the hop that took longest, between two steps and without blame, where another is clearly faster."""
        core, loop_s, timings = session.core, asyncio.get_running_loop().time(), self._sessions.last_hops
        if core is None or core.route is None or core.state is not State.READY or not timings:
            return
        if loop_s < (session.reconsider_at_s if session.pace.slowed else session.review_at_s):
            return
        if session.pace.slowed:
            session.reconsider_at_s = loop_s + min(RECONSIDER_S, RECONSIDER_S_MIN * 2.0 ** min(session.looks, 9))
            session.looks += 1
        session.review_at_s = loop_s + next_review_s(loop_s - session.began_s)
        slowest = max(timings, key=lambda hop: hop.queue_s + hop.compute_s).peer
        request, now_s = self._request(frozenset(), core.route, session.length), self._client.discovery.now_s()
        others_s = sum(hop.queue_s + hop.compute_s for hop in timings if hop.peer != slowest)
        took = {"step_s": session.pace.usual_s(1), "others_s": others_s}
        if worth_leaving(self._client.router, request, slowest, now_s, **took, slowed=session.pace.slowed):
            error = PeerUnreachable(f"{slowest} has become slow")
            logger.info("session %s: %s", core.session, error)
            self.perform(session, core.hop_leaves(slowest, core.epoch, error, answers=True))

    async def _open_hop(self, session: LiveSession, action: OpenHops, index: int, prefix: tuple[bytes, ...]) -> None:
        core, route, epoch = session.core, action.route, action.epoch
        assert core is not None
        hop = route.hops[index]
        message = self._opening(session, route, index, epoch, prefix=prefix, keep=action.keep[index])
        try:
            link = await self._client.links.to(hop.peer_id, hop.addresses)
            await self._upload(session, link, hop)
            if core.epoch == epoch and core.route is route:  # else it was released meanwhile
                await link.send(message, bulk=message.adapter is not None)
        except PeerError as error:
            self.lose(session, hop.peer_id, error)
        except Unavailable as error:  # of this client's own node: no other route helps
            self.perform(session, core.give_up(error))

    async def _upload(self, session: LiveSession, link: Link, hop: Hop) -> None:
        """What of the session's adapter is the hop's."""
        adapter = None if session.adapter is None else session.adapter.within(hop.span)
        if adapter is not None:
            await self.uploads.send(link, adapter, hop.span, told=session.renew_deadline)

    def _opening(
        self,
        session: LiveSession,
        route: Route,
        index: int,
        epoch: int,
        *,
        prefix: tuple[bytes, ...],
        keep: int,
        standby: bool = False,
    ) -> Open:
        core, hop = session.core, route.hops[index]
        assert core is not None
        own = None if session.adapter is None else session.adapter.within(hop.span)
        following = route.hops[index + 1] if index + 1 < len(route.hops) else None
        return Open(
            session=core.session.raw,
            epoch=epoch,
            model=self.model.model.digest,
            start=hop.span.start,
            end=hop.span.end,
            previous=route.hops[index - 1].peer_id if index else None,
            next=None if following is None else following.peer_id,
            next_addresses=() if following is None else following.addresses,
            prefix=prefix,
            keep=keep,
            adapter=self._hosted.digest if self._hosted else None if own is None else own.name,
            standby=standby,
        )

    # --- standbys: nothing here may harm the session ---

    def _find_standbys(self, session: LiveSession, need: NeedStandbys) -> list[Hop]:
        core = session.core
        assert core is not None
        assert core.route is not None
        request, now_s = self._request(need.avoid, core.route, session.length), self._client.discovery.now_s()
        hops = (self._client.router.standby(request, hop, need.avoid, now_s) for hop in need.hops)
        return [hop for hop in hops if hop is not None]

    async def _open_standby(self, session: LiveSession, action: OpenStandby) -> None:
        core, hop = session.core, action.hop
        assert core is not None
        route = core.route
        if route is None or core.epoch != action.epoch:
            return
        index = next(at for at, other in enumerate(route.hops) if other.span == hop.span)
        prefix: tuple[bytes, ...] = ()
        if action.offer:
            prefix = self._keys(session, route.hops[:index], self._blocks(session, action.offer))
        standing = replace(route, hops=(*route.hops[:index], hop, *route.hops[index + 1 :]))
        message = self._opening(session, standing, index, action.epoch, prefix=prefix, keep=action.keep, standby=True)
        await self._send_to_standby(session, hop, hop, action.epoch, message)

    async def _feed(self, session: LiveSession, action: Feed) -> None:
        core, step, to = session.core, action.step, action.to
        assert core is not None
        if core.route is None or not core.feeds(step.step, action.epoch):
            return
        if len(session.history) < step.first + step.count:  # rolled back meanwhile
            self.perform(session, core.feed_failed(step.step, action.epoch, busy=True))
            return
        self.traffic.standby_positions += step.count
        if step.hop:
            message = replace_fields(
                self._replay(session, step, core.route, action.epoch),
                bulk=step.count * self.model.hidden_size * 2 >= BULK_BYTES,
                urgency=Urgency.BACKGROUND,
                to=to.peer_id,
                to_addresses=to.addresses,
            )
            await self._send_to_standby(session, to, core.route.hops[step.hop - 1], action.epoch, message)
            return
        rows_TD, regime_length = await self._rows_again(session, step)
        carried, payload = self._step(core, to, step, action.epoch, rows_TD, regime_length)
        whole = replace_fields(carried, bulk=len(payload) >= BULK_BYTES, urgency=Urgency.BACKGROUND, stop=to.span.end)
        await self._send_to_standby(session, to, to, action.epoch, whole, payload)

    async def _send_to_standby(
        self,
        session: LiveSession,
        standby: Hop,
        hop: Hop,
        epoch: int,
        message: Open | Replay | Step,
        payload: memoryview = _NOTHING,
    ) -> None:
        """What concerns `standby`, to it or to the `hop` before it."""
        core = session.core
        assert core is not None
        try:
            link = await self._client.links.to(hop.peer_id, hop.addresses)
            bulk = isinstance(message, Step) and message.bulk
            if isinstance(message, Open) and message.adapter is not None:
                await self._upload(session, link, hop)
                bulk = True
            if core.epoch == epoch and core.standby_at(standby.peer_id, standby.span.start):
                await link.send(message, payload, bulk=bulk)
                self.traffic.bytes_sent += len(payload)
        except (PeerError, Unavailable) as error:
            logger.info("session %s: no standby at %s: %s", core.session, standby.peer_id, error)
            if hop is standby:
                self.blame(standby.peer_id, error)
            self.perform(session, core.standby_lost(standby.peer_id, epoch))

    def _close_hops(self, hops: Sequence[Hop], session: SessionId) -> None:
        for peer in dict.fromkeys(hop.peer_id for hop in hops):
            self._goodbyes.spawn(self._close_hop(peer, session), name=f"close {session}")

    async def _close_hop(self, peer: PeerId, session: SessionId) -> None:
        link = self._client.links.known(peer)
        if link is not None:
            try:
                await link.send(Close(sessions=(session.raw,)))
            except PeerError as error:
                logger.debug("session %s: %s", session, error)  # the hop frees it with the link

    async def _wait(self, session: LiveSession, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        assert session.core is not None
        self.perform(session, session.core.timer())

    def _send_pending(self, session: LiveSession) -> None:
        """Send what is in the outbox, in order: now, as far as nothing has to be waited for, the rest by a task."""
        if session.pumping:
            return
        while session.outbox:
            if not self._send_now(session, session.outbox[0]):
                self._tasks.spawn(self._pump(session), name="send a step")
                return
            session.outbox.popleft()

    async def _pump(self, session: LiveSession) -> None:
        """Send what is in the outbox, in order; one pump per session at a time."""
        if session.pumping:
            return
        session.pumping = True
        try:
            while session.outbox:
                await self._send(session, session.outbox.popleft())
        finally:
            session.pumping = False

    def _send_now(self, session: LiveSession, action: SendStep) -> bool:
        """As `_send`, if nothing has to be waited for; else False, and nothing was sent."""
        core, step = session.core, action.step
        assert core is not None
        if core.route is None or not core.due(step.step, action.epoch):
            return True
        known, link = session.rows.get(step.step), self._client.links.known(core.route.hops[0].peer_id)
        if step.hop or known is None or link is None or not link.wanted:
            return False
        message, payload = self._first(session, core, core.route, action, *known)
        # with steps of other sessions it shares a frame
        if message.bulk or not link.send_now(message, payload, alone=len(self._sessions.by_id) == 1):
            return False
        self._sent(payload)
        return True

    async def _send(self, session: LiveSession, action: SendStep) -> None:
        core, step = session.core, action.step
        assert core is not None
        if core.route is None or not core.due(step.step, action.epoch):
            return
        if step.hop:
            await self._have_replayed(session, step, core.route, action.epoch)
            return
        known = session.rows.get(step.step)
        rows_TD, regime_length = await self._rows_again(session, step) if known is None else known
        if not core.due(step.step, action.epoch):
            return
        hop = core.route.hops[0]
        message, payload = self._first(session, core, core.route, action, rows_TD, regime_length)
        await self.send_to(session, hop.peer_id, hop.addresses, message, payload)

    def _first(
        self,
        session: LiveSession,
        core: SessionCore,
        route: Route,
        action: SendStep,
        rows_TD: torch.Tensor,
        regime_length: int,
    ) -> tuple[Step, memoryview]:
        """What the first hop gets now."""
        step = action.step
        if len(rows_TD) > step.count:
            rows_TD = rows_TD[-step.count :]  # what every hop holds already is not sent
        alone = step.count == 1 and step.until is None and not core.crowded
        session.timed_step = (step.step, asyncio.get_running_loop().time()) if alone else None
        return self._step(core, route.hops[0], step, action.epoch, rows_TD, regime_length)

    def _step(
        self, core: SessionCore, hop: Hop, step: PendingStep, epoch: int, rows_TD: torch.Tensor, regime_length: int
    ) -> tuple[Step, memoryview]:
        """`step` for `hop`, the first of the route or one in its place, with what goes with it."""
        assert core.route is not None
        dtype = tensors.NAMES[rows_TD.dtype]
        payload = tensors.pack(rows_TD, dtype)
        message = Step(
            session=core.session.raw,
            block=hop.span.start,
            epoch=epoch,
            step=step.step,
            first=step.first,
            count=step.count,
            want_from=step.want_from,
            regime_length=regime_length,
            parent=None if step.parent is None else step.parent.raw,
            dtype=dtype,
            hidden=self.model.hidden_size,
            # steps under way together share a lane, also a short one behind long ones: they must stay in order
            bulk=len(payload) >= BULK_BYTES or core.crowded,
            urgency=self._urgency,
            stop=_stop(core.route, step),
        )
        return message, payload

    async def _have_replayed(self, session: LiveSession, step: PendingStep, route: Route, epoch: int) -> None:
        """The hop before the step's first one sends it, from its journal."""
        hop = route.hops[step.hop - 1]
        self.traffic.replayed_positions += step.count
        message = self._replay(session, step, route, epoch)
        await self.send_to(session, hop.peer_id, hop.addresses, message, memoryview(b""))

    def _replay(self, session: LiveSession, step: PendingStep, route: Route, epoch: int) -> Replay:
        core = session.core
        assert core is not None
        segments = session.history.between(step.first, step.first + step.count, self.model.regime_key)
        return Replay(
            session=core.session.raw,
            block=route.hops[step.hop - 1].span.start,
            epoch=epoch,
            step=step.step,
            first=step.first,
            count=step.count,
            want_from=step.want_from,
            regime_length=max(segment.regime_length for segment in segments),
            bulk=core.crowded or step.count * self.model.hidden_size * 2 >= BULK_BYTES,
            urgency=self._urgency,
            stop=_stop(route, step),
        )

    async def send_to(
        self, session: LiveSession, peer: PeerId, addresses: Sequence[str], message: Step | Replay, payload: memoryview
    ) -> None:
        assert session.core is not None
        try:
            link = await self._client.links.to(peer, addresses)
            await link.send(message, payload, bulk=message.bulk and isinstance(message, Step))
        except PeerError as error:
            self.lose(session, peer, error)
        except Unavailable as error:
            self.perform(session, session.core.give_up(error))
        else:
            self._sent(payload)

    def _sent(self, payload: memoryview) -> None:
        self.traffic.steps += 1
        self.traffic.bytes_sent += len(payload)

    async def _rows_again(self, session: LiveSession, step: PendingStep) -> tuple[torch.Tensor, int]:
        segments = session.history.between(step.first, step.first + step.count, self.model.regime_key)
        rows_TD = await asyncio.to_thread(self._embed_again, segments)
        return rows_TD, max(segment.regime_length for segment in segments)

    def _embed_again(self, segments: Sequence[Segment]) -> torch.Tensor:
        return torch.cat([segment.rows(self._embed).detach().to("cpu") for segment in segments])

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
    return replace(step, hidden_TD=hidden_TD.detach().to("cpu"), token_ids_T=None if ids_T is None else ids_T.to("cpu"))


def _stop(route: Route, step: PendingStep) -> int:
    return 0 if step.until is None else route.hops[step.until - 1].span.end


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

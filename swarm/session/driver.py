"""Carries out what session cores decide: plans, opens, sends, replays, waits. One `SwarmRemote` per model and network.

Owns the client's sessions, their histories and deadlines, all inside the network's event loop; models enter from any
thread through the `Remote` protocol. Knows no kernels and no server.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from msgspec.structs import replace as replace_fields

from peers.errors import Busy, PeerUnreachable, ProtocolError, Refused
from peers.transport.links import BULK_BYTES, Link
from peers.transport.tasks import Tasks
from peers.wire import tensors
from peers.wire.messages import (
    PREFIX_POSITIONS,
    PROTOCOL_VERSION,
    Close,
    Code,
    Failed,
    Open,
    Opened,
    Relay,
    Result,
    Step,
)
from routing.errors import PeerError, SwarmError, Unavailable
from routing.ids import ModelId, PeerId, SessionId, StepId
from routing.router import Route, RouteRequest
from swarm.errors import SessionClosed
from swarm.network import ClientNode, Entrance, NetworkThread, enter
from swarm.session.core import (
    Action,
    Fail,
    NeedRoute,
    OpenHops,
    PendingStep,
    Release,
    SendStep,
    SessionConfig,
    SessionCore,
    Skip,
    StepDone,
    Wait,
)
from swarm.session.history import History, Segment
from swarm.session.prefix import describe_blocks, prefix_keys
from swarm.session.remote import Embed, RemoteSession, RowStep

logger = logging.getLogger(__name__)

SILENCE_S = 3.0
"""Nothing heard for this long: ask every hop whether it is alive. Doubles while all of them are."""
ALIVE_TIMEOUT_S = 2.0
IDLE_LOOKS = 3
"""Looks at which every hop is alive and has nothing queued, after which the step is taken for lost."""
WATCH_S = 0.25
GOODBYE_TIMEOUT_S = 2.0
"""How long closing waits for "close" messages to leave; a hop that misses one frees its pages with the link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopTiming:
    """What one hop reported of one step."""

    peer: PeerId
    queue_s: float
    compute_s: float


@dataclass(slots=True)
class Traffic:
    """What this client sent and heard; read by `generate --json`, benchmarks and tests."""

    steps: int = 0
    results: int = 0
    relays: int = 0
    rebuilds: int = 0
    prefix_positions: int = 0
    """Positions not sent, because every hop of a route held them already when it was opened."""
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    """What the driver has to know of a model."""

    model: ModelId
    num_blocks: int
    hidden_size: int
    regime_key: Callable[[int], object]
    """Lengths with equal keys may share one forward (`peers.model` RotaryRegime)."""
    min_precision: str | None = None
    """Of the peers that are asked (`routing.precision`); None for any."""


class _Session(RemoteSession):
    """One sequence. Touched by the network's loop only, save for `length`."""

    __slots__ = (
        "core",
        "deadline_s",
        "futures",
        "history",
        "idle_looks",
        "offered",
        "outbox",
        "parent",
        "pumping",
        "route",
        "rows",
        "silence_s",
    )

    def __init__(self, parent: tuple[_Session, int] | None) -> None:
        super().__init__(0 if parent is None else parent[1])
        self.parent = parent
        self.core: SessionCore | None = None
        self.history = History()
        self.futures: dict[StepId, asyncio.Future[torch.Tensor]] = {}
        self.rows: dict[StepId, tuple[torch.Tensor, int]] = {}
        self.outbox: deque[SendStep] = deque()
        self.pumping = False
        self.route: Route | None = None
        """The last one that was planned for this session."""
        self.offered = 0
        """Positions that the hops of the present route were asked for."""
        self.deadline_s = 0.0
        self.silence_s = SILENCE_S
        self.idle_looks = 0


@dataclass(slots=True)
class _State:
    sessions: dict[SessionId, _Session] = field(default_factory=dict)
    investigating: set[SessionId] = field(default_factory=set)
    last_route: Route | None = None
    last_hops: tuple[HopTiming, ...] = ()


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
    ) -> None:
        """`owns_network`: `close` ends the network too. `rng` spreads retries. Sessions of remotes with the same
        `prefix_secret` (16 to 64 bytes; by default random) can share what peers hold of their prompts."""
        self.model = model
        self.traffic = Traffic()
        self._network = network
        self._client: ClientNode = network.client
        self._embed = embed
        self._config = config or SessionConfig()
        self._owns_network = owns_network
        self._rng = rng or random.Random()
        self._prefix_secret = prefix_secret or secrets.token_bytes(32)
        self._tasks = Tasks()
        self._goodbyes = Tasks()
        self._guard = Tasks()
        self._failure: SwarmError | None = None
        """Why nothing can be run any more, should this client's own node have ended."""
        self._state = _State()
        self._closed = False
        network.call(self._start())

    # --- the Remote protocol: any thread ---

    def open(self, parent: RemoteSession | None = None, position: int = 0) -> RemoteSession:
        assert parent is None or isinstance(parent, _Session)
        return _Session(None if parent is None else (parent, position))

    def run(self, steps: Sequence[RowStep]) -> list[torch.Tensor]:
        if self._closed:
            raise SessionClosed("this model's connection to the swarm was closed")
        results = self._network.call(self._run(steps))
        return [
            result.to(device=step.hidden_TD.device, dtype=step.hidden_TD.dtype)
            for step, result in zip(steps, results, strict=True)
        ]

    def release(self, sessions: Sequence[RemoteSession]) -> None:
        if not self._closed:
            self._network.post(self._release, tuple(sessions))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if not self._network.closed:
                self._network.call(self._stop())
            if self._owns_network:
                self._network.close()

    @property
    def route(self) -> Route | None:
        """The route that was installed last."""
        return self._state.last_route

    @property
    def hop_timings(self) -> tuple[HopTiming, ...]:
        """Of the step that was answered last, one per hop."""
        return self._state.last_hops

    # --- inside the loop ---

    async def _start(self) -> None:
        links = self._client.links
        links.handle(Opened, self._opened)
        links.handle(Result, self._result)
        links.handle(Failed, self._failed)
        links.handle(Relay, self._relay)
        links.on_lost(self._link_lost)
        links.keep(self._needed_links)
        self._client.discovery.watch(self.model.model)
        self._tasks.spawn(self._watch(), name="watch sessions")
        self._guard.spawn(self._end_with_network(), name="end with the network")

    async def _stop(self) -> None:
        self._release(tuple(self._state.sessions.values()))
        await self._goodbyes.settled(timeout_s=GOODBYE_TIMEOUT_S)
        await self._goodbyes.close()
        await self._guard.close()
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
        if not isinstance(error, SwarmError):
            error = Unavailable(f"this client failed: {type(error).__name__}: {error}", hint="make the model again")
        self._failure = error
        logger.error("%s", error)
        for session in tuple(self._state.sessions.values()):
            if session.core is not None:
                self._perform(session, session.core.give_up(error))

    async def _run(self, steps: Sequence[RowStep]) -> list[torch.Tensor]:
        if self._failure is not None:
            raise self._failure
        sessions = [step.session for step in steps]
        try:
            for step in steps:
                self._resolve(step)
            return list(await asyncio.gather(*(self._row(step) for step in steps)))
        except BaseException:  # an error of one row or an interrupt: no row may go on in the background
            self._release(tuple(sessions))
            raise

    def _resolve(self, step: RowStep) -> None:
        """Give the session of a step a live core: its parent's fork, or a new one under a new id."""
        session = step.session
        assert isinstance(session, _Session)
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
            session.core = SessionCore(session_id, self._config, cuts)
        self._state.sessions[session_id] = session

    async def _row(self, step: RowStep) -> torch.Tensor:
        session = step.session
        assert isinstance(session, _Session)
        assert session.core is not None
        hidden_TD = step.hidden_TD.detach().to("cpu")
        count, want_from = len(hidden_TD), step.want_from
        futures = []
        if not session.core.outstanding:
            self._renew_deadline(session)
        for at in range(0, count, self._config.chunk_positions):
            rows_TD = hidden_TD[at : at + self._config.chunk_positions]
            ids_T = None if step.token_ids_T is None else step.token_ids_T[at : at + len(rows_TD)].detach().to("cpu")
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
            future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
            session.futures[step_id] = future
            futures.append(future)
            self._perform(session, actions, defer_sending=True)
        await self._pump(session)
        parts = [await future for future in futures]
        session.length = step.start + count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _release(self, sessions: Sequence[RemoteSession]) -> None:
        for session in sessions:
            assert isinstance(session, _Session)
            session.parent = None
            if session.core is not None:
                self._perform(session, session.core.close())
                self._forget(session, SessionClosed("the session was released"))

    def _forget(self, session: _Session, error: SwarmError) -> None:
        assert session.core is not None
        self._state.sessions.pop(session.core.session, None)
        session.outbox.clear()
        session.rows.clear()
        futures, session.futures = session.futures, {}
        for future in futures.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # marked as seen: a gather that failed already looks at one of them only

    # --- actions ---

    def _perform(
        self,
        session: _Session,
        actions: Sequence[Action],
        *,
        rows: torch.Tensor | None = None,
        defer_sending: bool = False,
    ) -> None:
        """`rows`: the result that the actions follow from."""
        core = session.core
        assert core is not None
        for action in actions:
            match action:
                case SendStep():
                    session.outbox.append(action)
                case StepDone():
                    assert rows is not None
                    self._done(session, action.step, rows)
                case NeedRoute():
                    self._tasks.spawn(self._plan(session, action.avoid), name=f"plan {core.session}")
                case OpenHops():
                    self._state.last_route = session.route = action.route
                    self.traffic.rebuilds += action.epoch > 1
                    self._renew_deadline(session)
                    for index, prefix in enumerate(self._offer(session, action)):
                        work = self._open_hop(session, action.route, index, action.epoch, prefix)
                        self._tasks.spawn(work, name=f"open {core.session}")
                case Skip():
                    self.traffic.prefix_positions += action.positions
                    for step in action.steps:
                        self._done(session, step, session.rows[step.step][0][:0])
                case Release():
                    session.outbox.clear()
                    self._close_hops(action.route, core.session)
                case Wait():
                    delay_s = action.delay_s * self._rng.uniform(1.0, 1.5)
                    self._tasks.spawn(self._wait(session, delay_s), name=f"wait {core.session}")
                case Fail():
                    self._forget(session, action.error)
        if session.outbox and not session.pumping and not defer_sending:
            self._tasks.spawn(self._pump(session), name=f"send {core.session}")

    def _offer(self, session: _Session, action: OpenHops) -> list[tuple[bytes, ...]]:
        """The keys to offer, for each hop of the route."""
        assert session.core is not None
        hops, (rows_TD, _) = action.route.hops, session.rows[session.core.pending[0].step]
        blocks = describe_blocks(session.history.between(0, action.offer), self.model.regime_key)
        session.offered = len(blocks) * PREFIX_POSITIONS
        start = (self._prefix_secret, self.model.model, tensors.NAMES[rows_TD.dtype])
        return [prefix_keys(*start, hops[:index], blocks) for index in range(len(hops))]

    def _done(self, session: _Session, step: PendingStep, rows: torch.Tensor) -> None:
        session.rows.pop(step.step, None)
        future = session.futures.pop(step.step, None)
        if future is not None and not future.done():
            future.set_result(rows)

    async def _plan(self, session: _Session, avoid: frozenset[PeerId]) -> None:
        core = session.core
        assert core is not None
        pending = core.pending
        request = RouteRequest(
            model=self.model.model,
            num_blocks=self.model.num_blocks,
            avoid=avoid,
            tokens=max((step.count for step in pending), default=1),
            bytes_per_token=self.model.hidden_size * 4,
            cache_tokens=max((step.first + step.count for step in pending), default=0),
            protocol=PROTOCOL_VERSION,
            min_precision=self.model.min_precision,
            previous=session.route,
        )
        try:
            route = await self._client.discovery.route(request)
        except Unavailable as error:  # no route, or this node has ended
            self._perform(session, core.no_route(error))
        else:
            self._perform(session, core.route_ready(route))

    async def _open_hop(
        self, session: _Session, route: Route, index: int, epoch: int, prefix: tuple[bytes, ...]
    ) -> None:
        core = session.core
        assert core is not None
        hop = route.hops[index]
        following = route.hops[index + 1] if index + 1 < len(route.hops) else None
        message = Open(
            session=core.session.raw,
            epoch=epoch,
            model=self.model.model.digest,
            start=hop.span.start,
            end=hop.span.end,
            previous=route.hops[index - 1].peer_id if index else None,
            next=None if following is None else following.peer_id,
            next_addresses=() if following is None else following.addresses,
            prefix=prefix,
        )
        try:
            link = await self._client.links.to(hop.peer_id, hop.addresses)
            if core.epoch == epoch and core.route is route:  # else it was released meanwhile
                await link.send(message)
        except PeerError as error:
            self._lose(session, hop.peer_id, error)
        except Unavailable as error:  # of this client's own node: no other route helps
            self._perform(session, core.give_up(error))

    def _close_hops(self, route: Route, session: SessionId) -> None:
        for hop in route.hops:
            self._goodbyes.spawn(self._close_hop(hop.peer_id, session), name=f"close {session}")

    async def _close_hop(self, peer: PeerId, session: SessionId) -> None:
        link = self._client.links.known(peer)
        if link is not None:
            try:
                await link.send(Close(sessions=(session.raw,)))
            except PeerError as error:
                logger.debug("session %s: %s", session, error)  # the hop frees it with the link

    async def _wait(self, session: _Session, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        assert session.core is not None
        self._perform(session, session.core.timer())

    async def _pump(self, session: _Session) -> None:
        """Send what is in the outbox, in order; one pump per session at a time."""
        if session.pumping:
            return
        session.pumping = True
        try:
            while session.outbox:
                await self._send(session, session.outbox.popleft())
        finally:
            session.pumping = False

    async def _send(self, session: _Session, action: SendStep) -> None:
        core, step = session.core, action.step
        assert core is not None
        if core.route is None or core.epoch != action.epoch:
            return
        known = session.rows.get(step.step)
        if known is None:
            segments = session.history.between(step.first, step.first + step.count)
            regime_length = max(segment.regime_length for segment in segments)
            rows_TD = await asyncio.to_thread(self._embed_again, segments)
        else:
            rows_TD, regime_length = known
            rows_TD = rows_TD[-step.count :]  # what every hop holds already is not sent
        if core.route is None or core.epoch != action.epoch:
            return
        dtype = tensors.NAMES[rows_TD.dtype]
        payload = tensors.pack(rows_TD, dtype)
        hop = core.route.hops[0]
        message = Step(
            session=core.session.raw,
            epoch=action.epoch,
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
        )
        await self._send_to(session, hop.peer_id, hop.addresses, message, payload)

    async def _send_to(
        self, session: _Session, peer: PeerId, addresses: Sequence[str], message: Step, payload: memoryview
    ) -> None:
        assert session.core is not None
        try:
            link = await self._client.links.to(peer, addresses)
            await link.send(message, payload, bulk=message.bulk)
        except PeerError as error:
            self._lose(session, peer, error)
        except Unavailable as error:
            self._perform(session, session.core.give_up(error))
        else:
            self.traffic.steps += 1
            self.traffic.bytes_sent += len(payload)

    def _embed_again(self, segments: Sequence[Segment]) -> torch.Tensor:
        return torch.cat([segment.rows(self._embed).detach().to("cpu") for segment in segments])

    # --- messages ---

    def _session_of(self, link: Link, session: bytes, peer: str | None = None) -> _Session | None:
        """The session that a message names, if the sender is on its route."""
        known = self._state.sessions.get(SessionId(session))
        if known is None or known.core is None or known.core.route is None:
            return None
        hops = [hop.peer_id for hop in known.core.route.hops]
        return known if link.remote in hops and (peer is None or peer in hops) else None

    async def _opened(self, link: Link, message: Opened, _: memoryview) -> None:
        session = self._session_of(link, message.session)
        if session is None or session.core is None or message.epoch != session.core.epoch:
            return
        if message.held > session.offered:
            error = ProtocolError(f"{link.remote} holds {message.held} positions, more than it was asked for")
            self._lose(session, link.remote, error)
            return
        self._perform(session, session.core.opened(link.remote, message.epoch, message.held))

    async def _result(self, link: Link, message: Result, payload: memoryview) -> None:
        session = self._session_of(link, message.session)
        if session is None or session.core is None or session.core.route is None:
            return
        core, route = session.core, session.core.route
        if link.remote != route.hops[-1].peer_id or message.hidden != self.model.hidden_size:
            return
        try:
            rows = tensors.unpack(payload, dtype=message.dtype, count=message.count, hidden=message.hidden)
        except ProtocolError as error:
            self._lose(session, link.remote, error)
            return
        step = core.sent(StepId(message.step), message.epoch)
        if step is None:
            return
        if len(rows) != step.count - step.want_from:
            self._lose(session, link.remote, ProtocolError(f"{link.remote} returned {len(rows)} rows of {step.count}"))
            return
        self.traffic.results += 1
        self.traffic.bytes_received += len(payload)
        self._learn(route, message, step.count)
        self._renew_deadline(session)
        self._perform(session, core.result(step.step, message.epoch), rows=rows)

    async def _failed(self, link: Link, message: Failed, _: memoryview) -> None:
        session = self._session_of(link, message.session, message.peer)
        if session is None or session.core is None or session.core.route is None:
            return
        core, route, peer, epoch = session.core, session.core.route, PeerId(message.peer), message.epoch
        if epoch != core.epoch:
            return  # of a route that was replaced
        logger.info("session %s: %s answers %s: %s", core.session, peer, message.code, message.message)
        text = f"{peer}: {message.message}"
        now_s = self._client.discovery.now_s()
        match message.code:
            case Code.BUSY | Code.PREEMPTED:
                self._client.router.on_busy(peer, message.retry_after_s, now_s)
                error = Busy(text, retry_after_s=message.retry_after_s)
                preempted = message.code == Code.PREEMPTED
                actions = core.busy(epoch, message.retry_after_s, error, preempted=preempted)
            case Code.UNKNOWN_SESSION | Code.STALE_EPOCH:
                actions = core.forgotten(epoch, Refused(text, code=message.code))
            case Code.GAP:
                gap_at = None if message.step is None else StepId(message.step)
                actions = core.forgotten(epoch, Refused(text, code=message.code), gap_at=gap_at)
            case Code.MALFORMED:
                hops = [hop.peer_id for hop in route.hops]
                at = hops.index(peer)
                if at == 0:
                    actions = core.give_up(ProtocolError(text, hint="the values given to the model are not usable"))
                else:  # what the hop before it sent is not usable
                    self._lose(session, hops[at - 1], ProtocolError(text))
                    return
            case Code.INTERNAL:
                self._lose(session, peer, Refused(text, code=message.code))
                return
            case _:
                actions = core.refused(peer, epoch, Refused(text, code=message.code))
        self._perform(session, actions)

    async def _relay(self, link: Link, message: Relay, payload: memoryview) -> None:
        session = self._session_of(link, message.step.session, message.next)
        if session is None or session.core is None or session.core.route is None:
            return
        route = session.core.route
        following = next(hop for hop in route.hops if hop.peer_id == message.next)
        self.traffic.relays += 1
        self._renew_deadline(session)
        step = replace_fields(message.step, epoch=session.core.epoch)
        if step == message.step:
            await self._send_to(session, following.peer_id, following.addresses, step, payload)

    def _link_lost(self, link: Link) -> None:
        error = PeerUnreachable(f"the connection to {link.remote} ended")
        if not link.outbound:
            return
        affected = [
            (session, actions)
            for session in self._state.sessions.values()
            if session.core is not None and (actions := session.core.hop_lost(link.remote, error))
        ]
        if affected:
            self._blame(link.remote, str(error))
        for session, actions in affected:
            self._perform(session, actions)

    def _needed_links(self) -> Iterator[Link]:
        """Those to every hop of every session: a hop between two others hears nothing from us while it works."""
        for session in self._state.sessions.values():
            if session.core is not None and session.core.route is not None:
                for hop in session.core.route.hops:
                    if (link := self._client.links.known(hop.peer_id)) is not None:
                        yield link

    # --- deadlines and measurements ---

    def _renew_deadline(self, session: _Session) -> None:
        session.silence_s = SILENCE_S
        session.idle_looks = 0
        session.deadline_s = asyncio.get_running_loop().time() + session.silence_s

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            now_s = asyncio.get_running_loop().time()
            for session_id, session in tuple(self._state.sessions.items()):
                overdue = session.core is not None and session.core.outstanding and now_s > session.deadline_s
                if overdue and session_id not in self._state.investigating:
                    self._state.investigating.add(session_id)
                    self._tasks.spawn(self._investigate(session_id, session), name=f"investigate {session_id}")

    async def _investigate(self, session_id: SessionId, session: _Session) -> None:
        """Ask every hop of an overdue session whether it lives; drop the silent, wait longer for the busy."""
        core = session.core
        assert core is not None
        try:
            epoch, route = core.epoch, core.route
            if route is None:
                return
            pongs = await asyncio.gather(
                *(self._client.links.ping(hop.peer_id, hop.addresses, timeout_s=ALIVE_TIMEOUT_S) for hop in route.hops),
                return_exceptions=True,
            )
            if core.epoch != epoch or not core.outstanding:
                return
            queued = 0
            for hop, pong in zip(route.hops, pongs, strict=True):
                if isinstance(pong, PeerError):
                    self._lose(session, hop.peer_id, pong)
                    return
                if isinstance(pong, Unavailable):
                    self._perform(session, core.give_up(pong))
                    return
                if isinstance(pong, BaseException):
                    raise pong
                queued += pong[1].queued_tokens
            session.idle_looks = 0 if queued else session.idle_looks + 1
            if session.idle_looks >= IDLE_LOOKS:
                error = PeerUnreachable("a step was lost although every hop of its route is alive")
                self._perform(session, core.stalled(error))
                return
            session.silence_s = min(30.0, session.silence_s * 2)
            session.deadline_s = asyncio.get_running_loop().time() + session.silence_s
        finally:
            self._state.investigating.discard(session_id)

    def _lose(self, session: _Session, peer: PeerId, error: SwarmError) -> None:
        """A hop of this session failed it."""
        assert session.core is not None
        self._blame(peer, str(error))
        self._perform(session, session.core.hop_lost(peer, error))

    def _blame(self, peer: PeerId, reason: str) -> None:
        logger.warning("peer %s: %s", peer, reason)
        self._client.router.on_failure(peer, self._client.discovery.now_s(), reason)

    def _learn(self, route: Route, message: Result, tokens: int) -> None:
        """Feed the router what the hops reported of their own time."""
        if len(message.hops) != len(route.hops):
            return  # a route with a relay in it may have lost count; nothing depends on it
        now_s = self._client.discovery.now_s()
        timings = []
        for hop, (queue_s, compute_s) in zip(route.hops, message.hops, strict=True):
            timings.append(HopTiming(peer=hop.peer_id, queue_s=queue_s, compute_s=compute_s))
            self._client.router.on_step(hop.peer_id, len(hop.span), tokens, compute_s, queue_s, now_s)
            self._client.router.on_success(hop.peer_id, now_s)
        self._state.last_hops = tuple(timings)


def connect(entrance: Entrance, model: RemoteModel, embed: Embed) -> SwarmRemote:
    """Enter a network in a thread of its own and drive one model through it. Raises SwarmError."""
    network = NetworkThread(lambda: enter(entrance))
    try:
        return SwarmRemote(network, model, embed)
    except BaseException:  # also an interrupt: the thread must not stay behind
        network.close()
        raise

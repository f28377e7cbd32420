"""Steps on their way out: to the first hop, by a hop that has them in its journal, or to a standby.

Owns what a step looks like on the wire, and that steps leave in order. What is sent, and when, `core` decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import torch
from msgspec.structs import replace as replace_fields

from peers.errors import PeerSilent
from peers.transport.links import BULK_BYTES
from peers.transport.tasks import Tasks
from peers.wire import tensors
from peers.wire.messages import Replay, Step, Urgency
from routing.errors import PeerError, Unavailable
from routing.ids import PeerId, StepId
from routing.routes import Hop, Route
from swarm.session.actions import Feed, SendStep
from swarm.session.core import SessionCore
from swarm.session.history import Segment
from swarm.session.installing import Installer
from swarm.session.live import Driver, LiveSession, Sessions
from swarm.session.remote import Embed
from swarm.session.steps import PendingStep

logger = logging.getLogger(__name__)

RELAY_PATIENCE_S = 1.0
"""With a peer's answer to whether it is there."""


class Sender:
    """For the sessions of one model; used in the network's loop."""

    def __init__(
        self, sessions: Sessions, driver: Driver, installer: Installer, *, tasks: Tasks, embed: Embed, urgency: Urgency
    ) -> None:
        """`tasks` own what has to wait. `embed` makes again what is not kept."""
        self._sessions = sessions
        self._driver = driver
        self._installer = installer
        self._tasks = tasks
        self._embed = embed
        self._urgency = urgency

    def send_pending(self, session: LiveSession) -> None:
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
        known, link = session.rows.get(step.step), self._sessions.client.links.known(core.route.hops[0].peer_id)
        if step.hop or known is None or link is None or not link.wanted:
            return False
        message, payload = self._first(session, core, core.route, action, *known)
        # with steps of other sessions it shares a frame
        if message.bulk or not link.send_now(message, payload, alone=len(self._sessions.by_id) == 1):
            return False
        self._sent(session, message, payload)
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
        if rows_TD.shape[0] > step.count:
            rows_TD = rows_TD[-step.count :]  # what every hop holds already is not sent
        alone = step.count == 1 and step.until is None and not core.crowded
        session.timed_step = (step.step, asyncio.get_running_loop().time()) if alone else None
        message, payload = self._step(core, route.hops[0], step, action.epoch, rows_TD, regime_length)
        if (longest := session.longest) > session.told:
            message = replace_fields(message, expects=longest)
        return message, payload

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
            hidden=self._sessions.model.hidden_size,
            # steps under way together share a lane, also a short one behind long ones: they must stay in order
            bulk=len(payload) >= BULK_BYTES or core.crowded,
            urgency=self._urgency,
            stop=_stop(core.route, step),
        )
        return message, payload

    async def _have_replayed(self, session: LiveSession, step: PendingStep, route: Route, epoch: int) -> None:
        """The hop before the step's first one sends it, from its journal."""
        hop = route.hops[step.hop - 1]
        self._sessions.traffic.replayed_positions += step.count
        message = self._replay(session, step, route, epoch)
        await self.send_to(session, hop.peer_id, hop.addresses, message, memoryview(b""))

    def _replay(self, session: LiveSession, step: PendingStep, route: Route, epoch: int) -> Replay:
        core = session.core
        assert core is not None
        segments = session.history.between(step.first, step.first + step.count, self._sessions.model.regime_key)
        return Replay(
            session=core.session.raw,
            block=route.hops[step.hop - 1].span.start,
            epoch=epoch,
            step=step.step,
            first=step.first,
            count=step.count,
            want_from=step.want_from,
            regime_length=max(segment.regime_length for segment in segments),
            bulk=core.crowded or step.count * self._sessions.model.hidden_size * 2 >= BULK_BYTES,
            urgency=self._urgency,
            stop=_stop(route, step),
        )

    async def send_to(
        self, session: LiveSession, peer: PeerId, addresses: Sequence[str], message: Step | Replay, payload: memoryview
    ) -> None:
        assert session.core is not None
        try:
            link = await self._sessions.client.links.to(peer, addresses)
            await link.send(message, payload, bulk=message.bulk and isinstance(message, Step))
        except PeerError as error:
            self._driver.lose(session, peer, error)
        except Unavailable as error:
            self._driver.perform(session, session.core.give_up(error))
        else:
            self._sent(session, message, payload)

    def relay(self, session: LiveSession, hop: Hop, step: Step, payload: memoryview) -> None:
        """Carry to `hop` what the one before it could not bring there, in order."""
        which = step.epoch, step.step, step.block
        if all((known.epoch, known.step, known.block) != which for _, known, _ in session.relays):
            session.relays.append((hop, step, payload))
            if not session.relaying:
                session.relaying = True
                self._tasks.spawn(self._relay(session), name="relay")

    async def _relay(self, session: LiveSession) -> None:
        try:
            while session.relays:
                hop, step, payload = session.relays.popleft()
                if await self._may_relay(session, hop, step):
                    await self.send_to(session, hop.peer_id, hop.addresses, step, payload)
        finally:
            session.relaying = False

    async def _may_relay(self, session: LiveSession, hop: Hop, step: Step) -> bool:
        """Whether the step is wanted still, by a peer that is there: asked once on each route, as it may be gone, and
        this client not know it yet."""
        core = session.core
        assert core is not None
        if core.due(StepId(step.step), step.epoch) and hop.peer_id not in session.relayed_to:
            session.relayed_to.add(hop.peer_id)
            try:
                await self._sessions.client.links.ping(hop.peer_id, hop.addresses, timeout_s=RELAY_PATIENCE_S)
            except PeerSilent as error:
                logger.info("relaying to %s all the same: %s", hop.peer_id, error)  # the watch will tell
            except PeerError as error:
                if core.epoch == step.epoch:
                    self._driver.lose(session, hop.peer_id, error)
            except Unavailable as error:
                self._driver.perform(session, core.give_up(error))
        return core.due(StepId(step.step), step.epoch) and core.uses(hop.peer_id)

    def _sent(self, session: LiveSession, message: Step | Replay, payload: memoryview) -> None:
        if isinstance(message, Step):
            session.told = max(session.told, message.expects)
        self._sessions.traffic.steps += 1
        self._sessions.traffic.bytes_sent += len(payload)

    async def _rows_again(self, session: LiveSession, step: PendingStep) -> tuple[torch.Tensor, int]:
        segments = session.history.between(step.first, step.first + step.count, self._sessions.model.regime_key)
        rows_TD = await asyncio.to_thread(self._embed_again, segments)
        return rows_TD, max(segment.regime_length for segment in segments)

    def _embed_again(self, segments: Sequence[Segment]) -> torch.Tensor:
        return torch.cat([segment.rows(self._embed).detach().to("cpu") for segment in segments])

    async def feed(self, session: LiveSession, action: Feed) -> None:
        core, step, to = session.core, action.step, action.to
        assert core is not None
        if core.route is None or not core.feeds(step.step, action.epoch):
            return
        if len(session.history) < step.first + step.count:  # rolled back meanwhile
            self._driver.perform(session, core.feed_failed(step.step, action.epoch, busy=True))
            return
        self._sessions.traffic.standby_positions += step.count
        if step.hop:
            message = replace_fields(
                self._replay(session, step, core.route, action.epoch),
                bulk=step.count * self._sessions.model.hidden_size * 2 >= BULK_BYTES,
                urgency=Urgency.BACKGROUND,
                to=to.peer_id,
                to_addresses=to.addresses,
            )
            await self._installer.to_standby(session, to, core.route.hops[step.hop - 1], action.epoch, message)
            return
        rows_TD, regime_length = await self._rows_again(session, step)
        carried, payload = self._step(core, to, step, action.epoch, rows_TD, regime_length)
        whole = replace_fields(carried, bulk=len(payload) >= BULK_BYTES, urgency=Urgency.BACKGROUND, stop=to.span.end)
        await self._installer.to_standby(session, to, to, action.epoch, whole, payload)


def _stop(route: Route, step: PendingStep) -> int:
    return 0 if step.until is None else route.hops[step.until - 1].span.end

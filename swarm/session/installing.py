"""Tells hops of a session: opens it there, on the route or as a standby, and closes it.

Owns how a route looks to each of its hops. That a standby fails does not harm the session.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from peers.transport.links import Link
from peers.transport.tasks import Tasks
from peers.wire.messages import MAX_POSITIONS, Close, Open, Replay, Step
from routing.errors import PeerError, Unavailable
from routing.ids import PeerId, SessionId
from routing.routes import Hop, Route
from swarm.session.actions import OpenHops, OpenStandby
from swarm.session.live import Driver, LiveSession, Sessions

logger = logging.getLogger(__name__)

GOODBYE_TIMEOUT_S = 2.0
"""How long closing waits for "close" messages to leave; a hop that misses one frees its pages with the link."""
_NOTHING = memoryview(b"")


class Installer:
    """For the sessions of one model; used in the network's loop."""

    def __init__(self, sessions: Sessions, driver: Driver) -> None:
        self._sessions = sessions
        self._driver = driver
        self._goodbyes = Tasks()

    async def close(self) -> None:
        """Once the hops of every session were told, or GOODBYE_TIMEOUT_S later."""
        await self._goodbyes.settled(timeout_s=GOODBYE_TIMEOUT_S)
        await self._goodbyes.close()

    async def open_hop(self, session: LiveSession, action: OpenHops, index: int, prefix: tuple[bytes, ...]) -> None:
        core, route, epoch = session.core, action.route, action.epoch
        assert core is not None
        hop = route.hops[index]
        message = self._opening(session, route, index, epoch, prefix=prefix, keep=action.keep[index])
        try:
            link = await self._sessions.client.links.to(hop.peer_id, hop.addresses)
            await self._upload(session, link, hop)
            if core.epoch == epoch and core.route is route:  # else it was released meanwhile
                await link.send(message, bulk=message.adapter is not None)
        except PeerError as error:
            self._driver.lose(session, hop.peer_id, error)
        except Unavailable as error:  # of this client's own node: no other route helps
            self._driver.perform(session, core.give_up(error))

    async def open_standby(self, session: LiveSession, action: OpenStandby) -> None:
        core, hop = session.core, action.hop
        assert core is not None
        route = core.route
        if route is None or core.epoch != action.epoch:
            return
        index = next(at for at, other in enumerate(route.hops) if other.span == hop.span)
        standing = replace(route, hops=(*route.hops[:index], hop, *route.hops[index + 1 :]))
        message = self._opening(session, standing, index, action.epoch, prefix=(), keep=action.keep, standby=True)
        await self.to_standby(session, hop, hop, action.epoch, message)

    async def to_standby(
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
            link = await self._sessions.client.links.to(hop.peer_id, hop.addresses)
            bulk = isinstance(message, Step) and message.bulk
            if isinstance(message, Open) and message.adapter is not None:
                await self._upload(session, link, hop)
                bulk = True
            if core.epoch == epoch and core.standby_at(standby.peer_id, standby.span.start):
                await link.send(message, payload, bulk=bulk)
                self._sessions.traffic.bytes_sent += len(payload)
        except (PeerError, Unavailable) as error:
            logger.info("session %s: no standby at %s: %s", core.session, standby.peer_id, error)
            if hop is standby:
                self._driver.blame(standby.peer_id, error)
            self._driver.perform(session, core.standby_lost(standby.peer_id, epoch))

    def close_hops(self, hops: Sequence[Hop], session: SessionId) -> None:
        for peer in dict.fromkeys(hop.peer_id for hop in hops):
            self._goodbyes.spawn(self._close_hop(peer, session), name=f"close {session}")

    async def _close_hop(self, peer: PeerId, session: SessionId) -> None:
        link = self._sessions.client.links.known(peer)
        if link is not None:
            try:
                await link.send(Close(sessions=(session.raw,)))
            except PeerError as error:
                logger.debug("session %s: %s", session, error)  # the hop frees it with the link

    async def _upload(self, session: LiveSession, link: Link, hop: Hop) -> None:
        """What of the session's adapter is the hop's."""
        adapter = None if session.adapter is None else session.adapter.within(hop.span)
        if adapter is not None:
            await self._sessions.uploads.send(link, adapter, hop.span, told=session.renew_deadline)

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
        core, hop, hosted = session.core, route.hops[index], self._sessions.hosted
        assert core is not None
        own = None if session.adapter is None else session.adapter.within(hop.span)
        following = route.hops[index + 1] if index + 1 < len(route.hops) else None
        longest = session.longest
        if not standby:
            session.told = longest
        return Open(
            session=core.session.raw,
            epoch=epoch,
            model=self._sessions.model.model.digest,
            start=hop.span.start,
            end=hop.span.end,
            previous=route.hops[index - 1].peer_id if index else None,
            next=None if following is None else following.peer_id,
            next_addresses=() if following is None else following.addresses,
            prefix=prefix,
            keep=keep,
            adapter=hosted.digest if hosted else None if own is None else own.name,
            standby=standby,
            expects=0 if longest == MAX_POSITIONS else longest,
        )

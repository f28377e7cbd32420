"""What peers send to a client: checked against the route of the session it names, and told to that session's core.

Owns the meaning of each message and what is learnt from it; a message of another epoch, or of a peer that is not on the
route, changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence

from peers.errors import Busy, Paused, PeerUnreachable, ProtocolError, Refused
from peers.transport.links import Link
from peers.wire import tensors
from peers.wire.messages import CODES, Code, Failed, Opened, Relay, Result
from routing.errors import SwarmError
from routing.ids import PeerId, SessionId, StepId
from routing.routes import Hop, Route
from swarm.session.live import Driver, HopTiming, LiveSession, Sessions
from swarm.session.sending import Sender

logger = logging.getLogger(__name__)

TRIPS = 16
"""The quickest of so many steps tells how long the ways of a route are: whatever else there is only adds."""
LEARN_AFTER_S = 0.002
"""Behind a result. By then who waited for it computes without Python."""
STANDBY_REST_S = 10.0
"""A peer that could not stand by is asked for nothing as long as others can."""


class Inbox:
    """Handles the messages of one client's links, for the sessions of one model."""

    def __init__(self, sessions: Sessions, driver: Driver, sender: Sender) -> None:
        self._sessions = sessions
        self._driver = driver
        self._sender = sender
        links = sessions.client.links
        links.handle(Opened, self._opened)
        links.handle_at_once(Result, self._result)
        links.handle(Failed, self._failed)
        links.handle(Relay, self._relay)
        links.on_lost(self._link_lost)
        links.keep(self._needed_links)

    def _session_of(self, link: Link, session: bytes, peer: str | None = None) -> LiveSession | None:
        """The session that a message names, if the sender is on its route or stands by."""
        known = self._sessions.by_id.get(SessionId(session))
        if known is None or known.core is None or known.core.route is None:
            return None
        hops = [hop.peer_id for hop in (*known.core.route.hops, *known.core.standby_hops)]
        return known if link.remote in hops and (peer is None or peer in hops) else None

    def _tell_trial(self, link: Link, message: Opened | Result | Failed) -> None:
        """It is of no session; it may answer a trial."""
        trial = self._sessions.trials.get(SessionId(message.session))
        if trial is not None and trial[0] == link.remote and not trial[1].full():
            trial[1].put_nowait(message)

    async def _opened(self, link: Link, message: Opened, _: memoryview) -> None:
        session = self._session_of(link, message.session)
        if session is None:
            self._tell_trial(link, message)
            return
        if session.core is None or message.epoch != session.core.epoch:
            return
        standby = session.core.standby_at(link.remote, message.start)
        if message.held > session.offered and not standby:
            error = ProtocolError(f"{link.remote} holds {message.held} positions, more than it was asked for")
            self._driver.lose(session, link.remote, error)
            return
        actions = session.core.opened(link.remote, message.start, message.epoch, message.held, message.journal)
        self._driver.perform(session, actions)

    def _result(self, link: Link, message: Result, payload: memoryview) -> None:
        session = self._session_of(link, message.session)
        if session is None:
            self._tell_trial(link, message)
            return
        if session.core is None or session.core.route is None:
            return
        core, route = session.core, session.core.route
        step = core.sent(StepId(message.step), message.epoch)
        if step is None:
            self._driver.perform(session, core.fed(link.remote, StepId(message.step), message.epoch))
            return
        hops = route.hops[step.hop : step.until]
        if link.remote != hops[-1].peer_id or message.hidden != self._sessions.model.hidden_size:
            return
        room, session.room = session.room, None
        try:
            rows = tensors.unpack(payload, dtype=message.dtype, count=message.count, hidden=message.hidden, room=room)
        except ProtocolError as error:
            self._driver.lose(session, link.remote, error)
            return
        if message.count != step.count - step.want_from:
            self._driver.lose(
                session, link.remote, ProtocolError(f"{link.remote} returned {message.count} rows of {step.count}")
            )
            return
        self._sessions.traffic.results += 1
        self._sessions.traffic.bytes_received += len(payload)
        timings: tuple[HopTiming, ...] = ()
        if len(message.hops) == len(hops):  # a route with a relay in it may have lost count; nothing depends on it
            self._sessions.last_hops = timings = tuple(
                HopTiming(peer=hop.peer_id, span=hop.span, queue_s=queue_s, compute_s=compute_s)
                for hop, (queue_s, compute_s) in zip(hops, message.hops, strict=True)
            )
            self._time_trips(session, message)
        elapsed_s = session.answered(step.count, timings)
        core.paced(session.pace.usual_s(1))
        if self._sessions.observer is not None:
            self._sessions.observer.answered(core.session, step, hops, message.hops)
        self._driver.perform(session, core.result(step.step, message.epoch), rows=rows)
        # whoever waited goes on meanwhile; but who works now may fail before anything else is learnt
        now_s = self._sessions.client.discovery.now_s()
        for hop in hops if len(message.hops) == len(hops) else ():
            self._sessions.client.router.on_success(hop.peer_id, now_s)
            self._sessions.client.links.vouch(hop.peer_id)
        asyncio.get_running_loop().call_later(LEARN_AFTER_S, self._learn, hops, message, step.count, elapsed_s, now_s)
        if len(session.trips_s) >= TRIPS:
            self._sessions.client.router.on_trips(hops, min(session.trips_s), now_s)
            session.trips_s.clear()
        self._driver.reconsider(session)

    async def _failed(self, link: Link, message: Failed, _: memoryview) -> None:
        session = self._session_of(link, message.session, message.peer)
        if session is None:
            self._tell_trial(link, message)
            return
        if session.core is None or session.core.route is None:
            return
        core, route, peer, epoch = session.core, session.core.route, PeerId(message.peer), message.epoch
        if link.remote != peer and not _precedes(route, link.remote, message.block):
            return  # a hop speaks for itself and for the one behind it
        at = _hop_at(route, peer, message.block)
        standby = core.standby_at(peer, message.block)
        fed = None if message.step is None or not core.feeds(StepId(message.step), epoch) else StepId(message.step)
        if epoch != core.epoch or (at is None and not standby):
            return  # of a route that was replaced
        logger.info("session %s: %s answers %s: %s", core.session, peer, message.code, message.message)
        self._sessions.traffic.failures[message.code if message.code in CODES else "other"] += 1
        if message.code == Code.UNKNOWN_ADAPTER and (known := self._sessions.client.links.known(peer)) is not None:
            self._sessions.uploads.forget(known)
        text = f"{peer}: {message.message}"
        now_s = self._sessions.client.discovery.now_s()
        if (standby or fed is not None) and message.code not in (Code.PAUSED, Code.DRAINING):
            if standby:
                self._sessions.client.router.on_busy(peer, max(message.retry_after_s, STANDBY_REST_S), now_s)
                actions = core.standby_lost(peer, epoch)
            else:
                assert fed is not None
                actions = core.feed_failed(fed, epoch, busy=message.code == Code.BUSY)
            self._driver.perform(session, actions)
            return
        match message.code:
            case Code.BUSY | Code.PREEMPTED:
                self._sessions.client.router.on_busy(peer, message.retry_after_s, now_s)
                error = Busy(text, retry_after_s=message.retry_after_s)
                preempted = message.code == Code.PREEMPTED
                actions = core.busy(peer, epoch, message.retry_after_s, error, preempted=preempted)
            case Code.PAUSED | Code.DRAINING:
                farewell: SwarmError
                if message.code == Code.PAUSED:
                    self._sessions.client.router.on_paused(peer)
                    farewell = Paused(text, retry_after_s=message.retry_after_s)
                else:
                    self._sessions.client.router.on_draining(peer)
                    farewell = Refused(text, code=message.code)
                for other in tuple(self._sessions.by_id.values()):  # a fork of which the peer has not heard leaves too
                    if other is not session and other.core is not None:
                        leave = other.core.hop_leaves(peer, other.core.epoch, farewell, answers=True)
                        self._driver.perform(other, leave)
                actions = core.hop_leaves(peer, epoch, farewell, answers=message.step is None)
            case Code.UNKNOWN_SESSION | Code.STALE_EPOCH | Code.UNKNOWN_ADAPTER:
                actions = core.forgotten(epoch, Refused(text, code=message.code))
            case Code.NOT_JOURNALLED:
                actions = core.journal_lost(peer, epoch, Refused(text, code=message.code))
            case Code.GAP:
                gap_at = None if message.step is None else StepId(message.step)
                actions = core.forgotten(epoch, Refused(text, code=message.code), gap_at=gap_at)
            case Code.REPLAY:
                self._sessions.traffic.replays += 1
                actions = core.behind_window(epoch, Refused(text, code=message.code))
            case Code.MALFORMED:
                if not at or message.step is None:  # with an open comes nothing but the client's own
                    unusable = ProtocolError(text, hint="the values given to the model are not usable")
                    actions = core.unusable(peer, None, epoch, unusable)
                else:
                    sender, unusable = route.hops[at - 1].peer_id, ProtocolError(text)
                    if core.believes(peer, sender):
                        self._driver.blame(sender, unusable)
                    actions = core.unusable(peer, sender, epoch, unusable)
            case Code.UNREACHABLE:
                return  # from there, for a standby that was let go of meanwhile
            case Code.INTERNAL:
                self._driver.lose(session, peer, Refused(text, code=message.code))
                return
            case _:
                actions = core.refused(peer, epoch, Refused(text, code=message.code))
        self._driver.perform(session, actions)

    async def _relay(self, link: Link, message: Relay, payload: memoryview) -> None:
        session = self._session_of(link, message.step.session, message.next)
        if session is None or session.core is None or session.core.route is None:
            return
        route = session.core.route
        at = _hop_at(route, PeerId(message.next), message.step.block)
        if at is None or not session.core.due(StepId(message.step.step), message.step.epoch):
            return
        self._sessions.traffic.relays += 1
        session.renew_deadline()
        session.timed_step = None  # it takes other ways than its route's
        if session.core.uses(route.hops[at].peer_id):
            self._sender.relay(session, route.hops[at], message.step, payload)

    def _link_lost(self, link: Link) -> None:
        error = PeerUnreachable(f"the connection to {link.remote} ended")
        if not (link.outbound and link.wanted):  # it carried no session: perhaps a ping's own, which ends with it
            return
        affected = [
            (session, session.core)
            for session in self._sessions.by_id.values()
            if session.core is not None and (session.core.uses(link.remote) or session.core.standby_at(link.remote))
        ]
        if affected:
            self._driver.blame(link.remote, error)
        for session, core in affected:
            self._driver.perform(session, core.hop_lost(link.remote, error))

    def _needed_links(self) -> Iterator[Link]:
        """Those to every hop of every session: a hop between two others hears nothing from us while it works."""
        for session in self._sessions.by_id.values():
            if session.core is not None and session.core.route is not None:
                for hop in (*session.core.route.hops, *session.core.standby_hops):
                    if (link := self._sessions.client.links.known(hop.peer_id)) is not None:
                        yield link

    def _time_trips(self, session: LiveSession, message: Result) -> None:
        timed, session.timed_step = session.timed_step, None
        if timed is not None and timed[0] == message.step:
            trips_s = asyncio.get_running_loop().time() - timed[1] - sum(map(sum, message.hops))
            if trips_s >= 0:  # else somebody claims too much
                session.trips_s.append(trips_s)

    def _learn(self, hops: Sequence[Hop], message: Result, count: int, elapsed_s: float, now_s: float) -> None:
        """Feed the router what the hops reported of their own time, and what is counted, with the same."""
        self._sessions.traffic.answered(count, message.hops, elapsed_s)
        if len(message.hops) != len(hops):
            return
        for hop, (queue_s, compute_s) in zip(hops, message.hops, strict=True):
            self._sessions.client.router.on_step(hop.peer_id, len(hop.span), count, compute_s, queue_s, now_s)


def _precedes(route: Route, peer: PeerId, block: int) -> bool:
    return any(hop.peer_id == peer and hop.span.end == block for hop in route.hops)


def _hop_at(route: Route, peer: PeerId, block: int) -> int | None:
    """Which hop of the route `peer` is from `block` on; None when it is none."""
    return next((at for at, hop in enumerate(route.hops) if (hop.peer_id, hop.span.start) == (peer, block)), None)

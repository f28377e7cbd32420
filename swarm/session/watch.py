"""Sessions of which nothing is heard: ask their hops how they stand. The silent are dropped, the busy waited for (not
for ever, and not for long where others have their blocks), and what was lost between two hops that live is sent again,
through the client where their link is silent.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence

from peers.errors import PeerSilent, PeerUnreachable, ProtocolError, Refused
from peers.transport.tasks import Tasks
from peers.wire.messages import Code, Trace, Traced
from routing.errors import PeerError, Unavailable
from routing.ids import PeerId, SessionId
from routing.routes import Hop
from swarm.session.core import SessionCore
from swarm.session.live import Driver, LiveSession, Sessions
from swarm.session.pace import hung_after_s
from swarm.session.planning import Planner

logger = logging.getLogger(__name__)

IDLE_LOOKS = 3
"""Looks at which all hops live, none computes and nothing is on its way, after which the step is taken for lost."""
WATCH_S = 0.1
DIAL_TRIPS = 3
"""What dialling a hop may take, times an answer."""
LATE = 2.0
"""Times what a peer's answers took lately, before it is taken for silent."""
STRETCH_MAX = 4.0
"""Times the usual patience, where this machine or a peer is late."""
LATE_FADES, MISTAKEN_FADES = 0.8, 0.999
"""What is left of either reason for that after each WATCH_S."""
SECOND_LOOK_S = 5.0
"""Whoever answers within this time after it was given up was late, not dead."""
LATE_S_MAX = 10.0
STANDBY_PATIENCE_S = 30.0
"""A standby works when nobody else wants to: only one that does nothing for so long is let go of."""


class Watch:
    """Looks after the sessions of one model; `run` runs until cancelled, what it starts belongs to `tasks`."""

    def __init__(self, sessions: Sessions, driver: Driver, planner: Planner, tasks: Tasks) -> None:
        self._sessions = sessions
        self._planner = planner
        self._driver = driver
        self._tasks = tasks
        self._investigating: set[SessionId] = set()
        self._given_up: set[PeerId] = set()
        """For silence, and asked once more."""
        self._late = 1.0
        """Times the usual, what everything takes now, as this loop itself is late."""
        self._mistaken: dict[PeerId, float] = {}
        """Times the usual, what those may take who were given up and alive."""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            slept_at_s = loop.time()
            await asyncio.sleep(WATCH_S)
            now_s = loop.time()
            self._late = max((now_s - slept_at_s) / WATCH_S - 0.5, self._late * LATE_FADES)
            faded = ((peer, times * MISTAKEN_FADES) for peer, times in self._mistaken.items())
            self._mistaken = {peer: times for peer, times in faded if times > 1.0}
            for session_id, session in tuple(self._sessions.by_id.items()):
                if session.core is not None and session.core.standby_hops:
                    self._let_go_of_silent(session, session.core, now_s)
                overdue = session.core is not None and session.core.outstanding and now_s > session.deadline_s
                if overdue and session_id not in self._investigating:
                    self._investigating.add(session_id)
                    self._tasks.spawn(self._investigate(session_id, session), name=f"investigate {session_id}")

    def _let_go_of_silent(self, session: LiveSession, core: SessionCore, now_s: float) -> None:
        for peer in core.owing:
            if now_s - session.asked_at_s[peer] > STANDBY_PATIENCE_S:
                self._driver.perform(session, core.standby_lost(peer, core.epoch))

    async def _investigate(self, session_id: SessionId, session: LiveSession) -> None:
        """Ask every hop of an overdue session. Half of the silence that is tolerated has passed; the other half is the
        time to answer, and half of that for the hops to ask their successors. Where this loop was late to ask, the hops
        have no less time."""
        core = session.core
        assert core is not None
        try:
            epoch, route = core.epoch, core.route
            if route is None:
                return
            late_s = asyncio.get_running_loop().time() - session.deadline_s
            usual_s = session.silence_s / 2 - min(late_s, WATCH_S)
            patience_s = [usual_s * self._stretch(hop.peer_id) for hop in route.hops]
            first = self._sessions.client.links.arrived(route.hops[0].peer_id, timeout_s=patience_s[0] / 2)
            asked = zip(route.hops, patience_s, strict=True)
            traces = (self._trace(session_id, hop, timeout_s=hop_s) for hop, hop_s in asked)
            arrived, answers = await asyncio.gather(first, asyncio.gather(*traces, return_exceptions=True))
            if core.epoch != epoch or not core.outstanding:
                return
            busy = not arrived
            waited_s = asyncio.get_running_loop().time() - session.heard_at_s
            cut: Hop | None = None
            replies = list(zip(route.hops, answers, strict=True))
            silent = {hop.peer_id: answer for hop, answer in replies if isinstance(answer, PeerError)}
            for peer, error in silent.items():  # all of them: another one, found out later, would cost as long again
                self._driver.lose(session, peer, error)
                if isinstance(error, PeerSilent) and peer not in self._given_up:
                    self._given_up.add(peer)
                    hop = next(hop for hop in route.hops if hop.peer_id == peer)
                    self._tasks.spawn(self._ask_once_more(hop), name=f"ping {peer[-8:]} once more")
                if (link := self._sessions.client.links.known(peer)) is not None:
                    link.retire()  # who waits to send over it must not wait on
            if silent:
                return
            for hop, answer in replies:
                if isinstance(answer, Unavailable):
                    self._driver.perform(session, core.give_up(answer))
                    return
                if isinstance(answer, BaseException):
                    raise answer
                busy = busy or answer.running > 0 or answer.moving
                cut = hop if answer.next_silent else cut
            if cut is not None:
                error = PeerUnreachable(f"{cut.peer_id} does not reach the hop behind it, although both are alive")
                self._driver.perform(session, core.stalled(error))
                return
            running = [hop for hop, answer in replies if isinstance(answer, Traced) and answer.running]
            if self._leave_hung(session, core, running):
                return
            if busy and waited_s > core.config.busy_patience_s:  # no answer shows that a hop computes, it only says so
                for hop in running:
                    self._driver.lose(session, hop.peer_id, _hung(hop, waited_s))
                if not running:
                    error = PeerUnreachable(f"a step has been on its way between two hops for {waited_s:.0f} s")
                    self._driver.perform(session, core.stalled(error))
                return
            session.idle_looks = 0 if busy else session.idle_looks + 1
            if session.idle_looks >= IDLE_LOOKS:
                error = PeerUnreachable("a step was lost although every hop of its route is alive")
                self._driver.perform(session, core.stalled(error))
                return
            session.look_again(soon=not busy)
        finally:
            self._investigating.discard(session_id)

    def _leave_hung(self, session: LiveSession, core: SessionCore, running: Sequence[Hop]) -> bool:
        """Let go of hops that have said for too long that they compute, while other peers have their blocks."""
        now_s, known, least_s = asyncio.get_running_loop().time(), session.busy_since_s, core.config.hung_s_min
        session.busy_since_s = {hop.peer_id: known.get(hop.peer_id, now_s) for hop in running}
        session.believed_until_s = min(session.busy_since_s.values(), default=math.inf) + least_s
        if now_s < session.believed_until_s:
            return False
        usual_s = self._planner.usual_s(session, core)  # as it is now: queues come and go
        if usual_s is None:
            return False
        after_s = hung_after_s(usual_s, least_s, core.session)
        session.believed_until_s += after_s - least_s
        hung = [hop for hop in running if now_s - session.busy_since_s[hop.peer_id] >= after_s]
        if not hung or not self._planner.replaceable(session, core, {hop.peer_id for hop in hung}):
            return False
        waited_s = now_s - session.heard_at_s
        for hop in hung:
            self._driver.lose(session, hop.peer_id, _hung(hop, waited_s))
            # at least so slow: others are preferred until a trial shows that it works again
            client = self._sessions.client
            client.router.on_step(hop.peer_id, len(hop.span), 1, waited_s, 0.0, client.discovery.now_s())
        return True

    async def _ask_once_more(self, hop: Hop) -> None:
        """Was it dead, or late? In the latter case it has more time from now on (Chandra and Toueg 1996, section 6.2:
        with each mistake about a process its time grows, until there are none)."""
        try:
            await self._sessions.client.links.ping(hop.peer_id, hop.addresses, timeout_s=SECOND_LOOK_S)
        except (PeerError, Unavailable):
            return
        finally:
            self._given_up.discard(hop.peer_id)
        self._mistaken[hop.peer_id] = times = min(2 * self._mistaken.get(hop.peer_id, 1.0), STRETCH_MAX)
        logger.info("peer %s was late, not dead: it has %.1f times as long now", hop.peer_id, times)

    def _stretch(self, peer: PeerId) -> float:
        return min(max(1.0, self._late, self._mistaken.get(peer, 1.0)), STRETCH_MAX)

    async def _trace(self, session: SessionId, hop: Hop, *, timeout_s: float) -> Traced:
        """Raises PeerError, and Unavailable where this client's own node cannot dial."""
        links = self._sessions.client.links

        def trace(nonce: int) -> Trace:
            return Trace(nonce=nonce, session=session.raw, block=hop.span.start, patience_s=timeout_s / 2)

        dial_s = max(timeout_s, min(DIAL_TRIPS * timeout_s, LATE_S_MAX))
        link = await links.to(hop.peer_id, hop.addresses, timeout_s=dial_s)
        timeout_s = max(timeout_s, min(LATE * link.answer_s, LATE_S_MAX))
        answer = await links.request(link, trace, timeout_s=timeout_s)
        if not isinstance(answer, Traced):
            raise ProtocolError(f"{hop.peer_id} answered a trace with {type(answer).__name__}")
        return answer


def _hung(hop: Hop, waited_s: float) -> Refused:
    text = f"{hop.peer_id} says that it has been computing one step for {waited_s:.0f} s"
    return Refused(text, code=Code.INTERNAL)

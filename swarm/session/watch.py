"""Sessions of which nothing is heard: ask their hops whether they live, drop the silent, wait longer for the busy."""

from __future__ import annotations

import asyncio

from peers.errors import PeerUnreachable
from peers.transport.tasks import Tasks
from routing.errors import PeerError, Unavailable
from routing.ids import SessionId
from swarm.session.live import Driver, LiveSession, Sessions

IDLE_LOOKS = 3
"""Looks at which every hop is alive and has nothing queued, after which the step is taken for lost."""
WATCH_S = 0.1
SILENCE_S_MAX = 30.0


class Watch:
    """Looks after the sessions of one model; `run` runs until cancelled, what it starts belongs to `tasks`."""

    def __init__(self, sessions: Sessions, driver: Driver, tasks: Tasks) -> None:
        self._sessions = sessions
        self._driver = driver
        self._tasks = tasks
        self._investigating: set[SessionId] = set()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            now_s = asyncio.get_running_loop().time()
            for session_id, session in tuple(self._sessions.by_id.items()):
                overdue = session.core is not None and session.core.outstanding and now_s > session.deadline_s
                if overdue and session_id not in self._investigating:
                    self._investigating.add(session_id)
                    self._tasks.spawn(self._investigate(session_id, session), name=f"investigate {session_id}")

    async def _investigate(self, session_id: SessionId, session: LiveSession) -> None:
        """Ask every hop of an overdue session whether it lives; drop the silent, wait longer for the busy.

        Half of the silence that is tolerated has passed; the other half is the time to answer.
        """
        core = session.core
        assert core is not None
        try:
            epoch, route = core.epoch, core.route
            if route is None:
                return
            pongs = await asyncio.gather(
                *(
                    self._sessions.client.links.ping(hop.peer_id, hop.addresses, timeout_s=session.silence_s / 2)
                    for hop in route.hops
                ),
                return_exceptions=True,
            )
            if core.epoch != epoch or not core.outstanding:
                return
            queued = 0
            for hop, pong in zip(route.hops, pongs, strict=True):
                if isinstance(pong, PeerError):
                    self._driver.lose(session, hop.peer_id, pong)
                    if (link := self._sessions.client.links.known(hop.peer_id)) is not None:
                        link.retire()  # who waits to send over it must not wait on
                    return
                if isinstance(pong, Unavailable):
                    self._driver.perform(session, core.give_up(pong))
                    return
                if isinstance(pong, BaseException):
                    raise pong
                queued += pong[1].queued_tokens
            session.idle_looks = 0 if queued else session.idle_looks + 1
            if session.idle_looks >= IDLE_LOOKS:
                error = PeerUnreachable("a step was lost although every hop of its route is alive")
                self._driver.perform(session, core.stalled(error))
                return
            session.silence_s = min(SILENCE_S_MAX, session.silence_s * 2)
            session.deadline_s = asyncio.get_running_loop().time() + session.silence_s
        finally:
            self._investigating.discard(session_id)

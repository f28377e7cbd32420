"""Who is given up for silence or a link that ended, and who is only late: real links over wires in memory, on a virtual
clock."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from peers.transport.links import Link, Links
from peers.transport.memory import MemoryNetwork
from peers.transport.tasks import Tasks
from peers.wire.messages import Trace, Traced
from routing.errors import SwarmError
from routing.ids import BlockSpan, PeerId, SessionId
from routing.routes import Hop, Route
from swarm.session.actions import Action
from swarm.session.core import SessionConfig, SessionCore
from swarm.session.inbox import Inbox
from swarm.session.live import SILENCE_S_MAX, LiveSession
from swarm.session.watch import WATCH_S, Watch
from tests.helpers.late_loop import LateLoop, run
from tests.peers.transport.nodes import signing_key

CLIENT, PEER = (signing_key(number).peer_id for number in (1, 2))
SILENCE_S = 2.0


class Scene:
    """A client with one session at one hop, which is asked to open it and never does; it answers what is asked."""

    def __init__(self, loop: LateLoop) -> None:
        self.loop = loop
        self.network = MemoryNetwork(latency_s=0.01)
        transports = [self.network.transport(peer) for peer in (CLIENT, PEER)]
        self.client, self.peer = (Links(transport, network="test", software="test") for transport in transports)
        self.peer.handle(Trace, self._trace)
        self.sessions: Any = SimpleNamespace(by_id={}, client=SimpleNamespace(links=self.client))
        self.tasks = Tasks()
        self.lost_at_s: list[float] = []
        self.running = 1
        """Works that the hop says it computes; where there are none, it says that an output is on its way."""
        self.watch = Watch(self.sessions, self, self.tasks)  # type: ignore[arg-type]

    async def _trace(self, link: Link, message: Trace, _: memoryview) -> None:
        await link.send(Traced(nonce=message.nonce, running=self.running, moving=not self.running))

    def lose(self, session: LiveSession, peer: PeerId, error: SwarmError) -> None:
        """As a driver does: the session is somebody else's affair now."""
        self.lost_at_s.append(self.loop.time())
        self.sessions.by_id.clear()

    def blame(self, peer: PeerId, error: SwarmError) -> None:
        pass

    def perform(self, session: LiveSession, actions: Sequence[Action]) -> None:
        if actions:
            self.lost_at_s.append(self.loop.time())

    def begin(self) -> float:
        """A new session; returns when it was last heard of."""
        session_id = SessionId(bytes([len(self.lost_at_s)]) * 16)
        session, core = LiveSession(None, bytes(16), standby=False), SessionCore(session_id, SessionConfig())
        core.submit(0, 1, 0)
        route = Route(hops=(Hop(peer_id=PEER, span=BlockSpan(0, 1), addresses=()),), cost_s=1.0)
        core.route_ready(route)
        session.core = core
        session.begin(route, review_in_s=60.0)
        self.sessions.by_id[session_id] = session
        return self.loop.time()

    async def __aenter__(self) -> Scene:
        await self.peer.serve()
        await self.client.to(PEER)
        self.tasks.spawn(self.watch.run(), name="watch")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.tasks.close()
        for node in (self.client, self.peer, self.client.transport, self.peer.transport):
            await node.close()


def given_up_after_s(*, trip_s: float = 0.01, late_s: float = 0.0, silent: bool = False) -> float | None:
    """From the last sign of life of a hop on; None where it is not given up within a minute."""

    async def work(loop: LateLoop) -> float | None:
        async with Scene(loop) as scene:
            await asyncio.sleep(1.0)
            scene.network.latency_s = trip_s
            if silent:
                scene.network.partition([CLIENT], [PEER])
            began_s = scene.begin()
            await asyncio.sleep(60.0)
            return scene.lost_at_s[0] - began_s if scene.lost_at_s else None

    return run(work, late_s=late_s)


@pytest.mark.parametrize("running", [0, 1])
def test_a_hop_that_says_for_minutes_that_something_happens_is_not_believed_for_ever(running: int) -> None:
    async def work(loop: LateLoop) -> None:
        async with Scene(loop) as scene:
            scene.running = running
            began_s, patience_s = scene.begin(), SessionConfig().busy_patience_s
            await asyncio.sleep(patience_s)
            assert scene.lost_at_s == []
            await asyncio.sleep(SILENCE_S_MAX + SILENCE_S)
            assert scene.lost_at_s[0] - began_s > patience_s

    run(work)


def test_a_silent_hop_is_given_up_in_time() -> None:
    assert given_up_after_s(silent=True) == pytest.approx(SILENCE_S, abs=WATCH_S)


def test_a_hop_that_lives_is_never_given_up() -> None:
    assert given_up_after_s() is None


@pytest.mark.parametrize("late_s", [0.1, 0.3, 1.0])
def test_where_this_loop_is_late_its_peers_may_be_as_late(late_s: float) -> None:
    """An answer takes longer than it ever may on a machine that is in time: as much as every turn of this loop."""
    assert given_up_after_s(trip_s=0.6) == pytest.approx(SILENCE_S, abs=WATCH_S)
    assert given_up_after_s(trip_s=0.6, late_s=late_s) is None
    after_s = given_up_after_s(silent=True, late_s=late_s)
    assert after_s is not None
    assert after_s > SILENCE_S


def test_a_session_ends_with_the_link_that_carries_it_and_not_with_that_of_a_ping() -> None:
    async def work(loop: LateLoop) -> None:
        async with Scene(loop) as scene:
            Inbox(scene.sessions, scene, None)  # type: ignore[arg-type]
            link = scene.client.known(PEER)
            assert link is not None
            await link.close()
            scene.begin()
            await scene.client.ping(PEER)
            assert scene.client.known(PEER) is None
            assert scene.lost_at_s == []
            carrying = await scene.client.to(PEER)
            await carrying.close()
            assert len(scene.lost_at_s) == 1

    run(work)


def test_a_wrong_verdict_gives_everybody_more_time_and_that_wears_off() -> None:
    async def work(loop: LateLoop) -> None:
        async with Scene(loop) as scene:
            scene.network.latency_s = 0.6
            verdicts = []
            for rest_s in (10.0, 600.0, 10.0):
                scene.begin()
                await asyncio.sleep(10.0)
                verdicts.append(len(scene.lost_at_s))
                scene.sessions.by_id.clear()
                await asyncio.sleep(rest_s)
            assert verdicts == [1, 1, 2]

    run(work)

"""Who is given up for silence or a link that ended, and who is only late: real links over wires in memory, on a virtual
clock."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from peers.transport.links import Link, Links
from peers.transport.memory import MemoryNetwork
from peers.transport.tasks import Tasks
from peers.wire.messages import PROTOCOL_VERSION, Trace, Traced
from routing.errors import SwarmError
from routing.ids import BlockSpan, PeerId, SessionId
from routing.records import RECORD_LIFETIME_S, RECORD_RENEW_S
from routing.router import Router
from routing.routes import Hop, Route
from swarm.session.actions import Action
from swarm.session.core import SessionConfig, SessionCore
from swarm.session.inbox import Inbox
from swarm.session.live import SILENCE_S_MAX, LiveSession, RemoteModel
from swarm.session.planning import Planner
from swarm.session.prompts import Prompts
from swarm.session.watch import WATCH_S, Watch
from tests.helpers.late_loop import LateLoop, run
from tests.peers.transport.nodes import signing_key
from tests.routing.swarms import MODEL, NOW_S, announcement, peer

CLIENT, PEER, OTHER = (signing_key(number).peer_id for number in (1, 2, 3))
SILENCE_S = 2.0


class Scene:
    """A client with one session at one hop, which is asked to open it and never does; it answers what is asked."""

    def __init__(self, loop: LateLoop) -> None:
        self.loop = loop
        self.network = MemoryNetwork(latency_s=0.01)
        transports = [self.network.transport(peer) for peer in (CLIENT, PEER, OTHER)]
        nodes = [Links(transport, network="test", software="test") for transport in transports]
        self.client, *self.peers = nodes
        for node in self.peers:
            node.handle(Trace, self._trace)
        self.router = Router()
        discovery = SimpleNamespace(now_s=lambda: NOW_S + loop.time())
        client = SimpleNamespace(links=self.client, router=self.router, discovery=discovery)
        model = RemoteModel(model=MODEL, num_blocks=1, hidden_size=8, regime_key=int)
        self.sessions: Any = SimpleNamespace(by_id={}, client=client, model=model, hosted=None)
        self.tasks = Tasks()
        self.lost_at_s: list[float] = []
        self.running = 1
        """Works that the hop says it computes; where there are none, it says that an output is on its way."""
        planner = Planner(self.sessions, Prompts(self.sessions), turn=0.0)
        self.watch = Watch(self.sessions, self, planner, self.tasks)

    async def _trace(self, link: Link, message: Trace, _: memoryview) -> None:
        await link.send(Traced(nonce=message.nonce, running=self.running, moving=not self.running))

    def announce(self, *peers: PeerId, prefill_s_per_token_block: float = 1e-4) -> None:
        """They have the model's block for as long as a test may take."""
        fields: dict[str, Any] = {"num_blocks": 1, "protocol": PROTOCOL_VERSION}
        fields["prefill_s_per_token_block"] = prefill_s_per_token_block

        async def renew() -> None:
            for sequence in itertools.count():
                now_s = NOW_S + self.loop.time()
                fields.update(sequence=sequence, expires_at_s=now_s + RECORD_LIFETIME_S)
                self.router.on_announcements([announcement(peer, 0, 1, **fields) for peer in peers], now_s)
                await asyncio.sleep(RECORD_RENEW_S)

        self.tasks.spawn(renew(), name="renew records")

    def lose(self, session: LiveSession, peer: PeerId, error: SwarmError) -> None:
        """As a driver does: the session is somebody else's affair now."""
        self.lost_at_s.append(self.loop.time())
        self.sessions.by_id.clear()

    def blame(self, peer: PeerId, error: SwarmError) -> None:
        pass

    def perform(self, session: LiveSession, actions: Sequence[Action], *, rows: Tensor | None = None) -> None:
        if actions:
            self.lost_at_s.append(self.loop.time())

    def reconsider(self, session: LiveSession) -> None:
        pass

    def begin(self, at: PeerId = PEER, *, positions: int = 1, first: int | None = None) -> float:
        """A new session at that peer; returns when it was last heard of. `first`: the first byte of its id."""
        session_id = SessionId(bytes([len(self.lost_at_s) if first is None else first]) * 16)
        session, core = LiveSession(None, bytes(16), standby=False), SessionCore(session_id, SessionConfig())
        core.submit(0, positions, 0)
        route = Route(hops=(Hop(peer_id=at, span=BlockSpan(0, 1), addresses=()),), cost_s=1.0)
        core.route_ready(route)
        if positions > 1:  # it is asked to open the session, and did
            core.opened(at, 0, core.epoch)
        session.core = core
        session.begin(route, review_in_s=60.0)
        self.sessions.by_id[session_id] = session
        return self.loop.time()

    async def __aenter__(self) -> Scene:
        for node in self.peers:
            await node.serve()
            await self.client.to(node.transport.peer_id)
        self.tasks.spawn(self.watch.run(), name="watch")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.tasks.close()
        for node in (self.client, *self.peers):
            await node.close()
            await node.transport.close()


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


def left_after_s(*, others: int = 1, positions: int = 1, first: int = 0, rests_until_s: float = 0.0) -> float | None:
    """A hop that says that it computes, and can be done without where there are `others`; None: not within 5 minutes.
    Before `rests_until_s` it does so only at the first look."""

    async def work(loop: LateLoop) -> float | None:
        async with Scene(loop) as scene:
            peers = [PEER, *(peer(number) for number in range(others))]
            scene.announce(*peers, prefill_s_per_token_block=0.01)
            began_s = scene.begin(positions=positions, first=first)
            await asyncio.sleep(SILENCE_S)
            scene.running = 0
            await asyncio.sleep(rests_until_s - SILENCE_S)
            scene.running = 1
            await asyncio.sleep(SessionConfig().busy_patience_s - 1.0)
            slow = scene.router.doubted(MODEL, NOW_S + loop.time())
            assert [a.peer_id for a in slow] == [PEER] * len(scene.lost_at_s), "it is not the first choice again"
            return scene.lost_at_s[0] - began_s if scene.lost_at_s else None

    return run(work)


def test_a_hop_that_only_says_that_it_computes_is_left_where_another_peer_has_its_blocks() -> None:
    least_s = SessionConfig().hung_s_min
    looks_s = SILENCE_S / 2 + 3 * WATCH_S  # until it is asked for the first time
    after_s = left_after_s()
    assert after_s is not None
    assert least_s < after_s < least_s + looks_s
    assert left_after_s(others=0) is None


def test_a_prompt_may_take_long_in_proportion_to_its_positions() -> None:
    after_s = left_after_s(positions=200)
    assert after_s is not None
    assert 20 * 200 * 0.01 < after_s < 20 * 200 * 0.01 + 5


def test_not_all_sessions_of_a_hop_that_has_too_much_to_do_leave_it_at_once() -> None:
    times_s = [left_after_s(first=first) for first in (0, 51, 102, 255)]
    assert all(after_s is not None for after_s in times_s)
    assert [round(after_s or 0.0) for after_s in times_s] == pytest.approx([11, 13, 15, 21], abs=1)


def test_a_hop_that_rests_between_two_looks_has_not_computed_one_step_all_the_time() -> None:
    after_s = left_after_s(rests_until_s=8.0)
    assert after_s is not None
    assert after_s > 8.0 + SessionConfig().hung_s_min


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


def test_whoever_was_given_up_wrongly_has_more_time_and_that_wears_off() -> None:
    async def work(loop: LateLoop) -> None:
        async with Scene(loop) as scene:
            scene.network.latency_s = 0.6
            verdicts = []
            for at, rest_s in ((PEER, 10.0), (PEER, 1.0), (OTHER, 600.0), (PEER, 10.0)):
                scene.begin(at)
                await asyncio.sleep(10.0)
                verdicts.append(len(scene.lost_at_s))
                scene.sessions.by_id.clear()
                await asyncio.sleep(rest_s)
            assert verdicts == [1, 1, 2, 3]

    run(work)

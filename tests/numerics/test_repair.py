"""A hop that dies is rebuilt by the one before it, and nobody else notices: counted in positions and bytes.

Virtual wires, real engines and drivers. Every peer of a swarm here has a spare one with the same blocks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peers.errors import Preempted
from peers.host.server import ServerPeer
from peers.runtime.works import Done, Work
from peers.serving.journal import JournalLimits
from peers.serving.push import Delivery
from peers.serving.spill import Disk
from peers.transport.links import Link
from peers.transport.memory import MemoryStream
from peers.wire.messages import Code, Failed, Step
from routing.estimates import DOUBT_AFTER_S
from routing.ids import PeerId
from swarm.session import planning, trial
from swarm.session.core import SessionConfig
from swarm.session.pace import Pace
from swarm.session.trial import TRIAL_STEPS, Trials
from tests.helpers.families import NUM_BLOCKS
from tests.helpers.memory_swarm import MemorySwarm
from tests.numerics.test_trouble import AtToken, generate, prompt

pytestmark = pytest.mark.usefixtures("plain_forwards")

SPANS = [(0, 1), (1, 2), (2, NUM_BLOCKS)]
PROMPT = prompt(length=100)
CONFIG = SessionConfig(chunk_positions=32)
TOKENS = 16


class Scene:
    """A swarm with a spare peer for each hop, and what every peer computed.

    All peers seem equally fast and near, however busy this machine is, so that no route is left for a better one.
    """

    def __init__(self, folder: Path, cache: Path, *, config: SessionConfig = CONFIG, reviews: bool = False) -> None:
        self.swarm = MemorySwarm(folder, SPANS, cache=cache, session_config=config, cache_tokens=4096)
        self.model = self.swarm.model(reviews=reviews)
        self.remote = self.model._remote_layers.remote
        router = self.swarm.thread.client.router
        on_rtt = router.on_rtt
        router.on_rtt = lambda peer, rtt_s, now_s, **how: on_rtt(peer, 1e-3, now_s, **how)  # type: ignore[method-assign]
        router.on_trips = lambda hops, trips_s, now_s: None  # type: ignore[method-assign]
        generate(self.model, prompt(), max_new_tokens=1, min_new_tokens=1)  # the client uses those it knows
        self.computed: dict[PeerId, list[tuple[int, int]]] = {}
        self.on_work: Callable[[PeerId, Work], None] = lambda peer, work: None
        for peer in self.swarm.peers:
            self._watch(peer)
        for hop in range(len(SPANS)):
            self.add_spare(hop)

    def add_spare(self, hop: int) -> None:
        self._watch(self.swarm.add_peer(*SPANS[hop]))

    def _watch(self, peer: ServerPeer) -> None:
        name, run = peer._key.peer_id, peer.engine.run
        works = self.computed[name] = []

        async def watched(work: Work) -> Done:
            self.on_work(name, work)
            done = await run(work)
            works.append((work.start, work.end))
            return replace(done, queue_s=0.0, compute_s=1e-3)

        peer.engine.run = watched  # type: ignore[method-assign]

    def warm_up(self) -> list[PeerId]:
        """The peers of the route, of whose work nothing is counted yet."""
        for works in self.computed.values():
            works.clear()
        return self.route

    @property
    def route(self) -> list[PeerId]:
        return [hop.peer_id for hop in self.remote.route.hops]

    def positions(self, peer: PeerId) -> int:
        return sum(end - start for start, end in self.computed[peer])

    def kill(self, *hops: int) -> list[PeerId]:
        killed = [self.route[hop] for hop in hops]
        for peer in killed:
            self.swarm.kill_peer(peer)
        return killed

    def peer(self, hop: int) -> ServerPeer:
        return next(peer for peer in self.swarm.peers if peer._key.peer_id == self.route[hop])


def _saying(run: Callable[[Work], Awaitable[Done]], peer: PeerId, slow: set[PeerId]) -> Callable[[Work], Any]:
    """`run`, which says that it took no time in the queue, and much or little of compute."""

    async def said(work: Work) -> Done:
        return replace(await run(work), queue_s=0.0, compute_s=1000.0 if peer in slow else 1e-3)

    return said


@pytest.fixture
def scene(request: pytest.FixtureRequest, folder: Path, local: Any, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(folder, tmp_path, **getattr(request, "param", {}))
    yield scene
    scene.swarm.close()


LENGTH = PROMPT.shape[1] + TOKENS - 1
"""Nobody runs the last token."""


@pytest.mark.parametrize("dies", [(0,), (1, 2), (0, 2)])
def test_only_the_hops_that_died_are_rebuilt_and_healthy_ones_hear_nothing_twice(
    scene: Scene, local: Any, dies: tuple[int, ...]
) -> None:
    used, killed = scene.warm_up(), []
    kill = AtToken(8, lambda: killed.extend(scene.kill(*dies)))
    assert torch.equal(generate(scene.model, PROMPT, stopping_criteria=[kill]), generate(local, PROMPT))
    assert killed == [used[hop] for hop in dies]
    assert [peer for hop, peer in enumerate(scene.route) if hop not in dies] == [p for p in used if p not in killed]
    assert [scene.positions(peer) for peer in scene.route] == [LENGTH] * 3
    assert (scene.remote.traffic.replayed_positions > 0) == any(hop and hop - 1 not in dies for hop in dies)
    assert scene.swarm.eventually_settled()


def test_the_client_sends_next_to_nothing_while_a_hop_is_rebuilt(
    scene: Scene, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[int] = []
    during: list[int] = []
    send, me = MemoryStream.send, scene.swarm.thread.client.node.transport.peer_id

    async def counted(stream: MemoryStream, *parts: Any) -> None:
        if stream.local == me:
            frames.append(sum(len(part) for part in parts))
        await send(stream, *parts)

    monkeypatch.setattr(MemoryStream, "send", counted)

    def kill() -> None:
        scene.kill(1)
        frames.clear()

    watchers = [AtToken(8, kill), AtToken(9, lambda: during.append(sum(frames)))]
    assert torch.equal(generate(scene.model, PROMPT, stopping_criteria=watchers), generate(local, PROMPT))
    assert 0 < during[0] <= 2048


def test_a_hop_that_dies_while_a_prompt_is_under_way_is_rebuilt_up_to_there(scene: Scene, local: Any) -> None:
    used = scene.warm_up()

    def kill(peer: PeerId, work: Work) -> None:
        if peer == used[1] and work.start == 32:
            scene.swarm.network.cut(peer)

    scene.on_work = kill
    assert torch.equal(generate(scene.model, PROMPT), generate(local, PROMPT))
    assert scene.route[1] != used[1]
    assert (scene.route[0], scene.route[2]) == (used[0], used[2])
    assert [scene.positions(peer) for peer in scene.route] == [LENGTH] * 3


@pytest.mark.parametrize("victim", ["replacement", "source", "both"])
def test_another_hop_that_dies_during_a_replay_is_rebuilt_too(scene: Scene, local: Any, victim: str) -> None:
    scene.add_spare(1)
    used = scene.warm_up()
    killed: list[PeerId] = []

    def kill(peer: PeerId, work: Work) -> None:
        if peer not in used and work.start == 32 and not killed:
            killed.extend({"replacement": [peer], "source": used[:1], "both": [peer, used[0]]}[victim])
            for each in killed:
                scene.swarm.network.cut(each)

    scene.on_work = kill
    first = AtToken(8, lambda: scene.kill(1) and None)
    assert torch.equal(generate(scene.model, PROMPT, stopping_criteria=[first]), generate(local, PROMPT))
    assert killed
    assert not {used[1], *killed} & set(scene.route)
    healthy = [peer for peer in used if peer in scene.route]
    assert [scene.positions(peer) for peer in healthy] == [LENGTH] * len(healthy)
    assert scene.swarm.eventually_settled()


def test_a_hop_whose_journal_is_gone_computes_again_what_the_one_before_it_sends(
    scene: Scene, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = scene.warm_up()

    def kill() -> None:
        monkeypatch.setattr(scene.peer(1).handler.journal, "read", lambda *_: None)  # evicted just when it is asked for
        scene.kill(2)

    actual = generate(scene.model, PROMPT, stopping_criteria=[AtToken(8, kill)])
    assert torch.equal(actual, generate(local, PROMPT))
    assert scene.route[:2] == used[:2]
    again = PROMPT.shape[1] + 8 - 1
    assert scene.positions(used[0]) == LENGTH
    assert LENGTH + again <= scene.positions(used[1]) <= LENGTH + again + 1


@pytest.mark.parametrize("room", [True, False])
def test_a_hop_is_rebuilt_from_a_journal_on_disk_and_without_one_where_the_disk_is_full(
    scene: Scene, local: Any, room: bool, tmp_path: Path
) -> None:
    used, keeper = scene.warm_up(), scene.peer(1)
    journal, disk = keeper.handler.journal, Disk(tmp_path, 1 << 20 if room else 0, keeper.tasks)
    journal.limits, journal._spill = JournalLimits(max_bytes=2048), disk
    kill = AtToken(8, lambda: scene.kill(2) and None)
    assert torch.equal(generate(scene.model, PROMPT, stopping_criteria=[kill]), generate(local, PROMPT))
    assert scene.route[:2] == used[:2]
    assert scene.positions(used[0]) == LENGTH
    assert (scene.positions(used[1]) == LENGTH) == room, "computed again only where nothing was kept"


def test_speculation_that_is_rolled_back_and_forks_survive_the_death_of_two_hops(scene: Scene, local: Any) -> None:
    ids = torch.cat([PROMPT[:, :20]] * 3, 1)
    for options in ({"prompt_lookup_num_tokens": 4}, {"num_beams": 3}):
        killed: list[PeerId] = []
        kill = AtToken(4, lambda killed=killed: killed.extend(scene.kill(1, 2)))
        actual = generate(scene.model, ids, stopping_criteria=[kill], **options)
        assert torch.equal(actual, generate(local, ids, **options))
        assert not set(killed) & set(scene.route)
        for hop in (1, 2):
            scene.add_spare(hop)
    assert scene.swarm.eventually_settled()


@pytest.mark.parametrize("leaves", [(0,), (1,), (1, 2)])
@pytest.mark.parametrize("chosen", [1, 8])
def test_peers_that_drain_hand_their_sessions_over_and_no_step_is_repeated(
    scene: Scene, local: Any, leaves: tuple[int, ...], chosen: int
) -> None:
    used, ended, failed = scene.warm_up(), [], []
    drain = AtToken(chosen, lambda: ended.extend(scene.swarm.drain_peer(used[hop]) for hop in leaves))
    links = scene.swarm.thread.client.links
    receive = links._receivers[Failed]

    async def watched(link: Link, message: Failed, payload: memoryview) -> None:
        failed.append((message.code, message.step))
        await receive(link, message, payload)

    links._receivers[Failed] = watched
    with scene.model.session():
        actual = generate(scene.model, PROMPT, stopping_criteria=[drain])
        for draining in ended:
            draining.result(60)
    assert torch.equal(actual, generate(local, PROMPT))
    assert set(failed) == {(Code.DRAINING, None)}, "nothing was refused"
    router, now_s = scene.swarm.thread.client.router, scene.swarm.thread.client.discovery.now_s()
    assert router._reputation.backed_off(now_s) == {}
    assert [hop for hop, peer in enumerate(used) if scene.route[hop] != peer] == list(leaves)
    assert [scene.positions(peer) for peer in scene.route] == [LENGTH] * len(used), "nothing twice"


def test_two_hops_that_fall_silent_together_are_replaced_together(scene: Scene, local: Any) -> None:
    used = scene.warm_up()
    others = [peer._key.peer_id for peer in scene.swarm.peers if peer._key.peer_id not in used[1:]]
    me, network = scene.swarm.thread.client.node.transport.peer_id, scene.swarm.network
    silence = AtToken(8, lambda: scene.swarm.thread.post(network.partition, used[1:], [*others, me]))
    assert torch.equal(generate(scene.model, PROMPT, stopping_criteria=[silence]), generate(local, PROMPT))
    assert scene.route[0] == used[0]
    assert not set(used[1:]) & set(scene.route)
    assert scene.remote.traffic.rebuilds == 1
    scene.swarm.thread.post(network.partition)


@pytest.mark.parametrize("phase", ["open", "prompt", "replay"])
def test_a_hop_that_falls_silent_whatever_it_was_doing_is_replaced_and_nobody_else_hears_anything_twice(
    scene: Scene, local: Any, phase: str
) -> None:
    scene.add_spare(1)
    used, silent, network = scene.warm_up(), list[PeerId](), scene.swarm.network
    me = scene.swarm.thread.client.node.transport.peer_id

    def silence(peer: PeerId) -> None:
        silent.append(peer)
        network.partition([peer], [me, *(other for other in scene.computed if other != peer)])

    def work_on(peer: PeerId, work: Work) -> None:
        if not silent and work.start == 32 and (peer == used[1] if phase == "prompt" else peer not in used):
            silence(peer)

    scene.on_work = work_on
    if phase == "open":
        scene.swarm.thread.post(silence, used[1])
    kill = AtToken(8, lambda: phase == "replay" and scene.kill(1) and None)
    assert torch.equal(generate(scene.model, PROMPT, stopping_criteria=[kill]), generate(local, PROMPT))
    assert silent
    assert silent[0] not in scene.route
    assert (scene.route[0], scene.route[2]) == (used[0], used[2])
    assert [scene.positions(peer) for peer in scene.route] == [LENGTH] * 3
    scene.swarm.thread.post(network.partition)


def test_a_hop_whose_engine_hangs_while_it_answers_everything_else_is_replaced_and_not_chosen_again(
    folder: Path, local: Any, tmp_path: Path
) -> None:
    scene = Scene(folder, tmp_path, config=replace(CONFIG, hung_s_min=0.2))
    try:
        used = scene.warm_up()
        hung, run = scene.peer(1), scene.peer(1).engine.run

        async def never(work: Work) -> Done:
            if work.start == PROMPT.shape[1] + 8:
                await asyncio.Event().wait()
            return await run(work)

        hung.engine.run = never  # type: ignore[method-assign]
        assert torch.equal(generate(scene.model, PROMPT), generate(local, PROMPT))
        assert (scene.route[0], scene.route[2]) == (used[0], used[2])
        assert scene.route[1] != used[1]
        assert [scene.positions(peer) for peer in scene.route] == [LENGTH] * 3, "nothing twice"
        router, now_s = scene.swarm.thread.client.router, scene.swarm.thread.client.discovery.now_s()
        (opinion,) = router.opinions(now_s, len(scene.computed))
        assert opinion.peer_id == used[1]
        assert "says that it has been computing" in opinion.reason
        known = router.snapshot(now_s).of_model(scene.remote.model.model)
        doubted = [a.peer_id for a in known if router._estimates.doubted_for_s(a, now_s + DOUBT_AFTER_S)]
        assert doubted == used[1:2], "a trial must show that it works"
    finally:
        scene.swarm.close()


def test_a_link_between_two_hops_that_falls_silent_is_gone_round_and_nobody_is_blamed(scene: Scene, local: Any) -> None:
    used, network = scene.warm_up(), scene.swarm.network
    cut = AtToken(8, lambda: scene.swarm.thread.post(network.partition, used[:1], used[1:2]))
    assert torch.equal(generate(scene.model, PROMPT, stopping_criteria=[cut]), generate(local, PROMPT))
    assert scene.route == used
    assert scene.remote.traffic.relays >= TOKENS - 8
    router, now_s = scene.swarm.thread.client.router, scene.swarm.thread.client.discovery.now_s()
    assert router._reputation.backed_off(now_s) == {}
    assert [scene.positions(peer) for peer in used] == [LENGTH] * 3, "nothing twice"
    assert scene.swarm.eventually_settled()


@pytest.mark.parametrize(("first", "count"), [(PROMPT.shape[1] + 8, 1), (64, 36)], ids=["token", "end of the prompt"])
def test_a_step_that_is_lost_between_two_hops_is_sent_again_from_where_it_came_last(
    scene: Scene, local: Any, monkeypatch: pytest.MonkeyPatch, first: int, count: int
) -> None:
    used = scene.warm_up()
    pusher = next(peer for peer in scene.swarm.peers if peer._key.peer_id == used[1]).handler.pusher
    deliver, lost = pusher.deliver, []

    async def lose(entry: Any, delivery: Delivery) -> None:
        step = delivery.message
        if isinstance(step, Step) and first <= step.first < first + count and step.step not in lost:
            lost.append(step.step)
        else:
            await deliver(entry, delivery)

    monkeypatch.setattr(pusher, "deliver", lose)
    assert torch.equal(generate(scene.model, PROMPT), generate(local, PROMPT))
    assert scene.route == used
    assert scene.remote.traffic.replayed_positions == count
    assert [scene.positions(peer) for peer in used] == [LENGTH] * 3


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_session_whose_pages_one_hop_takes_is_rebuilt_there_alone(scene: Scene, local: Any, elsewhere: bool) -> None:
    """At another peer, or where none is known at the same one, after a wait."""
    used = scene.warm_up()

    async def preempt() -> None:
        if elsewhere:
            await scene.swarm.thread.client.discovery.refresh()
        handler = next(peer for peer in scene.swarm.peers if peer._key.peer_id == used[1]).handler
        (entry,) = handler.ledger.entries()
        handler._let_go(entry.place, Preempted("an older one needs the pages", retry_after_s=0.1))

    act = AtToken(8, lambda: scene.swarm.thread.call(preempt()))
    assert torch.equal(generate(scene.model, PROMPT, stopping_criteria=[act]), generate(local, PROMPT))
    assert (scene.route[1] == used[1]) != elsewhere
    assert [scene.positions(peer) for peer in (used[0], used[2])] == [LENGTH] * 2, "nothing twice"
    assert scene.remote.traffic.replayed_positions > 0
    assert scene.swarm.eventually_settled()


@pytest.mark.parametrize("scene", [{"reviews": True}], indirect=True, ids=["reviews"])
def test_a_hop_that_becomes_slow_is_left_between_two_steps_for_a_faster_one_and_blamed_by_nobody(
    scene: Scene, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All times are said, by peers and by the clock that the client has for its own: nothing is timed here."""
    monkeypatch.setattr(planning, "RECONSIDER_S_MIN", 0.0)
    monkeypatch.setattr(planning, "RECONSIDER_S", math.inf)
    discovery, used = scene.swarm.thread.client.discovery, []
    slow: set[PeerId] = set()
    answered = Pace.answered

    def virtually(pace: Pace, positions: int, seconds: float, hops_s: Iterable[tuple[PeerId, float]]) -> None:
        answered(pace, positions, 1000.0 if slow & set(scene.route) else 1.0, hops_s)

    monkeypatch.setattr(Pace, "answered", virtually)
    for peer in scene.swarm.peers:
        monkeypatch.setattr(peer.engine, "run", _saying(peer.engine.run, peer._key.peer_id, slow))
    scene.swarm.thread.call(discovery.refresh())
    scene.swarm.thread.call(discovery.measure(discovery.router.snapshot(discovery.now_s()).peers))
    scene.warm_up()

    def slow_down() -> None:
        used.extend(scene.route)
        slow.add(used[1])

    assert torch.equal(
        generate(scene.model, PROMPT, stopping_criteria=[AtToken(8, slow_down)]), generate(local, PROMPT)
    )
    assert [hop for hop, peer in enumerate(used) if scene.route[hop] != peer] == [1]
    assert scene.swarm.thread.client.router._reputation.backed_off(discovery.now_s()) == {}
    assert [scene.positions(peer) for peer in scene.route] == [LENGTH] * 3, "nothing twice"
    assert scene.swarm.eventually_settled()


def test_a_peer_that_was_slow_is_tried_without_a_session_and_known_to_be_fast_again(scene: Scene) -> None:
    client, route = scene.swarm.thread.client, scene.route
    router, model = client.router, scene.remote.model.model
    scene.swarm.thread.call(client.discovery.refresh())
    now_s = client.discovery.now_s()
    (spare,) = [peer for peer in scene.computed if peer not in route and len(scene.computed[peer]) == 0][:1]
    for _ in range(20):
        router.on_step(spare, 1, 1, compute_s=1000.0, queue_s=0.0, now_s=now_s - DOUBT_AFTER_S)
    (doubted,) = router.doubted(model, now_s)
    assert doubted.peer_id == spare
    scene.swarm.thread.call(Trials(scene.remote._sessions).one(doubted))
    assert scene.computed[spare] == [(at, at + 1) for at in range(TRIAL_STEPS)]
    assert router._estimates.of(doubted, now_s).decode_s_per_block < 100.0, "so slow is no machine"
    assert scene.remote._sessions.trials == {}
    assert scene.swarm.eventually_settled()


def test_a_peer_that_does_not_answer_a_trial_stays_what_it_was(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TRIAL_TIMEOUT_S", 0.0)
    client = scene.swarm.thread.client
    scene.swarm.thread.call(client.discovery.refresh())
    peer, now_s = scene.route[0], client.discovery.now_s()
    (known,) = [a for a in client.router.snapshot(now_s).peers if a.peer_id == peer]
    before = client.router._estimates.of(known, now_s)
    scene.swarm.thread.call(Trials(scene.remote._sessions).one(known))
    assert client.router._estimates.of(known, now_s) == before
    assert scene.remote._sessions.trials == {}

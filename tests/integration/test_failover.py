"""Processes die, hang, leave and come back; what is generated stays the same.

With a small model whose words look random: any position that is missing, doubled or in the wrong place changes them
all. `test_joining` kills a peer of the real one.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from peers.discovery import LATE_PATIENCE_S
from peers.wire.messages import PREFIX_POSITIONS
from routing.errors import NoRoute
from swarm import SwarmModelForCausalLM
from swarm.testing import LocalPeer, LocalSwarm
from tests.helpers.checkpoints import save_llama
from tests.integration.conftest import Greedy, Observer, driver, generate, greedily

SPANS = [(0, 2), (2, 4), (4, 6)]
PROMPT = (7, 3, 200, 45, 99, 310, 5, 76, 401, 18, 222, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failing")


@pytest.fixture(scope="module")
def greedy(folder: Path) -> Greedy:
    """What the small model says locally."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
    return greedily(save_llama(folder, layers=6, **sizes))


@pytest.fixture(scope="module")
def spared(folder: Path, greedy: Greedy) -> Iterator[LocalSwarm]:
    """Three peers, and a spare one for each."""
    with LocalSwarm(folder, [*SPANS, *SPANS], dtype="float32") as swarm:
        yield swarm


@pytest.fixture
def failing(spared: LocalSwarm) -> LocalSwarm:
    """The same with every peer running, whatever the test before did."""
    for peer in spared.peers:
        if not peer.running:
            peer.restart()
    return spared


@pytest.fixture
def client(failing: LocalSwarm) -> Iterator[Any]:
    with SwarmModelForCausalLM.from_pretrained(failing.model, initial_peers=failing.initial_peers) as model:
        yield model


class At:
    """A streamer that does something once, when so many tokens have come."""

    def __init__(self, count: int, action: Callable[[], None]) -> None:
        self._at = count + 1  # the prompt comes first
        self._action = action
        self.times_s: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times_s.append(time.monotonic())
        if len(self.times_s) == self._at:
            self._action()

    def end(self) -> None:
        pass


def serving(client: Any, swarm: LocalSwarm, hop: int) -> LocalPeer:
    """The peer that serves this hop of the present route."""
    return next(peer for peer in swarm.peers if peer.peer_id == client.route.hops[hop].peer_id)


def middle(client: Any, swarm: LocalSwarm) -> LocalPeer:
    return serving(client, swarm, 1)


@pytest.mark.parametrize("hops", [(0,), (1,), (1, 2)], ids=["first", "middle", "two at once"])
def test_killed_peers_are_replaced_without_changing_a_token(
    client: Any, failing: LocalSwarm, greedy: Greedy, hops: tuple[int, ...]
) -> None:
    killed: list[LocalPeer] = []
    traffic = driver(client).traffic

    def kill() -> None:
        killed.extend(serving(client, failing, hop) for hop in hops)
        for peer in killed:
            peer.kill()

    assert generate(client, PROMPT, 48, streamer=At(20, kill)) == greedy(PROMPT, 48)
    assert not {serving(client, failing, hop).peer_id for hop in range(3)} & {peer.peer_id for peer in killed}
    assert traffic.rebuilds >= 1
    if 0 not in hops:  # the hop before the gap sent what the client would have had to
        assert traffic.replayed_positions >= len(PROMPT)


def test_a_standby_takes_the_place_of_a_killed_peer(client: Any, failing: LocalSwarm, greedy: Greedy) -> None:
    traffic, killed = driver(client).traffic, list[LocalPeer]()

    def kill() -> None:
        (session,) = driver(client)._sessions.by_id.values()
        assert session.core is not None
        deadline_s = time.monotonic() + 60.0
        while time.monotonic() < deadline_s and not all(standby.held >= 32 for standby in session.core._standbys):
            time.sleep(0.02)
        killed.append(middle(client, failing))
        killed[0].kill()

    generate(client, PROMPT, 2)
    with client.session(resilience="standby"):
        assert generate(client, PROMPT, 64, streamer=At(48, kill)) == greedy(PROMPT, 64)
    assert traffic.rebuilds >= traffic.switches >= 1, "on a busy machine a hop may have seemed slow as well"
    assert traffic.replayed_positions < (len(PROMPT) + 48) * traffic.rebuilds


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_peer_killed_in_training_changes_no_gradient(client: Any, failing: LocalSwarm, backward: bool) -> None:
    ids = torch.tensor([PROMPT] * 3)
    route, killed = client._remote_layers.remote.training, list[LocalPeer]()

    def gradient() -> torch.Tensor:
        embeds = client.get_input_embeddings()(ids).detach().requires_grad_()
        client(inputs_embeds=embeds, labels=ids).loss.backward()
        assert embeds.grad is not None
        return embeds.grad

    expected, ask = gradient(), route._exchange.ask

    async def asking(batch: Any, stretch: Any, gradient_TH: Any, **options: Any) -> torch.Tensor:
        if not killed and backward == (gradient_TH is not None) and stretch.span.start == SPANS[1][0]:
            killed.append(next(peer for peer in failing.peers if peer.peer_id == stretch.hop.peer_id))
            killed[0].pause()  # so that it is asked, and has not answered when it dies
            asyncio.get_running_loop().call_later(0.1, killed[0].kill)
        return await ask(batch, stretch, gradient_TH, **options)

    route._exchange.ask = asking
    actual = gradient()
    assert float((actual - expected).norm() / expected.norm()) <= 1e-5
    assert killed[0].peer_id not in {hop.peer_id for hop in route.route.hops}
    assert route.traffic.failures["lost"]


def test_a_peer_killed_after_a_prefix_hit_is_replaced_without_changing_a_token(
    client: Any, failing: LocalSwarm, greedy: Greedy
) -> None:
    asked, traffic = PROMPT * 8, driver(client).traffic
    assert len(asked) >= PREFIX_POSITIONS
    killed: list[LocalPeer] = []
    known = 0

    def kill() -> None:
        if traffic.prefix_positions > known:
            killed.append(middle(client, failing))
            killed[0].kill()

    # a spare that looks clearly faster is worth more than what others know; but there are no more than 2 × 2 × 2 routes
    for _ in range(2 ** len(SPANS) + 1):
        known = traffic.prefix_positions
        assert generate(client, asked, 24, streamer=At(8, kill)) == greedy(asked, 24)
        if killed:
            break
    assert middle(client, failing) is not killed[0]
    assert traffic.prefix_positions - known >= (len(asked) - 1) // PREFIX_POSITIONS * PREFIX_POSITIONS


def test_a_hung_peer_is_replaced_without_changing_a_token(client: Any, failing: LocalSwarm, greedy: Greedy) -> None:
    paused: list[LocalPeer] = []

    def pause() -> None:
        paused.append(middle(client, failing))
        paused[0].pause()

    reader = At(20, pause)
    try:
        assert generate(client, PROMPT, 48, streamer=reader) == greedy(PROMPT, 48)
    finally:
        paused[0].resume()
    assert middle(client, failing) is not paused[0]
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(reader.times_s)]
    assert max(gaps_s) < 10 + 30 * statistics.median(gaps_s), "on a busy machine everybody has more time"


def test_ctrl_c_at_a_serving_peer_drains_it_and_nobody_notices(
    client: Any, failing: LocalSwarm, greedy: Greedy
) -> None:
    leaving: list[LocalPeer] = []
    family: list[psutil.Process] = []

    def interrupt() -> None:
        leaving.append(serving(client, failing, 1))
        me = psutil.Process(leaving[0].pid)
        family.extend([me, *me.children(recursive=True)])
        me.send_signal(signal.SIGINT)

    assert generate(client, PROMPT, 48, streamer=At(20, interrupt)) == greedy(PROMPT, 48)
    (peer,) = leaving
    assert peer.wait_for("draining")
    assert peer.wait_for("stopped")
    assert peer._process.wait(30) == 0
    assert psutil.wait_procs(family, timeout=60)[1] == []


def test_the_swarm_works_without_its_bootstrap_and_finds_it_again(
    client: Any, failing: LocalSwarm, greedy: Greedy
) -> None:
    failing.bootstrap.kill()
    assert generate(client, PROMPT, 16) == greedy(PROMPT, 16)
    failing.bootstrap.restart()
    newcomer = Observer(failing.initial_peers)
    try:
        everybody = {peer.peer_id for peer in failing.peers}
        deadline_s = time.monotonic() + 60
        while newcomer.announced() != everybody:
            assert time.monotonic() < deadline_s
    finally:
        newcomer.close()


def test_a_gap_is_named_before_anybody_is_waited_for_who_is_only_late(client: Any, failing: LocalSwarm) -> None:
    generate(client, PROMPT, 2)
    for peer in (failing.peers[1], failing.peers[4]):
        assert peer.terminate() == 0
    started_s = time.monotonic()
    with pytest.raises(NoRoute, match="blocks 2:4 are missing") as caught:
        generate(client, PROMPT, 2)
    assert caught.value.missing == ((2, 4),)
    assert time.monotonic() - started_s < LATE_PATIENCE_S, "peers that are gone are not waited for as if they were late"

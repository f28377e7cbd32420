"""Processes die, hang, leave and come back; what is generated stays the same."""

from __future__ import annotations

import itertools
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from peers.wire.messages import PREFIX_POSITIONS
from routing.errors import NoRoute
from swarm import SwarmModelForCausalLM
from swarm.testing import LocalPeer, LocalSwarm
from tests.integration.conftest import MODEL, SPANS, Greedy, Observer, driver, generate

PROMPT = "The history of the steam engine begins in antiquity, when"


@pytest.fixture(scope="module")
def spared() -> Iterator[LocalSwarm]:
    """Three peers, and a spare one for each."""
    with LocalSwarm(MODEL, [*SPANS, *SPANS], dtype="float32") as swarm:
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
    with SwarmModelForCausalLM.from_pretrained(
        MODEL, initial_peers=failing.initial_peers, dtype=torch.float32
    ) as model:
        yield model


@pytest.fixture(scope="module")
def prompt(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(PROMPT).input_ids)


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
    client: Any, failing: LocalSwarm, prompt: tuple[int, ...], greedy: Greedy, hops: tuple[int, ...]
) -> None:
    killed: list[LocalPeer] = []
    traffic = driver(client).traffic

    def kill() -> None:
        killed.extend(serving(client, failing, hop) for hop in hops)
        for peer in killed:
            peer.kill()

    assert generate(client, prompt, 48, streamer=At(20, kill)) == greedy(prompt, 48)
    assert not {serving(client, failing, hop).peer_id for hop in range(3)} & {peer.peer_id for peer in killed}
    assert traffic.rebuilds >= 1
    if 0 not in hops:  # the hop before the gap sent what the client would have had to
        assert traffic.replayed_positions >= len(prompt)


def test_a_standby_takes_the_place_of_a_killed_peer(
    client: Any, failing: LocalSwarm, prompt: tuple[int, ...], greedy: Greedy
) -> None:
    traffic, killed = driver(client).traffic, list[LocalPeer]()

    def kill() -> None:
        (session,) = driver(client)._sessions.by_id.values()
        assert session.core is not None
        deadline_s = time.monotonic() + 20.0
        while time.monotonic() < deadline_s and not all(standby.held >= 32 for standby in session.core._standbys):
            time.sleep(0.02)
        killed.append(middle(client, failing))
        killed[0].kill()

    generate(client, prompt, 2)
    with client.session(resilience="standby"):
        assert generate(client, prompt, 64, streamer=At(48, kill)) == greedy(prompt, 64)
    assert (traffic.switches, traffic.rebuilds) == (1, 1)
    assert traffic.replayed_positions < len(prompt) + 48


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_peer_killed_in_training_changes_no_gradient(
    client: Any, failing: LocalSwarm, tokenizer: PreTrainedTokenizerBase, backward: bool
) -> None:
    ids = tokenizer([PROMPT] * 3, return_tensors="pt").input_ids
    route, killed = client._remote_layers.remote.training, list[LocalPeer]()

    def gradient() -> torch.Tensor:
        embeds = client.get_input_embeddings()(ids).detach().requires_grad_()
        client(inputs_embeds=embeds, labels=ids).loss.backward()
        assert embeds.grad is not None
        return embeds.grad

    expected, ask = gradient(), route._ask
    killing = threading.Timer(0.01, lambda: killed[0].kill())

    async def asking(batch: Any, stretch: Any, gradient_TH: Any, **options: Any) -> torch.Tensor:
        if not killed and backward == (gradient_TH is not None) and stretch.span.start == SPANS[1][0]:
            killed.append(next(peer for peer in failing.peers if peer.peer_id == stretch.hop.peer_id))
            killing.start()
        return await ask(batch, stretch, gradient_TH, **options)

    route._ask = asking
    actual = gradient()
    killing.join()  # the next test may restart it
    assert float((actual - expected).norm() / expected.norm()) <= 1e-5
    assert killed[0].peer_id not in {hop.peer_id for hop in route.route.hops}
    assert route.traffic.failures["lost"]


def test_a_peer_killed_after_a_prefix_hit_is_replaced_without_changing_a_token(
    client: Any, failing: LocalSwarm, prompt: tuple[int, ...], greedy: Greedy
) -> None:
    known = prompt * 8
    asked = (*known, *prompt[:3])
    assert len(known) >= PREFIX_POSITIONS
    traffic = driver(client).traffic
    for _ in range(8):  # until spares that nobody has measured yet do not look better than who knows the prompt
        assert generate(client, known, 2) == greedy(known, 2)
        if traffic.prefix_positions:
            break
    before = traffic.prefix_positions
    killed: list[LocalPeer] = []

    def kill() -> None:
        killed.append(middle(client, failing))
        killed[0].kill()

    assert generate(client, asked, 24, streamer=At(8, kill)) == greedy(asked, 24)
    assert middle(client, failing) is not killed[0]
    assert traffic.prefix_positions - before >= len(known) // PREFIX_POSITIONS * PREFIX_POSITIONS


def test_a_hung_peer_is_replaced_without_changing_a_token(
    client: Any, failing: LocalSwarm, prompt: tuple[int, ...], greedy: Greedy
) -> None:
    paused: list[LocalPeer] = []

    def pause() -> None:
        paused.append(middle(client, failing))
        paused[0].pause()

    reader = At(20, pause)
    try:
        assert generate(client, prompt, 48, streamer=reader) == greedy(prompt, 48)
    finally:
        paused[0].resume()
    assert middle(client, failing) is not paused[0]
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(reader.times_s)]
    assert max(gaps_s) < 10 + 30 * statistics.median(gaps_s), "on a busy machine everybody has more time"


def test_ctrl_c_at_a_serving_peer_drains_it_and_nobody_notices(
    client: Any, failing: LocalSwarm, prompt: tuple[int, ...], greedy: Greedy
) -> None:
    leaving: list[LocalPeer] = []
    family: list[psutil.Process] = []

    def interrupt() -> None:
        leaving.append(serving(client, failing, 1))
        me = psutil.Process(leaving[0].pid)
        family.extend([me, *me.children(recursive=True)])
        me.send_signal(signal.SIGINT)

    assert generate(client, prompt, 48, streamer=At(20, interrupt)) == greedy(prompt, 48)
    (peer,) = leaving
    assert peer.wait_for("draining")
    assert peer.wait_for("stopped")
    assert peer._process.wait(30) == 0
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_the_swarm_works_without_its_bootstrap_and_finds_it_again(
    client: Any, failing: LocalSwarm, prompt: tuple[int, ...], greedy: Greedy
) -> None:
    failing.bootstrap.kill()
    assert generate(client, prompt, 16) == greedy(prompt, 16)
    failing.bootstrap.restart()
    newcomer = Observer(failing.initial_peers)
    try:
        everybody = {peer.peer_id for peer in failing.peers}
        deadline_s = time.monotonic() + 60
        while newcomer.announced() != everybody:
            assert time.monotonic() < deadline_s
    finally:
        newcomer.close()


def test_a_gap_is_named_within_five_seconds(client: Any, failing: LocalSwarm, prompt: tuple[int, ...]) -> None:
    generate(client, prompt, 2)
    for peer in (failing.peers[1], failing.peers[4]):
        assert peer.terminate() == 0
    started_s = time.monotonic()
    with pytest.raises(NoRoute, match="blocks 10:20 are missing") as caught:
        generate(client, prompt, 2)
    assert caught.value.missing == ((10, 20),)
    assert time.monotonic() - started_s < 5

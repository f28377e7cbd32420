"""What a trainer makes of peers that say that they serve other blocks, or that what they were sent is malformed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peers.errors import Refused
from peers.host import server
from peers.host.server import ServerPeer
from peers.wire.messages import Code
from routing.ids import BlockSpan, BlockSpans, PeerId
from tests.helpers.families import FAMILIES, NUM_BLOCKS, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm, impatient
from tests.numerics.test_gradients import EVERY_ROW, TOLERANCE, batch, distance, gradient_of_inputs, route_of

pytestmark = pytest.mark.usefixtures("plain_forwards")

HALVES = BlockSpan(0, NUM_BLOCKS // 2), BlockSpan(NUM_BLOCKS // 2, NUM_BLOCKS)


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    return save_checkpoint(FAMILIES["llama"], folder).requires_grad_(False)


@pytest.fixture
def halves(local: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemorySwarm]:
    """Nobody but these two has their blocks."""
    monkeypatch.setattr(server, "MOVE_DRAIN_TIMEOUT_S", 0.1)
    spans = [(half.start, half.end) for half in HALVES]
    with MemorySwarm(folder, spans, cache=tmp_path, training=True, movable=True) as swarm:
        yield swarm


def planned(model: Any) -> dict[PeerId, BlockSpan]:
    route = route_of(model).route
    assert route is not None
    return {hop.peer_id: hop.span for hop in route.hops}


def change_places(swarm: MemorySwarm, model: Any, *, seen: bool) -> None:
    """The client reads of it at once, or when a peer refuses."""
    discovery, traffic = swarm.thread.client.discovery, route_of(model).traffic
    refresh = discovery.refresh

    async def late() -> None:
        if traffic.failures[Code.WRONG_MODEL]:
            await refresh()

    async def move() -> None:
        await refresh()
        discovery.refresh = late  # type: ignore[method-assign]
        for peer, half in zip(swarm.peers, reversed(HALVES), strict=True):
            await peer.move(BlockSpans.of(half))
            await peer.presence._announcer.announce()
        if seen:
            await refresh()

    swarm.thread.call(move(), timeout_s=100)


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_peers_that_moved_are_asked_for_what_they_have_now(
    local: Any, halves: MemorySwarm, backward: bool, seen: bool
) -> None:
    model = halves.model(training=EVERY_ROW)
    _, expected = gradient_of_inputs(local, batch())
    assert distance(gradient_of_inputs(model, batch())[1], expected) <= TOLERANCE
    inputs = batch()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, **inputs).loss if backward else None
    change_places(halves, model, seen=seen)
    if loss is None:
        loss = model(inputs_embeds=embeds, **inputs).loss
    loss.backward()
    assert embeds.grad is not None
    assert distance(embeds.grad * inputs["attention_mask"][..., None], expected) <= TOLERANCE
    route, (first, second) = route_of(model), halves.peers
    assert planned(model) == {
        first._key.peer_id: HALVES[1],
        second._key.peer_id: HALVES[0],
    }
    assert set(route.traffic.failures) - {Code.WRONG_MODEL} == set()
    assert bool(route.traffic.failures[Code.WRONG_MODEL]) == (backward or not seen)
    assert not route._stale
    assert not route._refused


@pytest.fixture(scope="module")
def pair(local: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemorySwarm]:
    """Each has everything."""
    cache = tmp_path_factory.mktemp("cache")
    with MemorySwarm(folder, [(0, NUM_BLOCKS)] * 2, cache=cache, training=True) as swarm:
        yield swarm


def used(swarm: MemorySwarm, model: Any) -> tuple[ServerPeer, ServerPeer]:
    """Who trains it, and the other one."""
    gradient_of_inputs(model, batch())
    first, second = swarm.peers
    return (first, second) if first._key.peer_id in planned(model) else (second, first)


def refuse(patch: pytest.MonkeyPatch, peer: ServerPeer, code: str, *, backward: bool) -> None:
    async def refusing(*_: Any) -> Any:
        raise Refused("no", code=code)

    patch.setattr(peer.training, "_backward" if backward else "_forward", refusing)


@pytest.mark.parametrize("backward", [False, True])
def test_who_does_not_serve_what_it_announced_is_asked_again_once_it_announces_anew(
    local: Any, pair: MemorySwarm, monkeypatch: pytest.MonkeyPatch, backward: bool
) -> None:
    model = pair.model(guest=True, training=EVERY_ROW)
    route, (peer, other) = route_of(model), used(pair, model)
    _, expected = gradient_of_inputs(local, batch())
    with monkeypatch.context() as patch:
        refuse(patch, peer, Code.WRONG_MODEL, backward=backward)
        assert distance(gradient_of_inputs(model, batch())[1], expected) <= TOLERANCE
    assert list(planned(model)) == [other._key.peer_id]
    assert route.traffic.failures[Code.WRONG_MODEL]

    async def announce() -> None:
        await peer.presence._announcer.announce()
        await route._client.discovery.refresh()  # which may have begun before
        await route._client.discovery.refresh()
        await route._planned()

    pair.thread.call(announce())
    assert not route._avoided


@pytest.mark.parametrize("backward", [False, True])
def test_one_peer_that_calls_its_rows_malformed_is_not_believed(
    local: Any, pair: MemorySwarm, monkeypatch: pytest.MonkeyPatch, backward: bool
) -> None:
    model = pair.model(guest=True, training=EVERY_ROW)
    peer, other = used(pair, model)
    refuse(monkeypatch, peer, Code.MALFORMED, backward=backward)
    _, expected = gradient_of_inputs(local, batch())
    assert distance(gradient_of_inputs(model, batch())[1], expected) <= TOLERANCE
    assert list(planned(model)) == [other._key.peer_id]
    assert route_of(model).traffic.failures[Code.MALFORMED]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_malformed_rows_are_an_error_once_nobody_says_otherwise_and_nothing_is_held_against_who_said_so(
    local: Any, pair: MemorySwarm, monkeypatch: pytest.MonkeyPatch, backward: bool, alone: bool
) -> None:
    model = pair.model(guest=True, training=EVERY_ROW)
    route, peers = route_of(model), used(pair, model)
    if alone:
        route._refused[peers[1]._key.peer_id] = float("inf")
    with monkeypatch.context() as patch, impatient():
        for peer in peers:
            refuse(patch, peer, Code.MALFORMED, backward=backward)
        with pytest.raises(Refused) as refused:
            gradient_of_inputs(model, batch())
    assert refused.value.code == Code.MALFORMED
    assert len(route._avoided) == alone
    _, expected = gradient_of_inputs(local, batch())
    assert distance(gradient_of_inputs(model, batch())[1], expected) <= TOLERANCE

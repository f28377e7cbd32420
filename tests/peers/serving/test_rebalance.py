"""A peer goes where blocks are missing, in one process over virtual wires: real engines, real records."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peers.errors import PeerTooSmall
from peers.host import server
from peers.host.server import ServerPeer
from peers.serving import rebalance
from peers.serving.rebalance import Rebalance
from routing.ids import BlockSpan, BlockSpans
from routing.placement import Move
from routing.records import PeerState
from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm

pytestmark = pytest.mark.usefixtures("plain_forwards")

HALF = NUM_BLOCKS // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


class Halves(MemorySwarm):
    """Peers of half a model each, and the model on this machine to compare with."""

    local: Any

    def check(self, model: Any) -> None:
        ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected, found = (
            one.generate(ids, attention_mask=torch.ones_like(ids), **options) for one in (self.local, model)
        )
        assert torch.equal(expected, found)


@pytest.fixture
def swarm(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Halves]:
    """Two peers with the first half of the model, one with the second; all may move."""
    monkeypatch.setattr(rebalance, "SETTLE_S", 0.01)
    monkeypatch.setattr(server, "MOVE_DRAIN_TIMEOUT_S", 0.1)
    local = save_checkpoint(FAMILIES["llama"], folder)
    spans = [(0, HALF), (0, HALF), (HALF, NUM_BLOCKS)]
    with Halves(folder, spans, cache=tmp_path, movable=True) as swarm:
        swarm.local = local
        yield swarm


def driver(peer: ServerPeer) -> Rebalance:
    async def move(move: Move) -> None:
        await peer.move(move.spans)

    peer.discovery.watch(peer.handler.served.model)
    return Rebalance(peer.discovery, peer.presence.describe, peer.presence.intend, move, rng=random.Random(0))


def test_a_peer_that_is_spare_takes_the_place_of_one_that_left_and_answers_stay_the_local_ones(
    swarm: Halves,
) -> None:
    model = swarm.model()
    swarm.check(model)
    first, second, last = swarm.peers
    drivers = [driver(first), driver(second)]

    async def heal() -> list[bool]:
        for peer in (first, second):
            await peer.discovery.refresh()
        assert not any([await one.look() for one in drivers]), "nothing is missing"
        await last.drain(timeout_s=1)
        swarm.network.cut(last._key.peer_id)
        for peer in (first, second):
            await peer.discovery.refresh()
        return [await one.look() for one in drivers]

    outcome = swarm.thread.call(heal(), timeout_s=30)
    assert sorted(outcome) == [False, True], "one of two goes"
    mover = (first, second)[outcome.index(True)]
    assert mover.handler.served.spans == BlockSpans.of(BlockSpan(HALF, NUM_BLOCKS))
    assert mover.presence.state is PeerState.ONLINE
    swarm.check(model)


def test_a_peer_moves_between_two_sessions_and_back(swarm: Halves) -> None:
    model = swarm.model()
    swarm.check(model)
    spare = swarm.peers[0]
    swarm.thread.call(spare.move(BlockSpans.of(BlockSpan(1, HALF))), timeout_s=30)
    swarm.check(model)
    swarm.thread.call(spare.move(BlockSpans.of(BlockSpan(0, HALF))), timeout_s=30)
    swarm.check(model)


def test_a_peer_that_cannot_load_other_blocks_serves_what_it_served(
    swarm: Halves, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = swarm.model()
    spare = swarm.peers[0]
    before, reload = spare.handler.served.spans, spare._reload

    async def refuse(spans: BlockSpans) -> None:
        if spans != before:
            raise PeerTooSmall("no room")
        await reload(spans)

    monkeypatch.setattr(spare, "_reload", refuse)
    with pytest.raises(PeerTooSmall):
        swarm.thread.call(spare.move(BlockSpans.of(BlockSpan(1, HALF))), timeout_s=30)
    assert spare.handler.served.spans == before
    assert spare.presence.state is PeerState.ONLINE
    swarm.check(model)

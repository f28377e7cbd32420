"""A peer goes where blocks are missing, in one process over virtual wires: real engines, real records."""

from __future__ import annotations

import asyncio
import errno
import gc
import random
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from peers import capacity, garbage
from peers.errors import CorruptCheckpoint, PeerTooSmall
from peers.host import blocks, server
from peers.host.server import ServerPeer
from peers.model.catalog import Checkpoint, resolve
from peers.model.cutting import SpanModel
from peers.model.loading import load_config, load_span, span_tensors
from peers.model.progress import Progress
from peers.runtime.works import EngineConfig
from peers.serving import rebalance
from peers.serving.rebalance import Rebalance
from routing.errors import NoRoute
from routing.ids import BlockSpan, BlockSpans
from routing.placement import MAX_PARTS, Move
from routing.records import PeerState
from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, random_model, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm, impatient
from tests.peers.model import test_hub

pytestmark = pytest.mark.usefixtures("plain_forwards")

HALF = NUM_BLOCKS // 2
hub = test_hub.server


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
    async def fetch(move: Move) -> None:
        await peer.fetch(move.spans)

    async def move(move: Move) -> None:
        await peer.move(move.spans)

    peer.discovery.watch(peer.handler.served.model)
    return Rebalance(peer.discovery, peer.presence.describe, peer.presence.intend, fetch, move, rng=random.Random(0))


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

    outcome = swarm.thread.call(heal(), timeout_s=100)
    assert sorted(outcome) == [False, True], "one of two goes"
    mover = (first, second)[outcome.index(True)]
    assert mover.handler.served.spans == BlockSpans.of(BlockSpan(HALF, NUM_BLOCKS))
    assert mover.presence.state is PeerState.ONLINE
    swarm.check(model)


def test_a_peer_moves_between_two_sessions_and_back(swarm: Halves) -> None:
    model = swarm.model()
    swarm.check(model)
    spare = swarm.peers[0]
    swarm.thread.call(spare.move(BlockSpans.of(BlockSpan(1, HALF))), timeout_s=100)
    swarm.check(model)
    swarm.thread.call(spare.move(BlockSpans.of(BlockSpan(0, HALF))), timeout_s=100)
    swarm.check(model)


def test_a_peer_that_moves_lets_go_of_the_weights_that_its_process_spares_from_collections(swarm: Halves) -> None:
    spare = swarm.peers[0]
    garbage.spare()
    try:
        for span in (BlockSpan(1, HALF), BlockSpan(0, HALF)):
            before = weakref.ref(spare.engine.model.module)
            swarm.thread.call(spare.move(BlockSpans.of(span)), timeout_s=120)
            assert before() is None
            assert gc.get_freeze_count(), "and spares those that it has now"
    finally:
        garbage.spare_nothing()


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
        swarm.thread.call(spare.move(BlockSpans.of(BlockSpan(1, HALF))), timeout_s=100)
    assert spare.handler.served.spans == before
    assert spare.presence.state is PeerState.ONLINE
    swarm.check(model)


def test_a_peer_that_is_ended_while_it_loads_other_blocks_says_goodbye(
    swarm: Halves, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm.check(swarm.model())
    spare = swarm.peers[0]

    async def end() -> None:
        loads = asyncio.Event()

        async def load(spans: BlockSpans) -> None:
            loads.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(spare, "_reload", load)
        moving = asyncio.create_task(spare.move(BlockSpans.of(BlockSpan(1, HALF))))
        await loads.wait()
        moving.cancel()
        await spare.drain(timeout_s=1)
        await swarm.thread.client.discovery.refresh()

    swarm.thread.call(end(), timeout_s=100)
    client = swarm.thread.client
    known = client.router.snapshot(client.discovery.now_s()).of_model(swarm.checkpoint.model_id)
    assert [a.state for a in known if a.peer_id == spare._key.peer_id] == [PeerState.DRAINING]


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), PeerTooSmall),
        (MemoryError(), PeerTooSmall),
        (OSError(errno.EIO, "Input/output error"), CorruptCheckpoint),
    ],
    ids=["device", "memory", "disk"],
)
def test_a_peer_whose_memory_or_disk_fails_while_it_loads_serves_what_it_served(
    swarm: Halves, monkeypatch: pytest.MonkeyPatch, broken: Exception, named: type[Exception]
) -> None:
    model = swarm.model()
    spare = swarm.peers[0]
    before = spare.handler.served.spans

    def load(checkpoint: Checkpoint, span: BlockSpan, **options: Any) -> SpanModel:
        if not before.covers(span) or len(span) < HALF:
            raise broken
        return load_span(checkpoint, span, **options)

    monkeypatch.setattr(blocks, "load_span", load)
    with pytest.raises(named):
        swarm.thread.call(spare.move(BlockSpans.of(BlockSpan(1, HALF))), timeout_s=100)
    assert spare.handler.served.spans == before
    assert spare.presence.state is PeerState.ONLINE
    swarm.check(model)


def test_what_would_not_fit_is_named_before_anything_is_given_up(
    swarm: Halves, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = swarm.peers[0]
    assert spare._max_parts() == MAX_PARTS
    monkeypatch.setattr(capacity, "FORWARD_BYTES", 1 << 40)
    assert spare._max_parts() == 1
    with pytest.raises(PeerTooSmall):
        swarm.thread.call(spare.fetch(BlockSpans.of(BlockSpan(1, HALF))), timeout_s=100)
    assert spare.presence.state is PeerState.ONLINE


def test_nobody_is_told_an_address_at_which_nobody_was_found_and_routes_come_back_with_it(swarm: Halves) -> None:
    model = swarm.model()
    last = swarm.peers[2]

    async def told(withdrawn: tuple[str, ...]) -> tuple[str, ...]:
        last.withdraw(frozenset(withdrawn))
        await last.presence.intend(None)  # announced by now
        client = swarm.thread.client
        await client.discovery.refresh()
        known = client.router.snapshot(client.discovery.now_s()).of_model(swarm.checkpoint.model_id)
        return next(a.addresses for a in known if a.peer_id == last._key.peer_id)

    assert swarm.thread.call(told(last._transport.addresses)) == ()
    with impatient(), pytest.raises(NoRoute):
        swarm.check(model)
    assert swarm.thread.call(told(())) == last._transport.addresses
    swarm.check(model)


def test_a_move_downloads_only_what_it_adds_while_it_serves_and_the_way_back_nothing(
    hub: test_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MOVE_DRAIN_TIMEOUT_S", 0.1)
    family = FAMILIES["llama"]
    random_model(family.config()).save_pretrained(tmp_path / "saved", max_shard_size="1KB")
    hub.files = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    with MemorySwarm(Path(test_hub.REPO), [(0, 2)], cache=tmp_path / "cache", movable=True) as swarm:
        (peer,) = swarm.peers
        checkpoint = swarm.checkpoint

        def move(spans: str) -> set[str]:
            hub.requests.clear()
            swarm.thread.call(peer.fetch(BlockSpans.parse(spans)), timeout_s=100)
            assert peer.presence.state is PeerState.ONLINE
            fetched = {name for name, wanted in hub.requests if wanted == "bytes=0-"}
            swarm.thread.call(peer.move(BlockSpans.parse(spans)), timeout_s=100)
            assert {name for name, wanted in hub.requests if wanted == "bytes=0-"} == fetched, "all was there"
            return fetched

        def files(block: int) -> set[str]:
            tensors = span_tensors(checkpoint, load_config(checkpoint), BlockSpan(block, block + 1))
            return {checkpoint.weight_map[tensor] for tensor in tensors}

        assert move("1:3") == files(2) - files(0) - files(1)
        assert move("0:1,3:4") == files(3) - files(0) - files(1) - files(2) != set()
        assert move("0:2") == set()


async def test_a_download_that_nobody_waits_for_any_more_ends(
    hub: test_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = await asyncio.to_thread(resolve, test_hub.REPO, cache=tmp_path / "cache")
    monkeypatch.setattr(blocks, "load_config", lambda checkpoint, device: None)
    monkeypatch.setattr(blocks, "span_tensors", lambda checkpoint, config, span, device: list(checkpoint.weight_map))
    arrived, go_on, ended = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def fetch(tensors: list[str], progress: Progress) -> Path:
        loop.call_soon_threadsafe(arrived.set)
        go_on.wait(60)
        try:
            return checkpoint.fetch(tensors, progress)
        finally:
            ended.set()

    config = EngineConfig(cache_tokens=256)
    waiting = cast(Checkpoint, SimpleNamespace(fetch=fetch, weight_map=checkpoint.weight_map))
    watched = blocks.Blocks(checkpoint=waiting, config=config, adapters={})
    fetching = asyncio.create_task(watched.fetch(BlockSpans.parse("0:1"), torch.device("cpu")))
    await arrived.wait()
    fetching.cancel()
    await asyncio.wait([fetching])
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 60)
    assert len(hub.asked_for() & set(test_hub.SHARDS)) < len(test_hub.SHARDS)

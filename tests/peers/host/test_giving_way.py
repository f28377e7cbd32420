"""A peer whose owner wants the memory: nothing is left of what it loaded, and it comes back as it was."""

from __future__ import annotations

import asyncio
import errno
import gc
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from prometheus_client.core import Metric
from transformers import LlamaConfig

from peers import capacity, garbage
from peers.errors import Paused
from peers.host import absence, blocks, server
from peers.host.events import Event
from peers.host.server import ServerPeer
from peers.model.cutting import SpanModel
from peers.model.loading import load_span
from peers.runtime.joined import JoinedEngine
from peers.wire.messages import Status
from routing.ids import BlockSpan, BlockSpans, Place, SessionId
from routing.records import Announcement, PeerState
from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, random_model, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm

WHOLE = (0, NUM_BLOCKS)


class Owned(MemorySwarm):
    """Peers that follow what an owner wants of the first one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.events: list[Event] = []
        self.peer: ServerPeer = self.peers[0]
        self.spans = self.peer.handler.served.spans
        self.following: asyncio.Task[None]
        self.at_once(lambda: setattr(self, "following", self.peer.tasks.spawn(self._follow(), name="give way")))

    async def _follow(self) -> None:
        await self.peer.give_way(self.events.append)

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def at_once(self, call: Callable[[], object]) -> None:
        """In the peers' loop."""

        async def do() -> None:
            call()

        self.thread.call(do(), timeout_s=100)

    def want(self, memory: bool) -> None:
        """The owner wants it, or nothing any more."""
        self.at_once(lambda: self._want(memory))

    def _want(self, memory: bool) -> None:
        self.peer.pause(memory)
        if memory:
            self.peer.give_back()

    def wait_for(self, *kinds: str) -> None:
        """Since the last wait."""
        assert self.eventually(lambda: len(self.events) >= len(kinds))
        assert self.kinds == [*kinds]
        self.events.clear()

    def known_as(self, state: PeerState) -> Announcement:
        """The record of the owner's peer, once a client reads this in it."""
        client = self.thread.client

        async def read() -> Announcement:
            client.discovery.watch(self.checkpoint.model_id)
            async with asyncio.timeout(60):
                while True:
                    await client.discovery.refresh()
                    known = client.router.snapshot(client.discovery.now_s()).of_model(self.checkpoint.model_id)
                    for record in known:
                        if record.peer_id == self.peer._key.peer_id and record.state is state:
                            return record
                    await asyncio.sleep(0.01)

        return self.thread.call(read(), timeout_s=100)

    def check(self, model: Any, local: Any) -> None:
        ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected, found = (one.generate(ids, attention_mask=torch.ones_like(ids), **options) for one in (local, model))
        assert torch.equal(expected, found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    return save_checkpoint(FAMILIES["llama"], folder)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "QUIET_LOOK_S", 0.01)
    monkeypatch.setattr(absence, "AGAIN_S", 0.05)


@pytest.fixture
def swarm(folder: Path, local: Any, tmp_path: Path) -> Iterator[Owned]:
    """Of two peers with the whole model, the first one has an owner."""
    with Owned(folder, [WHOLE, WHOLE], cache=tmp_path, movable=True) as swarm:
        yield swarm


def traces(peer: ServerPeer) -> dict[str, weakref.ref[Any]]:
    """Of what takes memory."""
    engines = peer.engine._engines if isinstance(peer.engine, JoinedEngine) else (peer.engine,)
    found: dict[str, weakref.ref[Any]] = {}
    for number, engine in enumerate(engines):
        cache: Any = engine._cache
        held = {
            "engine": engine,
            "module": engine.model.module,
            "weight": next(engine.model.module.parameters()),
            "cache": cache,
            "pool": cache._frames[0][0],
            "library": engine._library or cache._library,
            "thread": engine._thread,
        }
        if cache._tapes is not None:
            held |= {"tapes": cache._tapes, "arena": cache._tapes._arena}
        found |= {f"{name} {number}": weakref.ref(one) for name, one in held.items() if one is not None}
    return found


@contextmanager
def sparing() -> Iterator[None]:
    """As a process does that is for nothing else than a peer."""
    garbage.spare()
    try:
        yield
    finally:
        garbage.spare_nothing()


@pytest.mark.parametrize("spans", ["0:4", "0:1,2:4"])
def test_nothing_is_left_of_what_it_loaded_and_afterwards_it_serves_the_same(
    folder: Path, local: Any, tmp_path: Path, spans: str
) -> None:
    with Owned(folder, [spans, WHOLE], cache=tmp_path) as swarm, sparing():
        peer = swarm.peer
        swarm.thread.call(peer.engine.prepared(), timeout_s=100)
        swarm.check(swarm.model(), local)
        assert swarm.eventually_settled()
        left = traces(peer)
        swarm.want(memory=True)
        swarm.wait_for("gave_back")
        assert {name for name, trace in left.items() if trace() is not None} == set()
        assert peer.handler.engine is None
        assert swarm.known_as(PeerState.PAUSED).cache_tokens == 1024
        assert peer.presence.describe().free_tokens == 0
        swarm.check(swarm.model(), local)
        swarm.want(memory=False)
        swarm.wait_for("loading", "resumed")
        assert swarm.known_as(PeerState.ONLINE)
        assert not peer.absent
        assert gc.get_freeze_count(), "and collections pass by what it has now"
        assert peer.handler.served.spans == BlockSpans.parse(spans)
        swarm.kill_peer(swarm.peers[1]._key.peer_id)
        if spans == "0:4":
            swarm.check(swarm.model(), local)


def test_a_conversation_goes_on_elsewhere_before_and_returns_after(swarm: Owned, local: Any) -> None:
    swarm.at_once(lambda: swarm.peers[1].pause(True))
    model, ids = swarm.model(), torch.ones(1, 5, dtype=torch.long)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    with model.session():
        first = model.generate(ids, max_new_tokens=4, min_new_tokens=4, **options)
        assert len(swarm.peer.handler.ledger) == 1
        swarm.at_once(lambda: swarm.peers[1].pause(False))
        swarm.want(memory=True)
        second = model.generate(first, max_new_tokens=4, min_new_tokens=4, **options)
        swarm.wait_for("gave_back")
        swarm.want(memory=False)
        swarm.wait_for("loading", "resumed")
        swarm.at_once(lambda: swarm.peers[1].pause(True))
        third = model.generate(second, max_new_tokens=4, min_new_tokens=4, **options)
    assert torch.equal(third, local.generate(ids, max_new_tokens=12, min_new_tokens=12, **options))
    assert len(swarm.peer.handler.journal) == 0


def test_who_is_told_and_does_not_leave_is_forgotten_after_a_while(
    swarm: Owned, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LEAVE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(swarm.peer.handler, "_hand_over", lambda reason: None)
    swarm.at_once(lambda: swarm.peers[1].pause(True))
    model = swarm.model()
    with model.session():
        model.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=2, pad_token_id=0)
        swarm.at_once(lambda: swarm.peers[1].pause(False))
        swarm.want(memory=True)
        swarm.wait_for("gave_back")
        assert len(swarm.peer.handler.ledger) == 0
    swarm.check(model, local)


def test_a_peer_without_blocks_answers_whoever_asks_how_it_is(swarm: Owned) -> None:
    peer = swarm.peer
    swarm.want(memory=True)
    swarm.wait_for("gave_back")

    async def ask() -> tuple[Status | None, list[Metric]]:
        peer._status._made = None  # of this moment, not of a second ago
        links = swarm.thread.client.links
        _, pong = await links.ping(peer._key.peer_id, peer._transport.addresses, detail=True)
        return pong.status, await peer.metrics()._gather()

    status, metrics = swarm.thread.call(ask(), timeout_s=100)
    assert status is not None
    assert (status.pages, status.moved_from) == (0, ())
    states = next(metric for metric in metrics if metric.name == "hiveswarm_peer_state")
    assert [s.labels["state"] for s in states.samples if s.value] == ["paused"]
    swarm.thread.call(peer.measure_again(), timeout_s=100)
    swarm.at_once(lambda: peer.handler.release(Place(SessionId(b"0" * 16), 0)))


def test_nobody_waits_with_the_weights_in_hand_until_the_pause_is_over(swarm: Owned) -> None:
    engine = weakref.ref(swarm.peer.engine)

    async def begin() -> asyncio.Task[None]:
        swarm.peer.pause(True)
        waiting = asyncio.create_task(swarm.peer.measure_again())
        await swarm.peer.engine.prepared()
        return waiting

    waiting = swarm.thread.call(begin(), timeout_s=100)
    swarm.at_once(swarm.peer.give_back)
    swarm.wait_for("gave_back")
    assert engine() is None
    swarm.thread.call(asyncio.wait_for(waiting, 100), timeout_s=100)


def test_it_does_not_move_while_its_owner_wants_the_machine_nor_leave_in_the_middle_of_a_move(swarm: Owned) -> None:
    peer = swarm.peer

    async def move() -> None:
        moving = asyncio.create_task(peer.move(BlockSpans.of(BlockSpan(0, 2))))
        await asyncio.sleep(0)
        swarm._want(memory=True)
        await moving
        assert peer.presence.state is PeerState.PAUSED
        assert str(peer.handler.served.spans) == "0:2"
        assert not swarm.events

    swarm.thread.call(move(), timeout_s=100)
    swarm.wait_for("gave_back")
    with pytest.raises(Paused):
        swarm.thread.call(peer.move(BlockSpans.of(BlockSpan(1, 3))), timeout_s=100)
    swarm.want(memory=False)
    swarm.wait_for("loading", "resumed")
    assert str(swarm.known_as(PeerState.ONLINE).spans) == "0:2"


def test_what_took_the_memory_meanwhile_is_named_and_waited_for(
    swarm: Owned, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm.want(memory=True)
    swarm.wait_for("gave_back")
    with monkeypatch.context() as patch:
        patch.setattr(capacity, "_free_bytes", lambda device: 1 << 20)
        swarm.want(memory=False)
        swarm.wait_for("not_loaded")
        assert swarm.peer.presence.state is PeerState.PAUSED, "nobody counts on it"
    swarm.wait_for("loading", "resumed")
    swarm.at_once(lambda: swarm.peers[1].pause(True))
    swarm.check(swarm.model(), local)


def test_a_peer_that_finds_less_memory_has_less_cache_and_more_again_later(
    folder: Path, local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Owned(folder, [WHOLE], cache=tmp_path, cache_tokens=None) as swarm:
        peer = swarm.peer
        before = peer.cache_tokens
        sizes = peer._plan.request.sizes
        needed_bytes = sizes.process_bytes + sizes.forward_bytes + NUM_BLOCKS * sizes.block_bytes
        for free_bytes, as_before in ((needed_bytes + before // 2 * sum(sizes.token_bytes), False), (1 << 40, True)):
            monkeypatch.setattr(capacity, "_free_bytes", lambda device, free_bytes=free_bytes: free_bytes)
            swarm.want(memory=True)
            swarm.wait_for("gave_back")
            swarm.want(memory=False)
            swarm.wait_for("loading", "resumed")
            assert (peer.cache_tokens == before) == as_before
            assert peer.presence.describe().cache_tokens == peer.cache_tokens == peer.engine.stats().longest_tokens


@pytest.mark.parametrize(
    "broken",
    [
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
        RuntimeError("Allocator: can't allocate memory"),
    ],
    ids=["disk", "memory", "torch"],
)
def test_what_fails_while_it_loads_is_tried_again(
    swarm: Owned, local: Any, monkeypatch: pytest.MonkeyPatch, broken: Exception
) -> None:
    tried: list[PeerState] = []

    def load(*arguments: Any, **options: Any) -> SpanModel:
        tried.append(swarm.peer.presence.state)
        if len(tried) < 3:
            raise broken
        return load_span(*arguments, **options)

    monkeypatch.setattr(blocks, "load_span", load)
    swarm.want(memory=True)
    swarm.wait_for("gave_back")
    swarm.want(memory=False)
    swarm.wait_for("loading", "not_loaded", "loading", "loading", "resumed")
    assert tried == [PeerState.JOINING] * 3
    swarm.at_once(lambda: swarm.peers[1].pause(True))
    swarm.check(swarm.model(), local)


def test_a_disk_that_is_gone_is_said_and_the_peer_is_back_when_the_disk_is(
    folder: Path, local: Any, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    with Owned(tmp_path / "model", [WHOLE], cache=tmp_path / "cache") as swarm:
        swarm.want(memory=True)
        swarm.wait_for("gave_back")
        (tmp_path / "model").rename(tmp_path / "away")
        swarm.want(memory=False)
        assert swarm.eventually(lambda: "not_loaded" in swarm.kinds)
        assert swarm.peer.presence.state is not PeerState.ONLINE
        (tmp_path / "away").rename(tmp_path / "model")
        assert swarm.eventually(lambda: "resumed" in swarm.kinds)
        swarm.check(swarm.model(), local)


class Loading:
    """Holds up the loading of weights before it begins."""

    def __init__(self, swarm: Owned, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.ended, self.go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.loaded: list[SpanModel] = []
        loop = swarm.thread._loop

        def load(*arguments: Any, progress: Any, **options: Any) -> SpanModel:
            loop.call_soon_threadsafe(self.began.set)
            asyncio.run_coroutine_threadsafe(self.go_on.wait(), loop).result(60)
            try:
                self.loaded.append(load_span(*arguments, progress=progress, **options))
                return self.loaded[-1]
            finally:
                loop.call_soon_threadsafe(self.ended.set)

        monkeypatch.setattr(blocks, "load_span", load)


def test_who_wants_the_machine_while_the_blocks_are_loaded_has_it_with_its_memory(
    swarm: Owned, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm.want(memory=True)
    swarm.wait_for("gave_back")
    with monkeypatch.context() as patch:
        loading = Loading(swarm, patch)

        async def interrupt() -> None:
            swarm._want(memory=False)
            await loading.began.wait()
            assert swarm.peer.presence.state is PeerState.JOINING
            swarm.peer.pause(True)
            await asyncio.sleep(0)
            loading.go_on.set()
            await loading.ended.wait()

        swarm.thread.call(interrupt(), timeout_s=100)
        assert swarm.eventually(lambda: swarm.peer.presence.state is PeerState.PAUSED)
        assert loading.loaded == [], "not read to the end"
    assert swarm.peer.absent
    swarm.wait_for("loading")
    swarm.want(memory=False)
    swarm.wait_for("loading", "resumed")
    swarm.at_once(lambda: swarm.peers[1].pause(True))
    swarm.check(swarm.model(), local)


@pytest.mark.parametrize("phase", ["leaving", "absent", "failing", "loading"])
def test_a_peer_that_is_ended_says_goodbye_whatever_it_does_for_its_owner(
    folder: Path, local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    with Owned(folder, [WHOLE], cache=tmp_path) as swarm:
        peer, loading = swarm.peer, Loading(swarm, monkeypatch)
        ((engine, _),) = peer.engine.parts(BlockSpan(*WHOLE))

        async def reach() -> None:
            swarm._want(memory=True)
            if phase == "leaving":
                while not engine._stopping:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                return
            while not swarm.events:  # noqa: ASYNC110  # a list tells nobody
                await asyncio.sleep(0.01)
            if phase == "failing":
                monkeypatch.setattr(capacity, "_free_bytes", lambda device: 1 << 20)
            if phase != "absent":
                swarm._want(memory=False)
            if phase == "failing":
                while "not_loaded" not in swarm.kinds:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            if phase == "loading":
                await loading.began.wait()

        async def end() -> None:
            swarm.following.cancel()
            ending = asyncio.gather(peer.drain(timeout_s=1), asyncio.wait([swarm.following]))
            await asyncio.sleep(0)
            loading.go_on.set()
            await ending
            await peer.close()
            assert swarm.following.cancelled()

        swarm.thread.call(reach(), timeout_s=100)
        swarm.thread.call(end(), timeout_s=100)
        assert swarm.known_as(PeerState.DRAINING)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages stay until somebody wants them")
@pytest.mark.usefixtures("plain_forwards")
def test_the_machine_really_has_the_memory_back(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=NUM_BLOCKS, num_attention_heads=8, vocab_size=64
    )
    random_model(config).save_pretrained(tmp_path / "model")
    with Owned(tmp_path / "model", [WHOLE], cache=tmp_path / "cache") as swarm:
        ((engine, _),) = swarm.peer.engine.parts(BlockSpan(*WHOLE))
        weight_bytes = sum(weight.nbytes for weight in engine.model.module.parameters())
        assert weight_bytes > 60 << 20
        del engine
        model = swarm.model()
        model.generate(torch.ones(1, 50, dtype=torch.long), max_new_tokens=2, pad_token_id=0)
        for _ in range(3):
            full_bytes = resident_bytes()
            swarm.want(memory=True)
            swarm.wait_for("gave_back")
            assert resident_bytes() < full_bytes - 0.8 * weight_bytes
            swarm.want(memory=False)
            swarm.wait_for("loading", "resumed")
            assert resident_bytes() < full_bytes + 0.3 * weight_bytes
            model.generate(torch.ones(1, 50, dtype=torch.long), max_new_tokens=2, pad_token_id=0)


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)

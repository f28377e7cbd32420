"""What a node does with its parts when it leaves."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peers.capacity import FORWARD_BYTES, plan_capacity
from peers.host import blocks as loaded_blocks
from peers.host import server
from peers.model.loading import load_config
from peers.runtime import cost
from peers.runtime.joined import AnyEngine
from peers.runtime.probe import Probe
from peers.runtime.works import Done, Work
from peers.serving import announce
from peers.transport import links
from routing.ids import BlockSpan, BlockSpans
from routing.records import PeerState
from routing.routes import Route, RouteRequest
from routing.store import StoredRecord
from swarm.session import sending
from tests.helpers.families import FAMILIES, NUM_BLOCKS, save_checkpoint
from tests.helpers.memory_swarm import MemoryNode, MemorySwarm, new_key


def test_sessions_hear_that_a_peer_leaves_while_the_dht_keeps_it_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "tiny")
    monkeypatch.setattr(announce, "PUT_TIMEOUT_S", 0.2)
    with MemorySwarm(tmp_path / "tiny", [(0, 1)], cache=tmp_path / "cache") as swarm:
        (peer,) = swarm.peers
        said: list[str] = []

        async def hang(record: StoredRecord) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                said.append("given up")

        async def leave() -> None:
            monkeypatch.setattr(peer.presence._announcer._store, "put", hang)
            monkeypatch.setattr(peer.handler, "_hand_over", lambda reason: said.append("sessions"))
            await peer.drain(timeout_s=1.0)

        swarm.thread.call(leave(), timeout_s=100)
        assert said == ["sessions", *["given up"] * max(2, len(said) - 1)], "and a renewal that falls due just then"
        assert peer.presence.state is PeerState.DRAINING


@pytest.mark.parametrize(("host", "blocks"), [("/ip4/10.9.9.9", "2:4"), ("/ip4/193.99.144.80", "0:2")])
def test_a_peer_that_joins_counts_those_whom_its_clients_could_use(tmp_path: Path, host: str, blocks: str) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "tiny")
    with MemorySwarm(tmp_path / "tiny", [(0, 2)], cache=tmp_path / "cache") as swarm:
        plan = plan_capacity(
            load_config(swarm.checkpoint),
            dtype="float32",
            device="cpu",
            max_memory_bytes=8 << 30,
            cache_tokens=64,
            blocks=BlockSpans.of(BlockSpan(0, 2)),
        )

        async def choose() -> BlockSpans:
            node = MemoryNode(swarm.network, key := new_key())
            node.transport._addresses = (f"{host}/tcp/4001/p2p/{key.peer_id}",)
            peer = server.ServerPeer(node.transport, node.store, key=key, network="test")
            try:
                return await peer.choose_span(swarm.checkpoint, plan, None, alone=True)
            finally:
                await peer.close()
                await node.close()

        assert str(swarm.thread.call(choose(), timeout_s=100)) == blocks, "the other has a private address"


def test_a_peer_that_took_too_many_blocks_before_it_knew_its_speed_serves_some_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "tiny")
    measure = loaded_blocks.measure

    async def undisturbed(engine: AnyEngine, *, room_bytes: int) -> Probe:
        return replace(await measure(engine, room_bytes=room_bytes), disturbed=False)

    monkeypatch.setattr(loaded_blocks, "measure", undisturbed)
    with MemorySwarm(tmp_path / "tiny", [(0, 1), (1, 3)], cache=tmp_path / "cache") as swarm:
        plan = plan_capacity(load_config(swarm.checkpoint), dtype="float32", device="cpu", max_memory_bytes=8 << 30)

        async def say_that_they_are_fast() -> None:
            for peer in swarm.peers:
                peer.probe = replace(peer.probe, decode_s_per_block=1e-9)
                peer._offer()
                await peer.presence.intend(None)

        async def join() -> tuple[BlockSpans, BlockSpans, BlockSpans, int, int]:
            node = MemoryNode(swarm.network, key := new_key())
            peer = server.ServerPeer(node.transport, node.store, key=key, network="test")
            try:
                spans = await peer.choose_span(swarm.checkpoint, plan, None)
                settled = plan.beside(0, blocks=spans)
                await peer.load(swarm.checkpoint, spans, settled, threads=1, fit=True)
                said = peer.presence.describe()
                return spans, said.spans, peer.handler.served.spans, peer.engine.model.span.start, said.max_blocks
            finally:
                await peer.close()
                await node.close()

        swarm.thread.call(say_that_they_are_fast(), timeout_s=100)
        chosen, said, served, start, max_blocks = swarm.thread.call(join(), timeout_s=100)
        assert (str(chosen), str(said), str(served), start) == ("0:4", "3:4", "3:4", 3), "which nobody else has"
        assert max_blocks == 0, "it was not said to be movable"


def test_a_peer_announces_how_fast_it_sends_and_prompts_are_planned_for_the_rows_that_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "tiny")
    monkeypatch.setattr(sending, "BULK_BYTES", 1024)  # its hidden states are small
    monkeypatch.setattr(links, "TIMED_BYTES", 1024)
    monkeypatch.setattr(links, "QUIET_S", 0.0)
    asked: list[RouteRequest] = []
    with MemorySwarm(tmp_path / "tiny", [(0, 2), (2, 4)], cache=tmp_path / "cache") as swarm:
        first, second = swarm.peers
        plan = swarm.thread.client.router.plan

        def watched(request: RouteRequest, now_s: float) -> Route:
            if request.session is not None:  # else it asks over how many peers a prompt will probably go
                asked.append(request)
            return plan(request, now_s)

        monkeypatch.setattr(swarm.thread.client.router, "plan", watched)
        first.router.on_rtt(second._key.peer_id, 0.0, first.discovery.now_s())
        swarm.network.bytes_per_s = 200_000.0
        model = swarm.model()
        for number in range(6):  # the first one opens the lane, and other prompts have other first tokens
            prompt = torch.arange(200).remainder(50).add(number).unsqueeze(0)
            model.generate(prompt, max_new_tokens=1, do_sample=False)
        assert swarm.eventually(lambda: first.presence.describe().uplink_bytes_per_s > 0)
        assert first.presence.describe().uplink_bytes_per_s <= 2**18, "no faster than the wires"
        assert second.presence.describe().uplink_bytes_per_s == 0, "it sends on to nobody"
    assert {(request.tokens > 1, request.back_tokens) for request in asked} == {(True, 1)}


def test_a_peer_that_was_disturbed_measures_itself_again_when_it_serves_nobody_and_announces_what_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "tiny")
    monkeypatch.setattr(server, "QUIET_LOOK_S", 0.01)
    with MemorySwarm(tmp_path / "tiny", [(0, NUM_BLOCKS)], cache=tmp_path / "cache") as swarm:
        (peer,) = swarm.peers
        peer.probe = replace(peer.probe, decode_s_per_block=10.0, prefill_s_per_token_block=0.0, disturbed=True)
        budget, model, ids = peer.engine.config.token_budget, swarm.model(), torch.ones(1, 5, dtype=torch.long)
        measured: list[bool] = []

        async def begin() -> asyncio.Task[None]:
            task = asyncio.create_task(peer.measure_again())
            task.add_done_callback(lambda _: measured.append(True))
            await peer.engine.prepared()
            await asyncio.sleep(0.1)
            return task

        async def end(task: asyncio.Task[None]) -> None:
            await task

        with model.session():
            model.generate(ids, max_new_tokens=2, pad_token_id=0)
            task = swarm.thread.call(begin(), timeout_s=100)
            assert not measured, "somebody may go on at any moment"
        swarm.thread.call(end(task), timeout_s=100)
        said = peer.presence.describe()
        assert (said.prefill_s_per_token_block, peer.engine.config.token_budget) == (0.0, budget)
        assert 0 < said.decode_s_per_block == peer.probe.decode_s_per_block * peer.slower < 10.0


def test_forwards_become_larger_where_they_could_not_be_measured_before_the_engine_was_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "tiny")
    rooms: list[int] = []
    with MemorySwarm(tmp_path / "tiny", [(0, NUM_BLOCKS)], cache=tmp_path / "cache") as swarm:
        (peer,) = swarm.peers
        peer.probe = replace(peer.probe, disturbed=True, forward_bytes=0)
        small, large = replace(peer.probe, token_budget=512), replace(peer.probe, token_budget=1024, forward_bytes=9)
        left = iter((large, small))

        async def measured(engine: AnyEngine, *, room_bytes: int) -> Probe:
            rooms.append(room_bytes)
            engine.set_token_budget(2048)  # as it tries what is too large
            return replace(next(left), disturbed=False)

        monkeypatch.setattr(server, "measure", measured)
        for _ in range(2):  # what was found is not lost where less is found later
            swarm.thread.call(peer.measure_again(), timeout_s=100)
            assert (peer.probe.token_budget, peer.probe.forward_bytes, peer.probe.disturbed) == (1024, 9, False)
            assert peer.engine.config.token_budget == 1024
        assert rooms == [FORWARD_BYTES] * 2, "as at its start: the plan has it set aside"


def test_a_peer_announces_what_its_forwards_take_lately_where_that_is_clearly_more_than_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "tiny")
    monkeypatch.setattr(cost, "SPACING_S", 0.0)
    with MemorySwarm(tmp_path / "tiny", [(0, NUM_BLOCKS)], cache=tmp_path / "cache") as swarm:
        (peer,) = swarm.peers
        before = peer.probe
        quick = cost.ForwardCost(base_s=1e-9, per_token_s=0.0, per_token_past_s=0.0)
        peer.probe = replace(before, block_cost=quick)
        ids = torch.ones(1, 5, dtype=torch.long)
        swarm.model().generate(ids, max_new_tokens=cost.LATELY + 2, pad_token_id=0)
        assert peer.slower == cost.SLOWER_MAX, "no block takes a nanosecond"
        said = peer.presence.describe()
        assert said.decode_s_per_block == cost.SLOWER_MAX * before.decode_s_per_block
        assert said.prefill_s_per_token_block == cost.SLOWER_MAX * before.prefill_s_per_token_block

        peer.probe = replace(peer.probe, decode_s_per_block=10.0)
        swarm.thread.call(peer.measure_again(), timeout_s=100)
        assert peer.probe.block_cost != quick, "the faster probe's"
        assert peer.slower == 1.0, "what was before is forgotten"
        assert peer.presence.describe().decode_s_per_block == peer.probe.decode_s_per_block < 10.0


def test_a_peer_that_loads_other_blocks_neither_is_slower_nor_measures_itself(tmp_path: Path) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "tiny")
    with MemorySwarm(tmp_path / "tiny", [(0, NUM_BLOCKS)], cache=tmp_path / "cache") as swarm:
        (peer,) = swarm.peers

        async def measure() -> None:
            peer.handler.vacate()
            peer.handler.leave_engine()
            assert peer.slower == 1.0
            await peer.measure_again()

        swarm.thread.call(measure(), timeout_s=100)


def test_a_peer_does_not_measure_itself_while_its_owner_wants_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "tiny")
    monkeypatch.setattr(server, "QUIET_LOOK_S", 0.01)
    with MemorySwarm(tmp_path / "tiny", [(0, NUM_BLOCKS)], cache=tmp_path / "cache") as swarm:
        (peer,) = swarm.peers
        peer.probe = replace(peer.probe, decode_s_per_block=10.0, disturbed=True)
        works: list[bool] = []
        run = peer.engine.run

        async def watched(work: Work) -> Done:
            works.append(peer.handler.paused)
            if len(works) == 3:
                peer.pause(True)
                await asyncio.Event().wait()
            return await run(work)

        async def measure() -> None:
            monkeypatch.setattr(peer.engine, "run", watched)
            peer.pause(True)
            waiting = asyncio.create_task(peer.measure_again())
            await peer.engine.prepared()
            await asyncio.sleep(0.1)
            assert not works, "it is paused"
            peer.pause(False)
            await waiting
            assert works == [False, False, False], "it was paused again"
            assert (peer.probe.decode_s_per_block, peer.probe.disturbed) == (10.0, True)
            assert peer.engine.stats().sessions == 0
            peer.pause(False)
            await peer.measure_again()
            assert peer.probe.decode_s_per_block < 10.0

        swarm.thread.call(measure(), timeout_s=100)

"""What a peer says of itself, from real peers with a real engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peers.wire.messages import Status
from routing.ids import BlockSpan, BlockSpans
from tests.helpers.families import FAMILIES, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm

pytestmark = pytest.mark.usefixtures("plain_forwards")


def status(swarm: MemorySwarm, number: int) -> Status:
    peer = swarm.peers[number]
    peer._status._made = None  # of this moment, not of a second ago
    _, pong = swarm.thread.call(
        swarm.thread.client.links.ping(peer._key.peer_id, peer._transport.addresses, detail=True)
    )
    assert pong.status is not None
    return pong.status


def test_a_status_tells_what_was_computed_and_moved_and_what_stands_against_others(tmp_path: Path) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "model")
    with MemorySwarm(tmp_path / "model", [(0, 2), (2, 4)], cache=tmp_path / "cache", movable=True) as swarm:
        fresh = status(swarm, 0)
        assert (fresh.steps, fresh.tokens, fresh.decode_s_per_block, fresh.moved_from) == (0, 0, None, ())
        assert fresh.pages == fresh.free_pages > 0
        assert (fresh.device, fresh.memory_offered_bytes) == ("cpu", 8 << 30)
        assert fresh.memory_used_bytes > 1 << 20
        model = swarm.model()
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert swarm.eventually_settled()
        used = status(swarm, 0)
        assert (used.steps, used.tokens) == (4, 6)
        assert used.decode_s_per_block is not None
        assert used.prefill_s_per_token_block is not None

        first, second = swarm.peers
        now_s = first.discovery.now_s()
        first.router.on_rtt(second._key.peer_id, 0.25, now_s)
        first.router.on_failure(second._key.peer_id, now_s, "it was slow")
        said = status(swarm, 0)
        (trip,) = said.round_trips
        assert (trip.peer, trip.rtt_s) == (second._key.peer_id, pytest.approx(0.25, rel=0.01))
        (opinion,) = said.opinions
        assert (opinion.peer, opinion.reason) == (second._key.peer_id, "it was slow")
        assert opinion.strikes == pytest.approx(1.0, rel=0.01)

        swarm.thread.call(first.move(BlockSpans.of(BlockSpan(1, 3))))
        moved = status(swarm, 0)
        assert moved.moved_from == ((0, 2),)
        assert (moved.decode_s_per_block, moved.steps) == (None, 4)
        assert moved.uptime_s >= said.uptime_s


def test_who_asks_twice_in_a_second_gets_one_answer(tmp_path: Path) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "model")
    with MemorySwarm(tmp_path / "model", [(0, 4)], cache=tmp_path / "cache") as swarm:
        report = swarm.peers[0]._status
        clock_s = 100.0
        report.clock = lambda: clock_s
        report._made = None
        first = report()
        assert report() is first
        clock_s += 1.0
        assert report() is not first

"""What a step of training takes over links of 100 ms and 100 Mbit/s: the client's driver and real peers on a virtual
clock, with blocks that take their time and compute nothing."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from peers.model.adapters import Adapter
from peers.runtime.gradients import Graph, Outcome, Passage
from peers.serving import training
from peers.serving.admission import AdmissionLimits
from peers.serving.shelves import TrainingLimits
from peers.serving.training import Training
from peers.transport.links import Links
from peers.transport.memory import MemoryNetwork
from peers.wire.messages import AdapterTarget
from routing.ids import PeerId
from routing.router import Router
from routing.routes import Hop, Route
from swarm.session.live import RemoteModel
from swarm.session.training import TrainingRoute
from swarm.session.uploads import Uploads
from tests.peers.serving import hops

HOPS = 3
HIDDEN = 576
"""The default model's."""
LENGTHS = (64,) * 8
TOKEN_BLOCK_S = 1.1e-4
"""As one core of the machine of `scripts/bench` takes, in either direction."""
BLOCKS = 4
BLOCK_SCALE = 10 / BLOCKS
"""A hop of `hops` has four blocks, one of the default model ten."""
ADAPTER_VALUES = 153_600
"""Of a hop: LoRA of rank 8 on two projections of each of its blocks."""
PROJECTIONS = {"q": 576, "v": 192}
LATENCY_S = 0.05
BYTES_PER_S = 100e6 / 8


class Clockwork(hops.ToyEngine):
    """An engine with one thread, in which work takes as long as it has rows and blocks."""

    model = SimpleNamespace(max_positions=1000, device="cpu")

    @staticmethod
    def linear_shape(block: int, path: str) -> tuple[int, int] | None:
        return HIDDEN, PROJECTIONS[path]

    async def run_between(self, owner: PeerId, job: Any) -> tuple[Outcome, float]:
        async with self._turn:
            outcome = job(64)
            compute_s = len(outcome.rows_TH) * BLOCKS * BLOCK_SCALE * TOKEN_BLOCK_S
            await asyncio.sleep(compute_s)
            return outcome, compute_s


def forward(_: Clockwork, passage: Passage, keep: bool, __: int) -> Outcome:
    return Outcome(passage.input_TH + 1, Graph() if keep else None, 0.0)


def backward(_: Clockwork, passage: Passage, gradient: Tensor, __: Graph | None, ___: int) -> Outcome:
    added = None if passage.adapter is None else torch.full_like(passage.adapter.values, passage.tokens)
    return Outcome(gradient * 2, None, 0.0, added)


def an_adapter(number: int) -> Adapter:
    targets = tuple(
        AdapterTarget(block, name, round(8 * BLOCK_SCALE), HIDDEN, outputs, 1.0)
        for block in range(HOPS * BLOCKS)
        for name, outputs in PROJECTIONS.items()
    )
    return Adapter(targets, torch.full((HOPS * ADAPTER_VALUES,), float(number)))


async def step_s(monkeypatch: pytest.MonkeyPatch, network: MemoryNetwork, *, lora: bool) -> float:
    """Seconds of forward and backward, once the way is known and an adapter was there before."""
    monkeypatch.setattr(training, "_forward_job", forward)
    monkeypatch.setattr(training, "_backward_job", backward)
    monkeypatch.setattr(hops, "HIDDEN", HIDDEN)
    loop = asyncio.get_running_loop()
    peers = [hops.Hop(network, index) for index in range(HOPS)]
    trainings = []
    for peer in peers:
        peer.handler._engine = cast(Any, Clockwork())
        peer.admission.limits = AdmissionLimits()
        trainings.append(Training(links=peer.links, handler=peer.handler, limits=TrainingLimits(), clock=loop.time))
        await peer.start()
    links = Links(network.transport(hops.peer_id(1), client_mode=True), network="test", software="test")
    spans = [Hop(peer_id=peer.peer_id, span=peer.span, addresses=peer.transport.addresses) for peer in peers]
    discovery = SimpleNamespace(now_s=loop.time, route=lambda _: asyncio.sleep(0, Route(hops=tuple(spans), cost_s=1.0)))
    client = SimpleNamespace(links=links, discovery=discovery, router=Router())
    posts = SimpleNamespace(client=client, closed=False, post=lambda work, *arguments: work(*arguments))
    model = RemoteModel(model=hops.MODEL, num_blocks=HOPS * BLOCKS, hidden_size=HIDDEN, regime_key=lambda _: None)
    route = TrainingRoute(cast(Any, posts), model, Uploads(links, hops.MODEL))
    route.install()
    rows = torch.ones(sum(LENGTHS), HIDDEN)
    try:
        for number in range(2):
            began_s, adapter = loop.time(), an_adapter(number) if lora else None
            output, batches = await route._forward(LENGTHS, 64, rows, True, (), adapter, None)
            assert torch.equal(output, rows + HOPS)
            tape = SimpleNamespace(batches=batches, adapter=adapter)
            given, added = await route._backward(cast(Any, tape), rows)
            took_s = loop.time() - began_s
            assert torch.equal(given, rows * 2**HOPS)
            assert added is None or torch.equal(added, torch.full_like(added, sum(LENGTHS)))
        return took_s
    finally:
        await route.close()
        await links.close()
        for peer in peers:
            await peer.close()


@pytest.mark.looptime
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "prompt"])
async def test_slow_links_add_the_legs_of_one_micro_batch_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    near_s = await step_s(monkeypatch, MemoryNetwork(), lora=lora)
    far_s = await step_s(monkeypatch, MemoryNetwork(latency_s=LATENCY_S, bytes_per_s=BYTES_PER_S), lora=lora)
    leg_s = LATENCY_S + sum(LENGTHS) // (HOPS + 1) * HIDDEN * 4 / BYTES_PER_S
    adapter_s = ADAPTER_VALUES * 4 / BYTES_PER_S if lora else 0.0  # there before the first rows, back behind the last
    assert far_s - near_s <= 1.01 * (4 * HOPS * leg_s + 2 * adapter_s)

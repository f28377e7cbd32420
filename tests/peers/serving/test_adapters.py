"""Sessions with a client's own adapter at a peer: who may name one, and what becomes of it."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch import Tensor

from peers.model.adapters import Adapter, as_rows
from peers.serving.adapters import AdapterLimits
from peers.wire import tensors
from peers.wire.messages import PREFIX, AdapterTarget, Code, Failed, Opened
from peers.wire.messages import Adapter as AdapterMessage
from tests.peers.serving.hops import HIDDEN, MODEL, Client, Hop, Route, expected, session_id


def adapter_of(seed: float = 0.5, **changes: object) -> Adapter:
    fields = {"block": 1, "module": "proj", "rank": 2, "inputs": HIDDEN, "outputs": 2, "scaling": 1.0, **changes}
    target = AdapterTarget(**fields)  # type: ignore[arg-type]
    return Adapter((target,), torch.full((target.rank * (target.inputs + target.outputs),), seed))


async def upload(client: Client, hop: Hop, adapter: Adapter, *, start: int = 0, end: int = 4) -> bytes:
    values = as_rows(adapter.values)
    message = AdapterMessage(
        adapter=adapter.name,
        model=MODEL.digest,
        start=start,
        end=end,
        targets=adapter.targets,
        first=0,
        count=len(values),
    )
    await client.send(hop, message, tensors.pack(values, "float32"))
    return adapter.name


async def declined(client: Client, hop: Hop, **changes: object) -> str:
    (message,) = client.opens([hop], **changes)
    await client.send(hop, message)
    return await client.refusal()


def adapters_of(hop: Hop) -> list[Tensor | None]:
    return [None if work.adapter is None else work.adapter.values for work in hop.engine.ran]


@pytest.mark.looptime
async def test_a_session_and_its_forks_compute_with_the_adapter_that_their_client_sent() -> None:
    async with Route(1) as route:
        client, (hop,) = route.client, route.hops
        adapter = adapter_of()
        assert await declined(client, hop, adapter=adapter.name) == Code.UNKNOWN_ADAPTER
        name = await upload(client, hop, adapter)
        await client.open([hop], adapter=name)
        await client.open([hop], session=2)
        await client.step(hop, 1, 0, 3)
        assert torch.equal(await client.result(), expected([hop], 0, 3))
        await client.step(hop, 2, 3, session=3, parent=session_id(1).raw)
        await client.result()
        await client.step(hop, 3, 0, session=2)
        await client.result()
        assert [values is None for values in adapters_of(hop)] == [False, False, True]
        assert torch.equal(adapters_of(hop)[0], adapter.values)
        other = route.another_client()
        assert await declined(other, hop, session=4, adapter=name) == Code.UNKNOWN_ADAPTER


def prefix_of(ranks: dict[int, int]) -> Adapter:
    targets = tuple(AdapterTarget(block, PREFIX, rank, 2, 2, 1.0) for block, rank in ranks.items())
    return Adapter(targets, torch.ones(sum(ranks.values()) * 4))


@pytest.mark.looptime
async def test_a_prefix_stands_before_all_blocks_of_a_session_or_before_none() -> None:
    async with Route(1) as route:
        client, (hop,) = route.client, route.hops
        whole = prefix_of(dict.fromkeys(range(4), 3))
        for part in (prefix_of({0: 3, 1: 3, 3: 3}), prefix_of({0: 3, 1: 3, 2: 2, 3: 3})):
            assert await declined(client, hop, adapter=await upload(client, hop, part)) == Code.MALFORMED
        name = await upload(client, hop, whole)
        hop.engine.packs_sessions = False
        assert await declined(client, hop, adapter=name) == Code.MALFORMED
        hop.engine.packs_sessions = True
        await client.open([hop], adapter=name, prefix=(bytes(16),))
        assert hop.engine.opened == [], "what stands behind it is not kept for others"
        await client.step(hop, 1, 0, 3)
        assert torch.equal(await client.result(), expected([hop], 0, 3))


@pytest.mark.looptime
async def test_one_that_was_dropped_is_asked_for_and_the_session_goes_on_with_what_it_holds() -> None:
    async with Route(1) as route:
        client, (hop,) = route.client, route.hops
        name = await upload(client, hop, adapter_of())
        await client.open([hop], adapter=name)
        await client.step(hop, 1, 0, 3)
        await client.result()
        hop.handler.adapters.clear()
        await client.step(hop, 2, 3)
        message, _ = await client.next(Failed)
        assert (message.code, message.step) == (Code.UNKNOWN_ADAPTER, 2)
        await upload(client, hop, adapter_of())
        await client.send(hop, client.opens([hop], epoch=2, adapter=name, keep=3)[0])
        assert (await client.next(Opened))[0].held == 3
        await client.step(hop, 2, 3, epoch=2)
        assert torch.equal(await client.result(), expected([hop], 3, 4))
        # what one adapter computed, no other one goes on with
        await client.send(hop, client.opens([hop], epoch=3, keep=4)[0])
        assert (await client.next(Opened))[0].held == 0


@pytest.mark.looptime
async def test_an_adapter_in_use_outlives_its_lease_and_a_second_upload() -> None:
    async with Route(1) as route:
        client, (hop,) = route.client, route.hops
        hop.handler.adapters.wardrobe.limits = AdapterLimits(lease_s=7.0)
        name = await upload(client, hop, adapter_of())
        await client.open([hop], adapter=name)
        for step in range(4):
            await client.step(hop, step, step)
            await client.result()
            await upload(client, hop, adapter_of())
            await asyncio.sleep(5.0)
        assert None not in adapters_of(hop)
        await asyncio.sleep(20.0)
        assert len(hop.handler.adapters.wardrobe) == 0


@pytest.mark.looptime
async def test_what_is_wrong_with_an_adapter_is_told_to_the_open_that_needs_it() -> None:
    async with Route(1) as route:
        client, (hop,) = route.client, route.hops
        hop.handler.adapters.wardrobe.limits = AdapterLimits(max_bytes=1500, max_bytes_per_peer=1200)
        for adapter, code in (
            (adapter_of(module="norm"), Code.MALFORMED),
            (adapter_of(inputs=HIDDEN + 1), Code.MALFORMED),
            (adapter_of(float("nan")), Code.MALFORMED),
            (adapter_of(rank=200), Code.TOO_LONG),
        ):
            assert await declined(client, hop, adapter=await upload(client, hop, adapter)) == code
        assert (
            await declined(client, hop, adapter=await upload(client, hop, adapter_of(), start=3, end=2))
            == Code.WRONG_MODEL
        )
        assert len(hop.handler.adapters.wardrobe) == 0
        name = await upload(client, hop, adapter_of())
        assert await declined(client, hop, adapter=name, start=2) == Code.MALFORMED, "none of its blocks"
        await upload(client, hop, adapter_of(0.7))  # there is room for one of a client
        assert await declined(client, hop, adapter=name) == Code.UNKNOWN_ADAPTER
        other = route.another_client()
        assert await declined(other, hop, adapter=await upload(other, hop, adapter_of())) == Code.BUSY

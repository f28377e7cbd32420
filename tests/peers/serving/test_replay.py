"""A route that lost a hop: the others go on with what they hold, and the one before the gap sends it again."""

from __future__ import annotations

import asyncio

import pytest
import torch
from msgspec.structs import replace

from peers.wire.messages import Code, Opened, Replay, Result
from routing.ids import Place
from tests.peers.serving.hops import Client, Hop, Route, expected, session_id

pytestmark = pytest.mark.looptime


def replay(hop: Hop, step: int, first: int, count: int, *, epoch: int = 2, **changes: int) -> Replay:
    fields = {"want_from": count} | changes
    return Replay(
        session=session_id(1).raw, block=hop.span.start, epoch=epoch, step=step, first=first, count=count, **fields
    )


async def reopened(client: Client, hops: list[Hop], keep: list[int], epoch: int = 2) -> dict[str, tuple[int, int]]:
    """What every hop says it holds, and from where on it can send again what it sent."""
    for message, hop, kept in zip(client.opens(hops, epoch=epoch), hops, keep, strict=True):
        await client.send(hop, replace(message, keep=kept))
    said = {}
    for _ in hops:
        link, message, _ = await client.next_from(Opened)
        said[link.remote] = (message.held, message.journal)
    return said


async def test_a_replacement_is_rebuilt_by_its_predecessor_and_no_other_hop_computes_again() -> None:
    async with Route(4) as route:
        client, (first, second, last, spare) = route.client, route.hops
        spare.span, spare.handler.served = second.span, second.handler.served
        await client.open([first, second, last])
        await client.step(first, 1, 0, 5)
        await client.result()
        await client.step(first, 2, 5, 2)
        await client.result()
        hops = [first, spare, last]
        said = await reopened(client, hops, [7, 0, 7])
        assert said == {first.peer_id: (7, 0), spare.peer_id: (0, 0), last.peer_id: (7, 7)}
        ran = [len(hop.engine.ran) for hop in hops]
        await client.send(first, replay(first, 3, 0, 3, stop=spare.span.end))
        await client.send(first, replay(first, 4, 3, 4, stop=spare.span.end))
        for step in (3, 4):
            link, message, _ = await client.next_from(Result)
            assert (link.remote, message.step, message.count, len(message.hops)) == (spare.peer_id, step, 0, 1)
        assert [len(hop.engine.ran) for hop in hops] == [ran[0], 2, ran[2]]
        await client.step(first, 5, 7, epoch=2)
        assert torch.equal(await client.result(), expected([first, second, last], 7, 8))


async def test_what_a_hop_computed_before_the_route_was_lost_is_sent_on_under_its_own_step() -> None:
    async with Route() as route:
        client, (first, second, _) = route.client, route.hops
        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        await client.result()
        first.engine.compute_s = 0.5
        await client.step(first, 2, 5)
        await asyncio.sleep(0.1)
        said = await reopened(client, route.hops, [6, 6, 6])
        assert said[first.peer_id] == (6, 0), "it waits for what is under way"
        assert said[second.peer_id] == (5, 0)
        await client.send(first, replay(first, 2, 5, 1, want_from=0))
        assert torch.equal(await client.result(), expected(route.hops, 5, 6))
        assert len(first.engine.ran) == 2


async def test_pushes_and_replays_of_another_epoch_or_by_another_peer_are_refused() -> None:
    async with Route() as route:
        client, (first, second, last) = route.client, route.hops
        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        await client.result()
        await reopened(client, route.hops, [5, 5, 5])
        for hop in route.hops:
            await client.step(hop, 2, 5, epoch=1)
            assert await client.refusal() == Code.STALE_EPOCH
        await client.send(first, replay(first, 2, 0, 5, epoch=1))
        assert await client.refusal() == Code.STALE_EPOCH
        intruder = route.another_client()
        await intruder.send(first, replay(first, 2, 0, 5))
        assert await intruder.refusal() == Code.FORBIDDEN
        await intruder.step(second, 2, 0, epoch=2)
        assert await intruder.refusal() == Code.FORBIDDEN
        await client.send(second, replay(second, 2, 4, 2))
        assert await client.refusal() == Code.NOT_JOURNALLED, "never sent"
        await client.send(last, replay(last, 2, 0, 5))
        assert await client.refusal() == Code.NOT_JOURNALLED, "nobody is behind it"
        first.handler.journal.release(Place(session_id(1), first.span.start))
        await client.send(first, replay(first, 2, 0, 5))
        assert await client.refusal() == Code.NOT_JOURNALLED
        assert all(len(hop.engine.ran) == 1 for hop in route.hops)


async def test_a_hop_keeps_no_more_than_it_is_told_and_nothing_of_other_blocks() -> None:
    async with Route() as route:
        client, (first, second, _) = route.client, route.hops
        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        await client.result()
        assert set((await reopened(client, route.hops, [3, 3, 3])).values()) == {(3, 0), (3, 3)}
        await client.step(first, 2, 4, epoch=2)
        assert await client.refusal() == Code.GAP
        second.span = type(second.span)(second.span.start, second.span.end - 1)
        said = await reopened(client, route.hops, [3, 3, 0], epoch=3)
        assert [said[hop.peer_id][0] for hop in route.hops] == [3, 0, 0]

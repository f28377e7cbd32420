"""A standby is fed by the hop before it, beside the route, and takes of the spare room only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from peers.wire.messages import Code, Failed, Opened, Replay, Result
from tests.peers.serving.hops import Hop, Route, expected, session_id
from tests.peers.serving.test_replay import reopened, replay

pytestmark = pytest.mark.looptime


@asynccontextmanager
async def standing() -> AsyncIterator[Route]:
    """Seven positions at three hops, and a fourth peer that stands by for the second."""
    async with Route(4) as route:
        client, (first, second, last, spare) = route.client, route.hops
        spare.span, spare.handler.served = second.span, second.handler.served
        await client.open([first, second, last])
        await client.step(first, 1, 0, 7)
        await client.result()
        _, opening, _ = client.opens([first, spare, last])
        await client.send(spare, replace(opening, standby=True))
        await client.next(Opened)
        yield route


def feed(first: Hop, spare: Hop, step: int, start: int, count: int, **changes: Any) -> Replay:
    message = replay(first, step, start, count, epoch=1, stop=spare.span.end)
    return replace(message, to=spare.peer_id, to_addresses=spare.transport.addresses, **changes)


async def test_a_standby_hears_what_its_hop_heard_and_goes_on_in_its_place() -> None:
    async with standing() as route:
        client, (first, second, last, spare) = route.client, route.hops
        ran = [len(hop.engine.ran) for hop in (first, second, last)]
        await client.send(first, feed(first, spare, 2, 0, 5))
        link, message, _ = await client.next_from(Result)
        assert (link.remote, message.step, message.count) == (spare.peer_id, 2, 0)
        assert [len(hop.engine.ran) for hop in (first, second, last)] == ran
        said = await reopened(client, [first, spare, last], [7, 5, 7])
        assert said == {first.peer_id: (7, 0), spare.peer_id: (5, 0), last.peer_id: (7, 7)}
        await client.send(first, replay(first, 3, 5, 2, stop=spare.span.end))
        await client.next(Result)
        await client.step(first, 4, 7, epoch=2)
        assert torch.equal(await client.result(), expected([first, second, last], 7, 8))


async def test_a_standby_that_refuses_or_cannot_be_reached_is_named_and_nothing_goes_through_the_client() -> None:
    async with standing() as route:
        client, (first, _, _, spare) = route.client, route.hops
        await client.send(first, feed(first, spare, 2, 2, 3))
        failed, _ = await client.next(Failed)
        assert (failed.peer, failed.code, failed.step) == (spare.peer_id, Code.GAP, 2)
        route.network.cut(spare.peer_id)
        await client.send(first, feed(first, spare, 3, 0, 3))
        failed, _ = await client.next(Failed)
        assert (failed.peer, failed.code, failed.step) == (first.peer_id, Code.UNREACHABLE, 3)
        assert first.handler.pusher.counts.relayed == 0


async def test_a_standby_does_not_grow_into_room_that_others_may_need_and_goes_when_that_ends() -> None:
    async with standing() as route:
        client, (first, _, _, spare) = route.client, route.hops
        await client.send(first, feed(first, spare, 2, 0, 5))
        await client.next(Result)
        spare.engine.free_tokens = 20
        await client.send(first, feed(first, spare, 3, 5, 2))
        failed, _ = await client.next(Failed)
        assert (failed.peer, failed.code, len(spare.ledger)) == (spare.peer_id, Code.BUSY, 1)
        other = route.another_client()
        (opening,) = other.opens([spare], session=2)
        await other.send(spare, replace(opening, standby=True))
        assert await other.refusal() == Code.BUSY
        spare.engine.free_tokens = 10
        await other.open([spare], session=2)
        failed, _ = await client.next(Failed)
        assert (failed.code, failed.session) == (Code.PREEMPTED, session_id(1).raw)
        assert [place.session for place in spare.engine.sessions] == []


async def test_what_is_sent_to_a_standby_must_end_there() -> None:
    async with standing() as route:
        client, (first, _, _, spare) = route.client, route.hops
        await client.send(first, feed(first, spare, 2, 0, 5, stop=0))
        assert await client.refusal() == Code.MALFORMED

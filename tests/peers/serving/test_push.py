"""Where outputs go: from hop to hop, back on the client's own stream, or through the client as a last resort."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace as replace_fields
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from msgspec.structs import replace

from peers.errors import StreamClosed
from peers.serving.handler import LOST_S
from peers.serving.push import DIAL_TIMEOUT_S, MAX_DIALS, MAX_DIALS_PER_OWNER, RETRY_PUSH_S, Delivery, Pusher
from peers.transport.links import Link
from peers.wire.messages import Code, Failed, Opened, Relay, Result, Step
from routing.errors import Unavailable
from routing.ids import PeerId
from tests.peers.serving.hops import LATENCY_S, Client, Hop, Route, expected, peer_id, session_id, step_of

pytestmark = pytest.mark.looptime


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def carry(client: Client, hops: list[Hop]) -> None:
    """What a client does with a relayed step."""
    relay, payload = await client.next(Relay)
    (following,) = (hop for hop in hops if hop.peer_id == relay.next)
    await client.send(following, relay.step, payload)


async def test_every_hop_pushes_to_the_next_and_the_last_answers_on_the_clients_own_stream() -> None:
    async with Route() as route:
        await route.client.open(route.hops)
        started_s = now_s()
        await route.client.step(route.hops[0], 1, 0, 5)
        await asyncio.sleep(0.5)
        (link, message, _) = route.client.inbox[0]
        assert isinstance(message, Result)
        assert link.outbound, "dialled by the client, so that it works from behind a NAT"
        assert link.remote == route.hops[-1].peer_id
        assert [compute_s for _, compute_s in message.hops] == [0.005] * 3
        assert torch.equal(await route.client.result(), expected(route.hops, 0, 5))
        counts = [(hop.handler.pusher.counts.pushed, hop.handler.pusher.counts.returned) for hop in route.hops]
        assert counts == [(1, 0), (1, 0), (0, 1)]
        assert sum(hop.handler.pusher.counts.relayed for hop in route.hops) == 0
        await route.client.step(route.hops[0], 2, 5)
        started_s = now_s()
        assert torch.equal(await route.client.result(), expected(route.hops, 5, 6))
        assert now_s() - started_s == pytest.approx(4 * LATENCY_S + 3 * 0.005), "N hops, N + 1 one-way trips"


async def test_only_the_rows_that_are_wanted_come_back() -> None:
    async with Route() as route:
        await route.client.open(route.hops)
        await route.client.step(route.hops[0], 1, 0, 5, want_from=4)
        assert torch.equal(await route.client.result(), expected(route.hops, 4, 5))
        await route.client.step(route.hops[0], 2, 5, 3, want_from=3)
        assert (await route.client.result()).shape == (0, 4)
        await route.client.step(route.hops[0], 3, 8)
        assert torch.equal(await route.client.result(), expected(route.hops, 8, 9))


async def test_a_push_from_anybody_but_the_named_predecessor_is_refused_and_changes_nothing() -> None:
    async with Route() as route:
        client, (first, second, last) = route.client, route.hops
        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        await client.result()
        intruder = route.another_client()
        for hop in (second, last):
            for step in (0, 1, 5):
                await intruder.step(hop, 9, step, 3, rows=torch.full((3, 4), 7.0))
                assert await intruder.refusal() == Code.FORBIDDEN
        await intruder.step(last, 9, 5, session=2, parent=session_id(1).raw)
        assert await intruder.refusal() == Code.FORBIDDEN, "not as a fork either"
        # a peer of the route, but not the one before
        link = await first.links.to(last.peer_id, last.transport.addresses)
        await link.send(*step_of(9, 5))
        await asyncio.sleep(0.2)
        assert [len(hop.engine.ran) for hop in route.hops] == [1, 1, 1]
        assert client.inbox == []
        await client.step(first, 2, 5)
        assert torch.equal(await client.result(), expected(route.hops, 5, 6))


async def test_a_push_of_an_older_epoch_is_refused_and_changes_nothing() -> None:
    async with Route() as route:
        client, (first, second, last) = route.client, route.hops
        await client.open(route.hops)
        for message, hop in zip(client.opens(route.hops, epoch=2)[1:], (second, last), strict=True):
            await client.send(hop, message)
        await asyncio.sleep(0.2)
        client.inbox.clear()
        await client.step(first, 1, 0, 5)  # the first hop is still on the first route
        failure, _ = await client.next(Failed)
        assert (failure.peer, failure.code, failure.epoch) == (second.peer_id, Code.STALE_EPOCH, 1)
        assert [len(hop.engine.ran) for hop in route.hops] == [1, 0, 0]


async def test_a_hop_that_cannot_reach_the_next_one_goes_through_the_client_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Route() as route:
        client, (first, second, _) = route.client, route.hops
        route.network.partition({first.peer_id}, {second.peer_id})
        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        started_s = now_s()
        await carry(client, route.hops)
        assert now_s() - started_s < DIAL_TIMEOUT_S + 1
        assert torch.equal(await client.result(), expected(route.hops, 0, 5))
        assert first.handler.pusher.counts.relayed == second.handler.pusher.counts.pushed == 1
        assert any("relaying through the client" in record.getMessage() for record in caplog.records)

        started_s = now_s()
        await client.step(first, 2, 5)
        await carry(client, route.hops)
        assert torch.equal(await client.result(), expected(route.hops, 5, 6))
        assert now_s() - started_s < 0.5, "the successor is not dialled again for every token"

        route.network.partition()
        await asyncio.sleep(RETRY_PUSH_S)
        await client.step(first, 3, 6)
        assert torch.equal(await client.result(), expected(route.hops, 6, 7))
        assert first.handler.pusher.counts.pushed == 1


async def test_a_hop_that_can_dial_nobody_goes_through_the_client_and_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Route() as route:
        client, (first, *_) = route.client, route.hops

        async def to(*_: object, **__: object) -> None:
            raise Unavailable("no descriptors left")

        monkeypatch.setattr(first.handler.pusher._links, "to", to)
        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        await carry(client, route.hops)
        assert torch.equal(await client.result(), expected(route.hops, 0, 5))


async def test_a_fork_knows_that_the_next_hop_cannot_be_reached() -> None:
    async with Route() as route:
        client, (first, second, _) = route.client, route.hops
        route.network.partition({first.peer_id}, {second.peer_id})
        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        await carry(client, route.hops)
        await client.result()
        started_s = now_s()
        await client.step(first, 1, 5, session=2, parent=session_id(1).raw)
        await carry(client, route.hops)
        assert torch.equal(await client.result(), expected(route.hops, 5, 6))
        assert now_s() - started_s < 0.5


async def test_a_successor_that_dies_between_two_steps_is_noticed_at_once() -> None:
    async with Route() as route:
        client, (first, second, _) = route.client, route.hops
        await client.open(route.hops)
        await client.step(first, 1, 0)
        await client.result()
        route.network.cut(second.peer_id)
        started_s = now_s()
        await client.step(first, 2, 1)
        await client.next(Relay)
        assert now_s() - started_s < 0.5


@pytest.mark.parametrize("after_s", [0.017, 0.023, 0.026, 0.028, 0.036, 0.041, 0.047, 0.3])
async def test_a_step_is_lost_with_no_link_to_the_successor(after_s: float) -> None:
    """It is under way from the first hop at 0.015 to 0.025 s, then from the second."""
    async with Route() as route:
        client, (first, second, _) = route.client, route.hops
        await client.open(route.hops)
        started_s = now_s()
        await client.step(first, 1, 0, 5)
        await asyncio.sleep(after_s)
        route.reset(first, second)
        assert torch.equal(await client.result(), expected(route.hops, 0, 5))
        assert now_s() - started_s < 0.5
        await asyncio.sleep(1.0)
        assert {type(message) for _, message, _ in client.inbox} <= {Result}
        assert [len(hop.engine.ran) for hop in route.hops] == [1, 1, 1], "who has it repeats what he answered"
        client.inbox.clear()
        await client.step(first, 2, 5)
        assert torch.equal(await client.result(), expected(route.hops, 5, 6))


async def test_the_client_is_given_the_step_that_was_under_way_to_a_successor_that_is_gone() -> None:
    """Its own connection to it may be idle, and then nothing tells it."""
    async with Route() as route:
        client, (first, second, _) = route.client, route.hops
        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        await asyncio.sleep(0.02)
        route.network.cut(second.peer_id)
        started_s = now_s()
        relay, payload = await client.next(Relay)
        assert now_s() - started_s < 0.1
        assert (relay.next, relay.step.step, len(payload)) == (second.peer_id, 1, 5 * 4 * 4)


async def drafts(route: Route, *, bulk: bool) -> None:
    """Of which all but the first are wrong."""
    await route.client.open(route.hops)
    await route.client.step(route.hops[0], 1, 0, 5)
    await route.client.result()
    await route.client.step(route.hops[0], 2, 5, 4, rows=torch.full((4, 4), 7.0), bulk=bulk)
    await route.client.result()


async def goes_on_behind_the_first_draft(route: Route) -> None:
    await route.client.step(route.hops[0], 3, 5)
    await asyncio.sleep(1.0)
    route.client.inbox.clear()
    await route.client.step(route.hops[0], 4, 6)
    assert torch.equal(await route.client.result(), expected(route.hops, 6, 7))


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.03, 0.04, 0.05])
@pytest.mark.parametrize("bulk", [False, True])
async def test_a_step_that_is_sent_once_more_undoes_nothing_that_came_after_it(after_s: float, bulk: bool) -> None:
    """What is large comes later, over a lane that has to be opened."""
    async with Route() as route:
        await drafts(route, bulk=bulk)
        route.reset(*route.hops[:2])
        await asyncio.sleep(after_s)
        await goes_on_behind_the_first_draft(route)


@pytest.mark.parametrize("then_s", [0.01, 0.02, 0.03, 0.04])
@pytest.mark.parametrize("cut_s", [0.03, 0.05, 0.07])
async def test_what_is_repeated_for_a_step_that_came_once_more_undoes_nothing_further_down(
    cut_s: float, then_s: float
) -> None:
    """The links of the hop in the middle end one after the other."""
    async with Route() as route:
        await drafts(route, bulk=True)
        route.reset(*route.hops[:2])
        await asyncio.sleep(cut_s)
        route.reset(*route.hops[1:])
        await asyncio.sleep(then_s)
        await goes_on_behind_the_first_draft(route)


@pytest.mark.parametrize("sessions", [1, 20])
async def test_a_successor_that_ends_every_link_is_sent_a_step_twice_and_then_the_client_carries_it(
    sessions: int,
) -> None:
    async with Route() as route:
        client, (first, second, _) = route.client, route.hops
        for session in range(1, sessions + 1):
            await client.open(route.hops, session)
            await client.step(first, 1, 0, 5, session=session)
            await client.result()
        arrived = 0

        def end(link: Link, *_: object) -> None:
            nonlocal arrived
            arrived += 1
            link.retire()

        second.links.handle_at_once(Step, end)
        await client.step(first, 2, 5)
        await asyncio.sleep(5.0)
        assert arrived <= sessions + 1
        relayed = [message for _, message, _ in client.inbox if isinstance(message, Relay)]
        assert (relayed[0].next, relayed[0].step.step) == (second.peer_id, 2)
        assert len(relayed) == len(client.inbox) <= sessions


async def test_what_is_sent_once_more_is_no_failure_of_steps_that_were_answered_long_ago() -> None:
    async with Route() as route:
        client, (first, second, _) = route.client, route.hops
        for session in range(1, 31):
            await client.open(route.hops, session)
            await client.step(first, 1, 0, 900, session=session)
            await client.result()
        limits = first.admission.limits
        first.admission.limits = replace_fields(limits, max_bytes_in_flight_per_peer=10_000)
        route.reset(first, second)
        await asyncio.sleep(5.0)
        assert all(isinstance(message, Result) for _, message, _ in client.inbox)
        await asyncio.sleep(LOST_S)
        client.inbox.clear()
        route.reset(first, second)
        await asyncio.sleep(5.0)
        assert client.inbox == [], "all of them have arrived long ago"
        first.admission.limits = limits


async def test_of_a_link_that_ends_nothing_is_sent_again_but_the_end_of_its_sessions() -> None:
    async with Route() as route:
        client, (first, second, _) = route.client, route.hops
        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        await client.step(first, 2, 5, 3)
        for _ in range(2):
            await client.result()
        await client.step(first, 3, 5, 3)  # in the place of the second one
        await asyncio.sleep(0.012)
        route.reset(first, second)  # while it is computed
        assert torch.equal(await client.result(), expected(route.hops, 5, 8))
        await asyncio.sleep(1.0)
        assert client.inbox == []
        assert first.handler.pusher.counts.pushed == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"next": peer_id(9)},
        {"next": peer_id(9), "next_addresses": ("garbage",)},
        {"next": peer_id(9), "next_addresses": (f"/ip4/10.0.0.2/tcp/4001/p2p/{peer_id(8)}",)},
        {"next": "nobody"},
    ],
)
async def test_a_next_hop_that_makes_no_sense_harms_only_that_session(changes: dict[str, Any]) -> None:
    async with Route() as route:
        client, (first, *_) = route.client, route.hops
        await client.open([first], session=2, **changes)
        await client.step(first, 1, 0, session=2)
        await client.next(Relay)
        await client.open(route.hops)
        await client.step(first, 1, 0, 3)
        assert torch.equal(await client.result(), expected(route.hops, 0, 3))


async def test_a_client_that_is_gone_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with Route() as route:
        await route.client.open(route.hops)
        route.hops[-1].engine.compute_s = 5.0
        await route.client.step(route.hops[0], 1, 0)
        await asyncio.sleep(1.0)
        await route.client.close()
        await asyncio.sleep(10.0)
        assert route.hops[-1].handler.pusher.counts.returned == 0
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_session_crosses_two_hops_at_once_with_a_window_of_steps() -> None:
    async with Route() as route:
        client = route.client
        await client.open(route.hops)
        started_s = now_s()
        for number in range(4):
            await client.step(route.hops[0], number, 10 * number, 10)
        for number in range(4):
            assert torch.equal(await client.result(), expected(route.hops, 10 * number, 10 * number + 10))
        assert now_s() - started_s == pytest.approx(4 * LATENCY_S + (3 + 3) * 0.005), "hops work side by side"


async def test_a_client_that_we_dialled_and_cannot_answer_in_bulk_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Route() as route:
        first, second, _ = route.hops
        await first.links.to(second.peer_id, second.transport.addresses)
        await asyncio.sleep(0.1)
        (link,) = second.links._inbound.values()
        second.links.handle(Opened, ignore)
        opens = route.client.opens([first])
        await link.send(opens[0])

        async def open_stream(*_: object, **__: object) -> None:
            raise Unavailable("no descriptors left")

        monkeypatch.setattr(first.transport, "open_stream", open_stream)
        await link.send(*step_of(1, 0, bulk=True))
        await asyncio.sleep(0.5)
        assert len(first.engine.ran) == 1
        assert first.handler.pusher.counts.returned == 0
        await link.close()


async def ignore(*_: object) -> None:
    pass


async def test_what_is_dialled_for_strangers_is_bounded_for_each_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Route() as route:
        first = route.hops[0]
        silent = {peer_id(number) for number in range(200, 240)}
        monkeypatch.setattr(route.network, "latency_s", lambda _, peer: DIAL_TIMEOUT_S if peer in silent else LATENCY_S)
        under_way: list[str] = []
        most: list[int] = []
        open_stream = first.transport.open_stream

        async def count(peer: PeerId, *arguments: Any, **options: Any) -> Any:
            under_way.append(peer)
            most.append(len(under_way))
            try:
                return await open_stream(peer, *arguments, **options)
            finally:
                under_way.remove(peer)

        monkeypatch.setattr(first.transport, "open_stream", count)
        strangers = [route.another_client() for _ in range(8)]
        targets = iter(sorted(silent))
        session = 10
        for number, stranger in enumerate(strangers):
            for _ in range(5):
                session += 1
                await stranger.open([first], session=session, next=next(targets))
            await asyncio.sleep(0.1)
            assert len(under_way) == min(MAX_DIALS_PER_OWNER * (number + 1), MAX_DIALS)
        started_s = now_s()
        await strangers[0].step(first, 1, 0, session=15)
        await strangers[0].next(Relay)
        assert now_s() - started_s < 0.5, "no waiting in line either"
        await asyncio.sleep(2 * DIAL_TIMEOUT_S)
        assert max(most) == MAX_DIALS
        assert not under_way
        await route.client.open(route.hops)
        await route.client.step(first, 1, 0, 3)
        assert torch.equal(await route.client.result(), expected(route.hops, 0, 3))
        assert first.handler.pusher.counts.pushed == 1


async def test_sessions_that_share_a_successor_share_its_dial() -> None:
    async with Route() as route:
        for session in range(1, 20):
            await route.client.send(route.hops[0], route.client.opens(route.hops, session)[0])
        for _ in range(1, 20):
            await route.client.next(Opened)
        await asyncio.sleep(0.5)
        for session in range(1, 20):
            (entry,) = [e for e in route.hops[0].ledger._entries.values() if e.place.session == session_id(session)]
            assert entry.relay_until_s == 0.0
        assert len(route.hops[1].links._inbound) == 1


@pytest.mark.parametrize("own", ["/ip4/1.2.3.4/tcp/4001", "/ip4/10.0.0.1/tcp/4001"])
async def test_a_node_of_the_internet_dials_nothing_inside_its_network_for_a_stranger(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Route() as route:
        first, second, _ = route.hops
        inside = (*second.transport.addresses, f"/dns4/intranet/tcp/80/p2p/{second.peer_id}")
        public = f"/ip4/5.6.7.8/tcp/4001/p2p/{second.peer_id}"
        dialled: list[Any] = []
        open_stream = first.transport.open_stream

        async def record(peer: PeerId, addresses: Any, *arguments: Any, **options: Any) -> Any:
            dialled.extend(addresses)
            return await open_stream(peer, (), *arguments, **options)

        monkeypatch.setattr(first.transport, "open_stream", record)
        monkeypatch.setattr(first.transport, "_addresses", (f"{own}/p2p/{first.peer_id}",))
        (message, *_) = route.client.opens(route.hops)
        link = await route.client.links.to(first.peer_id)
        await link.send(replace(message, next_addresses=(*inside, public, "garbage")))
        await route.client.next(Opened)
        await asyncio.sleep(0.1)
        assert dialled == [public] if own.startswith("/ip4/1.") else set(dialled) >= {public, *inside}


async def test_a_link_that_ends_once_the_route_was_replaced_says_nothing_of_the_new_successor() -> None:
    old, new, owner = peer_id(1), peer_id(2), peer_id(3)
    entry: Any = SimpleNamespace(
        next=old, next_addresses=(), owner=owner, owner_link=None, epoch=1, relay_until_s=0.0, place="p"
    )

    class Ending:
        remote = old

        async def send(self, *_: object, **__: object) -> None:
            entry.next, entry.epoch = new, 2  # the client was quicker
            raise StreamClosed("the stream was closed")

    async def to(*_: object, **__: object) -> Ending:
        return Ending()

    pusher = Pusher(cast(Any, SimpleNamespace(known=lambda peer: True, to=to)), lambda: 0.0)
    message, payload = SimpleNamespace(epoch=1), memoryview(b"")
    await pusher.deliver(entry, Delivery(cast(Any, message), payload, False))
    assert entry.relay_until_s == 0.0
    assert pusher.counts.relayed == 0

"""When a peer moves and when it does not, on a virtual clock; what a move is made of is `test_rebalance`'s."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from peers.discovery import Discovery
from peers.errors import NotEnoughDisk
from peers.serving.rebalance import AGAIN_S, ANSWER_TIMEOUT_S, UNANSWERED_S, Rebalance
from peers.transport.links import Links
from peers.transport.memory import MemoryNetwork
from routing.ids import BlockSpan, BlockSpans
from routing.placement import ESCALATE_S, LOOK_S, REST_S, SETTLE_S, Move
from routing.records import Announcement, PeerState, model_key, sign_record
from routing.router import Router
from routing.store import StoredRecord
from tests.peers.transport.nodes import MODEL, NETWORK, announcement, signing_key

pytestmark = pytest.mark.looptime

FETCH_S, LOAD_S = 30.0, 5.0


class Member:
    """A peer of a model of thirty blocks that announces what it serves and, unless it is fixed, moves."""

    def __init__(
        self, network: MemoryNetwork, number: int, spans: str, *, max_blocks: int = 0, decode_s: float = 0.001
    ):
        self.key, self.network = signing_key(number), network
        self.store, self.sequence = network.store(self.key.peer_id), 0
        self.links = links = Links(network.transport(self.key.peer_id), network=NETWORK, software="test")
        self.discovery = Discovery(store=self.store, router=Router(), links=links, network=NETWORK, clock=network.clock)
        self.discovery.watch(MODEL)
        self.said = replace(
            announcement(self.key),
            addresses=links.transport.addresses,
            spans=BlockSpans.parse(spans),
            max_blocks=max_blocks,
            decode_s_per_block=decode_s,
        )
        self.fetch_s = FETCH_S
        self.heard, self.disk_full, self.saying = True, False, asyncio.Lock()
        self.intents: list[BlockSpan | None] = []
        self.fetched: list[str] = []
        self.moves: list[tuple[float, str]] = []
        rng = random.Random(number)
        self.driver = Rebalance(self.discovery, self.describe, self.intend, self.fetch, self.move, rng=rng)

    def describe(self) -> Announcement:
        return self.said

    async def say(self, **changes: object) -> None:
        async with self.saying:
            await self._say(**changes)

    async def _say(self, **changes: object) -> None:
        self.sequence += 1
        expires_at_s = round(self.network.clock() + 20, 3)
        self.said = replace(self.said, sequence=self.sequence, expires_at_s=expires_at_s, **changes)
        key = model_key(NETWORK, MODEL, self.key.peer_id)
        await self.store.put(
            StoredRecord(
                key=key,
                subkey=self.key.peer_id,
                value=sign_record(self.said, key, self.key),
                expires_at_s=expires_at_s,
            )
        )

    async def intend(self, intent: BlockSpan | None) -> bool:
        self.intents.append(intent)
        if not self.heard:
            self.said = replace(self.said, intent=intent)
            return False
        await self.say(intent=intent)
        return True

    async def fetch(self, move: Move) -> None:
        assert self.said.state is PeerState.ONLINE, "it serves meanwhile"
        self.fetched.append(str(move.spans))
        await asyncio.sleep(self.fetch_s)
        if self.disk_full:
            raise NotEnoughDisk("full")

    async def move(self, move: Move) -> None:
        self.moves.append((self.network.clock(), str(move.spans)))
        await self.say(state=PeerState.DRAINING)
        await self.say(state=PeerState.JOINING, spans=move.spans, intent=None)
        await asyncio.sleep(LOAD_S)
        await self.say(state=PeerState.ONLINE)

    async def live(self) -> None:
        await self.links.serve()
        while not self.network.is_cut(self.key.peer_id):
            await self.say()
            await self.discovery.refresh()
            await asyncio.sleep(4.0)
        await asyncio.Event().wait()


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork(latency_s=0.05, clock=lambda: 1e9 + asyncio.get_running_loop().time())


@contextlib.contextmanager
def living(*members: Member, moving: tuple[Member, ...] = ()) -> Iterator[None]:
    tasks = [asyncio.create_task(member.live()) for member in members]
    tasks += [asyncio.create_task(member.driver.run()) for member in moving]
    try:
        yield
        for task in tasks:
            assert not task.done(), task
    finally:
        for task in tasks:
            task.cancel()


async def test_of_two_peers_that_intend_the_same_at_the_same_time_exactly_one_goes(network: MemoryNetwork) -> None:
    spare = [Member(network, n, "0:10", max_blocks=10) for n in (1, 2)]
    with living(*spare, Member(network, 3, "0:20")):
        await asyncio.sleep(1.0)
        for member in spare:
            member.driver._arrivals.late(member.driver._alike(), network.clock() - ESCALATE_S)  # both are called
        outcome = await asyncio.gather(*(member.driver.look() for member in spare))
    assert sorted(outcome) == [False, True]
    assert all(member.intents[0] == BlockSpan(20, 30) for member in spare)
    assert sorted(len(member.moves) for member in spare) == [0, 1]


async def test_an_intent_that_nobody_hears_is_taken_back_and_nobody_moves(network: MemoryNetwork) -> None:
    spare = Member(network, 1, "0:10", max_blocks=10)
    with living(spare, Member(network, 2, "0:20")):
        await asyncio.sleep(1.0)
        spare.heard = False
        assert not await spare.driver.look()
        assert spare.intents == [BlockSpan(20, 30), None]
        assert not spare.fetched
        spare.heard = True
        assert await spare.driver.look()


async def test_who_gives_up_nothing_goes_unheard_too_as_the_last_one_does_that_takes_records(
    network: MemoryNetwork,
) -> None:
    last = Member(network, 1, "0:20", max_blocks=30)
    with living(last):
        await asyncio.sleep(1.0)
        last.heard = False
        assert await last.driver.look()
    assert [spans for _, spans in last.moves] == ["0:30"]


async def test_a_download_ends_when_somebody_else_has_closed_the_gap_and_the_next_gap_finds_the_peer(
    network: MemoryNetwork,
) -> None:
    spare, other = Member(network, 1, "0:10", max_blocks=10), Member(network, 2, "0:20")
    with living(spare, other, Member(network, 3, "0:10")):
        await asyncio.sleep(1.0)
        looking = asyncio.create_task(spare.driver.look())
        await asyncio.sleep(SETTLE_S + FETCH_S / 3)
        await other.say(spans=BlockSpans.parse("0:30"))
        began_s = network.clock()
        assert not await looking
        assert network.clock() - began_s < LOOK_S + 1
        assert (spare.moves, spare.said.intent) == ([], None)
        await other.say(spans=BlockSpans.parse("0:20"))
        await spare.discovery.refresh()
        assert await spare.driver.look()


@pytest.mark.parametrize("after_s", [1.0, SETTLE_S + FETCH_S / 2])
async def test_who_became_the_last_holder_meanwhile_stays(network: MemoryNetwork, after_s: float) -> None:
    mover = Member(network, 1, "0:10", max_blocks=20)
    other, slow = Member(network, 2, "0:10"), Member(network, 3, "10:30", decode_s=0.01)
    with living(mover, other, slow):
        await asyncio.sleep(REST_S)
        looking = asyncio.create_task(mover.driver.look())
        await asyncio.sleep(after_s)
        assert mover.said.intent == BlockSpan(10, 30)
        await other.say(state=PeerState.DRAINING)
        assert not await looking
    assert (mover.moves, mover.said.state, mover.said.intent) == ([], PeerState.ONLINE, None)
    assert len(mover.fetched) == (after_s > SETTLE_S)


@pytest.mark.parametrize("cut", [True, False], ids=["killed", "silent"])
async def test_who_is_the_last_holder_beside_one_that_died_and_is_still_announced_stays(
    network: MemoryNetwork, cut: bool
) -> None:
    mover, other = (Member(network, n, "0:10", max_blocks=10 * (n == 1)) for n in (1, 2))
    rest = Member(network, 3, "10:20")
    with living(mover, other, rest):
        await asyncio.sleep(1.0)
        looking = asyncio.create_task(mover.driver.look())
        await asyncio.sleep(SETTLE_S + FETCH_S - 4)
        assert mover.fetched == ["20:30"]
        if cut:
            network.cut(other.key.peer_id)
        else:
            network.partition([mover.key.peer_id], [other.key.peer_id])
        assert not await looking
        known = mover.discovery.router.snapshot(network.clock()).of_model(MODEL)
        assert other.said.peer_id in {a.peer_id for a in known if a.state is PeerState.ONLINE}
        assert (mover.moves, mover.said.state, mover.said.intent) == ([], PeerState.ONLINE, None)
        third = Member(network, 4, "0:10")
        with living(third):
            await asyncio.sleep(UNANSWERED_S * 1.5)
            assert await mover.driver.look(), "beside one that is there"


async def test_while_nobody_answers_who_would_hold_what_a_peer_leaves_it_tries_ever_more_seldom(
    network: MemoryNetwork,
) -> None:
    mover, other = (Member(network, n, "0:10", max_blocks=10 * (n == 1)) for n in (1, 2))
    mover.fetch_s = 0.0
    with living(mover, other, Member(network, 3, "10:20"), moving=(mover,)):
        network.partition([mover.key.peer_id], [other.key.peer_id])  # its records arrive all the same
        attempt_s = 1.5 * LOOK_S + SETTLE_S + ANSWER_TIMEOUT_S + 1
        await asyncio.sleep(attempt_s + 1.5 * UNANSWERED_S + attempt_s)
        assert len(mover.fetched) >= 2, "soon again at first"
        await asyncio.sleep(5 * AGAIN_S)
        tried = len(mover.fetched)
        await asyncio.sleep(10 * AGAIN_S)
        assert 6 <= len(mover.fetched) - tried <= 10
        assert mover.moves == []
        network.partition()
        await asyncio.sleep(1.5 * AGAIN_S + attempt_s)
        assert [spans for _, spans in mover.moves] == ["20:30"]


async def test_who_rests_since_nobody_answered_closes_a_gap_all_the_same_where_it_leaves_nothing(
    network: MemoryNetwork,
) -> None:
    mover, other = Member(network, 1, "0:10", max_blocks=15), Member(network, 2, "0:10")
    rest, third = Member(network, 3, "10:20"), Member(network, 4, "25:30")
    mover.fetch_s = 0.0
    with living(mover, other, rest):
        await asyncio.sleep(1.0)
        network.partition([mover.key.peer_id], [other.key.peer_id])  # its records arrive all the same
        assert not await mover.driver.look()
        assert not await mover.driver.look()
        assert len(mover.fetched) == 1, "it rests"
        with living(third):
            await asyncio.sleep(1.0)
            await mover.discovery.refresh()
            assert await mover.driver.look()
    assert [spans for _, spans in mover.moves] == ["0:10,20:25"]


async def test_between_moves_that_heal_nothing_a_peer_rests_and_before_the_first_too(network: MemoryNetwork) -> None:
    mover = Member(network, 1, "0:10", max_blocks=20)
    with living(mover, Member(network, 2, "0:10"), Member(network, 3, "10:30", decode_s=0.01), moving=(mover,)):
        await asyncio.sleep(REST_S - 1)
        assert not mover.intents
        await asyncio.sleep(2 * LOOK_S + SETTLE_S + FETCH_S)
        assert [spans for _, spans in mover.moves] == ["10:30"]
        await asyncio.sleep(LOAD_S + 1)
        await mover.say(spans=BlockSpans.parse("0:10"))  # as bad as before
        await asyncio.sleep(60 + REST_S)
        assert len(mover.moves) == 2
        assert mover.moves[1][0] - mover.moves[0][0] >= REST_S


async def test_what_failed_is_not_tried_again_at_once_and_costs_nobody_anything(network: MemoryNetwork) -> None:
    spare = Member(network, 1, "0:10", max_blocks=10)
    with living(spare, Member(network, 2, "0:20"), moving=(spare,)):
        spare.disk_full = True
        await asyncio.sleep(2 * LOOK_S + SETTLE_S + FETCH_S + AGAIN_S / 2)
        assert spare.fetched == ["20:30"]
        assert (spare.moves, spare.said.state, spare.said.intent) == ([], PeerState.ONLINE, None)
        spare.disk_full = False
        await asyncio.sleep(AGAIN_S + 2 * LOOK_S + SETTLE_S + FETCH_S)
        assert [spans for _, spans in spare.moves] == ["20:30"]

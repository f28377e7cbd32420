"""When a peer leaves its blocks and comes back to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import looptime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers.errors import CorruptCheckpoint, PeerTooSmall
from peers.host.absence import AGAIN_S, Absence, Wish
from routing.errors import SwarmError

LOAD_S = 10.0


class Peer:
    """One that takes LOAD_S to load its blocks, and fails as often as `broken` says."""

    def __init__(self, *broken: SwarmError) -> None:
        self.wish = Wish()
        self.broken = list(broken)
        self.told: list[SwarmError] = []
        self.did: list[str] = []
        self.has_blocks = True

    async def leave(self) -> bool:
        if not self.wish.memory.is_set():
            return False
        self.has_blocks = False
        self.did.append("left")
        return True

    async def come_back(self) -> None:
        assert not self.has_blocks
        self.did.append("loads")
        await asyncio.sleep(LOAD_S)
        if self.broken:
            raise self.broken.pop(0)
        self.has_blocks = True
        self.did.append("is back")

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        absence = Absence(self.wish, self.leave, self.come_back, self.told.append)
        task = asyncio.create_task(absence.run())
        await asyncio.sleep(1)
        yield
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])

    async def want(self, what: str, for_s: float = 1) -> None:
        match what:
            case "nothing":
                self.wish.pause(False)
            case "processors":
                self.wish.pause(True)
            case "memory":
                self.wish.pause(True)
                self.wish.give_back()
        await asyncio.sleep(for_s)


@pytest.mark.looptime
async def test_a_pause_alone_costs_no_blocks_and_memory_is_wanted_only_within_one() -> None:
    peer = Peer()
    async with peer.followed():
        await peer.want("processors", 1000)
        await peer.want("nothing")
        peer.wish.give_back()
        await asyncio.sleep(1000)
    assert peer.did == []


@pytest.mark.looptime
async def test_a_peer_leaves_when_its_memory_is_wanted_and_is_back_when_the_machine_is_spared() -> None:
    peer = Peer()
    async with peer.followed():
        for _ in range(2):
            await peer.want("memory", 1000)
            assert not peer.has_blocks
            await peer.want("nothing", LOAD_S + 1)
            assert peer.has_blocks
    assert peer.did == ["left", "loads", "is back"] * 2


@pytest.mark.looptime
async def test_a_peer_whose_owner_changes_his_mind_before_anything_is_given_up_stays() -> None:
    peer = Peer()

    async def slow() -> bool:
        await asyncio.sleep(5)
        return await Peer.leave(peer)

    peer.leave = slow  # type: ignore[method-assign]
    async with peer.followed():
        await peer.want("memory", 1)
        await peer.want("nothing", 100)
        assert peer.has_blocks
        await peer.want("memory", 6)
        assert not peer.has_blocks


@pytest.mark.looptime
async def test_who_wants_the_machine_while_blocks_are_loaded_again_has_it_at_once() -> None:
    peer = Peer()
    async with peer.followed():
        await peer.want("memory")
        await peer.want("nothing", LOAD_S / 2)
        await peer.want("processors", 1000)
        assert (peer.has_blocks, peer.did) == (False, ["left", "loads"])
        await peer.want("nothing", LOAD_S + 1)
    assert peer.did == ["left", "loads", "loads", "is back"]


@pytest.mark.looptime
async def test_what_cannot_be_loaded_is_told_once_and_tried_again_while_the_machine_is_spared() -> None:
    peer = Peer(PeerTooSmall("1"), PeerTooSmall("2"), CorruptCheckpoint("3"), PeerTooSmall("4"))
    async with peer.followed():
        await peer.want("memory")
        await peer.want("nothing", LOAD_S + 1)
        assert [str(error) for error in peer.told] == ["1"]
        await peer.want("processors", 1000)
        assert peer.did.count("loads") == 1, "not while it is wanted"
        await peer.want("nothing", 4 * (LOAD_S + AGAIN_S))
        assert [str(error) for error in peer.told] == ["1", "3", "4"]
        assert peer.has_blocks
        peer.broken.append(PeerTooSmall("5"))
        await peer.want("memory")
        await peer.want("nothing", LOAD_S + 1)
        assert str(peer.told[-1]) == "5", "another absence"


@pytest.mark.looptime
async def test_what_nobody_expected_ends_it() -> None:
    peer = Peer()

    async def broken() -> None:
        raise ZeroDivisionError

    absence = Absence(peer.wish, peer.leave, broken, peer.told.append)
    running = asyncio.create_task(absence.run())
    await peer.want("memory")
    peer.wish.pause(False)
    with pytest.raises(ZeroDivisionError):
        await running


WISHES = st.lists(st.tuples(st.sampled_from(["nothing", "processors", "memory"]), st.floats(0.0, 60.0)), max_size=20)


@given(WISHES, st.integers(0, 3))
def test_in_the_end_it_is_where_its_owner_wants_it(wishes: list[tuple[str, float]], failures: int) -> None:
    async def live() -> None:
        peer = Peer(*[PeerTooSmall("")] * failures)
        async with peer.followed():
            for what, for_s in wishes:
                await peer.want(what, for_s)
            await peer.want("nothing", (failures + 1) * (LOAD_S + AGAIN_S) + LOAD_S)
            assert peer.has_blocks
            await peer.want("memory", 1)
            assert not peer.has_blocks

    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        runner.run(live())

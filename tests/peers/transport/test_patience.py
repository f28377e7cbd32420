"""Deadlines that a late event loop does not shorten, on a virtual clock."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers.errors import PeerSilent
from peers.transport.links import Links
from peers.transport.memory import MemoryNetwork
from peers.transport.patience import RENEWALS_MAX, SLICES, Patience
from tests.helpers.late_loop import LateLoop, run
from tests.peers.transport.nodes import signing_key


async def waited_s(loop: LateLoop, patience: Patience) -> float:
    began_s = loop.time()
    with pytest.raises(TimeoutError):
        async with patience:
            await asyncio.Event().wait()
    return loop.time() - began_s


@given(st.floats(0.01, 100.0), st.floats(0.0, 10.0))
def test_a_deadline_comes_in_time_and_on_a_late_loop_only_after_so_many_turns(seconds: float, late_s: float) -> None:
    waited = run(lambda loop: waited_s(loop, Patience(seconds)), late_s=late_s)
    assert waited == pytest.approx(seconds + SLICES * late_s)


@given(st.lists(st.integers(1, 3 * SLICES), max_size=4))
def test_each_sign_of_life_gives_the_whole_time_again_and_they_end(heard_in: list[int]) -> None:
    """A sign in the middle of the n-th slice from the last one on is seen at this slice's end."""
    heard_s = 0.0

    async def work(loop: LateLoop) -> float:
        def say(at: int) -> None:
            nonlocal heard_s
            heard_s = loop.time()
            if at + 1 < len(heard_in):
                loop.call_later(heard_in[at + 1], say, at + 1)

        if heard_in:
            loop.call_later(heard_in[0] - 0.5, say, 0)
        return await waited_s(loop, Patience(float(SLICES), lambda: heard_s))

    ends, at = SLICES, 0
    for slices in heard_in:
        at += slices
        if at > ends:
            break
        ends = at + SLICES
    assert run(work) == pytest.approx(min(ends, SLICES * (1 + RENEWALS_MAX)))


def test_what_is_done_in_time_raises_nothing_and_leaves_no_timer() -> None:
    async def work(loop: LateLoop) -> None:
        async with Patience(10.0):
            await asyncio.sleep(9.9)
        await asyncio.sleep(100.0)

    run(work)


def test_cancellation_passes_through() -> None:
    async def work(loop: LateLoop) -> None:
        async def waits() -> None:
            async with Patience(10.0):
                await asyncio.Event().wait()

        task = loop.create_task(waits())
        await asyncio.sleep(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work)


@pytest.mark.parametrize("missed_s", [0.0, 60.0])
@pytest.mark.parametrize("alive", [True, False])
def test_a_peer_that_answered_while_this_loop_stood_still_is_not_taken_for_silent(missed_s: float, alive: bool) -> None:
    async def work(loop: LateLoop) -> None:
        network = MemoryNetwork(latency_s=0.2)
        transports = [network.transport(signing_key(number).peer_id) for number in (1, 2)]
        client, peer = (Links(transport, network="test", software="test") for transport in transports)
        await peer.serve()
        link = await client.to(transports[1].peer_id)
        if not alive:
            network.partition([transports[0].peer_id], [transports[1].peer_id])
        loop.call_later(0.1, loop.miss, missed_s)  # the ping is under way
        try:
            if alive:
                rtt_s, _ = await client.ping(link.remote, timeout_s=1.0)
                assert link.answer_s == pytest.approx(rtt_s)
                assert rtt_s == pytest.approx(0.4 + (missed_s and missed_s - 0.1), abs=0.2)
            else:
                with pytest.raises(PeerSilent):
                    await client.ping(link.remote, timeout_s=1.0)
        finally:
            for node in (client, peer, *transports):
                await node.close()

    run(work)

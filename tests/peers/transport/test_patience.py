"""Deadlines that a late event loop does not shorten, on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hivemind.p2p import PeerID
from hypothesis import given
from hypothesis import strategies as st

from peers.errors import PeerSilent
from peers.transport.hivemind_p2p.dht import LOOKUP_TIMEOUT_S, STRAGGLER_GRACE_S, DhtStore, _Answer
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


class Nodes:
    """DHT nodes, each of which answers after so many seconds, or never (None), and whom a reader gave up."""

    def __init__(self, answers_s: Mapping[int, float | None]) -> None:
        self.answers_s = {PeerID.from_base58(signing_key(number).peer_id): s for number, s in answers_s.items()}
        self.given_up: set[PeerID] = set()
        protocol = SimpleNamespace(
            routing_table=SimpleNamespace(get_nearest_neighbors=lambda *_: ()),
            find=self._find,
            forget=self.given_up.add,
        )
        blacklist = SimpleNamespace(register_success=lambda _: None, register_failure=lambda _: None)
        node = cast(Any, SimpleNamespace(protocol=protocol, blacklist=blacklist))
        self.store = DhtStore(node, lambda: list(self.answers_s), lambda: False)

    async def _find(self, peer: PeerID, queries: Sequence[bytes]) -> list[_Answer]:
        answers_s = self.answers_s[peer]
        if answers_s is None:
            await asyncio.Event().wait()
        else:
            await asyncio.sleep(answers_s)
        return [_Answer(b"", {}) for _ in queries]


@pytest.mark.parametrize(
    ("answers_s", "took_s", "silent"),
    [
        ({1: 0.1, 2: 1.0}, 1.0, 0),
        ({1: 0.1, 2: None}, 0.1 + STRAGGLER_GRACE_S, 1),
        ({1: 2.0, 2: 3.0, 3: 9.0}, 2.0 + STRAGGLER_GRACE_S, 1),
        ({1: 3.0, 2: 3.9}, 3.9, 0),
        ({1: None, 2: 9.0}, LOOKUP_TIMEOUT_S, 2),
    ],
)
@pytest.mark.parametrize("missed_s", [0.0, 60.0])
def test_a_dht_is_asked_until_all_have_answered_or_had_the_time_for_it(
    answers_s: dict[int, float | None], took_s: float, silent: int, missed_s: float
) -> None:
    """Whoever answered while this loop stood still is not given up either."""
    nodes = Nodes(answers_s)
    if missed_s:
        silent = list(answers_s.values()).count(None)

    async def work(loop: LateLoop) -> None:
        loop.call_later(0.05, loop.miss, missed_s)  # the calls are under way
        answers, near = await nodes.store._look_up(["key"], records=True)
        assert (len(answers), len(near["key"])) == (len(answers_s) - silent,) * 2
        assert len(nodes.given_up) == silent
        assert missed_s or loop.time() == pytest.approx(took_s)

    run(work)

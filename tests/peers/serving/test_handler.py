"""One peer and its clients: what reaches the engine, what is refused before it, and what is released when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from peers.errors import Busy, Preempted
from peers.runtime.works import BehindWindow, CacheTooSmall, ComputeFailed, Done, PositionGap, Work
from peers.serving.admission import AdmissionLimits
from peers.serving.handler import MAX_PAYLOAD_BYTES, MAX_TELLING, PAUSED_RETRY_S, SWEEP_S
from peers.transport import links
from peers.transport.base import MAX_FRAME_BYTES
from peers.transport.links import Link
from peers.wire import codec
from peers.wire.messages import MAX_HOPS, PREFIX_POSITIONS, Code, Failed, Opened, Relay, Trace, Traced
from routing.errors import PeerError, Unavailable
from routing.ids import Place
from tests.peers.serving.hops import HIDDEN, LATENCY_S, Client, Hop, Route, expected, rows, session_id, step_of

pytestmark = pytest.mark.looptime


class Alone(Route):
    """One hop, which is the whole route."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(1, **limits)
        (self.hop,) = self.hops

    async def __aenter__(self) -> Alone:
        await super().__aenter__()
        return self


async def runs(client: Client, hop: Hop, step: int, first: int, count: int = 1, **changes: Any) -> None:
    """The step is computed, and rightly."""
    await client.step(hop, step, first, count, **changes)
    assert torch.equal(await client.result(), expected([hop], first, first + count))


async def runs_through(client: Client, hops: Sequence[Hop], step: int, first: int, count: int = 1) -> None:
    await client.step(hops[0], step, first, count)
    assert torch.equal(await client.result(), expected(hops, first, first + count))


# --- what is refused before the engine hears of it ---

NAN = rows(5, 1).clone()
NAN[0, 1] = float("nan")
INFINITE = rows(5, 1).clone()
INFINITE[0, 3] = float("inf")


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": NAN},
        {"rows": INFINITE},
        {"dtype": "float64"},
        {"dtype": "float16"},
        {"dtype": ""},
        {"hidden": HIDDEN * 2, "rows": torch.zeros(1, HIDDEN * 2)},
        {"hidden": 0, "rows": torch.zeros(1, 0)},
        {"count": 2, "rows": rows(5, 1)},
        {"count": 0, "rows": torch.zeros(0, HIDDEN)},
        {"want_from": 2},
        {"hops": ((0.0, 0.0),) * MAX_HOPS},
        {"count": 1 << 24, "rows": rows(5, 1)},
    ],
    ids=str,
)
async def test_a_malformed_step_is_refused_and_disturbs_nobody(changes: dict[str, Any]) -> None:
    async with Alone() as route:
        other = route.another_client()
        await route.client.open(route.hops, session=1)
        await other.open(route.hops, session=2)
        await runs(route.client, route.hop, 1, 0, 5)
        await runs(other, route.hop, 1, 0, 5, session=2)
        await route.client.step(route.hop, 2, 5, **changes)
        assert await route.client.refusal() in (Code.MALFORMED, Code.TOO_LONG)
        assert len(route.hop.engine.ran) == 2
        await runs(other, route.hop, 2, 5, session=2)
        await runs(route.client, route.hop, 3, 5)


async def test_what_could_not_be_passed_on_is_not_taken_in() -> None:
    """The header grows at every hop: a frame of just the legal size would not fit any more."""
    async with Alone() as route:
        await route.client.open(route.hops)
        message, _ = step_of(1, 0, MAX_FRAME_BYTES // 16 - 100)
        payload = bytes(16 * message.count)
        assert MAX_PAYLOAD_BYTES < len(payload) < MAX_FRAME_BYTES - len(codec.encode(message))
        await route.client.send(route.hop, message, payload)
        assert await route.client.refusal() == Code.MALFORMED


async def test_a_step_that_leaves_a_gap_or_passes_the_limit_never_reaches_the_engine() -> None:
    async with Alone(max_positions=8) as route:
        client, hop = route.client, route.hop
        await client.step(hop, 1, 0)
        assert await client.refusal() == Code.UNKNOWN_SESSION
        await client.open(route.hops)
        await runs(client, hop, 1, 0, 5)
        for step, first, count, epoch, code in [
            (2, 6, 1, 1, Code.GAP),
            (2, 5, 4, 1, Code.TOO_LONG),
            (2, 5, 1, 0, Code.STALE_EPOCH),
        ]:
            await client.step(hop, step, first, count, epoch=epoch)
            failure, _ = await client.next(Failed)
            assert (failure.code, failure.step, failure.epoch, failure.peer) == (code, step, epoch, hop.peer_id)
        assert len(hop.engine.ran) == 1
        await runs(client, hop, 2, 5)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": b"x" * 32}, Code.WRONG_MODEL),
        ({"start": 0, "end": 5}, Code.WRONG_MODEL),
        ({"start": 3, "end": 3}, Code.WRONG_MODEL),
        ({"start": 3, "end": 2}, Code.WRONG_MODEL),
        ({"epoch": 0}, Code.STALE_EPOCH),
    ],
)
async def test_a_wrong_open_is_refused_and_keeps_what_was_open(changes: dict[str, Any], code: str) -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        await runs(client, hop, 1, 0, 5)
        (message,) = client.opens(route.hops, **{"epoch": 2} | changes)
        await client.send(hop, message)
        assert await client.refusal() == code
        await runs(client, hop, 2, 5)


async def test_a_journal_that_holds_nothing_yet_is_used_all_the_same() -> None:
    """It is false, as everything empty is."""
    async with Alone() as route:
        assert route.hop.handler.journal is route.hop.journal


async def test_a_part_of_the_span_can_be_opened() -> None:
    async with Alone() as route:
        await route.client.open(route.hops, start=1, end=3)
        await route.client.step(route.hop, 1, 0, block=1)
        await route.client.result()
        assert (route.hop.engine.ran[0].span.start, route.hop.engine.ran[0].span.end) == (1, 3)


async def test_too_many_bytes_in_flight_are_busy_and_all_are_given_back() -> None:
    async with Alone(max_positions=1 << 20) as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        hop.engine.compute_s = 1.0
        half = (1 << 20) // 16 // 2
        for number in range(3):
            await client.step(hop, number, number * half, half)
        failure, _ = await client.next(Failed)
        assert (failure.code, failure.step) == (Code.BUSY, 2)
        assert failure.retry_after_s > 0
        await client.result()
        await client.result()
        await client.step(hop, 2, 2 * half, half)
        await client.result()


async def test_what_a_client_has_in_flight_takes_nothing_from_others_behind_the_same_predecessor() -> None:
    async with Route(2) as route:
        client, other, (first, second) = route.client, route.another_client(), route.hops
        await client.open(route.hops)
        await other.open(route.hops, session=2)
        second.engine.compute_s = 1.0
        second.admission.limits = AdmissionLimits(max_bytes_in_flight_per_peer=2 * HIDDEN * 4)
        for step in range(3):
            await client.step(first, step, step)
        failure, _ = await client.next(Failed)
        assert (failure.peer, failure.code, failure.step) == (second.peer_id, Code.BUSY, 2)
        await other.step(first, 1, 0, session=2)
        assert torch.equal(await other.result(), expected(route.hops, 0, 1))
        for step in range(2):
            assert torch.equal(await client.result(), expected(route.hops, step, step + 1))
        assert second.admission.account(first.peer_id).idle


async def test_what_a_stranger_sends_for_a_session_counts_as_its_own() -> None:
    async with Alone() as route:
        client, stranger, hop = route.client, route.another_client(), route.hop
        await client.open(route.hops)
        hop.admission.limits = AdmissionLimits(max_bytes_in_flight_per_peer=2 * HIDDEN * 4)
        await stranger.step(hop, 1, 0, 3)
        assert await stranger.refusal() == Code.BUSY
        await stranger.step(hop, 1, 0, 2)
        assert await stranger.refusal() == Code.FORBIDDEN
        accounts = hop.admission.accounts
        assert accounts[stranger.transport.peer_id].refused == 1
        assert client.transport.peer_id not in accounts


# --- once and only once ---


async def test_a_repeated_step_returns_the_stored_answer_without_running_again() -> None:
    async with Route() as route:
        client = route.client
        await client.open(route.hops)
        for _ in range(3):
            await client.step(route.hops[0], 1, 0, 5)
            assert torch.equal(await client.result(), expected(route.hops, 0, 5))
        assert [len(hop.engine.ran) for hop in route.hops] == [1, 1, 1]


async def test_a_step_that_is_computed_at_once_is_answered_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Route() as route:
        client = route.client
        await client.open(route.hops)
        await client.step(route.hops[0], 1, 0, 5)
        assert torch.equal(await client.result(), expected(route.hops, 0, 5))
        for hop in route.hops:
            hop.engine.momentary = True
            monkeypatch.setattr(hop.handler._steps, "spawn", None)  # no task is needed
        started_s = asyncio.get_running_loop().time()
        for step in (2, 2, 3):
            await client.step(route.hops[0], step, 3 + step)
            assert torch.equal(await client.result(), expected(route.hops, 3 + step, 4 + step))
        assert asyncio.get_running_loop().time() - started_s == pytest.approx(3 * 4 * LATENCY_S)
        for hop in route.hops:
            assert len(hop.engine.ran) == 3
            assert hop.handler.counts.tokens == {"decode": 7}
            assert not any(account.bytes_in_flight for account in hop.admission.accounts.values())
        assert route.hops[0].journal.start(Place(session_id(1), 0), 7) == 0
        assert [hop.handler.pusher.counts.pushed for hop in route.hops] == [4, 4, 0]
        assert route.hops[2].handler.pusher.counts.returned == 4


async def test_what_is_computed_at_once_has_left_before_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Route(2) as route:
        client, (first, _) = route.client, route.hops
        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        await client.result()
        first.engine.momentary = True
        pushed: list[int] = []

        def note(*_: object, **__: object) -> None:
            pushed.append(first.handler.pusher.counts.pushed)

        monkeypatch.setattr(first.journal, "append", note)
        monkeypatch.setattr(first.admission, "charge", note)
        await client.step(first, 2, 5)
        await client.result()
        assert pushed == [2, 2]


async def test_a_step_that_fails_at_once_is_told_to_the_client_who_may_repeat_it() -> None:
    async with Alone() as route:
        await route.client.open(route.hops)
        await runs(route.client, route.hop, 1, 0, 5)
        route.hop.engine.momentary = True
        route.hop.engine.errors.append(ComputeFailed("broken"))
        await route.client.step(route.hop, 2, 5)
        assert await route.client.refusal() == Code.INTERNAL
        await runs(route.client, route.hop, 3, 5)


async def test_what_is_computed_at_once_waits_for_a_successor_that_reads_nothing_and_nobody_waits_for_it() -> None:
    async with Route(2) as route:
        client, (first, second) = route.client, route.hops
        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        await client.result()
        first.engine.momentary = second.engine.momentary = True
        route.network.partition([first.peer_id, client.transport.peer_id], [second.peer_id])
        link = first.links.known(second.peer_id)
        assert link is not None
        lane = link._lanes[links.SMALL]
        lane.stream.other._room.clear()  # type: ignore[attr-defined]
        await client.step(first, 2, 5)
        await asyncio.sleep(1.0)
        await client.links.ping(first.peer_id)
        assert len(first.engine.ran) == 2
        lane.stream.other._room.set()  # type: ignore[attr-defined]
        route.network.partition()
        assert torch.equal(await client.result(), expected(route.hops, 5, 6))


def read_nothing(network: Any, link: Link) -> Any:
    """From now on the other side of `link` takes nothing; returns what lets it go on."""
    stream = link._lanes[links.SMALL].stream.other  # type: ignore[attr-defined]
    stream._room.clear()
    return stream._room.set


async def test_nobody_waits_for_a_client_that_reads_nothing_of_what_it_asked_for_again() -> None:
    async with Route(2) as route:
        client, (first, second) = route.client, route.hops
        other = route.another_client()
        await client.open(route.hops)
        await other.open(route.hops, session=2)
        await client.step(first, 1, 0, 5)
        await client.result()
        go_on = read_nothing(route.network, second.ledger.get(Place(session_id(1), 4)).owner_link)  # type: ignore[union-attr]
        for _ in range(3):
            await client.step(first, 1, 0, 5)
        await asyncio.sleep(0.1)
        await other.step(first, 1, 0, 5, session=2)
        assert torch.equal(await other.result(), expected(route.hops, 0, 5))
        await first.links.ping(second.peer_id)
        go_on()
        assert torch.equal(await client.result(), expected(route.hops, 0, 5))
        await asyncio.sleep(1.0)
        assert client.inbox == [], "asked for while it was on its way"


async def test_nobody_waits_for_a_client_that_reads_nothing_of_its_failures() -> None:
    async with Route(2) as route:
        client, (first, second) = route.client, route.hops
        other = route.another_client()
        await client.open(route.hops)
        await other.open(route.hops, session=2)
        await client.close_session([second], 1)
        go_on = read_nothing(route.network, first.ledger.get(Place(session_id(1), 0)).owner_link)  # type: ignore[union-attr]
        for step in range(1, 3 * MAX_TELLING):
            await client.step(first, step, step - 1)
        await asyncio.sleep(0.5)
        assert first.handler._telling[Place(session_id(1), 0)] == MAX_TELLING
        await other.step(first, 1, 0, 5, session=2)
        assert torch.equal(await other.result(), expected(route.hops, 0, 5))
        await first.links.ping(second.peer_id)
        go_on()
        for _ in range(MAX_TELLING):
            assert await client.refusal() == Code.UNKNOWN_SESSION
        await asyncio.sleep(1.0)
        assert not first.handler._telling


async def test_what_a_client_does_not_read_is_bounded_and_can_be_asked_for_again() -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        await runs(client, hop, 1, 0)
        hop.admission.limits = AdmissionLimits(max_bytes_in_flight_per_peer=3 * HIDDEN * 4)
        go_on = read_nothing(route.network, hop.ledger.get(Place(session_id(1), 0)).owner_link)  # type: ignore[union-attr]
        for step in range(2, 7):
            await client.step(hop, step, step - 1)
            await asyncio.sleep(0.1)
        assert hop.admission.account(client.transport.peer_id).bytes_in_flight == 3 * HIDDEN * 4
        go_on()
        for step in (2, 3, 4):
            assert torch.equal(await client.result(), expected([hop], step - 1, step))
        await asyncio.sleep(0.1)
        assert hop.admission.account(client.transport.peer_id).bytes_in_flight == 0
        ran = [work.start for work in hop.engine.ran]
        assert ran == sorted(set(ran))


async def test_a_client_hears_when_what_its_successor_does_not_read_is_too_much_and_gets_it_later() -> None:
    async with Route(2) as route:
        client, (first, second) = route.client, route.hops
        await client.open(route.hops)
        await runs_through(client, route.hops, 1, 0)
        first.admission.limits = AdmissionLimits(max_bytes_in_flight_per_peer=2 * HIDDEN * 4)
        shared = first.links.known(second.peer_id)
        assert shared is not None
        go_on = read_nothing(route.network, shared)
        for step in (2, 3, 4):
            await client.step(first, step, step - 1)
            await asyncio.sleep(0.1)
        failure, _ = await client.next(Failed)
        assert (failure.code, failure.step) == (Code.BUSY, 4)
        go_on()
        for step in (2, 3):
            assert torch.equal(await client.result(), expected(route.hops, step - 1, step))
        await runs_through(client, route.hops, 4, 3)
        assert [work.start for work in first.engine.ran] == [0, 1, 2, 3]


async def test_a_step_overtakes_none_before_it_whose_answer_has_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        await runs(client, hop, 1, 0, 5)
        computed, posted, run = asyncio.Event(), asyncio.Event(), hop.engine.run

        async def slowly_posted(work: Work) -> Done:
            done = await run(work)
            computed.set()
            await posted.wait()
            return done

        monkeypatch.setattr(hop.engine, "run", slowly_posted)
        await client.step(hop, 2, 5)
        await computed.wait()
        hop.engine.momentary = True
        await client.step(hop, 3, 6)
        await asyncio.sleep(0.1)
        assert client.inbox == []
        posted.set()
        for step in (2, 3):
            assert torch.equal(await client.result(), expected([hop], 3 + step, 4 + step))


async def test_a_step_repeated_while_it_runs_is_answered_once() -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        hop.engine.compute_s = 1.0
        for _ in range(3):
            await client.step(hop, 1, 0, 5)
        assert torch.equal(await client.result(), expected([hop], 0, 5))
        await asyncio.sleep(5.0)
        assert (client.inbox, len(hop.engine.ran)) == ([], 1)


async def test_a_stored_answer_keeps_no_more_memory_than_its_rows() -> None:
    async with Alone() as route:
        await route.client.open(route.hops)
        await route.client.step(route.hop, 1, 0, 500, want_from=499)
        await route.client.result()
        entry = route.hop.ledger.get(Place(session_id(1), 0))
        assert entry is not None
        (kept,) = entry.answers.values()
        assert memoryview(kept.answer.payload.obj).nbytes == 4 * HIDDEN, "and not all 500 rows"


async def test_a_step_lower_than_what_is_held_rolls_back() -> None:
    async with Alone() as route:
        await route.client.open(route.hops)
        await route.client.step(route.hop, 1, 0, 8, rows=torch.ones(8, HIDDEN))
        await route.client.result()
        await runs(route.client, route.hop, 2, 0, 3)
        await runs(route.client, route.hop, 3, 3)


# --- failures of the engine ---


@pytest.mark.parametrize(
    ("error", "code", "retry_after_s"),
    [
        (Busy("full", retry_after_s=0.7), Code.BUSY, 0.7),
        (Preempted("taken", retry_after_s=0.3), Code.PREEMPTED, 0.3),
        (PositionGap(5, 0), Code.GAP, 0.0),
        (BehindWindow(5), Code.REPLAY, 0.0),
        (CacheTooSmall("small"), Code.TOO_LONG, 0.0),
        (ComputeFailed("broken"), Code.INTERNAL, 0.0),
        (Unavailable("stopping"), Code.DRAINING, 0.0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_the_client_hears_why_a_step_did_not_run_and_may_repeat_it(
    error: Exception, code: str, retry_after_s: float
) -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        await runs(client, hop, 1, 0, 5)
        hop.engine.errors.append(error)
        await client.step(hop, 2, 5)
        failure, _ = await client.next(Failed)
        assert (failure.code, failure.step, failure.retry_after_s) == (code, 2, retry_after_s)
        await runs(client, hop, 2, 5)


async def test_the_steps_behind_a_busy_one_leave_no_trace() -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        hop.engine.errors.append(Busy("full", retry_after_s=0.5))
        for number in range(3):
            await client.step(hop, number, 10 * number, 10)
        assert [await client.refusal() for _ in range(3)] == [Code.BUSY, Code.GAP, Code.GAP]
        for number in range(4):
            await runs(client, hop, number, 10 * number, 10)


async def test_a_fork_that_was_busy_forks_when_it_is_repeated() -> None:
    async with Route() as route:
        client = route.client
        await client.open(route.hops)
        await client.step(route.hops[0], 1, 0, 5)
        await client.result()
        route.hops[1].engine.errors.append(Busy("full", retry_after_s=0.5))
        fork: dict[str, Any] = {"session": 2, "parent": session_id(1).raw}
        await client.step(route.hops[0], 1, 3, **fork)
        assert await client.refusal() == Code.BUSY
        await client.step(route.hops[0], 1, 3, **fork)
        assert torch.equal(await client.result(), expected(route.hops, 3, 4))
        assert [len(hop.engine.ran) for hop in route.hops] == [2, 2, 2]
        await client.step(route.hops[0], 2, 5)
        assert torch.equal(await client.result(), expected(route.hops, 5, 6)), "the parent is as it was"


async def test_a_failure_further_down_comes_back_through_the_predecessor_that_was_named() -> None:
    async with Route() as route:
        client, (first, second, last) = route.client, route.hops
        await client.open(route.hops)
        await client.close_session([last], 1)
        await asyncio.sleep(0.1)
        await client.step(first, 1, 0)
        failure, _ = await client.next(Failed)
        assert (failure.peer, failure.code) == (last.peer_id, Code.UNKNOWN_SESSION)
        forged = Failed(
            peer=second.peer_id, session=session_id(1).raw, block=4, epoch=1, code=Code.INTERNAL, message="forged"
        )
        await route.another_client().send(first, forged)
        link = await last.links.to(first.peer_id, first.transport.addresses)
        await link.send(forged)
        await asyncio.sleep(0.2)
        assert client.inbox == []


async def test_an_error_that_nobody_expected_ends_the_peer_and_not_just_a_session() -> None:
    async with Alone() as route:
        await route.client.open(route.hops)
        route.hop.engine.errors.append(KeyError("a bug"))
        await route.client.step(route.hop, 1, 0)
        assert route.hop.running is not None
        with pytest.raises(ExceptionGroup) as caught:
            await route.hop.running
        assert caught.group_contains(KeyError)
        assert {task.get_name() for task in asyncio.all_tasks()}.isdisjoint({"sweep leases"})
        route.hop.running = asyncio.create_task(asyncio.sleep(1000))


# --- release ---


async def test_a_session_is_released_when_its_client_closes_it_and_only_its_client() -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        await runs(client, hop, 1, 0, 5)
        await route.another_client().close_session(route.hops, 1)
        await asyncio.sleep(0.1)
        assert len(hop.ledger) == 1
        await client.close_session(route.hops, 1, 2, 1)
        await asyncio.sleep(0.1)
        assert hop.empty


async def test_a_session_begins_with_what_is_kept_of_its_prefix() -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        hop.engine.kept = 5
        keys = (b"k" * 16, b"l" * 16)
        (message,) = client.opens(route.hops, prefix=keys)
        await client.send(hop, message)
        opened, _ = await client.next(Opened)
        assert opened.held == 5
        assert hop.engine.opened == [(Place(session_id(1), 0), client.transport.peer_id, hop.span, keys)]
        await client.step(hop, 1, 6)
        assert await client.refusal() == Code.GAP
        await runs(client, hop, 2, 5)
        await runs(client, hop, 3, 3, 4)  # nobody has to begin with all of it
        (message,) = client.opens(route.hops, epoch=2)
        await client.send(hop, message)
        opened, _ = await client.next(Opened)
        assert opened.held == 0
        await client.step(hop, 4, 1, epoch=2)
        assert await client.refusal() == Code.GAP


async def test_a_session_is_released_when_its_lease_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Alone(lease_s=60.0) as route:
        client, hop = route.client, route.hop
        (message,) = client.opens(route.hops)
        await client.send(hop, message)
        opened, _ = await client.next(Opened)
        assert opened.lease_s == 60.0
        for number in range(4):
            await asyncio.sleep(50.0)
            await runs(client, hop, number, number)
        hop.engine.compute_s = 200.0
        await runs(client, hop, 9, 4)
        await asyncio.sleep(59.0)
        assert len(hop.ledger) == 1, "a step that took long was no idle time"
        await asyncio.sleep(SWEEP_S + 1.0)
        assert hop.empty
        assert "lease expired" in caplog.text
        await client.step(hop, 10, 5)
        assert await client.refusal() == Code.UNKNOWN_SESSION


async def test_the_end_of_the_clients_link_releases_its_sessions_and_no_others() -> None:
    async with Alone() as route:
        other = route.another_client()
        await route.client.open(route.hops, session=1)
        await other.open(route.hops, session=2)
        await runs(route.client, route.hop, 1, 0, 5)
        await route.client.step(route.hop, 1, 5, session=3, parent=session_id(1).raw)
        await route.client.result()
        await runs(other, route.hop, 1, 0, 5, session=2)
        route.network.cut(route.client.transport.peer_id)
        await asyncio.sleep(0.1)
        assert set(route.hop.engine.sessions) == {Place(session_id(2), 0)}
        assert len(route.hop.ledger) == 1


async def test_a_full_peer_makes_room_at_the_cost_of_nobodys_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_INBOUND_LINKS", 1)
    async with Alone() as route:
        newcomer = route.another_client()
        await route.client.open(route.hops)
        await runs(route.client, route.hop, 1, 0, 5)
        await asyncio.sleep(2 * links.FRESH_S)
        with pytest.raises(PeerError):
            await newcomer.links.ping(route.hop.peer_id)
        await runs(route.client, route.hop, 2, 5)
        await route.client.close_session(route.hops, 1)
        await asyncio.sleep(2 * links.FRESH_S)
        await newcomer.open(route.hops, session=2)
        await runs(newcomer, route.hop, 1, 0, 5, session=2)


async def test_a_step_and_the_close_behind_it_leave_no_pages() -> None:
    """They may arrive in one piece, so that the session is closed before the engine hears of the step."""
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        link = await client.links.to(hop.peer_id)
        await asyncio.gather(link.send(*step_of(1, 0, 5)), client.close_session(route.hops, 1))
        await asyncio.sleep(1.0)
        assert hop.empty
        assert client.inbox == []


async def test_a_new_route_silences_the_steps_of_the_old_one() -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        hop.engine.compute_s = 1.0
        await client.step(hop, 1, 0, 5, rows=torch.ones(5, HIDDEN))
        await asyncio.sleep(0.5)
        await client.open(route.hops, epoch=2)
        await client.step(hop, 2, 0, 3, epoch=2)
        assert torch.equal(await client.result(), expected([hop], 0, 3))
        await asyncio.sleep(5.0)
        assert client.inbox == [], "no late result, and no failure for which a healthy peer would be blamed"


async def test_a_fork_outlives_its_parent() -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        await runs(client, hop, 1, 0, 5)
        await runs(client, hop, 1, 4, session=2, parent=session_id(1).raw)
        await client.close_session(route.hops, 1)
        await runs(client, hop, 2, 5, session=2)


# --- leaving, and telling the load ---


async def test_a_draining_peer_refuses_new_sessions_tells_those_it_has_and_serves_them_until_they_are_gone() -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        hop.engine.compute_s = 3.0
        await client.step(hop, 1, 0, 5)
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(hop.handler.drain(timeout_s=20.0))
        failure, _ = await client.next(Failed)
        assert (failure.code, failure.step, failure.epoch) == (Code.DRAINING, None, 1)
        for message in (*client.opens(route.hops, session=2), *client.opens(route.hops, epoch=2)):
            await client.send(hop, message)
            assert await client.refusal() == Code.DRAINING
        assert torch.equal(await client.result(), expected([hop], 0, 5))
        await runs(client, hop, 2, 5)
        assert not draining.done()
        await client.close_session(route.hops, 1)
        await asyncio.wait_for(draining, 0.1)


async def test_a_peer_drains_no_longer_than_it_was_told() -> None:
    async with Alone() as route:
        await route.client.open(route.hops)
        await asyncio.wait_for(route.hop.handler.drain(timeout_s=2.0), 2.1)


async def test_a_client_hears_what_runs_and_which_hop_does_not_reach_the_next_one() -> None:
    async with Route() as route:
        client, first, second = route.client, *route.hops[:2]

        async def traced(asks: Client, hop: Hop) -> tuple[int, bool]:
            link = await asks.links.to(hop.peer_id, hop.transport.addresses)

            def trace(nonce: int) -> Trace:
                return Trace(nonce=nonce, session=session_id(1).raw, block=hop.span.start, patience_s=1.0)

            answer = await asks.links.request(link, trace, timeout_s=2.0)
            assert isinstance(answer, Traced)
            return answer.running, answer.next_silent

        await client.open(route.hops)
        await client.step(first, 1, 0, 5)
        await client.result()
        second.engine.compute_s = 3.0
        await client.step(first, 2, 5)
        await asyncio.sleep(1.0)
        assert [await traced(client, hop) for hop in route.hops] == [(0, False), (1, False), (0, False)]
        route.network.partition([first.peer_id], [second.peer_id])
        assert await traced(route.another_client(), first) == (0, False), "a stranger learns nothing"
        assert [await traced(client, hop) for hop in route.hops] == [(0, True), (1, False), (0, False)]
        await client.result()
        await client.step(first, 3, 6)
        relay, _ = await client.next(Relay)
        assert relay.next == second.peer_id


async def test_a_client_without_patience_takes_no_link_from_others() -> None:
    async with Route(2) as route:
        client, (first, second) = route.client, route.hops
        await client.open(route.hops)
        await runs_through(client, route.hops, 1, 0, 5)
        link, shared = await client.links.to(first.peer_id), first.links.known(second.peer_id)
        answer = await client.links.request(
            link,
            lambda nonce: Trace(nonce=nonce, session=session_id(1).raw, block=0, patience_s=0.0),
            timeout_s=2.0,
        )
        assert isinstance(answer, Traced)
        assert not answer.next_silent
        assert shared is not None
        assert first.links.known(second.peer_id) is shared
        await runs_through(client, route.hops, 2, 5)


async def test_a_paused_peer_finishes_what_runs_refuses_everything_else_and_goes_on_where_it_was() -> None:
    async with Alone() as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        hop.engine.compute_s = 3.0
        await client.step(hop, 1, 0, 5)
        await asyncio.sleep(0.1)
        hop.handler.pause(True)
        await asyncio.sleep(0.1)
        await client.step(hop, 2, 5)
        (message,) = client.opens(route.hops, session=2)
        await client.send(hop, message)
        for step in (None, 2, None):  # it says so, refuses a step, refuses a session
            failure, _ = await client.next(Failed)
            assert (failure.code, failure.step) == (Code.PAUSED, step)
            assert failure.retry_after_s == PAUSED_RETRY_S
        assert torch.equal(await client.result(), expected([hop], 0, 5))
        hop.handler.pause(False)
        await runs(client, hop, 2, 5)


async def test_a_paused_peer_keeps_nothing_for_sessions_to_come_once_the_last_one_has_gone() -> None:
    async with Route() as route:
        client, hop = route.client, route.hops[0]
        keys = (b"k" * 16,)
        for session in (1, 2):
            await client.open(route.hops, session=session, prefix=keys)
        await runs_through(client, route.hops, 1, 0, PREFIX_POSITIONS)
        kept_bytes = hop.handler.journal.memory_bytes.total()
        hop.handler.pause(True)
        assert hop.engine.resting
        await client.close_session(route.hops, 1)
        await asyncio.sleep(0.1)
        assert hop.handler.journal.memory_bytes.total() == kept_bytes > 0
        await client.close_session(route.hops, 2)
        await asyncio.sleep(0.1)
        assert hop.handler.journal.memory_bytes == {}
        hop.handler.pause(False)
        assert not hop.engine.resting


async def test_a_pause_in_the_middle_of_a_route_is_told_to_the_client_by_the_hop_before() -> None:
    async with Route() as route:
        await route.client.open(route.hops)
        route.hops[1].handler.paused = True
        await route.client.step(route.hops[0], 1, 0, 5)
        failure, _ = await route.client.next(Failed)
        assert (failure.code, failure.peer, failure.step) == (Code.PAUSED, route.hops[1].peer_id, 1)


async def test_a_peer_takes_no_further_sessions_while_others_wait_to_be_read_and_goes_on_with_those_it_has() -> None:
    async with Alone(max_bytes_per_s=1000) as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        reading = [asyncio.create_task(hop.links.download.admit(2000, bulk=True)) for _ in range(4)]
        await asyncio.sleep(0.1)
        (message,) = client.opens(route.hops, session=2)
        await client.send(hop, message)
        assert await client.refusal() == Code.BUSY
        await runs(client, hop, 1, 0)
        await asyncio.wait(reading)
        await client.open(route.hops, session=2)


async def test_a_peer_whose_answers_wait_for_bandwidth_takes_no_further_steps() -> None:
    async with Alone(max_bytes_per_s=1000) as route:
        client, hop = route.client, route.hop
        await client.open(route.hops)
        sending = [asyncio.create_task(hop.links.upload.admit(2000, bulk=True)) for _ in range(4)]
        await asyncio.sleep(0.1)
        await client.step(hop, 1, 0)
        failure, _ = await client.next(Failed)
        assert failure.code == Code.BUSY
        assert failure.retry_after_s == pytest.approx(6.0)
        await asyncio.wait(sending)
        await runs(client, hop, 1, 0)


async def test_a_full_table_is_busy() -> None:
    async with Alone(max_sessions_per_owner=1) as route:
        await route.client.open(route.hops)
        (message,) = route.client.opens(route.hops, session=2)
        await route.client.send(route.hop, message)
        failure, _ = await route.client.next(Failed)
        assert (failure.code, failure.step) == (Code.BUSY, None)
        assert failure.retry_after_s > 0


async def test_a_session_is_let_in_by_what_it_is_expected_to_become_and_the_engine_hears_what_was_said() -> None:
    limits = {"pool_positions": 100, "free_positions": lambda: 42, "expected_positions": 30}
    async with Alone(**limits) as route:
        other = route.another_client()
        await route.client.open(route.hops, expects=50)
        _, pong = await other.links.ping(route.hop.peer_id)
        assert pong.free_tokens == 12, "what was promised is not free"
        for message in other.opens(route.hops, session=2, expects=13):
            await other.send(route.hop, message)
        failure, _ = await other.next(Failed)
        assert (failure.code, failure.step) == (Code.BUSY, None)
        await other.open(route.hops, session=3, expects=12)
        await runs(route.client, route.hop, 1, 0, 5)
        await route.client.step(route.hop, 2, 5, expects=80)
        await route.client.result()
        assert [work.told for work in route.hop.engine.ran] == [50, 80]


async def test_a_ping_tells_the_load() -> None:
    async with Alone() as route:
        await route.client.open(route.hops)
        _, pong = await route.client.links.ping(route.hop.peer_id)
        assert (pong.free_tokens, pong.queued_tokens, pong.sessions) == (42, 7, 1)


async def test_the_account_of_a_client_says_what_it_used() -> None:
    async with Alone() as route:
        await route.client.open(route.hops)
        await runs(route.client, route.hop, 1, 0, 5)
        await runs(route.client, route.hop, 2, 5)
        account = route.hop.admission.accounts[route.client.transport.peer_id]
        assert (account.steps, account.positions, account.bytes_in_flight) == (2, 6, 0)
        assert account.compute_s == pytest.approx(0.01)
        assert account.bytes_received == 6 * HIDDEN * 4

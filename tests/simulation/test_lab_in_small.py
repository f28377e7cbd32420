"""The experiments of the lab (`tests/lab`) in small form, on a virtual clock: real handlers, discovery and drivers over
wires in memory. What is here of seconds is virtual, and the same on every machine."""

from __future__ import annotations

import asyncio
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from peers.errors import Busy
from peers.runtime.works import Done, Work
from peers.wire.messages import MAX_UNDER_WAY
from routing.errors import NoRoute
from routing.ids import BlockSpan, PeerId
from routing.records import RECORD_RENEW_S
from routing.routes import Route, RouteRequest
from swarm.session.core import PIECE_POSITIONS_MIN, SessionConfig
from tests.helpers.twin import THIRDS, Twin, User, local, run
from tests.lab.links import PROFILES
from tests.peers.serving.hops import HIDDEN

RETRANSMISSION_S_MIN = 0.2
"""Linux; RFC 6298 would have a second. What a lost packet costs beside a round trip."""


@pytest.mark.parametrize(("probability", "tokens", "least"), [(1e-3, 512, 0.9), (1e-2, 128, 0.5)])
def test_failures_drawn_per_step_and_hop_cost_little_of_the_speed(
    probability: float, tokens: int, least: float
) -> None:
    async def tokens_per_s(probability: float) -> float:
        async with Twin(copies=4, compute_s=(0.01,)) as twin:
            user, prompt = twin.user(), twin.prompt(32)
            for peer in twin.peers:
                peer.fails = lambda: twin.rng.random() < probability
            assert torch.equal(await user.generate(prompt, tokens), local(prompt, tokens))
            assert (user.remote.traffic.rebuilds > 0) == (probability > 0)
            return tokens / (user.times_s[-1] - user.times_s[0])

    assert run(lambda: tokens_per_s(probability)) >= least * run(lambda: tokens_per_s(0.0))


def test_sessions_outlive_peers_that_come_and_go_half_of_them_without_a_word() -> None:
    async def work() -> None:
        async with Twin(copies=2) as twin:
            users, over = [twin.user() for _ in range(2)], asyncio.Event()

            async def talk(user: User) -> int:
                answers = 0
                while not over.is_set():
                    prompt = twin.prompt()
                    assert torch.equal(await user.generate(prompt, 64), local(prompt, 64))
                    answers += 1
                return answers

            talks = [asyncio.create_task(talk(user)) for user in users]
            for number in range(12):
                await twin.join(THIRDS[number % 3])
                await asyncio.sleep(6.0)  # it is known by then
                old = twin.peer(users[number // 2 % 2].route[number % 3])
                if number % 2:
                    twin.network.cut(old.peer_id)
                else:
                    await old.leave()
                await asyncio.sleep(4.0)
            over.set()
            assert all(answers > 20 for answers in await asyncio.gather(*talks))
            for user in users:
                assert user.remote.traffic.rebuilds >= 1
                assert sum(user.remote.traffic.failures.values()) <= 0.01 * user.remote.traffic.results

    run(work)


@pytest.mark.parametrize("holders", [1, 11])
def test_a_gap_is_named_within_five_seconds_and_outlived_however_many_died_in_it(holders: int) -> None:
    """Each of the dead is tried once: their records outlive them, and a session has twelve attempts."""

    async def work() -> None:
        async with Twin(copies=1) as twin:
            lost = [twin.peers[-1], *[await twin.join(THIRDS[-1]) for _ in range(holders - 1)]]
            reader, prober, prompt = twin.user(), twin.user(), twin.prompt()
            await asyncio.sleep(10.0)  # everybody is known by then
            await prober.generate(prompt, 1)
            talk = asyncio.create_task(reader.generate(prompt, 200))
            await asyncio.sleep(1.0)
            assert 0 < len(reader.times_s) < 200
            for peer in lost:
                twin.network.cut(peer.peer_id)
            loop = asyncio.get_running_loop()
            for _ in range(3):
                began_s = loop.time()
                with pytest.raises(NoRoute):
                    await prober.generate(prompt, 1)
                assert loop.time() - began_s <= 5
            await twin.join(THIRDS[-1])
            assert torch.equal(await talk, local(prompt, 200))
            assert reader.remote.traffic.rebuilds <= holders

    run(work)


@pytest.mark.parametrize(("users", "together", "least"), [(12, True, 0.85), (8, True, 0.8), (8, False, 0.7)])
def test_users_share_six_uneven_peers_fairly_and_nearly_all_that_these_can_do(
    users: int, together: bool, least: float
) -> None:
    """Of the maximum flow; through one node, or each through one of his own. Eight users, each of whom is at one peer
    at a time, leave some of six peers idle that share no forwards."""
    fast_s, slow_s = 0.02, 0.04

    async def work() -> list[float]:
        async with Twin(copies=2, latency_s=0.001, compute_s=(fast_s, slow_s)) as twin:
            nodes = [twin.user() for _ in range(1 if together else users)]
            return await talking(twin, nodes, users, 60.0)

    each = run(work)
    assert sum(each) >= least * (1 / fast_s + 1 / slow_s)
    assert min(each) >= 0.6 * statistics.fmean(each)


@pytest.mark.parametrize("users", [3, 8, 16])
def test_users_of_peers_that_batch_get_what_they_would_if_all_were_kept_to_the_best_routes(users: int) -> None:
    """A forward takes little longer for what else is in it, so few users do best at the faster peers, all of them; see
    `test_few_users`."""
    fast_s, slow_s = 0.04, 0.08

    async def work(*, kept: bool) -> list[float]:
        async with Twin(copies=2, latency_s=0.001, compute_s=(fast_s, slow_s)) as twin:
            for peer in twin.peers:
                peer.engine.batches, peer.engine.position_s = True, peer.engine.compute_s / 8
            await asyncio.sleep(2 * RECORD_RENEW_S)  # they have said so
            nodes = [twin.user() for _ in range(users)]
            slow = frozenset(peer.peer_id for peer in twin.peers if peer.engine.compute_s == slow_s)
            for plan in [node.client.router.plan for node in nodes] if kept else ():
                plan.__self__.plan = functools.partial(without, plan, slow)  # type: ignore[attr-defined]
            return await talking(twin, nodes, users, 30.0)

    def without(plan: Callable[..., Route], peers: frozenset[PeerId], request: RouteRequest, now_s: float) -> Route:
        return plan(replace(request, avoid=request.avoid | peers), now_s)

    best, each = run(lambda: work(kept=True)), run(lambda: work(kept=False))
    assert sum(each) >= 0.95 * sum(best)
    assert min(each) >= 0.6 * statistics.fmean(each)


async def talking(twin: Twin, nodes: Sequence[User], users: int, seconds: float) -> list[float]:
    """Tokens per second of each of so many users, who have one answer after another through these nodes."""
    loop, counts = asyncio.get_running_loop(), [0] * users
    until_s = loop.time() + seconds

    async def talk(number: int) -> None:
        def count(_: int) -> None:
            counts[number] += loop.time() < until_s

        while loop.time() < until_s:
            answer = twin.rng.randint(20, 60)
            await nodes[number % len(nodes)].generate(twin.prompt(), answer, on_step=count)

    await asyncio.gather(*map(talk, range(users)))
    return [count / seconds for count in counts]


@pytest.mark.parametrize("latency_s", [0.0, 0.05])
def test_a_token_takes_four_trips_and_what_three_hops_compute(latency_s: float) -> None:
    async def work() -> None:
        async with Twin(latency_s=latency_s, compute_s=(0.02,)) as twin:
            user, prompt = twin.user(), twin.prompt()
            assert torch.equal(await user.generate(prompt, 32), local(prompt, 32))
            took_s = (user.times_s[-1] - user.times_s[0]) / 31
            assert took_s == pytest.approx(4 * latency_s + 3 * 0.02, rel=0.1)

    run(work)


def cut_into(hops: int) -> list[BlockSpan]:
    ends = [THIRDS[-1].end * at // hops for at in range(hops + 1)]
    return [BlockSpan(*pair) for pair in itertools.pairwise(ends)]


@pytest.mark.parametrize(
    ("hops", "chunk", "most"), [(3, 32, 1.0), (6, 256, 0.7), (6, 32, 0.75), (8, 256, 0.65), (8, 32, 0.65)]
)
def test_every_hop_of_a_long_route_works_on_a_prompt(
    hops: int, chunk: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the time that it takes with four steps under way, whatever the route; a piece takes as long as 10 positions
    and its own. It is the client's first, for which only the records tell how many hops there will be."""
    length, latency_s, step_s, position_s = 960, 0.001, 0.01, 0.001
    spans = cut_into(hops)

    async def takes_s() -> float:
        async with Twin(copies=1, spans=spans, latency_s=latency_s, compute_s=(step_s,)) as twin:
            for peer in twin.peers:
                peer.engine.position_s = position_s
            user, prompt = twin.user(SessionConfig(chunk_positions=chunk)), twin.prompt(length)
            await asyncio.sleep(5.0)  # these were read by then
            began_s = asyncio.get_running_loop().time()
            assert torch.equal(await user.generate(prompt, 1), local(prompt, 1, spans))
            return user.times_s[0] - began_s

    took_s = run(takes_s)
    pieces = max(-(-length // chunk), min(2 * hops, length // PIECE_POSITIONS_MIN))
    least_s = (hops + pieces - 1) * (step_s + position_s * length / pieces) + (hops + 1) * latency_s
    assert took_s == pytest.approx(least_s, rel=0.05)
    monkeypatch.setattr(SessionConfig, "under_way", lambda self, hops, crowd=1: self.window)
    assert took_s <= most * run(takes_s)


@pytest.mark.parametrize(("hops", "taken_in", "most"), [(3, 256, 0.4), (8, 256, 0.65), (8, 512, 0.75)])
def test_a_prompt_whose_states_are_large_is_sent_no_faster_than_peers_take_it_in(
    hops: int, taken_in: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many of its positions each, and no more. Of the time of one whose client only counts its steps."""
    length, spans, bound_bytes = 960, cut_into(hops), taken_in * HIDDEN * torch.float32.itemsize
    monkeypatch.setattr("swarm.session.core.UNDER_WAY_BYTES", bound_bytes)

    async def takes_s() -> tuple[float, int]:
        async with Twin(copies=1, spans=spans, latency_s=0.001, compute_s=(0.01,)) as twin:
            for peer in twin.peers:
                peer.engine.position_s, admission = 0.001, peer.handler.admission
                admission.limits = replace(admission.limits, max_bytes_in_flight_per_peer=bound_bytes)
            user, prompt = twin.user(), twin.prompt(length)
            await asyncio.sleep(5.0)
            began_s = asyncio.get_running_loop().time()
            assert torch.equal(await user.generate(prompt, 1), local(prompt, 1, spans))
            return user.times_s[0] - began_s, user.remote.traffic.failures["busy"]

    took_s, busy = run(takes_s)
    assert busy == 0
    monkeypatch.setattr(SessionConfig, "under_way_positions", lambda self, crowd=1: length)
    counted_s, busy = run(takes_s)
    assert busy > 0
    assert took_s <= most * counted_s


@pytest.mark.parametrize("at_once", [False, True])
def test_a_hop_that_dies_or_is_full_under_a_prompt_over_many_hops_changes_nothing(at_once: bool) -> None:
    """Several users, each with a client of his own or all with one."""
    spans = cut_into(6)

    async def work() -> None:
        async with Twin(copies=2, spans=spans, latency_s=0.001, compute_s=(0.01,)) as twin:
            await asyncio.sleep(5.0)  # everybody is known by then
            users = [twin.user()] * 3 if at_once else [twin.user() for _ in range(3)]
            prompts = [twin.prompt(900) for _ in users]

            async def disturb() -> None:
                await asyncio.sleep(0.1)
                route = users[0].route
                twin.peer(route[3]).engine.errors.append(Busy("full", retry_after_s=0.1))
                await asyncio.sleep(0.05)
                twin.network.cut(route[2])

            *answers, _ = await asyncio.gather(
                *(user.generate(prompt, 4) for user, prompt in zip(users, prompts, strict=True)), disturb()
            )
            assert all(
                torch.equal(answer, local(prompt, 4, spans)) for answer, prompt in zip(answers, prompts, strict=True)
            )
            traffic = [user.remote.traffic for user in users]
            assert sum(one.failures["busy"] for one in traffic) > 0 < sum(one.rebuilds for one in traffic)

    run(work)


def test_prompts_of_one_client_share_what_is_under_way() -> None:
    """So that a gateway's users do not fill the queues for each other."""
    spans, users = cut_into(8), 8

    async def work() -> None:
        async with Twin(copies=1, spans=spans, compute_s=(0.01,)) as twin:
            user, under_way, most = twin.user(SessionConfig(chunk_positions=16)), 0, 0
            await asyncio.sleep(5.0)
            run_first = twin.peers[0].engine.run

            async def counted(work: Work) -> Done:
                nonlocal under_way, most
                under_way, most = under_way + 1, max(most, under_way + 1)
                try:
                    return await run_first(work)
                finally:
                    under_way -= 1

            twin.peers[0].engine.run = counted  # type: ignore[method-assign]
            prompts = [twin.prompt(480) for _ in range(users)]
            answers = await asyncio.gather(*(user.generate(prompt, 1) for prompt in prompts))
            assert all(
                torch.equal(answer, local(prompt, 1, spans)) for answer, prompt in zip(answers, prompts, strict=True)
            )
            assert MAX_UNDER_WAY < most <= 2 * MAX_UNDER_WAY + SessionConfig().window * users

    run(work)


@pytest.mark.parametrize("hop", [0, 1])
def test_a_hop_to_which_the_way_becomes_long_is_left_within_seconds(hop: int) -> None:
    async def work() -> None:
        async with Twin(copies=2, compute_s=(0.02,)) as twin:
            user, prompt = twin.user(), twin.prompt()
            victim = PeerId("")
            left_s: list[float] = []

            def on_step(number: int) -> None:
                nonlocal victim
                if number == 100:
                    victim = user.route[hop]
                    twin.network.latency_s = lambda a, b: 0.25 if victim in (a, b) else 0.005
                elif number > 100 and victim not in user.route and not left_s:
                    left_s.append(user.times_s[-1] - user.times_s[99])

            await asyncio.sleep(10)  # ways are measured by then
            rows = await user.generate(prompt, 160, on_step=on_step)
            assert torch.equal(rows, local(prompt, 160))
            assert left_s[0] <= 10

    run(work)


@pytest.mark.parametrize("name", PROFILES)
def test_an_answer_is_the_same_over_every_kind_of_link(name: str) -> None:
    async def work() -> None:
        async with Twin() as twin:
            profile, user, prompt = PROFILES[name], twin.user(), twin.prompt()

            def latency_s(sender: PeerId, receiver: PeerId) -> float:
                lost = twin.rng.random() < profile.loss
                again_s = RETRANSMISSION_S_MIN + 2 * profile.delay_s if lost else 0.0
                return profile.delay_s + twin.rng.uniform(-1, 1) * profile.jitter_s + again_s

            twin.network.latency_s, twin.network.bytes_per_s = latency_s, profile.bytes_per_s
            assert torch.equal(await user.generate(prompt, 64), local(prompt, 64))
            assert user.remote.traffic.rebuilds == 0 or profile.loss, "no peer is given up because it is far"

    run(work)


def test_a_user_that_nobody_can_dial_is_served_without_relaying_anything() -> None:
    async def work() -> None:
        async with Twin() as twin:
            user, prompt = twin.user(), twin.prompt()
            assert user.client.node.transport.addresses == ()
            assert torch.equal(await user.generate(prompt, 16), local(prompt, 16))
            assert user.remote.traffic.relays == 0
            pushed = [twin.peer(peer).handler.pusher.counts for peer in user.route]
            assert [(counts.pushed, counts.returned, counts.relayed) for counts in pushed] == [
                (16, 0, 0),
                (16, 0, 0),
                (0, 16, 0),
            ]

    run(work)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_hop_that_is_separated_from_everybody_for_a_while_is_gone_round_or_waited_for(copies: int) -> None:
    """Where it holds its blocks alone, until it is back."""

    async def work() -> None:
        async with Twin(copies=copies) as twin:
            user, prompt = twin.user(), twin.prompt()
            await user.generate(prompt, 2)
            hop = twin.peer(user.route[1])

            def separate(number: int) -> None:
                if number == 10:
                    hop.separate(True)
                    asyncio.get_running_loop().call_later(8.0, hop.separate, False)

            answer = await user.generate(prompt, 40, on_step=separate)
            assert torch.equal(answer, local(prompt, 40))
            assert (user.longest_s < 2.5) == (copies > 1)
            assert (hop.peer_id in user.route) == (copies == 1)

    run(work)


def test_a_peer_whose_links_flap_changes_nothing_and_is_used_again() -> None:
    async def work() -> None:
        async with Twin() as twin:
            user, prompt = twin.user(), twin.prompt()
            await user.generate(prompt, 2)
            hop = twin.peer(user.route[1])
            (other,) = (peer for peer in twin.peers if peer.span == hop.span and peer is not hop)

            async def flap() -> None:
                for _ in range(8):
                    for on in (True, False):
                        hop.separate(on)
                        await asyncio.sleep(twin.rng.uniform(1.0, 3.0))

            flapping = asyncio.create_task(flap())
            while not flapping.done():
                assert torch.equal(await user.generate(prompt, 40), local(prompt, 40))
                assert user.longest_s < 3.5
            assert user.remote.traffic.rebuilds > 0
            healed_s = asyncio.get_running_loop().time()
            twin.network.cut(other.peer_id)
            while hop.peer_id not in user.route:
                assert torch.equal(await user.generate(prompt, 4), local(prompt, 4))
            assert asyncio.get_running_loop().time() < healed_s + 60.0

    run(work)

"""Death, pressure and interruption in a whole swarm in one process: the ids stay those of the local model.

Virtual wires, real engines and drivers. The real processes' version of these is in `tests/integration`.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

from peers import discovery
from peers.errors import ProtocolError
from peers.transport import links
from peers.wire.messages import Code, Failed, Urgency
from routing.errors import CallerError, NoRoute, Unavailable
from routing.routes import Route, RouteRequest
from swarm.models.tracing import traced
from swarm.network import Answer
from swarm.session import planning
from tests.helpers.families import NUM_BLOCKS, VOCABULARY
from tests.helpers.memory_swarm import MemorySwarm, impatient
from tests.helpers.traces import check_trace

pytestmark = pytest.mark.usefixtures("plain_forwards")

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0}


class AtToken(StoppingCriteria):
    """Calls `act` when so many tokens have been chosen; stops nothing."""

    def __init__(self, count: int, act: Callable[[], None]) -> None:
        self.left = count
        self.act = act

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            self.act()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def prompt(rows: int = 1, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    result: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **kwargs})
    return result


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_hop_that_dies_is_replaced_and_the_ids_stay_the_same(
    make_swarm: Callable[..., MemorySwarm], local: Any, dies: int, beams: int
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model = swarm.model()
    swarm.add_peer(0, 2)
    swarm.add_peer(2, NUM_BLOCKS)
    ids, used = prompt(2), []

    def die() -> None:
        used.extend(hop.peer_id for hop in model._remote_layers.remote.route.hops)
        swarm.kill_peer(used[dies])

    kill = AtToken(5, die)
    actual = generate(model, ids, num_beams=beams, stopping_criteria=[kill])
    assert torch.equal(actual, generate(local, ids, num_beams=beams))
    assert model._remote_layers.remote.traffic.rebuilds >= 1
    assert used[dies] not in [hop.peer_id for hop in model._remote_layers.remote.route.hops]


@pytest.mark.parametrize("token", [1, 5])
def test_a_link_between_two_hops_that_ends_costs_no_route(
    make_swarm: Callable[..., MemorySwarm], local: Any, token: int
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model = swarm.model()
    ids = prompt()

    def reset() -> None:
        first, second = (hop.peer_id for hop in model._remote_layers.remote.route.hops)

        async def abort() -> None:
            for stream in swarm.network.streams_between(first, second):
                stream.abort("the connection was reset")

        swarm.thread.call(abort())

    actual = generate(model, ids, stopping_criteria=[AtToken(token, reset)])
    assert torch.equal(actual, generate(local, ids))
    traffic = model._remote_layers.remote.traffic
    assert (traffic.rebuilds, traffic.relays) == (0, 0)


@pytest.mark.parametrize("code", [Code.DRAINING, Code.PAUSED, Code.INTERNAL, Code.UNKNOWN_SESSION])
def test_a_hop_speaks_for_no_other_than_the_one_behind_it(
    make_swarm: Callable[..., MemorySwarm], local: Any, code: str
) -> None:
    swarm = make_swarm([(0, 1), (1, 3), (3, NUM_BLOCKS)])
    model = swarm.model()
    swarm.add_peer(3, NUM_BLOCKS)
    remote, router = model._remote_layers.remote, swarm.thread.client.router
    ids, used = prompt(), list[Route]()

    def slander() -> None:
        used.append(remote.route)
        liar, _, victim = remote.route.hops
        handler = next(peer.handler for peer in swarm.peers if peer.presence.describe().peer_id == liar.peer_id)

        async def send() -> None:
            (entry,) = handler.ledger.entries()
            place = {"session": entry.place.session.raw, "block": victim.span.start, "epoch": entry.epoch}
            await entry.owner_link.send(Failed(peer=victim.peer_id, code=code, message="forged", **place))

        swarm.thread.call(send())

    assert torch.equal(generate(model, ids, stopping_criteria=[AtToken(5, slander)]), generate(local, ids))
    assert remote.route == used[0]
    assert (remote.traffic.rebuilds, sum(remote.traffic.failures.values())) == (0, 0)
    assert router._reputation.backed_off(swarm.thread.client.discovery.now_s()) == {}


def say(swarm: MemorySwarm, route: Route, at: int, code: str) -> None:
    """A hop of the only session's route declines a step of it."""
    hop = route.hops[at]
    handler = next(peer.handler for peer in swarm.peers if peer.presence.describe().peer_id == hop.peer_id)

    async def send() -> None:
        (entry,) = handler.ledger.entries()
        place: dict[str, Any] = {"session": entry.place.session.raw, "block": hop.span.start, "epoch": entry.epoch}
        await entry.owner_link.send(Failed(peer=hop.peer_id, code=code, message="so it says", step=1, **place))

    swarm.thread.call(send())


@pytest.mark.parametrize("at", [0, 1])
def test_one_hop_that_says_that_what_it_is_sent_is_unusable_is_done_without_and_nobody_is_blamed(
    make_swarm: Callable[..., MemorySwarm], local: Any, at: int
) -> None:
    spans = [(0, 2), (2, NUM_BLOCKS)]
    swarm = make_swarm(spans)
    model = swarm.model()
    swarm.add_peer(*spans[at])
    remote, router = model._remote_layers.remote, swarm.thread.client.router
    ids, used = prompt(), list[Route]()

    def complain() -> None:
        used.append(remote.route)
        say(swarm, remote.route, at, Code.MALFORMED)

    assert torch.equal(generate(model, ids, stopping_criteria=[AtToken(5, complain)]), generate(local, ids))
    stays = 1 - at
    assert remote.route.hops[at].peer_id != used[0].hops[at].peer_id
    assert remote.route.hops[stays] == used[0].hops[stays]
    assert router._reputation.backed_off(swarm.thread.client.discovery.now_s()) == {}


@pytest.mark.parametrize("copies", [1, 2])
def test_values_that_are_not_finite_are_said_to_be_unusable_whether_one_hop_could_say_so_or_two(
    make_swarm: Callable[..., MemorySwarm], copies: int
) -> None:
    swarm = make_swarm([*[(0, 2)] * copies, (2, NUM_BLOCKS)])
    model = swarm.model()
    embeds = model.get_input_embeddings()(prompt()) * float("nan")
    with impatient(), pytest.raises(ProtocolError, match="not finite") as raised:
        model(inputs_embeds=embeds)
    assert raised.value.hint == "the values given to the model are not usable"
    assert model._remote_layers.remote.traffic.failures[Code.MALFORMED] == 2
    assert swarm.eventually_settled()


@pytest.mark.parametrize("code", [Code.WRONG_MODEL, Code.MALFORMED, "of a later version"])
def test_the_only_holder_that_declined_once_is_asked_again(
    make_swarm: Callable[..., MemorySwarm], local: Any, code: str
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model, ids = swarm.model(), prompt()
    remote = model._remote_layers.remote
    decline = AtToken(5, lambda: say(swarm, remote.route, 1, code))
    with impatient():
        assert torch.equal(generate(model, ids, stopping_criteria=[decline]), generate(local, ids))
    assert remote.traffic.rebuilds == 1


def test_a_hop_that_cannot_reach_a_standby_that_is_gone_keeps_its_session(
    make_swarm: Callable[..., MemorySwarm], local: Any
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    swarm.add_peer(0, 2)
    model, ids = swarm.model(), prompt()
    remote = model._remote_layers.remote
    late = AtToken(5, lambda: say(swarm, remote.route, 0, Code.UNREACHABLE))
    assert torch.equal(generate(model, ids, stopping_criteria=[late]), generate(local, ids))
    assert (remote.traffic.rebuilds, remote.traffic.failures[Code.UNREACHABLE]) == (0, 1)


def test_a_trace_shows_every_step_at_every_hop_and_the_failover(
    make_swarm: Callable[..., MemorySwarm], local: Any, tmp_path: Path
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    swarm.add_peer(2, NUM_BLOCKS)
    model, file, ids = swarm.model(), tmp_path / "trace.json", prompt(1)

    def die() -> None:
        swarm.kill_peer(model.route.hops[1].peer_id)

    with traced(model, file):
        actual = generate(model, ids, stopping_criteria=[AtToken(5, die)])
    assert torch.equal(actual, generate(local, ids))
    trace = json.loads(file.read_text())
    tracks = check_trace(trace)

    def count(track: str, name: str) -> int:
        return sum(event["name"] == name for event in tracks[track])

    assert [count("client", name) for name in ("forward", "embed", "peers", "head", "sample")] == [16] * 5
    assert [count("route", name) for name in ("plan", "open")] == [2, 2]
    assert count("steps", "decode") >= 16
    at_hops = {name: events for name, events in tracks.items() if "…" in name}
    assert sorted(name.partition(" ")[0] for name in at_hops) == ["0:2", f"2:{NUM_BLOCKS}", f"2:{NUM_BLOCKS}"]
    computed = [event for events in at_hops.values() for event in events if event["name"] == "compute"]
    assert sum(event["dur"] for event in computed) > 0
    assert any(event["ph"] == "i" and event["name"].startswith("lost …") for event in trace["traceEvents"])
    with pytest.raises(CallerError, match="written"), traced(model, tmp_path):
        pass


@pytest.mark.parametrize("pauses", [0, 1])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_hop_that_pauses_is_replaced_with_the_same_ids_and_blamed_by_nobody_and_serves_again_later(
    make_swarm: Callable[..., MemorySwarm], local: Any, pauses: int, beams: int
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model = swarm.model()
    remote, router = model._remote_layers.remote, swarm.thread.client.router
    swarm.add_peer(*((0, 2), (2, NUM_BLOCKS))[pauses])
    ids, used = prompt(2), []

    def step_back() -> None:
        used.append(remote.route.hops[pauses].peer_id)
        swarm.pause_peer(used[0])

    pause = AtToken(5, step_back)
    assert torch.equal(
        generate(model, ids, num_beams=beams, stopping_criteria=[pause]), generate(local, ids, num_beams=beams)
    )
    other = remote.route.hops[pauses].peer_id
    assert other != used[0]
    assert remote.traffic.rebuilds >= 1
    assert router._reputation.backed_off(swarm.thread.client.discovery.now_s()) == {}
    assert swarm.eventually_settled()

    swarm.pause_peer(used[0], False)
    swarm.pause_peer(other)
    assert torch.equal(generate(model, ids), generate(local, ids))
    assert remote.route.hops[pauses].peer_id == used[0]


def test_a_conversation_whose_only_holder_pauses_hears_why_and_goes_on_when_it_is_back(
    make_swarm: Callable[..., MemorySwarm], local: Any
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model = swarm.model()
    peer_id = swarm.peers[1]._key.peer_id
    with model.session():
        first = generate(model, prompt())
        more = torch.cat([first, prompt(seed=7)], 1)
        swarm.pause_peer(peer_id)
        with impatient(), pytest.raises(NoRoute, match="paused"):
            generate(model, more)
        swarm.pause_peer(peer_id, False)
        assert torch.equal(generate(model, more), generate(local, more))


def test_a_rebuild_is_planned_from_the_route_that_was_lost(
    make_swarm: Callable[..., MemorySwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model = swarm.model()
    asked: list[Route | None] = []
    route = swarm.thread.client.discovery.route

    async def spy(request: RouteRequest, *, patience_s: float | None) -> Route:
        asked.append(request.previous)
        return await route(request, patience_s=patience_s)

    monkeypatch.setattr(swarm.thread.client.discovery, "route", spy)
    used: list[Route] = []

    def kill() -> None:
        used.append(model._remote_layers.remote.route)
        swarm.add_peer(2, NUM_BLOCKS)
        swarm.kill_peer(used[0].hops[1].peer_id)

    generate(model, prompt(), stopping_criteria=[AtToken(5, kill)])
    assert asked[:2] == [None, used[0]]
    assert model._remote_layers.remote.route.hops[0] == used[0].hops[0]


def test_room_is_asked_for_what_is_to_be_generated_within_reason(
    make_swarm: Callable[..., MemorySwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm([(0, NUM_BLOCKS)])
    model, asked = swarm.model(), list[tuple[int, int]]()
    route = swarm.thread.client.discovery.route

    async def spy(request: RouteRequest, *, patience_s: float | None) -> Route:
        asked.append((request.cache_tokens, request.expected_tokens))
        return await route(request, patience_s=patience_s)

    monkeypatch.setattr(swarm.thread.client.discovery, "route", spy)
    generate(model, prompt(length=9), max_new_tokens=16, stopping_criteria=[AtToken(5, swarm.forget_sessions)])
    assert asked == [(9, 25), (14, 25)], "for the prompt, and when its only holder had forgotten the session"
    monkeypatch.setattr(planning, "EXPECTED_TOKENS_MAX", 3)
    generate(model, prompt(length=9), max_new_tokens=16)
    model(prompt(length=9))
    assert asked[2:] == [(9, 12), (9, 0)], "who only computes says nothing of what is to come"


def test_peers_hear_how_long_a_session_may_become_and_when_that_becomes_more(
    make_swarm: Callable[..., MemorySwarm],
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model, told = swarm.model(), list[list[int]]()
    cache = model._remote_layers.new_cache()

    def look() -> None:
        told.append([entry.told for peer in swarm.peers for entry in peer.handler.ledger.entries()])

    def go_on(ids: torch.Tensor, count: int) -> torch.Tensor:
        wanted = {"max_new_tokens": count, "min_new_tokens": count, "past_key_values": cache}
        return generate(model, ids, **wanted, stopping_criteria=[AtToken(5, look)])

    go_on(go_on(prompt(length=9), 8), 16)
    assert told == [[17, 17], [33, 33]]


def test_peers_hear_how_long_a_session_may_become_that_begins_with_embeddings(
    make_swarm: Callable[..., MemorySwarm],
) -> None:
    swarm = make_swarm([(0, NUM_BLOCKS)])
    model, told = swarm.model(), list[set[int]]()
    embeds = model.get_input_embeddings()(prompt(length=9))

    def look() -> None:
        told.append({entry.told for entry in swarm.peers[0].handler.ledger.entries()})

    for length in ({"max_new_tokens": 8}, {"max_length": 17}):
        options = {"do_sample": False, "min_new_tokens": 8, "pad_token_id": 0, **length}
        mask, stop = torch.ones(1, 9, dtype=torch.long), [AtToken(2, look)]
        model.generate(inputs_embeds=embeds, attention_mask=mask, **options, stopping_criteria=stop)
    assert told == [{17}, {17}]


def test_a_client_whose_own_node_ends_says_so_at_once_and_from_then_on(
    make_swarm: Callable[..., MemorySwarm], local: Any
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model = swarm.model()
    gone = Unavailable("the daemon ended")

    def die() -> None:
        swarm.thread.post(swarm.thread.client.node.died.set_exception, gone)  # type: ignore[attr-defined]

    with pytest.raises(Unavailable, match="the daemon ended"):
        generate(model, prompt(), max_new_tokens=4000, stopping_criteria=[AtToken(5, die)])
    with pytest.raises(Unavailable, match="the daemon ended"):
        generate(model, prompt())


@pytest.mark.parametrize("error", [Unavailable("no descriptors left"), RuntimeError("a bug")])
def test_nothing_hangs_when_a_client_cannot_dial(
    make_swarm: Callable[..., MemorySwarm], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm([(0, NUM_BLOCKS)])
    model = swarm.model()

    async def to(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(swarm.thread.client.links, "to", to)
    with pytest.raises(Unavailable, match=str(error)):
        generate(model, prompt())


def test_a_gap_is_named(make_swarm: Callable[..., MemorySwarm]) -> None:
    swarm = make_swarm([(0, 1), (3, NUM_BLOCKS)])
    with impatient(), pytest.raises(NoRoute, match="1:3") as raised:
        generate(swarm.model(), prompt())
    assert raised.value.missing == ((1, 3),)


def test_a_session_under_way_waits_for_blocks_whose_only_holders_are_left_alone(
    make_swarm: Callable[..., MemorySwarm],
    local: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS), (2, NUM_BLOCKS)])
    model, ids = swarm.model(), prompt()

    async def fail() -> None:
        client = swarm.thread.client
        now_s = client.discovery.now_s()
        for peer in swarm.peers[1:]:
            for ago_s in (2.5, 0.0):  # the second time they are left alone for longer
                client.router.on_failure(peer._key.peer_id, now_s - ago_s, "refused")

    def refuse() -> None:
        monkeypatch.setattr(discovery, "NO_ROUTE_PATIENCE_S", 0.0)  # whoever waits at all is told, in case it is late
        swarm.thread.call(fail())
        swarm.forget_sessions()

    assert torch.equal(generate(model, ids, stopping_criteria=[AtToken(5, refuse)]), generate(local, ids))
    assert "s more: no route" in caplog.text
    assert "backed off" in caplog.text


def test_a_route_uses_part_of_a_span(make_swarm: Callable[..., MemorySwarm], local: Any) -> None:
    swarm = make_swarm([(0, 3), (1, NUM_BLOCKS)])
    model = swarm.model()
    assert torch.equal(generate(model, prompt()), generate(local, prompt()))
    spans = [str(hop.span) for hop in model._remote_layers.remote.route.hops]
    assert len(spans) == 2
    assert spans != ["0:3", f"1:{NUM_BLOCKS}"]


@pytest.mark.parametrize("options", [{}, {"device": "cpu,cpu"}], ids=["one-device", "two-devices"])
def test_a_route_returns_to_a_peer_of_two_spans_and_both_of_its_hops_are_replaced(
    make_swarm: Callable[..., MemorySwarm], local: Any, options: dict[str, str]
) -> None:
    swarm = make_swarm([f"0:1,3:{NUM_BLOCKS}", (1, 3)], **options)
    model = swarm.model()
    assert torch.equal(generate(model, prompt()), generate(local, prompt()))
    two, middle = (peer._key.peer_id for peer in swarm.peers)
    remote = model._remote_layers.remote
    assert [hop.peer_id for hop in remote.route.hops] == [two, middle, two]
    assert remote.traffic.relays == 0
    forked = prompt(2, seed=3)
    assert torch.equal(generate(model, forked, num_beams=2), generate(local, forked, num_beams=2))
    assert swarm.eventually_settled()

    def replace() -> None:
        assert [hop.peer_id for hop in remote.route.hops] == [two, middle, two]
        swarm.add_peer(0, NUM_BLOCKS)
        swarm.kill_peer(two)

    ids = generate(model, prompt(), stopping_criteria=[AtToken(6, replace)])
    assert torch.equal(ids, generate(local, prompt()))
    assert two not in [hop.peer_id for hop in remote.route.hops]


def test_a_pool_too_small_for_all_sessions_at_once_finishes_every_one(
    make_swarm: Callable[..., MemorySwarm], local: Any
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)], cache_tokens=64)  # six sessions of 25 positions want 150
    model = swarm.model()
    prompts = [prompt(seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda ids: generate(model, ids), prompts))
    for ids, result in zip(prompts, results, strict=True):
        assert torch.equal(result, generate(local, ids))
    assert swarm.eventually_settled()


def test_two_users_whose_sessions_pass_the_pool_together_both_finish_everything(
    make_swarm: Callable[..., MemorySwarm], local: Any
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)], cache_tokens=64)
    light, heavy = swarm.model(guest=True), swarm.model()
    work = [(light, prompt(seed=10)), *((heavy, prompt(seed=seed)) for seed in range(5)), (light, prompt(seed=11))]
    with ThreadPoolExecutor(len(work)) as threads:
        results = list(threads.map(lambda one: generate(*one), work))
    for (_, ids), result in zip(work, results, strict=True):
        assert torch.equal(result, generate(local, ids))
    assert swarm.eventually_settled()


def test_a_model_in_the_background_says_the_same_beside_one_that_is_not(
    make_swarm: Callable[..., MemorySwarm], local: Any
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    models = [swarm.model(), swarm.model(guest=True, urgency=Urgency.BACKGROUND)]
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda model: generate(model, prompt(2)), models))
    for result in results:
        assert torch.equal(result, generate(local, prompt(2)))


def test_an_interrupted_generation_frees_its_pages(make_swarm: Callable[..., MemorySwarm], local: Any) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model = swarm.model()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt(2), stopping_criteria=[AtToken(3, interrupt)])
    assert swarm.eventually_settled()
    assert torch.equal(generate(model, prompt()), generate(local, prompt()))


def test_who_is_interrupted_while_a_step_is_under_way_leaves_nothing_and_may_go_on_at_once(
    make_swarm: Callable[..., MemorySwarm], local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)], latency_s=0.01)
    model, waits, wait = swarm.model(), itertools.count(), Answer.wait

    def interrupted(answer: Answer[Any], timeout_s: float | None) -> Any:
        if next(waits) == 3:
            raise KeyboardInterrupt
        return wait(answer, timeout_s)

    with model.session():
        monkeypatch.setattr(Answer, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(model, prompt(2))
        assert torch.equal(generate(model, prompt(2)), generate(local, prompt(2)))
    assert swarm.eventually_settled()


def test_a_lone_sessions_next_token_leaves_without_a_task(
    make_swarm: Callable[..., MemorySwarm], local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model = swarm.model()
    remote, spawned = model._remote_layers.remote, list[str]()
    spawn = remote._tasks.spawn

    def noted(work: Any, *, name: str) -> Any:
        spawned.append(name)
        return spawn(work, name=name)

    with model.session():
        ids = generate(model, prompt())
        monkeypatch.setattr(remote._tasks, "spawn", noted)
        assert torch.equal(generate(model, ids), generate(local, ids))
        assert "send a step" not in spawned
    assert swarm.eventually_settled()


def test_a_conversation_keeps_its_session_and_survives_the_loss_of_every_page(
    make_swarm: Callable[..., MemorySwarm], local: Any
) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model = swarm.model()
    remote = model._remote_layers.remote
    with model.session():
        first = generate(model, prompt())
        more = torch.cat([first, prompt(seed=7)], 1)
        before = remote.traffic.bytes_sent
        second = generate(model, more)
        assert remote.traffic.bytes_sent - before < len(more[0]) * 32 * 4  # not the whole conversation again
        assert torch.equal(second, generate(local, more))
        swarm.forget_sessions()
        third = generate(model, torch.cat([second, prompt(seed=8)], 1))
        assert torch.equal(third, generate(local, torch.cat([second, prompt(seed=8)], 1)))
    assert swarm.eventually_settled()


def test_what_came_through_a_hop_shows_that_it_lives_although_it_says_nothing_itself(
    make_swarm: Callable[..., MemorySwarm],
) -> None:
    swarm = make_swarm([(0, 1), (1, 2), (2, NUM_BLOCKS)])
    model, mine = swarm.model(), swarm.thread.client.links
    heard_s: list[list[float]] = []

    def note() -> None:
        heard_s.append([mine._outbound[hop.peer_id].heard_at_s for hop in model.route.hops])

    generate(model, prompt(), stopping_criteria=[AtToken(5, note), AtToken(12, note)])
    assert all(early_s < late_s for early_s, late_s in zip(*heard_s, strict=True))


def test_several_threads_share_a_model(make_swarm: Callable[..., MemorySwarm], local: Any) -> None:
    swarm = make_swarm([(0, 2), (2, NUM_BLOCKS)])
    model = swarm.model()
    start = threading.Barrier(4)

    def one(seed: int) -> torch.Tensor:
        start.wait(60)
        return generate(model, prompt(seed=seed, length=5 + seed))

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(one, range(4)))
    for seed, result in enumerate(results):
        assert torch.equal(result, generate(local, prompt(seed=seed, length=5 + seed)))


def test_idle_links_close_but_for_those_of_a_session_also_to_hops_that_hear_nothing_from_us(
    make_swarm: Callable[..., MemorySwarm], local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "IDLE_S", 0.1)
    swarm = make_swarm([(0, 1), (1, 2), (2, NUM_BLOCKS)])
    model = swarm.model()
    mine = swarm.thread.client.links
    with model.session():
        first = generate(model, prompt())
        time.sleep(0.5)
        more = torch.cat([first, prompt(seed=7)], 1)
        assert torch.equal(generate(model, more), generate(local, more))
        assert model._remote_layers.remote.traffic.rebuilds == 0
        assert len(mine._outbound) == 3
    deadline_s = time.monotonic() + 60.0
    while mine._outbound and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert mine._outbound == {}
    assert torch.equal(generate(model, prompt()), generate(local, prompt()))

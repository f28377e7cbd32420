"""A prompt whose beginning a peer has seen from the same client is not sent again, and nobody reads a difference.

One process, memory transport, real engines, handlers and drivers. The real processes' version: `tests/integration`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from peers.host.server import ServerPeer
from peers.runtime.works import EngineStats
from peers.wire.messages import PREFIX_POSITIONS
from routing.errors import CallerError
from routing.routes import Route, RouteRequest
from swarm import SwarmModelForCausalLM
from swarm.session.review import ANSWER_STEPS
from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm
from tests.numerics.test_trouble import AtToken, generate

pytestmark = pytest.mark.usefixtures("plain_forwards")

SPANS = [(0, 1), (1, 3), (3, NUM_BLOCKS)]
BLOCK = PREFIX_POSITIONS
LENGTH = 2 * BLOCK + BLOCK // 2
"""Of a text: two blocks and a bit."""


def text(length: int, *, shared: int = 2 * BLOCK + BLOCK // 4, seed: int = 1) -> torch.Tensor:
    """`length` tokens, of which the first `shared` are the same in every text."""
    ids = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    ids[:, shared:] = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))[
        :, shared:
    ]
    return ids


def skipped(model: Any) -> int:
    positions: int = model._remote_layers.remote.traffic.prefix_positions
    return positions


def stats(swarm: MemorySwarm) -> list[EngineStats]:
    return [peer.engine.stats() for peer in swarm.peers]


@pytest.mark.parametrize(
    ("family", "same_length", "other_length"),
    [
        ("llama", 2 * BLOCK, 2 * BLOCK),
        ("gemma3", 2 * BLOCK, 2 * BLOCK),
        ("gemma4-moe", 2 * BLOCK, 2 * BLOCK),
        ("mixtral", 2 * BLOCK, 2 * BLOCK),
        ("opt", 2 * BLOCK, 2 * BLOCK),
        ("deepseek-v3", 2 * BLOCK, 2 * BLOCK),
        ("phi3-longrope", 2 * BLOCK, 2 * BLOCK),
        ("bloom", 0, 0),  # its sessions run alone
    ],
)
def test_a_known_beginning_is_not_sent_again(family: str, same_length: int, other_length: int, tmp_path: Path) -> None:
    local = save_checkpoint(FAMILIES[family], tmp_path / "model")
    with MemorySwarm(tmp_path / "model", SPANS, cache=tmp_path / "cache") as swarm:
        model = swarm.model()
        for ids, expected in (
            (text(LENGTH), 0),
            (text(LENGTH, seed=2), same_length),
            (text(LENGTH), same_length),
            (text(LENGTH + 10, seed=3), other_length),
        ):
            before = skipped(model)
            assert torch.equal(generate(model, ids), generate(local, ids))
            assert skipped(model) - before == expected
        assert swarm.eventually_settled()
        assert all(each.prefix_tokens >= 2 * same_length + other_length for each in stats(swarm))


def test_every_output_is_there_when_every_output_is_wanted(make_swarm: Callable[..., MemorySwarm], local: Any) -> None:
    model = make_swarm(SPANS).model()
    generate(model, text(LENGTH))
    with torch.no_grad():
        actual, expected = model(text(LENGTH)).logits, local(text(LENGTH)).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    ids = text(2 * BLOCK)  # all of it is known, and the last output is wanted
    assert torch.equal(generate(model, ids), generate(local, ids))
    assert skipped(model) == 2 * BLOCK - 1


def test_sessions_share_a_beginning_while_they_run(make_swarm: Callable[..., MemorySwarm], local: Any) -> None:
    swarm = make_swarm(SPANS)
    model = swarm.model()
    expected = [generate(local, text(LENGTH, seed=seed)) for seed in range(5)]
    second: list[torch.Tensor] = []
    begin = AtToken(4, lambda: second.append(generate(model, text(LENGTH, seed=4))))
    assert torch.equal(generate(model, text(LENGTH, seed=0), stopping_criteria=[begin]), expected[0])
    assert torch.equal(second[0], expected[4])
    assert skipped(model) == 2 * BLOCK
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda seed: generate(model, text(LENGTH, seed=seed)), range(1, 4)))
    assert all(torch.equal(*pair) for pair in zip(results, expected[1:4], strict=True))
    assert skipped(model) == 4 * 2 * BLOCK
    assert swarm.eventually_settled()


def test_a_prompt_that_was_seen_before_is_planned_with_what_its_old_route_saves(
    make_swarm: Callable[..., MemorySwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_swarm(SPANS).model()
    remote = model._remote_layers.remote
    asked: dict[Hashable, RouteRequest] = {}

    def plan(request: RouteRequest, now_s: float) -> Route:
        asked.setdefault(request.session, request)
        return plans(request, now_s)

    plans = remote._client.router.plan
    monkeypatch.setattr(remote._client.router, "plan", plan)
    for seed in (1, 2):
        generate(model, text(LENGTH, seed=seed))
    generate(model, text(LENGTH, shared=0, seed=3))
    asked.pop(None, None)
    first, again, other = asked.values()
    assert (first.kept, other.kept) == (None, None)
    assert again.kept is not None
    assert again.kept.hops == remote.route.hops
    assert again.kept.saves == pytest.approx(2 * BLOCK / ANSWER_STEPS, rel=0.05), "fewer, as the prompt has some steps"


@pytest.mark.parametrize("dies", [0, 1, 2])
def test_a_hop_that_dies_after_a_hit_is_replaced_and_the_ids_stay_the_same(
    make_swarm: Callable[..., MemorySwarm], local: Any, dies: int
) -> None:
    swarm = make_swarm(SPANS)
    model = swarm.model()
    generate(model, text(LENGTH))
    route = [hop.peer_id for hop in model._remote_layers.remote.route.hops]
    swarm.add_peer(*SPANS[dies])
    ids = text(LENGTH, seed=2)
    kill = AtToken(5, lambda: swarm.kill_peer(route[dies]))
    assert torch.equal(generate(model, ids, stopping_criteria=[kill]), generate(local, ids))
    remote = model._remote_layers.remote
    assert (remote.traffic.prefix_positions, remote.traffic.rebuilds) == (2 * BLOCK, 1)
    assert route[dies] not in [hop.peer_id for hop in remote.route.hops]
    assert (remote.traffic.replayed_positions >= LENGTH) == (dies > 0), "from the journal, the prefix included"


def test_a_hop_that_dies_after_a_hit_of_another_client_is_rebuilt_from_the_journal(
    make_swarm: Callable[..., MemorySwarm], local: Any
) -> None:
    swarm = make_swarm(SPANS, share_prefixes="network")
    first, second = (swarm.model(guest=True, prefix_secret=b"s" * 32) for _ in range(2))
    generate(first, text(LENGTH))
    route = [hop.peer_id for hop in first._remote_layers.remote.route.hops]
    ids = text(LENGTH, seed=2)

    def replace() -> None:
        swarm.add_peer(*SPANS[1])
        swarm.kill_peer(route[1])

    assert torch.equal(generate(second, ids, stopping_criteria=[AtToken(5, replace)]), generate(local, ids))
    traffic = second._remote_layers.remote.traffic
    assert (traffic.prefix_positions, traffic.rebuilds) == (2 * BLOCK, 1)
    assert traffic.replayed_positions >= LENGTH, "all of it by the hop before, nothing by the client"


def test_a_session_that_was_forgotten_replays_from_what_is_kept(
    make_swarm: Callable[..., MemorySwarm], local: Any
) -> None:
    swarm = make_swarm(SPANS)
    model = swarm.model()
    ids = text(LENGTH)
    forget = AtToken(5, swarm.forget_sessions)
    assert torch.equal(generate(model, ids, stopping_criteria=[forget]), generate(local, ids))
    assert skipped(model) == 2 * BLOCK


def test_under_pressure_what_is_kept_goes_and_every_session_ends_well(
    make_swarm: Callable[..., MemorySwarm], local: Any
) -> None:
    swarm = make_swarm(SPANS, cache_tokens=4 * BLOCK)  # two sessions of 96 positions want more, but for what they share
    model = swarm.model()
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda seed: generate(model, text(LENGTH, seed=seed)), range(3)))
    for seed, result in enumerate(results):
        assert torch.equal(result, generate(local, text(LENGTH, seed=seed)))
    other = text(LENGTH + 20, shared=0, seed=7)
    assert torch.equal(generate(model, other), generate(local, other))
    assert swarm.eventually_settled()


def test_another_client_begins_with_nothing_unless_both_sides_agree(
    make_swarm: Callable[..., MemorySwarm], local: Any
) -> None:
    for share_prefixes, secrets, expected in (
        ("owner", (b"s" * 32, b"s" * 32), 0),
        ("network", (None, None), 0),
        ("network", (b"s" * 32, b"s" * 32), 2 * BLOCK),
    ):
        swarm = make_swarm(SPANS, share_prefixes=share_prefixes)
        first, second = (swarm.model(guest=True, prefix_secret=secret) for secret in secrets)
        for model in (first, second):
            assert torch.equal(generate(model, text(LENGTH)), generate(local, text(LENGTH)))
        assert (skipped(first), skipped(second)) == (0, expected)


@pytest.mark.parametrize("size", [0, 15, 65])
def test_a_prefix_secret_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(CallerError, match="16 to 64 bytes"):
        SwarmModelForCausalLM.from_pretrained("nowhere", prefix_secret=bytes(size))


@pytest.mark.parametrize(("too_many", "same_route"), [(0, True), (1, False)])
def test_a_hop_that_holds_less_than_it_says_costs_a_route_and_no_token(
    make_swarm: Callable[..., MemorySwarm],
    local: Any,
    too_many: int,
    same_route: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within what it was offered it may have lost it, and is not believed again; beyond that it is broken.

    The first and the last say what they should; of the two between them the one that is asked first does not.
    """
    swarm = make_swarm([*SPANS, SPANS[1]])
    model = swarm.model()
    first, *middle, last = (swarm.peers[at] for at in (0, 1, 3, 2))
    liars, routes = list[ServerPeer](), list[Route]()
    plan = swarm.thread.client.discovery.route

    async def route(request: RouteRequest, *, patience_s: float | None) -> Route:
        routes.append(await plan(request, patience_s=patience_s))
        return routes[-1]

    def lying(peer: ServerPeer, honest: Callable[..., int]) -> Callable[..., int]:
        def opened(session: Any, owner: Any, span: Any, keys: Sequence[Any], adapter: Any) -> int:
            if not liars:
                liars.append(peer)
            if peer is not liars[0]:
                return honest(session, owner, span, keys, adapter)
            return len(keys) * BLOCK + too_many

        return opened

    monkeypatch.setattr(swarm.thread.client.discovery, "route", route)
    for peer in middle:
        monkeypatch.setattr(peer.engine, "open", lying(peer, peer.engine.open))
    for peer in (first, last):
        monkeypatch.setattr(peer.engine, "open", lambda session, owner, span, keys, adapter: len(keys) * BLOCK)
    assert torch.equal(generate(model, text(LENGTH)), generate(local, text(LENGTH)))
    assert liars
    assert (model.route.hops == routes[0].hops) == same_route

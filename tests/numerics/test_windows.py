"""However far a caller goes back in a model whose layers slide, the outputs are those of the local one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm
from tests.numerics.test_trouble import generate


@pytest.fixture(scope="module", params=["gemma3", "gemma4-moe"])
def local(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_checkpoint(FAMILIES[request.param], folder)
    model.folder = folder
    return model


@pytest.fixture
def swarm(local: Any, tmp_path: Path) -> Iterator[MemorySwarm]:
    with MemorySwarm(local.folder, [(0, 1), (1, NUM_BLOCKS)], cache=tmp_path) as swarm:
        yield swarm


def ids_of(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def test_going_back_behind_the_window_is_a_replay_over_the_same_route_without_blame(
    swarm: MemorySwarm, local: Any
) -> None:
    model = swarm.model()
    remote, client = model._remote_layers.remote, swarm.thread.client
    ids, other = ids_of(150, 1), ids_of(6, 2)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(ids_of(1, 3), past_key_values=cache)
        route = remote.route
        for kept, replays in ((100, 0), (20, 1)):
            cache.crop(kept - cache.get_seq_length())
            ids = torch.cat([ids[:, :kept], other], 1)
            actual, expected = model(other, past_key_values=cache).logits, local(ids).logits[:, -6:]
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert remote.traffic.replays == replays
    assert remote.route is route
    assert remote.traffic.rebuilds == 0
    assert client.router._reputation.backed_off(client.discovery.now_s()) == {}


def test_speculation_never_meets_the_end_of_what_a_window_keeps(swarm: MemorySwarm, local: Any) -> None:
    model = swarm.model()
    ids = ids_of(30, 4).repeat(1, 4)
    for arguments in ({"prompt_lookup_num_tokens": 40}, {"assistant_model": local}):
        actual = generate(model, ids, max_new_tokens=40, min_new_tokens=40, **arguments)
        assert torch.equal(actual, generate(local, ids, max_new_tokens=40, min_new_tokens=40))
    traffic = model._remote_layers.remote.traffic
    assert (traffic.rebuilds, traffic.replays) == (0, 0)

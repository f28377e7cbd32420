"""Threads that leave together stay together: in every frame, and in every forward of every peer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from peers.runtime import engine
from swarm.errors import SessionClosed
from swarm.session.callers import Callers
from tests.helpers.families import FAMILIES, VOCABULARY, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm

pytestmark = pytest.mark.usefixtures("plain_forwards")

CALLERS, TOKENS = 3, 12
DEADLINE_S = 60.0
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}


class AllOfThem(Callers):
    """Everybody waits for everybody."""

    def __init__(self) -> None:
        super().__init__()
        self.held = threading.Event()

    def __len__(self) -> int:
        return CALLERS

    def patience_s(self, waiting: int, gain_s: float, now_s: float, *, to_head: bool = False) -> float:
        if not to_head:
            self.held.set()
        return 0.0 if to_head or waiting == CALLERS else DEADLINE_S


@pytest.fixture
def local(tmp_path: Path) -> Any:
    return save_checkpoint(FAMILIES["llama"], tmp_path)


@pytest.fixture
def swarm(local: Any, tmp_path: Path) -> Iterator[MemorySwarm]:
    with MemorySwarm(tmp_path, [(0, 1), (1, 4)]) as swarm:
        yield swarm


@pytest.fixture
def model(swarm: MemorySwarm) -> Any:
    model = swarm.model()
    departures = model._remote_layers.remote._departures
    departures._callers, departures._gain_s = AllOfThem(), lambda: DEADLINE_S
    return model


def prompt(seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    return result


def test_callers_that_leave_together_share_every_forward(
    local: Any, swarm: MemorySwarm, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MOMENT_S", DEADLINE_S)  # however late the loop is on a busy machine
    with ThreadPoolExecutor(CALLERS) as threads:
        answers = list(threads.map(lambda seed: generate(model, prompt(seed)), range(CALLERS)))
    assert all(torch.equal(answer, generate(local, prompt(seed))) for seed, answer in enumerate(answers))
    for peer in swarm.peers:
        works = peer.engine.counts().batch_works
        assert works.sum == CALLERS * TOKENS
        assert TOKENS <= sum(works.counts) < TOKENS + CALLERS, "each prompt waits for its own route"
    assert swarm.eventually_settled()


def test_a_model_that_is_closed_lets_nobody_wait(swarm: MemorySwarm, model: Any) -> None:
    callers = model._remote_layers.remote._departures._callers
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(generate, model, prompt(0))
        assert callers.held.wait(DEADLINE_S)
        model.close()
        with pytest.raises(SessionClosed):
            answer.result(DEADLINE_S)
    assert swarm.eventually_settled()

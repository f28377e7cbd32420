"""Gradients through peers equal local ones: inputs, prompts and heads, padded and packed batches, whatever peers do.

Real engines, handlers and drivers in one process; the real processes' version is in `tests/integration`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from peers.errors import Refused
from peers.serving.training import TrainingLimits
from peers.wire import parts
from peers.wire.messages import Trained
from routing.errors import CallerError, NoRoute
from swarm import SwarmModelForSequenceClassification
from swarm.errors import SessionClosed, UnsupportedGradient, UnsupportedMask
from swarm.models.classification import with_class_head
from swarm.session import training as client
from swarm.session.training import TrainingConfig, TrainingRoute, micro_batches
from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm

SPANS = [(0, 1), (1, 3), (3, NUM_BLOCKS)]
EVERY_ROW = TrainingConfig(micro_batch_tokens=8)
TOLERANCE = 1e-5


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((actual - expected).norm() / expected.norm())


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Rows of 9, 6 (padded on the left) and 5 (on the right) tokens; no label is predicted from padding."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, 5:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradient_of_inputs(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient for the embeddings of what is no padding."""
    given = dict(inputs)
    ids = given.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, **given).loss
    loss.backward()
    assert embeds.grad is not None
    return loss.detach(), embeds.grad * given.get("attention_mask", torch.ones_like(ids))[..., None]


def route_of(model: Any) -> TrainingRoute:
    route: TrainingRoute = model._remote_layers.remote.training
    return route


def limit(swarm: MemorySwarm, **limits: int) -> None:
    for peer in swarm.peers:
        peer.training.shelf.limits = TrainingLimits(**limits)


def counts(swarm: MemorySwarm) -> tuple[int, int, int]:
    """Backwards, those that used no graph of a forward, and works that are still kept."""
    trainings = [peer.training for peer in swarm.peers]
    return (
        sum(training.counts.backwards for training in trainings),
        sum(training.counts.recomputed for training in trainings),
        sum(len(training.shelf) for training in trainings),
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "gemma3", "gpt-neox", "bloom"])
def test_gradients_of_inputs_equal_local_ones_whatever_peers_kept(family: str, tmp_path: Path) -> None:
    local = save_checkpoint(FAMILIES[family], tmp_path / "model").requires_grad_(False)
    inputs = batch()
    expected_loss, expected = gradient_of_inputs(local, inputs)
    with MemorySwarm(tmp_path / "model", SPANS, cache=tmp_path / "cache", training=True) as swarm:
        model = swarm.model(training=EVERY_ROW)
        input_bytes = 9 * 32 * 4
        for kept, (max_bytes, per_peer) in enumerate([(1 << 30, 1 << 30), (1 << 30, 3 * input_bytes), (1, 1)]):
            limit(swarm, max_bytes=max_bytes, max_bytes_per_peer=per_peer)
            before = counts(swarm)
            loss, gradient = gradient_of_inputs(model, inputs)
            assert distance(loss, expected_loss) <= TOLERANCE
            assert distance(gradient, expected) <= TOLERANCE
            backwards, recomputed = counts(swarm)[0] - before[0], counts(swarm)[1] - before[1]
            assert (backwards, recomputed) == (9, 9 if kept else 0)
        assert route_of(model).traffic.resent == 9
        assert swarm.eventually(lambda: counts(swarm)[2] == 0), "peers forget what was used"
        assert swarm.eventually_settled()

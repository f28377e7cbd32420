"""The dropout of an adapter: the same bits for everybody, from the seed alone."""

from __future__ import annotations

import torch

from peers.model.adapters import Dropout, dropped
from peers.wire.messages import AdapterTarget

TARGET = AdapterTarget(3, "self_attn.q_proj", 2, 5, 4, 1.0)


def test_the_bits_are_those_that_every_version_draws() -> None:
    kept = dropped(Dropout(0.4, 7), TARGET, 2, 3) > 0
    assert kept.int().tolist() == [[1, 1, 1, 0, 1], [1, 1, 0, 0, 1], [0, 0, 0, 1, 0]]


def test_what_stays_is_scaled_so_that_the_mean_stays() -> None:
    factors = dropped(Dropout(0.4, 1), TARGET, 0, 4000)
    assert factors.dtype == torch.float32
    assert factors.unique().tolist() == [0.0, torch.tensor(1 / 0.6).item()]
    assert abs(float(factors.mean()) - 1) < 0.02


def test_a_longer_sequence_begins_alike_and_every_other_place_is_drawn_apart() -> None:
    factors = dropped(Dropout(0.4, 1), TARGET, 0, 40)
    assert torch.equal(dropped(Dropout(0.4, 1), TARGET, 0, 60)[:40], factors)
    other = AdapterTarget(4, "self_attn.q_proj", 2, 5, 4, 1.0)
    for apart in (
        dropped(Dropout(0.4, 2), TARGET, 0, 40),
        dropped(Dropout(0.4, 1), TARGET, 1, 40),
        dropped(Dropout(0.4, 1), other, 0, 40),
    ):
        assert not torch.equal(apart, factors)

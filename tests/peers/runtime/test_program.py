"""What can be recorded runs at any number of positions; what cannot says why. For the families, see `test_tape`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peers.runtime.program import TOKENS_MAX, NotFlat, Programs, record


class NoAttention:
    def attend(self, q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        return q.new_ones(1, q.shape[2], q.shape[1], v.shape[3]) * v.mean()


ALONE = NoAttention()


def recorded(forward: Any) -> Programs:
    steps = record(forward, torch.zeros(6), ALONE)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            programs = end.value
            assert isinstance(programs, Programs)
            return programs


def test_what_is_linear_in_the_number_of_positions_runs_at_any() -> None:
    weight = torch.randn(6, 6)

    def forward(hidden: Tensor, positions: Tensor, attender: object) -> Tensor:
        tokens = hidden.shape[1]
        halves = (hidden @ weight).view(1, tokens * 2, 3).reshape(1, tokens, 2, 3)
        return (halves.flip(2).reshape(1, tokens, 6) + positions[..., None]) * 0.5

    programs = recorded(forward)
    for tokens in (1, 2, 7, TOKENS_MAX):
        hidden, positions = torch.randn(1, tokens, 6), torch.randint(0, 99, (1, tokens))
        assert torch.equal(programs(hidden, positions, ALONE), forward(hidden, positions, ALONE))


def test_a_forward_that_looks_at_values_is_refused() -> None:
    def forward(hidden: Tensor, positions: Tensor, attender: object) -> Tensor:
        return hidden if hidden.sum() > 0 else -hidden

    with pytest.raises(NotFlat, match="cannot be recorded"):
        recorded(forward)


def test_a_forward_that_depends_on_how_many_there_are_is_refused() -> None:
    def forward(hidden: Tensor, positions: Tensor, attender: object) -> Tensor:
        return hidden * 2 if hidden.shape[1] < 5 else hidden * 3

    with pytest.raises(NotFlat, match="5 positions come out differently"):
        recorded(forward)

    def branch(hidden: Tensor, positions: Tensor, attender: object) -> Tensor:
        return hidden * 2 if hidden.shape[1] == 2 else (hidden + 1) * 3

    with pytest.raises(NotFlat, match="how many positions"):
        recorded(branch)

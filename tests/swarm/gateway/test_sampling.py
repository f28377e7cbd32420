from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from swarm.gateway import sampling
from swarm.gateway.sampling import Sampling, adjusted, choose

LOGITS_V = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3


def possible(how: Sampling, draws: int = 3000) -> Counter[int]:
    rng = random.Random(0)
    return Counter(choose(LOGITS_V, how, rng) for _ in range(draws))


@pytest.mark.parametrize(
    ("how", "warpers"),
    [
        (Sampling(), []),
        (Sampling(temperature=0.5), [TemperatureLogitsWarper(0.5)]),
        (Sampling(top_k=4), [TopKLogitsWarper(4)]),
        (Sampling(top_p=0.7), [TopPLogitsWarper(0.7)]),
        (Sampling(min_p=0.2), [MinPLogitsWarper(0.2)]),
        (Sampling(temperature=2.0, top_k=9, top_p=0.8), [TemperatureLogitsWarper(2.0), TopKLogitsWarper(9)]),
    ],
)
def test_tokens_come_as_often_as_transformers_would_draw_them(how: Sampling, warpers: list) -> None:
    scores_1V = LOGITS_V[None]
    for warper in warpers:
        scores_1V = warper(None, scores_1V)
    if how.top_k and how.top_p < 1:  # of what top-k leaves, as vLLM means it, or of everything: both keep the likeliest
        scores_1V = TopPLogitsWarper(how.top_p)(None, scores_1V)
    expected_V, drawn = scores_1V[0].softmax(-1), possible(how)
    assert all(expected_V[token] > 0 for token in drawn)
    for token, chance in enumerate(expected_V.tolist()):
        assert abs(drawn[token] / 3000 - chance) < 0.04


def test_top_p_looks_further_where_the_first_look_holds_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = possible(Sampling(top_p=0.95))
    monkeypatch.setattr(sampling, "FIRST_LOOK", 2)
    assert possible(Sampling(top_p=0.95)) == whole


def test_temperature_0_is_the_likeliest_and_a_tiny_one_does_not_overflow() -> None:
    best = int(LOGITS_V.argmax())
    assert {*possible(Sampling(temperature=0), 5)} == {*possible(Sampling(temperature=1e-6), 50)} == {best}
    assert set(possible(Sampling(top_p=1e-9), 50)) == {best}


def test_a_forbidden_token_is_never_drawn() -> None:
    masked_V = LOGITS_V.clone()
    masked_V[torch.arange(50) != 7] = -torch.inf
    for how in (Sampling(), Sampling(top_p=0.5), Sampling(top_k=10), Sampling(min_p=0.5), Sampling(temperature=0)):
        assert choose(masked_V, how, random.Random(1)) == 7


def test_penalties_and_bias_do_what_the_reference_says() -> None:
    how = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: -100.0})
    got_V = adjusted(LOGITS_V, how, [1, 2], Counter({4: 2, 5: 1}))
    expected_V = LOGITS_V.clone()
    expected_V[4] -= 0.5 + 2 * 0.25
    expected_V[5] -= 0.5 + 0.25
    expected_V[3] -= 100
    torch.testing.assert_close(got_V, expected_V)
    repeated_V = adjusted(LOGITS_V, Sampling(repetition_penalty=1.3), [1, 2], Counter({4: 2}))
    reference_1V = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[1, 2, 4, 4]]), LOGITS_V[None].clone())
    torch.testing.assert_close(repeated_V, reference_1V[0])

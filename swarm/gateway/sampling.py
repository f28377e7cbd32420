"""Which token comes next, from one row of logits.

Owns the order of things: bias and penalties, the grammar's mask, then temperature, top-k, top-p, min-p, as vLLM and
transformers apply them. Randomness is an argument.

Legend: V the vocabulary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FIRST_LOOK = 1024
"""Tokens that top-p sorts at first; nearly always they hold the share that it wants, and sorting all takes ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one answer's tokens are chosen."""

    temperature: float = 1.0
    """0: the likeliest, always."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def as_they_are(self) -> bool:
        """Whether the logits' own maximum is the choice."""
        return self.temperature == 0 and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalties or self.logit_bias)


def adjusted(logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], generated: Counter[int]) -> Tensor:
    """The logits with bias and penalties. Presence and frequency count what was generated, repetition the prompt too
    (https://platform.openai.com/docs/api-reference/chat, arXiv:1909.05858 section 4.1)."""
    if not sampling.changes_logits:
        return logits_V
    logits_V = logits_V.clone()
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *generated}), device=logits_V.device)
        had = logits_V[seen]
        logits_V[seen] = torch.where(had < 0, had * sampling.repetition_penalty, had / sampling.repetition_penalty)
    if generated and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.tensor([*generated.items()], device=logits_V.device).T
        logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token_id, bias in sampling.logit_bias.items():
        logits_V[token_id] += bias
    return logits_V


def choose(logits_V: Tensor, sampling: Sampling, rng: random.Random) -> int:
    """A token id. Takes one number from `rng`, or none with temperature 0."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled_V = (logits_V - logits_V.max()) / sampling.temperature  # the largest is 0: no temperature overflows
    ids_K = None
    if sampling.top_k or sampling.top_p < 1:
        scaled_K, ids_K = _likeliest(scaled_V, sampling)
    else:
        scaled_K = scaled_V
    if sampling.min_p:
        scaled_K = scaled_K.masked_fill(scaled_K.exp() < sampling.min_p, -torch.inf)
    cumulated_K = scaled_K.exp().double().cumsum(0)
    index = int(torch.searchsorted(cumulated_K, rng.random() * float(cumulated_K[-1]), right=True))
    index = min(index, len(cumulated_K) - 1)
    return index if ids_K is None else int(ids_K[index])


def _likeliest(scaled_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The K likeliest, in order, that top-k and then top-p leave, with their ids."""
    vocabulary = len(scaled_V)
    if sampling.top_k:
        values_K, ids_K = scaled_V.topk(min(sampling.top_k, vocabulary))
        total = float(values_K.exp().sum())
    else:
        values_K, ids_K = scaled_V.topk(min(FIRST_LOOK, vocabulary))
        total = float(scaled_V.exp().sum())
        if float(values_K.exp().sum()) < sampling.top_p * total:
            values_K, ids_K = scaled_V.sort(descending=True)
    if sampling.top_p < 1:
        weights_K = values_K.exp()
        before_K = weights_K.cumsum(0) - weights_K
        kept = max(1, int((before_K < sampling.top_p * total).sum()))
        values_K, ids_K = values_K[:kept], ids_K[:kept]
    return values_K, ids_K

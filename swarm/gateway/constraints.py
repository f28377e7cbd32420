"""Answers that must be JSON, or JSON of a given form: what may come next, computed by llguidance.

Owns the translation of schemas to grammars and the mask over the vocabulary. Knows no request.

Legend: V the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from routing.errors import CallerError

MAX_SCHEMA_CHARACTERS = 64 << 10
MAX_REASON_CHARACTERS = 300


class Grammars:
    """Makes grammars for one model's vocabulary."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int]) -> None:
        self._hf_tokenizer = tokenizer
        self._eos_ids = sorted(eos_ids)
        self._tokenizer: LLTokenizer | None = None

    def prepare(self) -> LLTokenizer:
        """Takes about a second the first time. Raises CallerError for a tokenizer that llguidance cannot read."""
        if self._tokenizer is None:
            try:
                self._tokenizer = llguidance.hf.from_tokenizer(self._hf_tokenizer, eos_token=self._eos_ids or None)
            except ValueError as error:
                raise CallerError(f"this model's tokenizer does not allow constrained answers: {error}") from error
        return self._tokenizer

    def json(self, schema: dict[str, Any] | bool) -> Callable[[], JsonGrammar]:
        """A maker of grammars of JSON as `schema` describes it, checked once. May take seconds. Raises CallerError."""
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA_CHARACTERS:
            raise CallerError(f"the JSON schema is longer than {MAX_SCHEMA_CHARACTERS} characters")
        tokenizer = self.prepare()
        # no free white space: a model that is bad at JSON would go on with it for ever
        options: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=options)
            first = LLMatcher(tokenizer, grammar, log_level=0)
        except ValueError as error:
            raise _unusable(str(error)) from error
        if first.is_error():
            raise _unusable(first.get_error())
        return lambda: JsonGrammar(first.deep_copy(), self._eos_ids)


class JsonGrammar:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher, eos_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._eos_ids = list(eos_ids)

    def mask(self, logits_V: Tensor) -> Tensor:
        """The logits, with −∞ for all that may not follow."""
        allowed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise _unusable(self._matcher.get_error())
        bits = np.unpackbits(allowed, bitorder="little")[: len(logits_V)]
        allowed_V = torch.zeros(len(logits_V), dtype=torch.bool)
        allowed_V[: len(bits)] = torch.from_numpy(bits).bool()
        ends = [token_id for token_id in self._eos_ids if token_id < len(logits_V)]
        allowed_V[ends] = self._matcher.is_accepting()
        return logits_V.masked_fill(~allowed_V.to(logits_V.device), -torch.inf)

    def accept(self, token_id: int) -> None:
        if token_id not in self._eos_ids:
            self._matcher.consume_token(token_id)

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_stopped())


def _unusable(reason: str) -> CallerError:
    """The first line says what is wrong, the rest is llguidance's own state."""
    return CallerError(f"the JSON schema cannot be used: {reason.partition(chr(10))[0][:MAX_REASON_CHARACTERS]}")

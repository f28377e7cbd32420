"""One prompt in, a streamed answer and its timings out: what the command line and the demo do with a model.

Owns the choice between greedy and sampling, the streaming of text and the measuring of its speed. Works on whatever
generates like a Hugging Face model, and knows no network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

from peers.model.catalog import Checkpoint
from peers.model.support import one_line
from routing.errors import CallerError
from swarm.errors import ContextTooLong

Message = dict[str, str]
"""`{"role": "user" | "assistant" | "system", "content": …}`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest, unless one of the first five asks for chance."""

    temperature: float | None = None
    """0 is greedy, whatever else is given."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1

    @property
    def by_chance(self) -> bool:
        asked = (self.temperature, self.top_p, self.top_k, self.min_p, self.seed)
        return self.temperature != 0 and any(option is not None for option in asked)

    def arguments(self) -> dict[str, Any]:
        """For `generate`. The model's own sampling defaults count only where chance is asked for."""
        chosen: dict[str, Any] = {"do_sample": self.by_chance, "num_beams": self.num_beams}
        if self.by_chance:
            options = ("temperature", "top_p", "top_k", "min_p")
            chosen |= {name: value for name in options if (value := getattr(self, name)) is not None}
        else:
            chosen |= {"temperature": None, "top_p": None, "top_k": None, "min_p": None}
        if self.repetition_penalty is not None:
            chosen["repetition_penalty"] = self.repetition_penalty
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Of one answer; the loading of the model is not part of it."""

    time_to_first_token_s: float
    """With beam search, which settles nothing before the end, the time to the whole answer."""
    tokens_per_s: float | None
    """Behind the first token; over everything for beam search; None when only one token came."""
    total_s: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back."""

    text: str
    token_ids: list[int]
    """The new ones, with the end token if the model set one."""
    timings: Timings


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's own. Raises CallerError when it has none."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a stranger's file runs through the tokenizer's own code: KeyError, TypeError, …
        raise CallerError(
            f"{checkpoint.name} has no tokenizer that can be loaded ({one_line(error)})",
            hint="give the folder or id of a checkpoint with a tokenizer",
        ) from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a text to go on from."""
    return list(tokenizer(prompt).input_ids)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation whose next turn is the model's. Raises CallerError without a chat template."""
    if not tokenizer.chat_template:
        raise CallerError(
            "this model has no chat template", hint="it continues texts: use `swarm generate MODEL --raw --prompt …`"
        )
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    write: Callable[[str], None],
) -> Answer:
    """Generate behind `prompt_ids` and hand each piece of text to `write` as it is settled.

    Stops at the end of the model's context. Raises ContextTooLong when the prompt fills it, and SwarmError.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None:
        if len(prompt_ids) >= context:
            raise ContextTooLong(
                f"the prompt has {len(prompt_ids)} tokens; the model's context has {context}", hint="shorten the prompt"
            )
        max_new_tokens = min(max_new_tokens, context - len(prompt_ids))
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    stream = Stream(tokenizer, write) if sampling.num_beams == 1 else None
    prompt_1T = torch.tensor([list(prompt_ids)])
    started_s = time.monotonic()
    output_1T = model.generate(
        prompt_1T,
        attention_mask=torch.ones_like(prompt_1T),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        streamer=stream,
        **sampling.arguments(),
    )
    ended_s = time.monotonic()
    token_ids: list[int] = output_1T[0, len(prompt_ids) :].tolist()
    text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
    if stream is None:
        write(text)
        first_s = last_s = ended_s
        rate: float | None = len(token_ids) / (ended_s - started_s)
    else:
        first_s, last_s = stream.first_s, stream.last_s
        rate = (len(token_ids) - 1) / (last_s - first_s) if len(token_ids) > 1 else None
    return Answer(
        text=text,
        token_ids=token_ids,
        timings=Timings(
            time_to_first_token_s=first_s - started_s,
            tokens_per_s=rate,
            total_s=ended_s - started_s,
            prompt_tokens=len(prompt_ids),
            new_tokens=len(token_ids),
        ),
    )


class Stream(TextStreamer):  # type: ignore[misc]  # transformers is not typed
    """Gives whole words to `write`, and notes when tokens came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first_s = self.last_s = 0.0
        self._write = write

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.last_s = time.monotonic()
            self.first_s = self.first_s or self.last_s
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)

"""Training examples: lines of JSON in, token ids and what of them is learned out.

A line is one of three things: `{"text": …}`, all of which is learned; `{"prompt": …, "completion": …}`; or
`{"messages": [{"role": …, "content": …}, …]}`. Of the latter two, only completions and what the assistant says.

Preferences, of which DPO learns, have a form of their own: `{"prompt": …, "chosen": …, "rejected": …}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from transformers import PreTrainedTokenizerBase

from routing.errors import CallerError

IGNORED: Final = -100
"""The label of a token that is not learned."""
MAX_LINE_BYTES: Final = 16 << 20
FORMS: Final = (
    'write one of {"text": "…"}, {"prompt": "…", "completion": "…"} and '
    '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]} on each line'
)
PAIRS: Final = (
    'write {"prompt": "…", "chosen": "…", "rejected": "…"} on each line, where each of the three is text, or a list '
    'of messages like [{"role": "user", "content": "…"}]'
)
_ROLES: Final = ("system", "user", "assistant")

T = TypeVar("T")


class BadData(CallerError):
    """A training file, or a line of it, that cannot be used; the message names the line."""

    default_hint = FORMS


@dataclass(frozen=True, slots=True)
class Example:
    """One line. Either `messages`, or a `completion` behind a `prompt` that may be empty."""

    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()
    line: int = 0
    """Where in its file it stands, from 1 on."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and as many labels: the same ids where they are learned, IGNORED elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def learned(self) -> int:
        """Tokens that are. The first one of a row has nothing before it that could predict it."""
        return sum(label != IGNORED for label in self.labels[1:])

    def cut(self, max_tokens: int) -> Encoded:
        return Encoded(self.input_ids[:max_tokens], self.labels[:max_tokens])


def read_examples(file: Path) -> list[Example]:
    """Every line that is not blank, in order. Raises BadData with the file and the line."""
    return [replace(example, line=number) for number, example in _read(file, _example, FORMS)]


def read_preferences(file: Path) -> list[dict[str, Any]]:
    """Every line that is not blank, in order: prompt, chosen and rejected, as TRL's DPOTrainer takes them.

    All lines hold text, or all of them messages. Raises BadData with the file and the line.
    """
    found = _read(file, _preference, PAIRS)
    kind = type(found[0][1]["prompt"])
    for number, pair in found:
        if type(pair["prompt"]) is not kind:
            raise BadData(f"{file}, line {number}: text and messages do not go together in one file", hint=PAIRS)
    return [pair for _, pair in found]


def _read(file: Path, parse: Callable[[Any], T], forms: str) -> list[tuple[int, T]]:
    """What `parse` makes of each line that is not blank, with its number. Raises BadData."""
    found = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), 1):
                if line.strip():
                    try:
                        found.append((number, parse(_value(line))))
                    except BadData as error:
                        hint = forms if error.hint == BadData.default_hint else error.hint
                        raise BadData(f"{file}, line {number}: {error}", hint=hint) from error
    except OSError as error:
        raise BadData(f"{file} cannot be read: {error.strerror}", hint="name a file of JSON lines") from error
    if not found:
        raise BadData(f"{file} is empty", hint=forms)
    return found


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> Encoded:
    """Token ids as the model would see them, with an end behind what is learned. Raises BadData.

    A conversation is learned turn by turn: what its template makes of everything up to an assistant's turn, with the
    opening of that turn, must be the beginning of what it makes of the conversation with it.
    """
    if example.messages:
        return _encode_chat(tokenizer, example.messages)
    prompt_ids = tokenizer(example.prompt).input_ids if example.prompt else []
    rest = tokenizer(example.completion, add_special_tokens=not example.prompt).input_ids
    if tokenizer.eos_token_id is not None and rest[-1:] != [tokenizer.eos_token_id]:
        rest = [*rest, tokenizer.eos_token_id]
    return Encoded(prompt_ids + rest, [IGNORED] * len(prompt_ids) + rest)


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[list[Encoded], int]:
    """All examples that have anything to learn within `max_tokens`, and how many were cut or left out for it.

    Raises BadData, with the line where it is about one example.
    """
    kept, shortened = [], 0
    for number, example in enumerate(examples, 1):
        try:
            whole = encode(tokenizer, example)
        except BadData as error:
            raise BadData(f"line {example.line}: {error}", hint=error.hint) from error
        encoded = whole.cut(max_tokens)
        shortened += encoded != whole
        if encoded.learned:
            kept.append(encoded)
        on_progress(number)
    if not kept:
        raise BadData(
            f"none of {len(examples)} examples has anything to learn within {max_tokens} tokens",
            hint="allow more --max-tokens, or write shorter prompts",
        )
    return kept, shortened


def _value(line: bytes) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise BadData(f"longer than {MAX_LINE_BYTES >> 20} MiB", hint="one example a line, please")
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise BadData("not UTF-8 text", hint="save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadData(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise BadData("nested too deep") from error


def _example(value: Any) -> Example:
    match value:
        case {"messages": list() as messages}:
            return Example(messages=tuple(_message(message) for message in messages))
        case {"prompt": str() as prompt, "completion": str() as completion} if completion:
            return Example(prompt, completion)
        case {"text": str() as text} if text:
            return Example(completion=text)
        case dict():
            raise BadData(f"neither text, nor prompt and completion, nor messages, but {_named(value)}")
        case _:
            raise BadData(f"expected an object, found {type(value).__name__}")


def _preference(value: Any) -> dict[str, Any]:
    match value:
        case {"prompt": str() as prompt, "chosen": str() as chosen, "rejected": str() as rejected}:
            pass
        case {"prompt": list() as prompt, "chosen": list() as chosen, "rejected": list() as rejected}:
            prompt, chosen, rejected = ([_message(one) for one in part] for part in (prompt, chosen, rejected))
        case dict():
            raise BadData(f"no prompt with a chosen and a rejected answer, but {_named(value)}")
        case _:
            raise BadData(f"expected an object, found {type(value).__name__}")
    if not prompt or not chosen or not rejected or chosen == rejected:
        raise BadData("prompt, chosen and rejected are none of them empty, and the answers differ")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _message(value: Any) -> dict[str, str]:
    match value:
        case {"role": str() as role, "content": str() as content} if role in _ROLES:
            return {"role": role, "content": content}
        case {"role": str() as role, "content": str()}:
            raise BadData(f"a message of {role[:40]!r}", hint=f"roles are {', '.join(_ROLES)}")
        case _:
            raise BadData('a message is {"role": "user", "content": "…"}')


def _named(value: dict[str, Any]) -> str:
    return ", ".join(f"{key[:40]!r}: {type(part).__name__}" for key, part in list(value.items())[:5]) or "nothing"


def _encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> Encoded:
    if not tokenizer.chat_template:
        raise BadData("this model has no chat template", hint="write text, or prompts with completions")
    whole = _template(tokenizer, messages, opened=False)
    labels = [IGNORED] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _template(tokenizer, messages[:index], opened=True)
            through = _template(tokenizer, messages[: index + 1], opened=False)
            if whole[: len(through)] != through or through[: len(before)] != before:
                raise BadData(
                    "the chat template changes earlier turns, so that single ones cannot be learned",
                    hint="write prompts with completions instead",
                )
            labels[len(before) : len(through)] = through[len(before) :]
    return Encoded(whole, labels)


def _template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, opened: bool) -> list[int]:
    ids = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=opened, return_dict=True
    ).input_ids
    return list(ids)

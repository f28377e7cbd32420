"""Functions that a model may call: how it is told of them, and how its calls are read.

Owns the forms in which models write calls, and which of them a checkpoint uses (see `Style`). Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from swarm.gateway.text import Decode, overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"

DEFAULT_SYSTEM = """You may call one or more functions to answer. They are described within <tools></tools>:
<tools>
{tools}
</tools>
For each call, write a JSON object with the function's name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": "function-name", "arguments": {{"argument": "value"}}}}
</tool_call>"""
"""Put in front of the first system text, or in its place, where a chat template does not speak of tools."""


def system_text(tools: Sequence[dict[str, Any]]) -> str:
    return DEFAULT_SYSTEM.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def call_schema(tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one call of any of the functions, as a JSON schema."""
    calls = []
    for tool in tools:
        function = tool["function"]
        properties = {
            "name": {"const": function["name"]},
            "arguments": function.get("parameters") or {"type": "object"},
        }
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


@dataclass(frozen=True, slots=True)
class Call:
    """Of one function."""

    name: str
    arguments: str
    """As JSON."""


def read_call(text: str, names: Sequence[str]) -> Call | None:
    """The call that `text` is, or None: no JSON, or of none of the functions."""
    try:
        return _call(json.loads(text), names)
    except (ValueError, RecursionError):
        return None


def read_calls(text: str, names: Sequence[str], style: Style) -> list[Call] | None:
    """All calls of a text that begins with one in Llama's or Mistral's style, or None where a part of it is no call."""
    calls: list[Call | None] = []
    try:
        for part in text.split(style.value[0]):
            named = _NAMED.match(part) if style is Style.MISTRAL else None
            if named is not None:
                calls.append(_call({"name": named["name"], "arguments": json.loads(part[named.end() :])}, names))
                continue
            for value in _json_values(part):
                calls += [_call(one, names) for one in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return None
    known = [call for call in calls if call is not None]
    return known if len(known) == len(calls) else None


_NAMED = re.compile(r"\s*(?P<name>[A-Za-z0-9_-]{1,64})(\[CALL_ID\]\w{1,64})?(\[ARGS\])?(?=\s*\{)")


def _json_values(text: str) -> list[Any]:
    values = []
    while text := text.lstrip(" \r\n\t;,"):
        value, end = json.JSONDecoder().raw_decode(text)
        values.append(value)
        text = text[end:]
    return values


def _call(found: Any, names: Sequence[str]) -> Call | None:
    if not isinstance(found, dict) or found.get("name") not in names:
        return None
    arguments = found.get("arguments", found.get("parameters"))
    return Call(found["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


class Style(Enum):
    """How a model writes calls; the value: what they begin with, and other marks of the style."""

    HERMES = (OPEN, CLOSE)
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, anywhere: Hermes, Qwen and most others
    (https://github.com/NousResearch/Hermes-Function-Calling)."""
    LLAMA = ("<|python_tag|>",)
    """Llama 3: `{"name": …, "parameters": {…}}` as the whole answer, or behind the mark; several by `;`
    (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1)."""
    MISTRAL = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    """`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or since tokenizer v11 `[TOOL_CALLS]name[ARGS]{…}` for each."""

    @classmethod
    def of(cls, template: str, special_tokens: Collection[str]) -> Style:
        """Of a checkpoint whose chat template knows tools: as that shows calls, else by its special tokens."""
        styles = (cls.HERMES, cls.MISTRAL, cls.LLAMA)
        shown = next((style for style in styles if style.value[0] in template), None)
        return shown or next((style for style in styles if style.value[0] in special_tokens), cls.HERMES)


def keeping(decode: Decode, marks: Mapping[int, str]) -> Decode:
    """As `decode`, which leaves out special tokens, but with these: `marks` by their ids."""

    def decode_all(ids: Sequence[int]) -> str:
        text, plain = "", list[int]()
        for token_id in ids:
            if token_id in marks:
                text, plain = text + decode(plain) + marks[token_id], []
            else:
                plain.append(token_id)
        return text + decode(plain)

    return decode_all


class Reader(Protocol):
    """Parts a growing text into what is said and what is called. What is no valid call stays text."""

    calls: int
    """Read so far."""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Content and calls that are certain now."""
        ...

    def end(self) -> tuple[str, list[Call]]:
        """The rest, at the end of the text."""
        ...


def make_reader(style: Style, names: Sequence[str], *, only: bool = False) -> Reader:
    """`names`: of functions. `only`: the whole text is one call, in the form of `call_schema`."""
    return CallReader(names, only=only) if only or style is Style.HERMES else TailReader(style, names)


class CallReader:
    """A `Reader` of calls in Hermes' style."""

    def __init__(self, names: Sequence[str], *, only: bool = False) -> None:
        """`only`: the whole text is one call."""
        self._names = names
        self._only = only
        self._held = ""
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Content and calls that are certain now."""
        self._held += text
        if self._only:
            return "", []
        said, calls = "", list[Call]()
        while (start := self._held.find(OPEN)) >= 0 and (end := self._held.find(CLOSE, start)) >= 0:
            whole = self._held[start : end + len(CLOSE)]
            call = read_call(whole[len(OPEN) : -len(CLOSE)], self._names)
            before = self._held[:start]
            if call is None:
                said += before + whole
            else:
                said += before.rstrip() if self.calls else before
                calls.append(call)
                self.calls += 1
            self._held = self._held[end + len(CLOSE) :]
        if start < 0:
            start = len(self._held) - overlap(self._held, OPEN)
        said += self._held[:start]
        self._held = self._held[start:]
        if self.calls and not said.strip():
            said = ""  # line ends between calls
        return said, calls

    def end(self) -> tuple[str, list[Call]]:
        """The rest, at the end of the text."""
        rest, self._held = self._held, ""
        call = read_call(rest.removeprefix(OPEN).removesuffix(CLOSE), self._names) if self._only else None
        if call is None and rest.startswith(OPEN):  # a model may end with its call's last brace
            call = read_call(rest[len(OPEN) :], self._names)
        if call is None:
            return rest, []
        self.calls += 1
        return "", [call]


class TailReader:
    """A `Reader` of calls in Llama's or Mistral's style: behind the first one there is no other text."""

    def __init__(self, style: Style, names: Sequence[str]) -> None:
        self._style, self._names = style, names
        self._held = ""
        self._said = self._begun = False
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        if self._begun:
            return "", []
        mark = self._style.value[0]
        start = self._held.find(mark)
        if start < 0 and self._style is Style.LLAMA and not self._said:
            first = self._held.lstrip()[:1]
            self._begun = first == "{"
            if self._begun or not first:
                return "", []
        self._begun = start >= 0
        if start < 0:
            start = len(self._held) - overlap(self._held, mark)
        said, self._held = self._held[:start], self._held[start:]
        self._said = self._said or bool(said)
        return said, []

    def end(self) -> tuple[str, list[Call]]:
        rest, self._held = self._held, ""
        calls = read_calls(rest, self._names, self._style) if self._begun else None
        if not calls:
            return rest, []
        self.calls += len(calls)
        return "", calls

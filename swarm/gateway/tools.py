"""Functions that a model may call: how it is told of them, and how its calls are read.

Owns the text form `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, which most open models were trained on
(https://github.com/NousResearch/Hermes-Function-Calling). Pure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.get("name") not in names or not isinstance(call.get("arguments"), dict):
        return None
    return Call(call["name"], json.dumps(call["arguments"], ensure_ascii=False))


class CallReader:
    """Parts a growing text into what is said and what is called. What is no valid call stays text."""

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
            keep = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
            start = len(self._held) - keep
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

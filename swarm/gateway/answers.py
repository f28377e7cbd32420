"""Pieces of answers in the words of OpenAI's API: whole answers and streams of chunks.

Owns the two formats, chat and plain completion. Knows neither HTTP nor how pieces come to be.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from swarm.gateway.feed import Piece, TokenLogprob, Traversal
from swarm.gateway.served import Served
from swarm.gateway.tools import Reader, Style, make_reader

IMPOSSIBLE = -9999.0
"""Stands for the logarithm of 0, which JSON has no number for."""


@dataclass(slots=True)
class Totals:
    """What an answer cost."""

    prompt: int
    completion: int = 0
    cached: int = 0

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Format(ABC):
    """One request's answer: give it every piece, in order."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, served: Served, *, prompt_tokens: int, include_usage: bool) -> None:
        self.served = served
        self.totals = Totals(prompt_tokens)
        self.id = f"{self.prefix}-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._include_usage = include_usage

    def take(self, piece: Piece) -> list[bytes]:
        """The events that a stream sends for one piece."""
        self.totals.completion += piece.tokens
        self.totals.cached += piece.cached
        told = {"swarm": {"steps": [_traversal(each) for each in piece.traversals]}} if piece.traversals else {}
        events = []
        for choice in self._chunks(piece):
            events.append(self._event([choice], **told))
            told = {}
        return events

    def last(self) -> list[bytes]:
        """The events at a stream's end."""
        usage = [self._event([], usage=self.totals.usage())] if self._include_usage else []
        return [*usage, b"data: [DONE]\n\n"]

    def add(self, piece: Piece) -> None:
        """Collect one piece of an answer that is sent whole."""
        self.totals.completion += piece.tokens
        self.totals.cached += piece.cached
        self._collect(piece)

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        return {
            **self._head(self.kind),
            "choices": self._choices(),
            "usage": self.totals.usage(),
        }

    @abstractmethod
    def _chunks(self, piece: Piece) -> list[dict[str, Any]]: ...
    @abstractmethod
    def _collect(self, piece: Piece) -> None: ...
    @abstractmethod
    def _choices(self) -> list[dict[str, Any]]: ...

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self.served.name}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, **more: object) -> bytes:
        chunk = {**self._head(self.chunk_kind), "choices": choices, **more}
        if self._include_usage:
            chunk["usage"] = usage
        return event(chunk)


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _traversal(traversal: Traversal) -> dict[str, Any]:
    """As `swarm.gateway.schemas` describes it."""
    return {
        "positions": traversal.positions,
        "total_s": round(traversal.total_s, 6),
        "hops": [
            {
                "peer_id": hop.peer,
                "blocks": [hop.span.start, hop.span.end],
                "queue_s": round(hop.queue_s, 6),
                "compute_s": round(hop.compute_s, 6),
            }
            for hop in traversal.hops
        ],
    }


def new_call_id(style: Style) -> str:
    """Mistral's templates take nothing but nine letters and digits."""
    return secrets.token_hex(5)[:9] if style is Style.MISTRAL else f"call_{secrets.token_hex(12)}"


@dataclass(slots=True)
class _ChatChoice:
    reader: Reader | None
    begun: bool = False
    text: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str = ""


class ChatFormat(Format):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self,
        served: Served,
        *,
        prompt_tokens: int,
        include_usage: bool,
        choices: int,
        logprobs: bool,
        tools: Sequence[str] | None,
        forced: bool,
        named: bool,
    ) -> None:
        """`tools`: names of functions whose calls are read, None for none; `forced`: the answer is one call;
        `named`: of a function that the request named, which OpenAI reports as `stop`."""
        super().__init__(served, prompt_tokens=prompt_tokens, include_usage=include_usage)
        self._logprobs = logprobs
        self._named = named
        self._all = [
            _ChatChoice(None if tools is None else make_reader(served.call_style, tools, only=forced))
            for _ in range(choices)
        ]

    def _chunks(self, piece: Piece) -> list[dict[str, Any]]:
        choice = self._all[piece.choice]
        text, calls = self._read(choice, piece)
        chunks, deltas = [], list[dict[str, Any]]()
        if text:
            deltas.append({"content": text})
        for call in calls:
            deltas.append({"tool_calls": [{"index": len(choice.calls), **call}]})
            choice.calls.append(call)
        finish = self._finish(choice, piece)
        if not deltas and (finish is not None or piece.logprobs or piece.traversals):
            deltas.append({})
        for at, delta in enumerate(deltas):
            if not choice.begun:
                delta = {"role": "assistant", "content": "", **delta}
                choice.begun = True
            chunk: dict[str, Any] = {"index": piece.choice, "delta": delta, "logprobs": None, "finish_reason": None}
            if at == 0 and self._logprobs:
                chunk["logprobs"] = {"content": self._entries(piece.logprobs), "refusal": None}
            if at == len(deltas) - 1:
                chunk["finish_reason"] = finish
            chunks.append(chunk)
        return chunks

    def _collect(self, piece: Piece) -> None:
        choice = self._all[piece.choice]
        text, calls = self._read(choice, piece)
        choice.text.append(text)
        choice.calls += calls
        choice.logprobs += self._entries(piece.logprobs)
        choice.finish = self._finish(choice, piece) or choice.finish

    def _choices(self) -> list[dict[str, Any]]:
        choices = []
        for index, choice in enumerate(self._all):
            text = "".join(choice.text)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if choice.calls:
                message |= {"content": text or None, "tool_calls": choice.calls}
            logprobs = {"content": choice.logprobs, "refusal": None} if self._logprobs else None
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish})
        return choices

    def _read(self, choice: _ChatChoice, piece: Piece) -> tuple[str, list[dict[str, Any]]]:
        if choice.reader is None:
            return piece.text, []
        text, calls = choice.reader.push(piece.text)
        if piece.finish is not None:
            rest, more = choice.reader.end()
            text, calls = text + rest, calls + more
        return text, [
            {"id": new_call_id(self.served.call_style), "type": "function", "function": asdict(call)} for call in calls
        ]

    def _finish(self, choice: _ChatChoice, piece: Piece) -> str | None:
        called = choice.reader is not None and choice.reader.calls and not self._named
        return "tool_calls" if piece.finish == "stop" and called else piece.finish

    def _entries(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        return [
            {
                **self._entry(entry.token_id, entry.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in logprobs
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.served.token_text(token_id),
            "logprob": max(logprob, IMPOSSIBLE),
            "bytes": self.served.token_bytes(token_id),
        }


@dataclass(slots=True)
class _TextChoice:
    echo: str
    first_token: int | None
    """Of the prompt, where that is scored: no probability belongs to it."""
    text: list[str] = field(default_factory=list)
    offset: int = 0
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    finish: str = ""


class TextFormat(Format):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self,
        served: Served,
        *,
        prompt_tokens: int,
        include_usage: bool,
        echoes: Sequence[tuple[str, int | None]],
        logprobs: bool,
    ) -> None:
        """`echoes`: for each choice, what is said before it, and the first token of that where it is scored."""
        super().__init__(served, prompt_tokens=prompt_tokens, include_usage=include_usage)
        self._logprobs = logprobs
        self._all = [_TextChoice(echo, first) for echo, first in echoes]

    def _chunks(self, piece: Piece) -> list[dict[str, Any]]:
        choice = self._all[piece.choice]
        text, choice.echo = choice.echo + piece.text, ""
        return [
            {
                "index": piece.choice,
                "text": text,
                "logprobs": self._entries(choice, piece) if self._logprobs else None,
                "finish_reason": piece.finish,
            }
        ]

    def _collect(self, piece: Piece) -> None:
        choice = self._all[piece.choice]
        choice.text += [choice.echo, piece.text]
        choice.echo = ""
        for name, values in self._entries(choice, piece).items():
            choice.logprobs.setdefault(name, []).extend(values)
        choice.finish = piece.finish or choice.finish

    def _choices(self) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "text": "".join(choice.text),
                "logprobs": choice.logprobs if self._logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(self._all)
        ]

    def _entries(self, choice: _TextChoice, piece: Piece) -> dict[str, list[Any]]:
        entries: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

        def add(token_id: int, logprob: float | None, top: dict[str, float] | None) -> None:
            text = self.served.token_text(token_id)
            for values, value in zip(entries.values(), (text, logprob, top, choice.offset), strict=True):
                values.append(value)
            choice.offset += len(text)

        if choice.first_token is not None:
            add(choice.first_token, None, None)
            choice.first_token = None
        for entry in (*piece.prompt_logprobs, *piece.logprobs):
            likeliest = {self.served.token_text(token_id): max(logprob, IMPOSSIBLE) for token_id, logprob in entry.top}
            add(entry.token_id, max(entry.logprob, IMPOSSIBLE), likeliest)
        return entries

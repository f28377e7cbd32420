"""Tokens to text, piece by piece: whole characters only, and nothing of a stop sequence.

Owns what of a text may be shown already. Knows a tokenizer only as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "�"
"""What decoders put where bytes do not end a character."""
MAX_UNFINISHED = 8
"""Tokens after which bytes that are no character are taken for what they are. UTF-8 needs 4."""

Decode = Callable[[list[int]], str]


class TextStream:
    """The text of one growing sequence of tokens.

    Decoders look at neighbours (spaces, bytes of one character), so each piece is the difference between two decodings
    that begin a little earlier, as in text-generation-inference `decode_token`. The pieces together are what was
    generated, up to the first stop sequence.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop sequence came; the text ends before it."""
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._before = 0
        self._shown = 0
        self._held = ""

    def push(self, token_id: int) -> str:
        """What may be shown now. Not after `stopped`."""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._before : self._shown])
        text = self._decode(self._ids[self._before :])
        if text.endswith(UNFINISHED) and len(self._ids) - self._shown < MAX_UNFINISHED:
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        return self._settle(text[len(known) :])

    def end(self) -> str:
        """The rest, when no more tokens come."""
        known = self._decode(self._ids[self._before : self._shown])
        rest = self._settle(self._decode(self._ids[self._before :])[len(known) :])
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _settle(self, piece: str) -> str:
        if not self._stops:
            return piece
        text, self._held = self._held + piece, ""
        if found := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            self.stopped = True
            return text[: min(found)]
        held = max(overlap(text, stop) for stop in self._stops)
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        return text


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins, as many as possible."""
    for count in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0

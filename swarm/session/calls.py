"""Steps that were asked for together: answered together, or not at all.

Owns what has come of them so far. Knows neither the network nor who waits; all of it happens in the network's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swarm.session.remote import RowStep


class Call:
    """One step of each of some sessions, each in one piece or several."""

    __slots__ = ("_done", "_failed", "_missing", "_pieces", "over", "steps")

    def __init__(
        self,
        steps: Sequence[RowStep],
        done: Callable[[list[Tensor]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """`done` is told all outputs, `[T − want_from, D]` in the order of the steps, or `failed` why there are none;
        one of them, once."""
        self.steps = steps
        self.over = False
        self._done, self._failed = done, failed
        self._pieces: list[list[Tensor | None]] = [[] for _ in steps]
        self._missing = 1
        """Pieces not answered; one stands for those that are not known yet."""

    def expect(self, row: int) -> Piece:
        """One more piece of that row, behind those before it."""
        self._missing += 1
        self._pieces[row].append(None)
        return Piece(self, row, len(self._pieces[row]) - 1)

    def begun(self) -> None:
        """There are no more pieces."""
        self._end_if_whole()

    def fail(self, error: BaseException) -> None:
        if not self.over:
            self.over = True
            self._failed(error)

    def answered(self, row: int, piece: int, output_TD: Tensor) -> None:
        self._pieces[row][piece] = output_TD
        self._end_if_whole()

    def _end_if_whole(self) -> None:
        self._missing -= 1
        if self._missing or self.over:
            return
        self.over = True
        outputs = []
        for step, pieces in zip(self.steps, self._pieces, strict=True):
            step.session.length = step.start + step.hidden_TD.shape[0]
            parts = [part for part in pieces if part is not None]
            outputs.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        self._done(outputs)


class Piece:
    """What the answer of one step belongs to."""

    __slots__ = ("_call", "_piece", "_row")

    def __init__(self, call: Call, row: int, piece: int) -> None:
        self._call, self._row, self._piece = call, row, piece

    def answer(self, output_TD: Tensor) -> None:
        """Once."""
        self._call.answered(self._row, self._piece, output_TD)

    def fail(self, error: BaseException) -> None:
        self._call.fail(error)

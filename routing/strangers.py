"""What peers cost of which a node knows only what they say: of thousands at once, in arrays.

Owns the columns of what announcements say. The formulas are those of `estimates` and `cost` for one peer, operation by
operation, so that a price does not depend on how many are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from routing.coordinates import CELL_S, MAX_COORDINATE_S, USABLE_ERROR, Coordinate
from routing.dealing import GAIN, PHASE_CHARS, ROOMY
from routing.estimates import BANDWIDTH_BYTES_PER_S, DEFAULT_RTT_S, Dealt
from routing.flow import BATCH, GOLDEN
from routing.ids import PeerId
from routing.path import Floats, Ints
from routing.records import NUMBERS, Announcement

_NO_CELL: Final = 0.5
"""The others are whole numbers."""
_CELLS: Final = 4 * round(MAX_COORDINATE_S / CELL_S)
"""More than there are along each axis."""


class Columns:
    """One row for each span of each peer, in the order of their ids. Never changes."""

    def __init__(self, announcements: Sequence[Announcement]) -> None:
        ids = [a.peer_id for a in announcements]
        said = np.frombuffer(b"".join([a.numbers for a in announcements])).reshape(len(ids), NUMBERS)
        order = np.array(ids, dtype=np.bytes_).argsort(kind="stable")
        counts = said[order, 0].astype(np.int64)
        self.at: Ints = order.repeat(counts)
        """Which of the announcements."""
        self.peers: npt.NDArray[np.object_] = np.array(ids, dtype=np.object_)[self.at]
        self._bounds = [0, *counts.cumsum().tolist()]
        self._number = dict(zip(np.array(ids, dtype=np.object_)[order], range(len(ids)), strict=True))
        _, starts, ends, blocks, *numbers = said[self.at].T
        self.starts, self.ends = starts.astype(np.int64), ends.astype(np.int64)
        for number in np.flatnonzero(counts > 1).tolist():
            first = self._bounds[number]
            for row, span in enumerate(announcements[self.at[first]].spans, first):
                self.starts[row], self.ends[row] = span.start, span.end
        self._decode_s, self._prefill_s, self._queue_s, self._sessions, self._max, self._uplink, *others = numbers
        self.free_tokens, self._x_s, self._y_s, self._height_s, error = others
        self._takes_s = blocks / (BATCH / np.maximum(self._decode_s + (BATCH - 1) * self._prefill_s, 1e-9))
        last = np.array([peer[-PHASE_CHARS:] for peer in ids], dtype=f"S{PHASE_CHARS}").view(f">u{PHASE_CHARS}")
        self._phase: Floats = last[self.at] * GOLDEN % 1.0
        self._placed = error <= USABLE_ERROR
        x, y, height = (np.floor_divide(axis_s, CELL_S) for axis_s in (self._x_s, self._y_s, self._height_s))
        self.cells: Floats = np.where(self._placed, (x * _CELLS + y) * _CELLS + height, _NO_CELL)
        """A number for the part of the plane that holds a usable place; one of its own for none."""

    def rows(self, peer: PeerId) -> slice:
        """A peer's; none, where it is not among them."""
        number = self._number.get(peer)
        if number is None:
            return slice(0, 0)
        return slice(self._bounds[number], self._bounds[number + 1])

    def costs(
        self,
        here: Coordinate,
        turn_s: float,
        bytes_per_s: float,
        *,
        tokens: int,
        step_bytes: int,
        back_bytes: int,
    ) -> tuple[Floats, Floats, Floats]:
        """To enter, per block and to leave, as `cost.hop_cost` has it of what is estimated of strangers: from `here`,
        at `bytes_per_s`, behind sessions that take `turn_s` in turn."""
        half_s = self._rtt_s(here) / 2
        enter_s = half_s + step_bytes / bytes_per_s + self._waits_s(turn_s, tokens)
        capped = (self._max > 0) & (self._max < min(bytes_per_s, BANDWIDTH_BYTES_PER_S))
        out_bytes_per_s = np.where(capped, self._max, BANDWIDTH_BYTES_PER_S)
        assumed_s = step_bytes / BANDWIDTH_BYTES_PER_S
        enter_s += np.where(capped, step_bytes / out_bytes_per_s - assumed_s, 0.0)
        narrow = (self._uplink > 0) & (self._uplink < out_bytes_per_s)
        out_bytes_per_s = np.where(narrow, self._uplink, out_bytes_per_s)
        beyond_s = step_bytes / out_bytes_per_s - assumed_s
        return (
            enter_s + beyond_s,
            self._decode_s + (tokens - 1) * self._prefill_s,
            half_s - beyond_s + back_bytes / out_bytes_per_s,
        )

    def prices_s_per_block(self, dealt: Dealt, *, num_blocks: int, tokens: int) -> Floats:
        """By how much a step of so many positions gets dearer where this node has no session, as `estimates` has it."""
        part = (self._phase + dealt.turn) % 1.0 * self._takes_s * dealt.part_per_s
        excess = np.maximum(0.0, part * dealt.turn_s / dealt.cycle_s - ROOMY)
        prices_s: Floats = GAIN * dealt.cycle_s * excess / num_blocks * self._longer(tokens)
        return prices_s

    def _rtt_s(self, here: Coordinate) -> Floats:
        if not here.usable:
            return np.full(len(self.at), DEFAULT_RTT_S)
        x_s, y_s = here.x_s - self._x_s, here.y_s - self._y_s
        rtt_s = np.sqrt(x_s * x_s + y_s * y_s) + here.height_s + self._height_s
        return np.where(self._placed, rtt_s, DEFAULT_RTT_S)

    def _waits_s(self, turn_s: float, tokens: int) -> Floats:
        takes_s = self._takes_s
        excess_s = (self._sessions + 1) * takes_s - turn_s
        response_s = (excess_s + np.sqrt(excess_s * excess_s + 4 * takes_s * turn_s)) / 2
        queue_s = np.where(self._sessions > 0, np.maximum(self._queue_s, response_s - takes_s), self._queue_s)
        waits_s: Floats = queue_s * self._longer(tokens)
        return waits_s

    def _longer(self, tokens: int) -> Floats:
        instant = self._decode_s == 0
        longer = 1 + (tokens - 1) * self._prefill_s / np.where(instant, 1.0, self._decode_s)
        return np.where(instant, 1.0, longer)

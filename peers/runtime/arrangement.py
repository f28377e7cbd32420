"""Where each layer's keys and values lie, such that layers that slide leave memory to those that see everything.

Owns which tables `pages` keeps of a session, and what a page is in memory: the same slots of every *frame*. A frame is
a tensor of keys, [rows, slots, key width], and one of values. A page serves any table, so every table has layers in all
frames. Where layers store unlike things, a frame holds several of the small ones, side by side and below each other:

    a frame of a table whose     ▤▤▤▤▤▤▥▥▥▥▥▥     the same frame of one     ▤▤▤▤▤▤▤▤▤▤▤▤
    layers have four heads,      ▤▤▤▤▤▤▥▥▥▥▥▥     whose layers have two,    ▤▤▤▤▤▤▤▤▤▤▤▤
    half as wide as              ▤▤▤▤▤▤▥▥▥▥▥▥     each as wide as           ▥▥▥▥▥▥▥▥▥▥▥▥
    the frame                    ▤▤▤▤▤▤▥▥▥▥▥▥     the frame                 ▥▥▥▥▥▥▥▥▥▥▥▥
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from peers.runtime.sizing import BEHIND_WINDOW_TOKENS, TOKENS_MIN

CONVERSATION_TOKENS = 2 * TOKENS_MIN
"""A session of that length, or of two windows, is to take little memory."""
SPARED = 9 / 8
"""So much more it may take where that means fewer tables, which every step looks at."""


class Shape(NamedTuple):
    """What a layer keeps of a position, or a frame has room for in a slot: rows of keys, and as many of values."""

    rows: int
    key_width: int
    value_width: int

    @property
    def elements(self) -> int:
        return self.rows * (self.key_width + self.value_width)

    def columns(self, layer: Shape) -> int:
        """How many such layers lie side by side in this frame."""
        return min(self.key_width // layer.key_width, self.value_width // layer.value_width)

    def layers(self, layer: Shape) -> int:
        """How many such layers this frame holds."""
        return self.rows // layer.rows * self.columns(layer)


Kind: TypeAlias = tuple[int | None, Shape]
"""Layers of one window and one shape."""


class Place(NamedTuple):
    """Which table says where a layer's positions lie, and where they begin in each slot of which frame."""

    table: int
    frame: int
    row: int = 0
    key_column: int = 0
    value_column: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    windows: tuple[int | None, ...]
    """Of each table; None where its layers see everything."""
    shapes: tuple[Shape, ...]
    """Of each layer."""
    places: tuple[Place, ...]
    """Of each layer."""
    frames: tuple[Shape, ...]

    def pages(self, count: int) -> int:
        """How many pages take no more memory than `count` that hold all layers would; but one for each table."""
        layers, frames = (sum(shape.elements for shape in shapes) for shapes in (self.shapes, self.frames))
        return max(len(self.windows), count * layers // frames)


def arrange(windows: Sequence[int | None], shapes: Sequence[Shape]) -> Arrangement:
    """The tables and frames in which a conversation takes little, for layers of these windows and shapes.

    Layers that see and store alike share a table, or several of as many frames as the others' tables have, so that
    sessions long and short divide the pool as they need it (the idea is that of vLLM's hybrid KV cache manager). One
    table, and a frame for each layer, where all see alike, or where more would be lost in frames that are not full than
    windows save.
    """
    layers = list(zip(windows, shapes, strict=True))
    frame = Shape(*map(max, zip(*shapes, strict=True)))
    filled = {kind: -(-count // frame.layers(kind[1])) for kind, count in Counter(layers).items()}
    """Frames, of each kind of layers."""
    tokens = max(CONVERSATION_TOKENS, *(2 * (window or 0) for window in windows))
    kept = {window: tokens if window is None else min(tokens, window + BEHIND_WINDOW_TOKENS) for window in windows}
    apart = frame.elements * sum(kept[window] * count for (window, _), count in filled.items())
    if len(kept) == 1 or apart >= tokens * sum(shape.elements for shape in shapes):
        return Arrangement(
            windows=tuple(kept) if len(kept) == 1 else (None,),
            shapes=tuple(shapes),
            places=tuple(Place(0, index) for index in range(len(shapes))),
            frames=tuple(shapes),
        )
    depth = _depth(filled, kept)
    tables: list[int | None] = []
    first_of = {}
    for kind, count in filled.items():
        first_of[kind] = len(tables)
        tables += [kind[0]] * -(-count // depth)
    seen: Counter[Kind] = Counter()
    places = []
    for kind in layers:
        shape = kind[1]
        number, within = divmod(seen[kind], frame.layers(shape))
        row, column = divmod(within, frame.columns(shape))
        table, index = first_of[kind] + number // depth, number % depth
        places.append(Place(table, index, row * shape.rows, column * shape.key_width, column * shape.value_width))
        seen[kind] += 1
    return Arrangement(windows=tuple(tables), shapes=tuple(shapes), places=tuple(places), frames=(frame,) * depth)


def _depth(filled: Mapping[Kind, int], kept: Mapping[int | None, int]) -> int:
    """Of how many frames the tables are: as many as leave, in the last table of each kind, not too much empty of what
    a conversation takes, nor of what one takes that is as short as every window."""

    def taken(depth: int) -> tuple[int, int]:
        counts = [(window, depth * -(-count // depth)) for (window, _), count in filled.items()]
        return sum(kept[window] * count for window, count in counts), sum(count for _, count in counts)

    def spares(depth: int) -> bool:
        return all(more <= SPARED * least for more, least in zip(taken(depth), taken(1), strict=True))

    return max(filter(spares, range(1, max(filled.values()) + 1)))

"""Clients' low-rank adapters in one packed forward: each adds to the rows of its own sessions, and to no others.

Owns which rows add what behind which linear layer, and which layers can be adapted at all. The products are segmented:
one pair for each adapter and layer, over the rows of that adapter's sessions together, as in S-LoRA (arXiv 2311.03285,
section 5); the layer itself multiplies all rows at once, as it would without adapters.

Legend: T packed positions · n of them · K inputs, N outputs and R rank of a target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peers.model.adapters import Adapter
from peers.model.cutting import SpanModel
from peers.model.kernels.packed import PackedLinear
from peers.wire.messages import PREFIX
from routing.ids import BlockSpan

Place = tuple[int, str]
"""A block, and the path of a linear layer within it."""
Rows = slice | Tensor


class Fitted:
    """An adapter's weights on a device, in float32: views of its own values where that is the CPU."""

    def __init__(self, adapter: Adapter, device: torch.device) -> None:
        values = adapter.values.to(device)
        self.places: dict[Place, tuple[Tensor, Tensor, float]] = {}
        """A [R, K], B [N, R] and scaling."""
        self.prefixes: dict[int, tuple[Tensor, Tensor]] = {}
        """Of a block, keys and values of its prefix: a row each position."""
        on_device = Adapter(adapter.targets, values)
        for target, (a_RK, b_NR) in zip(adapter.targets, on_device.weights(), strict=True):
            if target.module == PREFIX:
                self.prefixes[target.block] = a_RK, b_NR.reshape(target.rank, -1)
            else:
                self.places[target.block, target.module] = (a_RK, b_NR, target.scaling)


class Fittings:
    """Of the adapters that somebody still holds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: WeakKeyDictionary[Adapter, Fitted] = WeakKeyDictionary()

    def of(self, adapter: Adapter) -> Fitted:
        if adapter not in self._known:
            self._known[adapter] = Fitted(adapter, self._device)
        return self._known[adapter]


class Adapting:
    """What is added in one forward through `layers`, blocks `span`. While entered, these do so by themselves."""

    def __init__(
        self, layers: Sequence[nn.Module], span: BlockSpan, parts: Sequence[tuple[int, Adapter | None]], fit: Fittings
    ) -> None:
        """`parts`: of the packed rows, in order: how many they are, and what adapts them."""
        self._layers, self._span = layers, span
        self._rows = sum(count for count, _ in parts)
        self._adds: dict[Place, list[tuple[Rows, tuple[Tensor, Tensor, float]]]] = {}
        self._handles: list[RemovableHandle] = []
        self._resting = False
        for adapter, rows in _rows_of(parts).items():
            for place, weights in fit.of(adapter).places.items():
                if place[0] in span:
                    self._adds.setdefault(place, []).append((rows, weights))

    @property
    def layers(self) -> Collection[Place]:
        """Those that somebody adapts."""
        return self._adds.keys()

    def __enter__(self) -> Self:
        for place in self._adds:
            block, path = place

            def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, place: Place = place) -> None:
                if not self._resting:
                    self.add(place, args[0], output)

            module = self._layers[block - self._span.start].get_submodule(path)
            self._handles.append(module.register_forward_hook(add))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def around(self, between: Callable[[], None] | None) -> Callable[[], None] | None:
        """`between`, which may run a forward of others through the same layers."""
        if between is None:
            return None

        def rest() -> None:
            self._resting = True
            try:
                between()
            finally:
                self._resting = False

        return rest

    def add(self, place: Place, given: Tensor, output: Tensor) -> None:
        """What the layer at `place` made of `given` in this forward becomes what its adapters say, too."""
        given_TK, output_TN = given.reshape(self._rows, -1), output.view(self._rows, -1)
        for rows, (a_RK, b_NR, scaling) in self._adds[place]:
            low_nR = F.linear(given_TK[rows].to(a_RK.dtype), a_RK)
            output_TN[rows] = (output_TN[rows] + F.linear(low_nR, b_NR) * scaling).to(output.dtype)


def _rows_of(parts: Sequence[tuple[int, Adapter | None]]) -> dict[Adapter, Rows]:
    """Where the rows of each adapter are."""
    runs: dict[Adapter, list[tuple[int, int]]] = {}
    first = 0
    for count, adapter in parts:
        if adapter is not None:
            runs.setdefault(adapter, []).append((first, first + count))
        first += count
    return {adapter: _rows(pairs) for adapter, pairs in runs.items()}


def _rows(runs: Sequence[tuple[int, int]]) -> Rows:
    (start, _), (_, end) = runs[0], runs[-1]
    if sum(end - start for start, end in runs) == end - start:
        return slice(start, end)
    return torch.cat([torch.arange(start, end) for start, end in runs])


@contextmanager
def noting_adaptable(model: SpanModel, tokens: int) -> Iterator[set[Place]]:
    """Within, one forward of so many positions through `model` is to be run; afterwards the set holds the linear layers
    that it called as layers, once and over all of its positions: only these can be adapted row by row."""
    found: set[Place] = set()
    calls: Counter[Place] = Counter()
    handles = []

    def noted(place: Place) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
            calls[place] += 1
            whole = len(args) == 1 and args[0].numel() == tokens * getattr(module, "in_features", 0)
            if whole and isinstance(output, Tensor) and output.is_contiguous():
                found.add(place)

        return note

    for block, layer in zip(model.span, model.layers(), strict=True):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear | PackedLinear):
                handles.append(module.register_forward_hook(noted((block, path))))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found.intersection_update(place for place, times in calls.items() if times == 1)

"""Layers of this package as single operations, for whoever records a forward instead of running it.

Owns the detour: while a thread records, its linear layers and experts go through what it gave. Other threads, and all
of them at other times, notice nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from peers.model.kernels import experts
from peers.model.kernels.linear import FastLinear
from peers.model.kernels.packed import PackedLinear

Through = Callable[..., Tensor]
"""(function, the module it belongs to, *its inputs) → its output"""


@contextmanager
def through(record: Through) -> Iterator[None]:
    """Within, what this thread asks of these layers goes through `record`. One thread at a time may be inside."""
    recording = threading.get_ident()

    def detour(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(self: Any, *inputs: Tensor) -> Tensor:
            if threading.get_ident() != recording:
                return own(self, *inputs)
            return record(own.__get__(self), self, *inputs)

        return forward

    linears: tuple[Any, ...] = (FastLinear, PackedLinear)
    own_forwards = [kind.forward for kind in linears]
    for kind in linears:
        kind.forward = detour(kind.forward)
    ALL_EXPERTS_FUNCTIONS.register(experts.HIVE, detour(experts.forward))
    try:
        yield
    finally:
        for kind, own in zip(linears, own_forwards, strict=True):
            kind.forward = own
        ALL_EXPERTS_FUNCTIONS.register(experts.HIVE, experts.forward)

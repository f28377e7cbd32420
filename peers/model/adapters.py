"""Adapters of a client's own, as they travel to peers: low-rank ones (LoRA, arXiv 2106.09685), and keys and values that
every sequence finds before its own (prefix tuning, arXiv 2101.00190).

Owns the format: which linear layers of which blocks, in what order their values lie, and the name that is their
content. Knows neither PEFT nor how a peer computes with them.

What a target adds to the output of its layer is `scaling · B (A x)`, with A [rank, inputs] and B [outputs, rank]. With
dropout, x is first multiplied by what `dropped` says: a pure function of the seed that the client chose and of places
that do not depend on how a batch or the blocks are divided, so that who computes it again computes the same. A PREFIX
is `rank` positions, from 0 on: keys [rank, inputs] as they stand in a cache, then values [rank, outputs], each of all
heads; sequences must leave those positions to it (`Train.jumps`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peers.errors import ProtocolError
from peers.wire.messages import PREFIX, AdapterTarget
from routing.ids import BlockSpan

WIDTH = 256
"""Values travel as float32 rows of so many."""


def num_values(target: AdapterTarget) -> int:
    return target.rank * (target.inputs + target.outputs)


def num_rows(targets: Sequence[AdapterTarget]) -> int:
    """In which the values of these travel."""
    return -(-sum(map(num_values, targets)) // WIDTH)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """Values of targets in order of blocks, each its A and then its B, as one float32 vector on the CPU."""

    targets: tuple[AdapterTarget, ...]
    values: Tensor
    _parts: dict[BlockSpan, Adapter | None] = field(default_factory=dict)
    _name: list[bytes] = field(default_factory=list)

    @property
    def name(self) -> bytes:
        """SHA-256 of what it is."""
        if not self._name:
            digest = hashlib.sha256(msgspec.msgpack.encode(self.targets))
            digest.update(self.values.numpy().data)
            self._name.append(digest.digest())
        return self._name[0]

    def within(self, span: BlockSpan) -> Adapter | None:
        """Of these blocks alone; None where it has none."""
        if span not in self._parts:
            targets = tuple(target for target in self.targets if target.block in span)
            first, end = self.place(span)
            self._parts[span] = Adapter(targets, self.values[first:end]) if targets else None
        return self._parts[span]

    def place(self, span: BlockSpan) -> tuple[int, int]:
        """Where the values of these blocks lie."""
        first = sum(num_values(target) for target in self.targets if target.block < span.start)
        return first, first + sum(num_values(target) for target in self.targets if target.block in span)

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of each target, as parts of the values."""
        ends = list(accumulate(map(num_values, self.targets), initial=0))
        found = []
        for target, (first, end) in zip(self.targets, pairwise(ends), strict=True):
            middle = first + target.rank * target.inputs
            a_RK, b_NR = self.values[first:middle], self.values[middle:end]
            found.append((a_RK.view(target.rank, target.inputs), b_NR.view(target.outputs, target.rank)))
        return found


def same(one: Adapter | None, other: Adapter | None) -> bool:
    """Whether both would compute the same."""
    return one is other or (one is not None and other is not None and one.name == other.name)


@dataclass(frozen=True, slots=True)
class Dropout:
    share: float
    """Of the inputs of all layers of an adapter, at least 0 and less than 1."""
    seed: int


def dropped(dropout: Dropout, target: AdapterTarget, sequence: int, tokens: int) -> Tensor:
    """What dropout multiplies the inputs of a sequence by, [tokens, inputs] in float32: 0, or 1 / (1 - share).

    Its bits are those of Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), counted
    from 0 under the first 16 bytes of a SHA-256: 32 bits for each value, in order.
    """
    place = f"{dropout.seed} {sequence} {target.block} {target.module}"
    key = int.from_bytes(hashlib.sha256(place.encode()).digest()[:16], "little")
    count = tokens * target.inputs
    words = np.random.Philox(key=key).random_raw(-(-count // 2)).view(np.uint32)[:count]
    kept = torch.from_numpy(words >= np.uint32(dropout.share * (1 << 32)))
    return kept.view(tokens, target.inputs) * torch.tensor(1 / (1 - dropout.share))


def as_rows(values: Tensor) -> Tensor:
    """[rows, WIDTH], filled up with zeros."""
    return F.pad(values, (0, -len(values) % WIDTH)).view(-1, WIDTH)


def of_rows(targets: Sequence[AdapterTarget], rows: Tensor) -> Tensor:
    """The values that `as_rows` made rows of."""
    return rows.flatten()[: sum(map(num_values, targets))]


def prefix_length(adapter: Adapter | None, span: BlockSpan) -> int:
    """Positions that it puts before every sequence at these blocks. Raises ProtocolError unless before all alike."""
    if adapter is None:
        return 0
    ranks = [target.rank for target in adapter.targets if target.module == PREFIX and target.block in span]
    if ranks and (len(ranks) < len(span) or len(set(ranks)) > 1):
        raise ProtocolError(f"a prefix that is not the same length before all of blocks {span}")
    return ranks[0] if ranks else 0


def check_order(targets: Sequence[AdapterTarget], span: BlockSpan) -> None:
    """Raises ProtocolError unless these are distinct, in order of blocks, and within `span`."""
    keys = [(target.block, target.module) for target in targets]
    if not keys or len(set(keys)) < len(keys) or any(a[0] > b[0] for a, b in pairwise(keys)):
        raise ProtocolError("an adapter without targets, or with one twice or out of order")
    if not all(target.block in span for target in targets):
        raise ProtocolError(f"an adapter with targets outside of blocks {span}")
    if not all(torch.isfinite(torch.tensor(target.scaling)) for target in targets):
        raise ProtocolError("an adapter whose scaling is not finite")

"""Remote layers in autograd: one node of the graph, from what enters the first block to what leaves the last.

Owns which columns of a batch are sequences of their own, and the way between padded batches and packed rows. Padding
never travels; nothing is kept in a cache. Rows whose position ids restart are packed: each document attends to itself
alone, as transformers has it where no mask is given. Knows neither peers nor routes.

Tensor names: B rows, T columns, N packed positions, D the model's hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peers.wire.messages import Jumps
from swarm.errors import ContextTooLong
from swarm.models.adapters import Attached
from swarm.models.layout import Layout, PositionRules
from swarm.session.remote import Gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """The sequences of one batch."""

    lengths: tuple[int, ...]
    """In order of rows, and of columns within each; no empty ones."""
    places: tuple[Tensor, Tensor] | None
    """Row and column of each packed position, on the CPU; None when that is every column of every row."""
    regime_length: int
    """Highest position id of the batch plus one."""
    jumps: Jumps = ()
    """Packed positions before which position ids of their sequence are left out, and how many."""


def documents_of(layout: Layout) -> Documents:
    """Each row is one sequence, behind what is cached."""
    width = layout.width
    lengths = tuple(width if columns_N is None else len(columns_N) for columns_N in layout.columns)
    places = None
    if any(columns_N is not None for columns_N in layout.columns):
        columns = [torch.arange(width) if columns_N is None else columns_N for columns_N in layout.columns]
        rows = [torch.full((len(columns_N),), row) for row, columns_N in enumerate(columns)]
        places = torch.cat(rows), torch.cat(columns)
    jumps: list[tuple[int, int]] = []
    for first, skipped, position in zip(
        accumulate(lengths, initial=0), layout.jumps, layout.first_positions, strict=False
    ):
        if layout.past and position:  # before which stands a prefix; without one, layers see relative positions alone
            jumps.append((first, position))
        jumps += ((first + index, count) for index, count in skipped)
    return Documents(
        lengths=tuple(length for length in lengths if length),
        places=places,
        regime_length=layout.regime_length,
        jumps=tuple(jumps),
    )


def packed_documents(rules: PositionRules, position_ids: object, mask: object, *, batch: int) -> Documents | None:
    """The documents of rows in which position ids go on otherwise than one by one, where there is no mask; else None.

    Raises ContextTooLong.
    """
    if not isinstance(position_ids, Tensor) or mask is not None or position_ids.ndim != 2:
        return None
    ids_BT = position_ids.to("cpu").expand(batch, -1)
    starts_BT = ids_BT.diff(dim=1, prepend=ids_BT[:, :1] - 1) != 1  # transformers.masking_utils, packed sequences
    if not starts_BT.any():
        return None
    starts_BT[:, 0] = True
    longest = int(ids_BT.max()) + 1
    if rules.max_positions is not None and longest > rules.max_positions:
        raise ContextTooLong(f"positions up to {longest}; the model's context has {rules.max_positions}")
    starts_N = starts_BT.flatten().nonzero().flatten()
    ends_N = torch.cat((starts_N[1:], torch.tensor([ids_BT.numel()])))
    return Documents(lengths=tuple((ends_N - starts_N).tolist()), places=None, regime_length=longest)


def run(
    remote: Gradients,
    hidden_BTD: Tensor,
    documents: Documents,
    *,
    repeat_last: bool = False,
    attached: Attached | None = None,
) -> Tensor:
    """What the layers make of a batch, `[B, T, D]`, with zeros where there is padding; differentiable.

    With `repeat_last`, a padded last column gets the output of its row's last token instead.
    """
    batch, width, _ = hidden_BTD.shape
    if not documents.lengths:
        return torch.zeros_like(hidden_BTD)
    if documents.places is None:
        hidden_ND = hidden_BTD.reshape(batch * width, -1)
    else:
        rows_N, columns_N = (places.to(hidden_BTD.device) for places in documents.places)
        hidden_ND = hidden_BTD[rows_N, columns_N]
    weights: tuple[Tensor, ...] = ()
    forward = functools.partial(
        remote.forward, lengths=documents.lengths, regime_length=documents.regime_length, jumps=documents.jumps
    )
    if attached is not None:
        weights = attached.weights
        forward = functools.partial(forward, adapter=attached.adapter(), dropout=attached.draw_dropout())
    learns = hidden_ND.requires_grad or (attached is not None and attached.requires_grad)
    if learns and torch.is_grad_enabled():
        output_ND: Tensor = _Through.apply(hidden_ND, remote, forward, *weights)  # type: ignore[no-untyped-call]
    else:
        output_ND, _ = forward(hidden_ND, keep=False)
    if documents.places is None:
        return output_ND.view(hidden_BTD.shape)
    out_BTD = output_ND.new_zeros(hidden_BTD.shape)
    out_BTD[rows_N, columns_N] = output_ND
    if repeat_last:
        last = torch.tensor(_last_of_rows(documents.places[0], batch), device=out_BTD.device)
        present_B = last >= 0
        out_BTD[present_B, -1] = output_ND[last[present_B]]
    return out_BTD


def _last_of_rows(rows_N: Tensor, batch: int) -> Sequence[int]:
    """The packed position of each row's last token; -1 for a row without any."""
    last = [-1] * batch
    for index, row in enumerate(rows_N.tolist()):
        last[row] = index
    return last


class _Through(torch.autograd.Function):
    """`[N, D]` in, `[N, D]` out; the weights behind it are frozen, but for the client's own adapter's."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        remote: Gradients,
        forward: Callable[..., tuple[Tensor, object]],
        *weights: Tensor,
    ) -> Tensor:
        ctx.remote, ctx.like = remote, [(weight.shape, weight.dtype, weight.device) for weight in weights]
        output_ND, ctx.tape = forward(hidden_ND.detach(), keep=True)
        return output_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor | None, ...]:
        given_ND, added = ctx.remote.backward(ctx.tape, gradient_ND)
        sizes = [shape.numel() for shape, _, _ in ctx.like]
        parts = [] if added is None else torch.split(added, sizes)
        weights = [
            part.view(shape).to(device, dtype) for part, (shape, dtype, device) in zip(parts, ctx.like, strict=True)
        ]
        return given_ND, None, None, *weights

"""Attention of a whole forward in one kernel, on an accelerator: torch's flex attention over gathered pages.

Segment by segment (`attention`) a forward launches several kernels for each session in every layer, and writes masks
out. Here the keys of all sessions are gathered in one call and attended to in another, which asks for the mask inside.

- Every mask that transformers makes for text lets a query see one run of positions. So a mask is two numbers for each
  query, where its run begins and ends among the gathered keys, and one kernel serves them all.
- Each session's queries, and its keys, begin a block of their own: even under a mask a NaN would be one, and what one
  session made of itself must reach nobody else. Blocks are filled up with slots of nobody's.
- Soft-capping is a function of scores. A sink is one score more, with no value behind it: the softmax with it is the
  softmax without, times sigmoid(logsumexp of the scores - sink).

Names as in `attention`; P padded queries, N gathered keys, both whole blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers.masking_utils import causal_mask_function

from peers.model.support import MaskFunction
from peers.runtime.attention import LayerPool, NotPluggable, Pattern, Segment

BLOCK = 128
"""Queries and keys for which a kernel decides at once whether to look at all; what torch's own masks use."""

Attend = Callable[..., Any]
"""`flex_attention`, compiled or not."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Where the queries and keys of one forward lie, under one mask and in one table."""

    rows_T: Tensor
    """Of each packed position, among the padded queries."""
    queries: int
    """P"""
    slots_N: Tensor
    mask: BlockMask


def lay_out(segments: Sequence[Segment], function: MaskFunction, nobodys: int, device: torch.device) -> Layout | None:
    """`nobodys`: a slot whose keys and values are finite and no session's. None where some query does not see one run
    of positions. Raises NotPluggable as `attention.look` does."""
    rows: list[int] = []
    slots: list[int] = []
    begins: list[int] = []
    ends: list[int] = []
    seen: list[list[int]] = []
    for segment in segments:
        run = _visible(segment, function)
        if run is None:
            return None
        rows += range(len(begins), len(begins) + segment.tokens)
        begins += (len(slots) + at for at, _ in run)
        ends += (len(slots) + end for _, end in run)
        slots += (slot for first, count in segment.runs for slot in range(first, first + count))
        slots += [nobodys] * (-len(slots) % BLOCK)
        empty = -len(begins) % BLOCK
        begins += [0] * empty
        ends += [0] * empty  # sees nothing
    for first in range(0, len(begins), BLOCK):
        real = [
            (at, end) for at, end in zip(begins[first : first + BLOCK], ends[first : first + BLOCK], strict=True) if end
        ]
        seen.append(list(range(min(at for at, _ in real) // BLOCK, -(-max(end for _, end in real) // BLOCK))))
    most = len(slots) // BLOCK
    indices = [blocks + [0] * (most - len(blocks)) for blocks in seen]
    begin_P, end_P = torch.tensor(begins, device=device), torch.tensor(ends, device=device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (begin_P[query] <= key) & (key < end_P[query])

    mask = BlockMask.from_kv_blocks(
        torch.tensor([[[len(blocks) for blocks in seen]]], dtype=torch.int32, device=device),
        torch.tensor([[indices]], dtype=torch.int32, device=device),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(len(begins), len(slots)),
        compute_q_blocks=False,  # only gradients ask for these
    )
    return Layout(
        rows_T=torch.tensor(rows, device=device),
        queries=len(begins),
        slots_N=torch.tensor(slots, device=device),
        mask=mask,
    )


class Flex:
    """Implements `attention.Whole`, over pools whose last slot is nobody's, and zero."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        segments: Sequence[Segment],
        q_1HTK: Tensor,
        pool: LayerPool,
        pattern: Pattern,
        scale: float,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> Tensor | None:
        if pool.table not in pattern.layouts:
            nobodys = pool.keys_1JSK.shape[2] - 1
            pattern.layouts[pool.table] = lay_out(segments, pattern.function, nobodys, q_1HTK.device)
        layout = pattern.layouts[pool.table]
        if layout is None:
            return None
        assert isinstance(layout, Layout)
        _, H, _, K = q_1HTK.shape
        attended = self._attend(
            q_1HTK.new_zeros(1, H, layout.queries, K).index_copy_(2, layout.rows_T, q_1HTK),
            pool.keys_1JSK.index_select(2, layout.slots_N),
            pool.values_1JSV.index_select(2, layout.slots_N),
            score_mod=None if softcap is None else _capped(softcap, q_1HTK.device),
            block_mask=layout.mask,
            scale=scale,
            enable_gqa=pool.keys_1JSK.shape[1] != H,
            return_aux=None if sinks_H is None else AuxRequest(lse=True),
        )
        out_1HPV: Tensor
        if sinks_H is None:
            out_1HPV = attended
        else:
            out_1HPV, extra = attended
            share_1HP = torch.sigmoid(extra.lse - sinks_H.float()[:, None])
            out_1HPV = out_1HPV * share_1HP[..., None].to(out_1HPV.dtype)
        return out_1HPV.index_select(2, layout.rows_T).transpose(1, 2).contiguous()


def compiled() -> Attend:
    """For whatever device its tensors are on; raises what torch's compiler raises, at the first call."""
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _capped(softcap: float, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    cap = torch.tensor(softcap, device=device)  # a number would be one of the compiler's variables

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return capped


def _visible(segment: Segment, function: MaskFunction) -> list[tuple[int, int]] | None:
    """Which run of the segment's positions, counted from its first one, each of its queries sees; None where one sees
    none, or several."""
    first = segment.first
    if function is causal_mask_function and not first:
        return [(0, position + 1) for position in range(segment.start, segment.end)]
    queries_n1 = torch.arange(segment.start, segment.end)[:, None]
    keys_1L = torch.arange(max(0, first - 1), segment.end)[None, :]
    seen_nL = function(0, 0, queries_n1, keys_1L).expand(segment.tokens, keys_1L.shape[1])
    if first:
        if seen_nL[:, 0].any():
            raise NotPluggable(f"a mask that sees positions before {first}, though the layer's window ends there")
        seen_nL = seen_nL[:, 1:]
    seen_nL = seen_nL.int()
    begin_n, count_n = seen_nL.argmax(1), seen_nL.sum(1)
    end_n = seen_nL.shape[1] - seen_nL.flip(1).argmax(1)
    if not bool(((count_n > 0) & (end_n - begin_n == count_n)).all()):
        return None
    return list(zip(begin_n.tolist(), end_n.tolist(), strict=True))

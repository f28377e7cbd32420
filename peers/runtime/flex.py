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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
    runs = [_visible(segment, function) for segment in segments]
    if any(run is None for run in runs):
        return None
    starts = _starts(segment.tokens for segment in segments)
    key_starts = _starts(segment.end - segment.first for segment in segments)
    rows_T = torch.cat([torch.arange(at, at + s.tokens) for at, s in zip(starts, segments, strict=False)])
    begin_P, end_P = (torch.zeros(starts[-1], dtype=torch.long) for _ in range(2))
    pieces = []
    """First slot, slots and first key of each run."""
    for segment, run, start, key_start in zip(segments, runs, starts, key_starts, strict=False):
        assert run is not None
        begin_P[start : start + segment.tokens] = run[0] + key_start
        end_P[start : start + segment.tokens] = run[1] + key_start  # the others see nothing
        for first, count in segment.runs:
            pieces.append((first, count, key_start))
            key_start += count
    slots_N = _expanded(pieces, torch.full((key_starts[-1],), nobodys))
    most = key_starts[-1] // BLOCK
    none_P = end_P == 0
    first_B = begin_P.masked_fill(none_P, key_starts[-1]).view(-1, BLOCK).amin(1) // BLOCK
    count_B = -(-end_P.view(-1, BLOCK).amax(1) // BLOCK) - first_B
    at_BN = torch.arange(most).expand(len(count_B), -1)
    index_BN = torch.where(at_BN < count_B[:, None], first_B[:, None] + at_BN, 0)
    begin_P, end_P = begin_P.to(device), end_P.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (begin_P[query] <= key) & (key < end_P[query])

    mask = BlockMask.from_kv_blocks(
        count_B[None, None].to(device, torch.int32),
        index_BN[None, None].to(device, torch.int32),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(starts[-1], key_starts[-1]),
        compute_q_blocks=False,  # only gradients ask for these
    )
    return Layout(
        rows_T=rows_T.to(device),
        queries=starts[-1],
        slots_N=slots_N.to(device),
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


def _starts(lengths: Iterable[int]) -> list[int]:
    """Where parts of these lengths begin, each in a block of its own, and where the last one's blocks end."""
    return list(accumulate((-(-length // BLOCK) * BLOCK for length in lengths), initial=0))


def _expanded(pieces: Sequence[tuple[int, int, int]], slots_N: Tensor) -> Tensor:
    """`slots_N` with so many slots from a first one on, from a place on, for each of `pieces`."""
    first_R, count_R, place_R = torch.tensor(pieces).unbind(1)
    before_R = count_R.cumsum(0) - count_R
    at_n = torch.arange(int(count_R.sum()))
    places_n, slots_n = (at_n + (each_R - before_R).repeat_interleave(count_R) for each_R in (place_R, first_R))
    slots_N.index_copy_(0, places_n, slots_n)
    return slots_N


def _visible(segment: Segment, function: MaskFunction) -> tuple[Tensor, Tensor] | None:
    """Where, counted from the segment's first position, the run begins and ends that each of its queries sees; None
    where one sees none, or several."""
    first = segment.first
    if function is causal_mask_function and not first:
        return torch.zeros(segment.tokens, dtype=torch.long), torch.arange(segment.start + 1, segment.end + 1)
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
    return begin_n, end_n

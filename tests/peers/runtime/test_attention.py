"""Ragged attention against its definition, one query at a time in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from peers.model.kernels import Pool
from peers.runtime import attention, flex
from peers.runtime.attention import (
    LayerPool,
    NotPluggable,
    Pattern,
    RaggedBatch,
    Segment,
    Whole,
    attend_one,
    look,
    ragged_attention,
    ragged_mask,
)
from peers.runtime.flex import Flex, Layout, lay_out
from peers.runtime.graphs import NOBODYS, Rows
from peers.runtime.program import Programs

Sees = Callable[[int, int], bool]


@st.composite
def patterns(draw: st.DrawFn) -> tuple[attention.MaskFunction, Sees]:
    """A mask function of transformers and what it means in plain words."""
    size = draw(st.integers(1, 9))
    full = (causal_mask_function, lambda query, key: key <= query)
    sliding = (sliding_window_causal_mask_function(size), lambda query, key: query - size < key <= query)
    chunked = (
        chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long)),
        lambda query, key: key <= query and key // size == query // size,
    )
    chosen: tuple[attention.MaskFunction, Sees] = draw(st.sampled_from([full, sliding, chunked]))
    return chosen


@st.composite
def runs(draw: st.DrawFn, lengths: list[int]) -> list[list[tuple[int, int]]]:
    """Disjoint slots for sessions of these lengths, in pieces of any size and any order."""
    pieces: list[tuple[int, int]] = []  # (session, slots)
    for session, length in enumerate(lengths):
        while length:
            count = draw(st.integers(1, length))
            pieces.append((session, count))
            length -= count
    order = draw(st.permutations(range(len(pieces))))
    first, placed = 0, {}
    for index in order:
        placed[index] = first
        first += pieces[index][1]
    return [
        [(placed[i], count) for i, (owner, count) in enumerate(pieces) if owner == session]
        for session in range(len(lengths))
    ]


def slots_of(session_runs: list[tuple[int, int]]) -> list[int]:
    return [slot for first, count in session_runs for slot in range(first, first + count)]


@st.composite
def gone(draw: st.DrawFn, extents: list[tuple[int, int]], sees: Sees) -> list[int]:
    """For each session, of those positions that no query sees any more, how many are there no longer."""
    return [draw(st.integers(0, next(key for key in itertools.count() if sees(start, key)))) for start, _ in extents]


def held(extents: list[tuple[int, int]], firsts: list[int]) -> list[int]:
    return [start + tokens - first for (start, tokens), first in zip(extents, firsts, strict=True)]


def surely(whole: Whole) -> Whole:
    """Else sessions would attend one by one where it cannot, and nobody would notice."""

    def attend(*given: Any) -> Tensor:
        output = whole(*given)
        assert output is not None
        return output

    return attend


def by_definition(
    q_H: Tensor, keys_LJ: Tensor, values_LJ: Tensor, seen: list[int], scale: float, softcap: float | None, sinks: Tensor
) -> Tensor:
    """One query of all heads, [H, V], in float64; `sinks` has no entry when there are none."""
    group = len(q_H) // keys_LJ.shape[1]
    keys_LH = keys_LJ[seen].double().repeat_interleave(group, 1)
    values_LH = values_LJ[seen].double().repeat_interleave(group, 1)
    scores_HL = torch.einsum("hk,lhk->hl", q_H.double(), keys_LH) * scale
    if softcap is not None:
        scores_HL = softcap * torch.tanh(scores_HL / softcap)
    if len(sinks):
        scores_HL = torch.cat([scores_HL, sinks.double()[:, None]], 1)
    return torch.einsum("hl,lhv->hv", scores_HL.softmax(1)[:, : len(seen)], values_LH)


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.sampled_from([4, 8, 32, 64, 72])).flatmap(
    lambda shape: st.tuples(*map(st.just, shape), st.sampled_from([shape[2], shape[2], 6, 84]))
)
"""J, G, K, V"""


def assert_attends_as_each_alone(
    data: st.DataObject,
    library: Pool | None,
    whole: Whole | None,
    device: str = "cpu",
    *,
    shapes: st.SearchStrategy[tuple[int, int, int, int]] = SHAPES,
    error: float = 1e-5,
    fixed: bool = False,
) -> None:
    """Some ragged batch, against the definition. Slots that are nobody's to read are NaN, and the last ones are zero;
    so is what lies beside the layer's keys and values in the memory that it shares with other layers. Of what sessions
    do not see any more some is gone, and its slots are others'.

    `error`: the largest scores are about 10, which float32 knows to 1e-6, sums of 72 products to a few times that; and
    values of either sign, up to about 4, are weighed by their exponentials. 4.2e-6 was seen.

    `fixed`: a batch of single positions, in tensors of fixed shapes as a graph repeats them."""
    J, G, K, V = data.draw(shapes)
    tokens = st.just(1) if fixed else st.one_of(st.just(1), st.integers(1, 20))
    extents = data.draw(st.lists(st.tuples(st.integers(0, 40), tokens), min_size=1, max_size=6))
    function, sees = data.draw(patterns())
    firsts = data.draw(gone(extents, sees))
    segment_runs = data.draw(runs(held(extents, firsts)))
    softcap = data.draw(st.sampled_from([None, None, 2.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sinks = random(J * G) if data.draw(st.booleans()) else random(0)
    slots = sum(held(extents, firsts))
    beside = data.draw(st.sampled_from([0, 0, 1, 5]))

    def room(width: int) -> Tensor:
        wide = torch.full((1, J + beside, slots + NOBODYS, width + 2 * beside), math.nan, device=device)
        wide[:, :, slots:] = 0
        return wide[:, :J, :, beside : beside + width]

    pool = LayerPool(keys_1JSK=room(K), values_1JSV=room(V))
    segments, queries, keys, values, expected = [], [], [], [], []
    for (start, tokens), first, session_runs in zip(extents, firsts, segment_runs, strict=True):
        q, k, v = random(tokens, J * G, K), random(start + tokens, J, K), random(start + tokens, J, V)
        past = slots_of(session_runs)[: start - first]
        pool.keys_1JSK[0, :, past] = k[first:start].transpose(0, 1).to(device)
        pool.values_1JSV[0, :, past] = v[first:start].transpose(0, 1).to(device)
        segments.append(Segment(start=start, tokens=tokens, runs=session_runs, first=first))
        queries.append(q)
        keys.append(k[start:])
        values.append(v[start:])
        for query in range(start, start + tokens):
            seen = [key for key in range(start + tokens) if sees(query, key)]
            expected.append(by_definition(q[query - start], k, v, seen, 0.3, softcap, sinks))

    def packed(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).transpose(0, 1)[None].to(device)

    pattern = Pattern(function)
    given = packed(queries), packed(keys), packed(values)
    if fixed:
        output = by_rows(segments, pool, given, pattern, softcap, sinks if len(sinks) else None)
    else:
        batch = RaggedBatch([segments], [pool], torch.device(device), library, whole and surely(whole))
        output = batch.attend(*given, pattern, 0.3, softcap, sinks.to(device) if len(sinks) else None)
        if library is not None:
            ours = [n == 1 or function is causal_mask_function for _, n in extents]
            assert [index for index, _ in pattern.plans[0].others] == [i for i, mine in enumerate(ours) if not mine]
    torch.testing.assert_close(output[0].double().cpu(), torch.stack(expected), atol=error, rtol=2.5 * error)
    for (start, _), first, session_runs, k in zip(extents, firsts, segment_runs, keys, strict=True):
        assert torch.equal(pool.keys_1JSK[0, :, slots_of(session_runs)[start - first :]].cpu(), k.transpose(0, 1))
    if isinstance(layout := pattern.layouts.get(0), Layout):
        assert_blocks_hold_all_that_is_seen(layout)


def by_rows(
    segments: list[Segment],
    pool: LayerPool,
    given: tuple[Tensor, Tensor, Tensor],
    pattern: Pattern,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What a graph's attention makes of these single positions' queries, keys and values, after another batch."""
    rows = Rows(8, 64, [pool], torch.zeros(4))
    filled = [torch.cat([part, torch.randn(1, part.shape[1], 8 - len(segments), part.shape[3])], 2) for part in given]

    def attend(hidden_1TH: Tensor, positions_1T: Tensor, attender: attention.Attender) -> Tensor:
        return attender.attend(*filled, pattern, 0.3, softcap, sinks)

    programs = cast(Programs, attend)
    rows.run(programs)
    assert rows.load(torch.zeros(1, len(segments), 4), [segments])
    return rows.run(programs)[:, : len(segments)]


def assert_sessions_are_apart(library: Pool | None, whole: Whole | None, device: str = "cpu") -> None:
    """What one session makes of itself (NaN) reaches no other."""
    lengths, firsts = (150, 5), (0, 150)
    slots = sum(lengths)
    pool = LayerPool(
        keys_1JSK=torch.zeros(1, 1, slots + 1, 64, device=device),
        values_1JSV=torch.zeros(1, 1, slots + 1, 64, device=device),
    )
    segments = [
        Segment(start=0, tokens=length, runs=[(first, length)]) for first, length in zip(firsts, lengths, strict=True)
    ]
    q, k, v = (torch.randn(1, heads, slots, 64, device=device) for heads in (2, 1, 1))
    k[:, :, lengths[0] :] = v[:, :, lengths[0] :] = math.nan
    batch = RaggedBatch([segments], [pool], torch.device(device), library, whole)
    output = batch.attend(q, k, v, Pattern(causal_mask_function), 0.3, None, None)
    assert output[0, : lengths[0]].isfinite().all()
    assert not output[0, lengths[0] :].isfinite().any()


def assert_blocks_hold_all_that_is_seen(layout: Layout) -> None:
    """A compiled kernel looks nowhere else; the definition looks everywhere."""
    sizes, device = (1, layout.queries, len(layout.slots_N)), layout.rows_T.device
    zero, every_P, every_N = (torch.arange(size, device=device) for size in sizes)
    seen_PN = layout.mask.mask_mod(zero, zero, every_P[:, None], every_N[None])
    seen_blocks = seen_PN.view(layout.queries // flex.BLOCK, flex.BLOCK, -1, flex.BLOCK).any(3).any(1)
    assert torch.equal(seen_blocks, layout.mask.to_dense()[0, 0].bool())


LIBRARIES = {"torch": None, "library": Pool(1), "library in two threads": Pool(2)}


@pytest.mark.parametrize("backend", LIBRARIES)
@settings(max_examples=70, deadline=None)
@given(data=st.data())
def test_a_ragged_batch_attends_as_each_of_its_sessions_would_alone(backend: str, data: st.DataObject) -> None:
    assert_attends_as_each_alone(data, LIBRARIES[backend], None)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_ragged_batch_at_once_attends_as_each_of_its_sessions_would_alone(data: st.DataObject) -> None:
    """By what a compiler is given; what it makes of that, where there is a device for it, is in `tests/gpu`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # no compiler: its definition
        patch.setattr(flex, "BLOCK", 8)
        assert_attends_as_each_alone(data, None, Flex(flex_attention.flex_attention))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_layout_has_each_session_in_blocks_of_its_own(data: st.DataObject) -> None:
    extents = data.draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=5))
    function, sees = data.draw(patterns())
    firsts = data.draw(gone(extents, sees))
    all_runs = data.draw(runs(held(extents, firsts)))
    rows: list[int] = []
    slots: list[int] = []
    seen: set[tuple[int, int]] = set()
    segments, queries, nobodys = [], 0, 999
    for (start, tokens), first, session_runs in zip(extents, firsts, all_runs, strict=True):
        segments.append(Segment(start=start, tokens=tokens, runs=session_runs, first=first))
        for row in range(tokens):
            keys = [key for key in range(first, start + tokens) if sees(start + row, key)]
            seen |= {(queries + row, len(slots) + key - first) for key in keys}
        rows += range(queries, queries + tokens)
        queries += -(-tokens // 8) * 8
        slots += slots_of(session_runs)
        slots += [nobodys] * (-len(slots) % 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", 8)
        layout = lay_out(segments, function, nobodys, torch.device("cpu"))
        assert layout is not None
        assert_blocks_hold_all_that_is_seen(layout)
    assert (layout.rows_T.tolist(), layout.queries, layout.slots_N.tolist()) == (rows, queries, slots)
    every_P, every_N, zero = torch.arange(queries), torch.arange(len(slots)), torch.tensor(0)
    assert set(map(tuple, layout.mask.mask_mod(zero, zero, every_P[:, None], every_N[None]).nonzero().tolist())) == seen


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_batch_in_fixed_tensors_attends_as_each_of_its_sessions_would_alone(data: st.DataObject) -> None:
    assert_attends_as_each_alone(data, None, None, fixed=True)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_what_one_session_made_of_itself_reaches_no_other(backend: str) -> None:
    assert_sessions_are_apart(LIBRARIES[backend], None)


def test_long_sessions_are_shared_out_among_threads_in_bfloat16() -> None:
    J, G, K, lengths = 2, 4, 64, (700, 1900, 1)
    generator = torch.Generator().manual_seed(0)
    slots = sum(lengths)
    pool = LayerPool(
        keys_1JSK=torch.randn(1, J, slots, K, generator=generator).bfloat16(),
        values_1JSV=torch.randn(1, J, slots, K, generator=generator).bfloat16(),
    )
    firsts = [0, 700, 2600]
    segments = [
        Segment(start=length - 1, tokens=1, runs=[(first, length)])
        for first, length in zip(firsts, lengths, strict=True)
    ]
    q, k, v = (torch.randn(1, heads, 3, K, generator=generator).bfloat16() for heads in (J * G, J, J))
    batch = RaggedBatch([segments], [pool], torch.device("cpu"), LIBRARIES["library in two threads"])
    output = batch.attend(q, k, v, Pattern(causal_mask_function), 0.125, None, None)
    for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        keys = pool.keys_1JSK[0, :, first : first + length].transpose(0, 1)
        values = pool.values_1JSV[0, :, first : first + length].transpose(0, 1)
        right = by_definition(q[0, :, row], keys, values, list(range(length)), 0.125, None, torch.empty(0))
        torch.testing.assert_close(output[0, row].double(), right, atol=1e-2, rtol=1e-2)


PIECES = {"a prompt": [(0, 300)], "a later piece": [(389, 128)], "some": [(150, 17), (0, 140), (31, 1), (290, 33)]}
"""Positions that sessions hold, and those that are new."""


@pytest.mark.parametrize("backend", ["library", "library in two threads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("J", "G", "K", "V", "softcap"),
    [(3, 3, 64, 64, None), (1, 1, 17, 33, 2.0), (2, 4, 128, 50, None), (2, 33, 8, 8, 5.0)],
)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("pieces", PIECES)
def test_pieces_of_prompts_attend_by_definition(
    backend: str, dtype: torch.dtype, J: int, G: int, K: int, V: int, softcap: float | None, sinks: bool, pieces: str
) -> None:
    """In blocks of keys, for several panels of queries; what is nobody's to read is NaN. In bfloat16 weights are
    rounded to 2^-9 each, as torch does, and the output is."""
    generator = torch.Generator().manual_seed(K)
    extents = PIECES[pieces]
    slots = sum(start + tokens for start, tokens in extents)
    keys, values, queries = (
        torch.randn(slots, heads, width, generator=generator).to(dtype) for heads, width in ((J, K), (J, V), (J * G, K))
    )
    pool = LayerPool(
        keys_1JSK=torch.full((1, J, slots + 9, K), math.nan, dtype=dtype),
        values_1JSV=torch.full((1, J, slots + 9, V), math.nan, dtype=dtype),
    )
    sinks_H = torch.randn(J * G, generator=generator) if sinks else torch.empty(0)
    segments, rows, expected, before = [], [], [], 0
    for start, tokens in extents:
        end, cut = start + tokens, (start + tokens) // 3
        mine = slice(before, before + end)
        runs = [(before + end - cut, cut), (before, end - cut)]  # the first third lies behind the others
        places = slots_of(runs)
        pool.keys_1JSK[0, :, places[:start]] = keys[mine][:start].transpose(0, 1)
        pool.values_1JSV[0, :, places[:start]] = values[mine][:start].transpose(0, 1)
        segments.append(Segment(start=start, tokens=tokens, runs=runs))
        rows += range(before + start, before + end)
        scores = torch.einsum(
            "nhk,lhk->hnl", queries[mine][start:].double(), keys[mine].double().repeat_interleave(G, 1)
        )
        scores *= K**-0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(torch.ones(tokens, end).tril(start) == 0, -math.inf)
        if sinks:
            scores = torch.cat([scores, sinks_H.double()[:, None, None].expand(-1, tokens, 1)], 2)
        weights = scores.softmax(2)[:, :, :end]
        expected.append(torch.einsum("hnl,lhv->nhv", weights, values[mine].double().repeat_interleave(G, 1)))
        before += end
    batch = RaggedBatch([segments], [pool], torch.device("cpu"), LIBRARIES[backend])
    q, k, v = (tensor[rows].transpose(0, 1)[None] for tensor in (queries, keys, values))
    output = batch.attend(q, k, v, Pattern(causal_mask_function), K**-0.5, softcap, sinks_H if sinks else None)
    right = torch.cat(expected)
    error = 2e-6 if dtype is torch.float32 else 4e-3
    assert (output[0].double() - right).norm() <= error * right.norm()
    torch.testing.assert_close(output[0].double(), right, atol=4 * error, rtol=2 * error)


def test_long_prompts_are_scored_a_few_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(9, 2, 3, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    mask = look(Segment(start=0, tokens=9, runs=[(0, 9)]), causal_mask_function, q).mask_nL
    whole = attend_one(q, k, v, mask, 0.3, softcap=4.0)
    monkeypatch.setattr(attention, "SCORES_LIMIT", 2 * 2 * 3 * 9)
    torch.testing.assert_close(attend_one(q, k, v, mask, 0.3, softcap=4.0), whole)


def test_a_window_reads_no_key_before_it() -> None:
    segment = Segment(start=20, tokens=1, runs=[(40, 16), (0, 5)])
    sight = look(segment, sliding_window_causal_mask_function(7), torch.empty(0))
    assert (sight.skipped, sight.mask_nL) == (14, None)


@pytest.mark.parametrize("function", [causal_mask_function, sliding_window_causal_mask_function(5)])
def test_a_mask_that_sees_what_is_gone_is_refused(function: attention.MaskFunction) -> None:
    segment = Segment(start=20, tokens=2, runs=[(0, 5)], first=17)
    with pytest.raises(NotPluggable, match="before 17"):
        look(segment, function, torch.empty(0))
    with pytest.raises(NotPluggable, match="before 17"):
        lay_out([segment], function, 99, torch.device("cpu"))


def test_what_it_does_not_understand_it_refuses() -> None:
    q = torch.zeros(1, 1, 1, 4)
    with pytest.raises(NotPluggable, match="mask"):
        ragged_attention(torch.nn.Identity(), q, q, q, torch.zeros(1, 1, 1, 1))
    with pytest.raises(NotPluggable, match="position_bias"):
        ragged_attention(torch.nn.Identity(), q, q, q, Pattern(causal_mask_function), position_bias=q)
    with pytest.raises(NotPluggable, match="positions"):
        ragged_mask(mask_function=causal_mask_function, use_vmap=True)

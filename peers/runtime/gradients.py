"""Forward and backward of frozen blocks over whole sequences, as jobs for the engine's thread.

Owns what is computed and what is kept for a backward; knows no network and nobody's budget (`serving.training` decides
what is kept). Both jobs are pure: a backward depends on the input and the gradient of the output alone, so that it may
be repeated anywhere, with or without the graph of the forward.

A job cuts its sequences into groups, each of which runs as one packed forward, block by block. Between two blocks the
graph is cut, too: every block has a graph of its own, from a leaf that holds its input to its output. So a piece of a
job is one block of one group, in both directions, and memory is freed on the way back block by block. Where attention
cannot be replaced (`cache.SoloCache`), a group is one sequence, and runs with the model's own attention.

Names: T packed positions · n positions of one sequence · H hidden size; for attention as in `runtime.attention`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from peers.errors import Refused
from peers.model.adapters import Adapter, Dropout, dropped
from peers.model.cutting import SpanModel
from peers.runtime.attention import Pattern, Segment, attend_one, attending, look
from peers.wire.messages import PREFIX, AdapterTarget, Code, Jumps
from routing.ids import BlockSpan

Pieces = Generator[None, None, "Outcome"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passage:
    """What is to be computed: sequences of these `lengths`, packed, through the blocks `span` of a model."""

    span: BlockSpan
    lengths: Sequence[int]
    jumps: Jumps = ()
    regime_length: int
    input_TH: Tensor
    """On the CPU, of any floating dtype."""
    adapter: Adapter | None = None
    """Of these blocks, of whoever asks; it changes nothing but what this passage computes."""
    dropout: Dropout | None = None
    """Of the adapter's inputs."""
    sequence: int = 0
    """Which sequence under its seed the first one is."""

    @property
    def tokens(self) -> int:
        return len(self.input_TH)

    @property
    def longest(self) -> int:
        """Of the user's forward, as rotary embeddings want to know it."""
        return max(self.regime_length, int(positions_of(self.lengths, self.jumps).max()) + 1)


@dataclass(slots=True, eq=False)
class _Group:
    """Consecutive sequences that ran as one forward."""

    lengths: tuple[int, ...]
    sequence: int
    """Which one of the passage's its first is."""
    positions_T: Tensor
    blocks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each block the leaf that was its input, and what it made of it."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(slots=True, eq=False)
class Graph:
    """What a backward needs of a forward. Good for one."""

    groups: list[_Group] = field(default_factory=list)
    num_bytes: int = 0
    """Of the tensors that it keeps alive, the model's own apart."""
    weights: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Leaves that hold the adapter's."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    rows_TH: Tensor
    """On the CPU, in the model's dtype; nobody else's memory."""
    graph: Graph | None
    bytes_per_token: float
    """That a graph was found to take; 0 where none was made."""
    adapter_gradient: Tensor | None = None
    """Of its values, in their order."""


def forward(model: SpanModel, passage: Passage, *, packs: bool, keep: bool, positions: int) -> Pieces:
    """The output of the blocks and, with `keep`, its graph. Parameters must be frozen.

    `packs`: whether the model's attention is ours now. `positions`: of a group of several sequences, at most.
    """
    graph = Graph(weights=_leaves(model, passage, keep))
    outputs = []
    for group, input_TH in _groups(passage, packs, positions):
        saved = _Saved(model)
        output_1TH = yield from _run(model, passage, group, input_TH, packs, keep, saved, graph.weights)
        graph.num_bytes += saved.num_bytes
        graph.groups.append(group)
        outputs.append(output_1TH.detach()[0].cpu())
    return Outcome(torch.cat(outputs), graph if keep else None, graph.num_bytes / passage.tokens)


def backward(
    model: SpanModel, passage: Passage, gradient_TH: Tensor, graph: Graph | None, *, packs: bool, positions: int
) -> Pieces:
    """The gradient of the input, from that of the output; without the `graph` of the forward, which is used up, that is
    run again, group by group."""
    gradients = []
    num_bytes = first = 0
    weights = _leaves(model, passage, True) if graph is None else graph.weights
    given = _groups(passage, packs, positions) if graph is None else ((group, None) for group in _taken(graph))
    for group, input_TH in given:
        if input_TH is not None:
            saved = _Saved(model)
            yield from _run(model, passage, group, input_TH, packs, True, saved, weights)
            num_bytes += saved.num_bytes
        gradient_1TH = gradient_TH[None, first : first + group.tokens].to(model.device, model.dtype)
        first += group.tokens
        while group.blocks:
            leaf_1TH, output_1TH = group.blocks.pop()
            torch.autograd.backward(output_1TH, gradient_1TH)
            assert leaf_1TH.grad is not None
            gradient_1TH = leaf_1TH.grad
            del leaf_1TH, output_1TH
            yield
        gradients.append(gradient_1TH[0].cpu())
    added = None
    if weights:
        each = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for pair in weights for leaf in pair)
        added = torch.cat([gradient.flatten().cpu() for gradient in each])
    return Outcome(torch.cat(gradients), None, num_bytes / passage.tokens, added)


def positions_of(lengths: Sequence[int], jumps: Jumps) -> Tensor:
    """Of each row, counted from 0 in each sequence but for the jumps."""
    skipped_T = torch.zeros(sum(lengths), dtype=torch.long)
    for row, count in jumps:
        skipped_T[row] = count
    return torch.cat([torch.arange(len(part)) + part.cumsum(0) for part in torch.split(skipped_T, list(lengths))])


def _leaves(model: SpanModel, passage: Passage, keep: bool) -> list[tuple[Tensor, Tensor]]:
    pairs = () if passage.adapter is None else passage.adapter.weights()
    return [
        (a.to(model.device).clone().requires_grad_(keep), b.to(model.device).clone().requires_grad_(keep))
        for a, b in pairs
    ]


def _taken(graph: Graph) -> Iterator[_Group]:
    groups, graph.groups = graph.groups, []
    while groups:
        yield groups.pop(0)


def _groups(passage: Passage, packs: bool, positions: int) -> Iterator[tuple[_Group, Tensor]]:
    """Each with its input; a sequence that is longer than `positions` is a group of its own."""
    first, lengths = 0, list(passage.lengths)
    positions_T = positions_of(lengths, passage.jumps)
    while lengths:
        sequence = len(passage.lengths) - len(lengths)
        count = tokens = 0
        for length in lengths:
            if count and (not packs or tokens + length > positions):
                break
            count, tokens = count + 1, tokens + length
        rows = slice(first, first + tokens)
        yield _Group(tuple(lengths[:count]), sequence, positions_T[rows]), passage.input_TH[rows]
        del lengths[:count]
        first += tokens


def _run(
    model: SpanModel,
    passage: Passage,
    group: _Group,
    input_TH: Tensor,
    packs: bool,
    keep: bool,
    saved: _Saved,
    weights: Sequence[tuple[Tensor, Tensor]],
) -> Generator[None, None, Tensor]:
    """The output [1, T, H] of a group; with `keep` its blocks stand in `group` afterwards."""
    prefixed = passage.adapter is not None and any(target.module == PREFIX for target in passage.adapter.targets)
    if not packs and (prefixed or passage.jumps):
        raise Refused(
            f"a prefix, or gaps between positions, in {model.config.model_type} models, whose attention is their own",
            code=Code.MALFORMED,
        )
    hidden_1TH = input_TH[None].to(model.device, model.dtype)
    attender = _Sequences(group.lengths, group.positions_T) if packs else None
    positions_T = group.positions_T.to(model.device)
    with attending(attender) if attender else nullcontext() as cache:
        blocks = model.blocks(
            hidden_1TH,
            positions_T[None],
            span=passage.span,
            past_key_values=cache,
            attention_mask=None if packs else torch.ones_like(positions_T)[None],  # ALiBi is built from it
            regime_length=passage.longest,
        )
    for number, (block, module) in zip(passage.span, blocks, strict=True):
        adapting = _adapting(passage, group, number, module, weights)
        if attender is not None:
            attender.prefix = _prefix(model, passage, number, weights)
        with attending(attender) if attender else nullcontext(), torch.set_grad_enabled(keep), adapting:
            if keep:
                leaf_1TH = hidden_1TH.detach().requires_grad_()
                with saved.counting():
                    hidden_1TH = block(leaf_1TH.clone())  # not the leaf itself: blocks may work in place
                group.blocks.append((leaf_1TH, hidden_1TH))
            else:
                hidden_1TH = block(hidden_1TH)
        yield
    return hidden_1TH


@contextmanager
def _adapting(
    passage: Passage, group: _Group, block: int, module: nn.Module, weights: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Within, the linear layers of this block that the adapter names add what it says. Raises Refused where one of them
    was not called: its block multiplies by the weights in some other way."""
    if passage.adapter is None:
        yield
        return
    called: set[str] = set()
    hooks = []
    for target, pair in zip(passage.adapter.targets, weights, strict=True):
        if target.block == block and target.module != PREFIX:

            def add(
                _: nn.Module, args: tuple[Tensor, ...], output: Tensor, target: AdapterTarget = target, pair: Any = pair
            ) -> Tensor:
                called.add(target.module)
                given = args[0].to(pair[0].dtype)
                if passage.dropout is not None:
                    given = given * _dropped(passage.dropout, target, passage.sequence + group.sequence, group, given)
                added = F.linear(F.linear(given, pair[0]) * target.scaling, pair[1])  # where it is narrow
                whole: Tensor = (output + added).to(output.dtype)
                return whole

            hooks.append(module.get_submodule(target.module).register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if len(called) < len(hooks):
        wanted = {target.module for target in passage.adapter.targets if target.block == block} - {PREFIX}
        raise Refused(
            f"{', '.join(sorted(wanted - called))} of block {block} cannot be adapted here", code=Code.MALFORMED
        )


def _dropped(dropout: Dropout, target: AdapterTarget, first: int, group: _Group, like: Tensor) -> Tensor:
    """What `like`, the inputs of a linear layer in order of positions, are multiplied by. Raises Refused for others."""
    if like.numel() != group.tokens * target.inputs:
        raise Refused(f"{target.module} of block {target.block} takes no dropout here", code=Code.MALFORMED)
    parts = [dropped(dropout, target, first + index, length) for index, length in enumerate(group.lengths)]
    return torch.cat(parts).to(like.device).view(like.shape)


def _prefix(
    model: SpanModel, passage: Passage, block: int, weights: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """Keys [1, J, P, K] and values [1, J, P, V] of P positions before every sequence; None where there are none."""
    for target, (keys, values) in zip(() if passage.adapter is None else passage.adapter.targets, weights, strict=True):
        if target.block == block and target.module == PREFIX:
            heads = model.kv_shapes[block - model.span.start].heads
            k_1JPK, v_1JPV = (
                part.reshape(target.rank, heads, -1).transpose(0, 1)[None].to(model.dtype) for part in (keys, values)
            )
            return k_1JPK, v_1JPV
    return None


class _Saved:
    """Bytes that autograd keeps for backwards, each storage once, without the model's weights."""

    def __init__(self, model: SpanModel) -> None:
        self.num_bytes = 0
        self._known = {
            tensor.untyped_storage().data_ptr() for tensor in (*model.module.parameters(), *model.module.buffers())
        }

    def counting(self) -> AbstractContextManager[None]:
        """What operations within keep is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._count, _as_it_is)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        return tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Sequences:
    """Every sequence of a packed forward attends to itself, and to a prefix; nothing is cached. An
    `attention.Attender`."""

    def __init__(self, lengths: Sequence[int], positions_T: Tensor) -> None:
        self._segments = [Segment(start=0, tokens=length, runs=[(0, length)]) for length in lengths]
        self._lengths = list(lengths)
        self._positions = torch.split(positions_T, self._lengths)
        self.prefix: tuple[Tensor, Tensor] | None = None
        """Of the block that runs next."""

    def attend(
        self,
        q_1HTK: Tensor,
        k_1JTK: Tensor,
        v_1JTV: Tensor,
        pattern: Pattern,
        scale: float,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> Tensor:
        H, J, V = q_1HTK.shape[1], k_1JTK.shape[1], v_1JTV.shape[3]
        causal = pattern.function is causal_mask_function
        plain = causal and softcap is None and sinks_H is None and self.prefix is None
        outputs = []
        parts = (torch.split(tensor, self._lengths, 2) for tensor in (q_1HTK, k_1JTK, v_1JTV))
        for index, (q_1HnK, k_1JnK, v_1JnV) in enumerate(zip(*parts, strict=True)):
            if plain and q_1HnK.shape[3] == V:
                outputs.append(_attend_causally(q_1HnK, k_1JnK, v_1JnV, scale))
                continue
            k_1JLK, v_1JLV, mask_nL = self._seen(index, pattern, k_1JnK, v_1JnV)
            q_nJGK = q_1HnK[0].transpose(0, 1).reshape(-1, J, H // J, q_1HnK.shape[3])
            out_nJGV = attend_one(q_nJGK, k_1JLK, v_1JLV, mask_nL, scale, softcap, sinks_H)
            outputs.append(out_nJGV.reshape(-1, H, V))
        return torch.cat(outputs)[None]

    def _seen(
        self, index: int, pattern: Pattern, k_1JnK: Tensor, v_1JnV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values that a sequence has before it, and an additive mask over them."""
        positions_n = self._positions[index]
        if self.prefix is None and positions_n[-1] == len(positions_n) - 1:
            sight = pattern.sights.get(index)
            if sight is None:
                sight = pattern.sights[index] = look(self._segments[index], pattern.function, k_1JnK)
            return k_1JnK[:, :, sight.skipped :], v_1JnV[:, :, sight.skipped :], sight.mask_nL
        queries_n1 = positions_n.to(k_1JnK.device)[:, None]
        keys_1L = queries_n1.T
        if self.prefix is not None:
            before_k, before_v = self.prefix
            k_1JnK, v_1JnV = torch.cat((before_k, k_1JnK), 2), torch.cat((before_v, v_1JnV), 2)
            keys_1L = torch.cat((torch.arange(before_k.shape[2], device=keys_1L.device)[None], keys_1L), 1)
        seen_nL = pattern.function(0, 0, queries_n1, keys_1L).expand(len(queries_n1), keys_1L.shape[1])
        mask_nL = torch.zeros_like(seen_nL, dtype=k_1JnK.dtype).masked_fill_(~seen_nL, float("-inf"))
        return k_1JnK, v_1JnV, mask_nL


def _attend_causally(q_1HnK: Tensor, k_1JnK: Tensor, v_1JnV: Tensor, scale: float) -> Tensor:
    """[n, H, V], without a mask in memory."""
    _, H, n, K = q_1HnK.shape
    J = k_1JnK.shape[1]
    out_JGnV = F.scaled_dot_product_attention(
        q_1HnK.reshape(J, H // J, n, K),
        k_1JnK[0][:, None].expand(-1, H // J, -1, -1),
        v_1JnV[0][:, None].expand(-1, H // J, -1, -1),
        is_causal=True,
        scale=scale,
    )
    return out_JGnV.flatten(0, 1).transpose(0, 1)

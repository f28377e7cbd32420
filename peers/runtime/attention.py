"""Attention over a ragged batch, registered with transformers under the name `swarm_ragged`.

Owns what happens between the projections of a layer: new keys and values go to their sessions' slots, every session
attends to its own past. Knows no sessions, only segments of the packed forward; everything else in a layer (norms,
projections, rotary embedding, MLP, experts) is the model's own and batched by construction.

Names: T packed positions · n positions of one segment · L positions a segment can see · H query heads · J key/value
heads · G = H / J query heads per key/value head · K, V width of a key and of a value · S slots of the pool.

The model hands over a mask as a function of absolute positions (`transformers.masking_utils`); it is asked, never
guessed, so that full, sliding, chunked and combined patterns all hold. Two shortcuts, both exact: a plain causal mask
is recognised by identity, and keys in front of the first visible one are not read. They need not be there any more:
what a session has of its past is asked of the table (`pages`) that a layer goes by.
"""

from __future__ import annotations

import functools
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from peers.model.kernels import Pool, Visits
from peers.model.support import MaskFunction
from peers.wire.messages import MAX_POSITIONS

RAGGED = "swarm_ragged"
SCORES_LIMIT = 1 << 24
"""Scores held at once where they are written out (soft-capping, sinks, keys wider than values): 64 MiB in float32."""


class Pattern(msgspec.Struct, frozen=True, eq=False):
    """One mask of one forward: which keys a query sees, as a function of absolute positions."""

    function: MaskFunction
    sights: dict[int, Sight] = msgspec.field(default_factory=dict)
    """What each segment sees under this pattern; filled by the first layer that uses it."""
    plans: dict[int, Plan] = msgspec.field(default_factory=dict)
    """For each table, which segments the library attends for; made by the first layer that uses both."""
    layouts: dict[int, object] = msgspec.field(default_factory=dict)
    """For each table, what `Whole` made of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPool:
    """The cache of one layer, for all sessions."""

    keys_1JSK: Tensor
    values_1JSV: Tensor
    table: int = 0
    """Which of a session's tables says where its positions are."""


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """`tokens` new positions of one session, from absolute position `start` on, somewhere in the packed forward."""

    start: int
    tokens: int
    runs: Sequence[tuple[int, int]]
    """Slots of positions `[first, start + tokens)`, as `(first slot, count)` in order."""
    first: int = 0
    """Earlier positions are there no more."""

    @property
    def end(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True, slots=True)
class Sight:
    """How many positions from the segment's first on it does not see, and an additive mask over the others."""

    skipped: int
    mask_nL: Tensor | None


class View(msgspec.Struct, frozen=True):
    """The slots a segment reads, and an additive mask over them where it does not see all."""

    runs: Sequence[tuple[int, int]]
    mask_nL: Tensor | None


class Plan(msgspec.Struct, frozen=True):
    """Segments that see all that came before go through the library together, the others through torch one by one."""

    visits: Visits | None
    others: Sequence[tuple[int, View]]


class Attender(Protocol):
    """What a forward under `attending` does with each layer's queries, keys and values."""

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
        """Called once per layer, in order. Returns [1, T, H, V], contiguous."""


class Whole(Protocol):
    """Attends for all segments of a forward at once."""

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
        """[1, T, H, V], contiguous; None where it cannot."""


class NotPluggable(Exception):
    """A layer wants something of its attention function that this one does not know how to do."""


class RaggedBatch:
    """The segments of one forward, packed in order, over the pools of the layers it runs through, in their order.

    `tables`: the same segments as each of the sessions' tables has them.
    """

    def __init__(
        self,
        tables: Sequence[Sequence[Segment]],
        pools: Iterable[LayerPool],
        device: torch.device,
        library: Pool | None = None,
        whole: Whole | None = None,
        attends: int = MAX_POSITIONS,
    ) -> None:
        """`attends`: up to how many new positions of a session `library` does, where they see all that came before."""
        self.positions = array("q", [p for s in tables[0] for p in range(s.start, s.end)])
        """Absolute, of the packed rows."""
        self._tables = tables
        self._slots = [array("q", [slot for s in segments for slot in last_slots(s)]) for segments in tables]
        self._rows = list(accumulate((segment.tokens for segment in tables[0]), initial=0))
        self._device = device
        self._pools = iter(pools)
        self._library = library
        self._attends = attends
        self._whole = whole

    @functools.cached_property
    def positions_T(self) -> Tensor:  # noqa: N802  # a tensor, named by its shape
        """`positions`, on the device."""
        return torch.frombuffer(self.positions, dtype=torch.long).to(self._device)

    @functools.cached_property
    def _slots_T(self) -> list[Tensor]:  # noqa: N802
        """Of each table: where the keys and values of the rows go, on the device."""
        return [torch.frombuffer(slots, dtype=torch.long).to(self._device) for slots in self._slots]

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
        pool = next(self._pools)
        keys, values = pool.keys_1JSK, pool.values_1JSV
        keys.index_copy_(2, self._slots_T[pool.table], k_1JTK)
        values.index_copy_(2, self._slots_T[pool.table], v_1JTV)
        if self._whole is not None:
            segments = self._tables[pool.table]
            out_1THV = self._whole(segments, q_1HTK, pool, pattern, scale, softcap, sinks_H)
            if out_1THV is not None:
                return out_1THV
        plan = pattern.plans.get(pool.table)
        if plan is None:
            plan = pattern.plans[pool.table] = self._plan(pattern, pool.table, q_1HTK)
        _, H, T, K = q_1HTK.shape
        J = keys.shape[1]
        out_THV = q_1HTK.new_empty(T, H, values.shape[3])
        if plan.visits is not None:
            assert self._library is not None
            self._library.attend(q_1HTK, keys, values, out_THV, plan.visits, scale, softcap, sinks_H)
        for index, view in plan.others:
            rows = slice(self._rows[index], self._rows[index + 1])
            if len(view.runs) == 1:
                first, count = view.runs[0]
                k_1JLK, v_1JLV = keys.narrow(2, first, count), values.narrow(2, first, count)
            else:
                k_1JLK = torch.cat([keys.narrow(2, first, count) for first, count in view.runs], 2)
                v_1JLV = torch.cat([values.narrow(2, first, count) for first, count in view.runs], 2)
            q_nJGK = q_1HTK[0, :, rows].transpose(0, 1).reshape(-1, J, H // J, K)
            out_nJGV = attend_one(q_nJGK, k_1JLK, v_1JLV, view.mask_nL, scale, softcap, sinks_H)
            out_THV[rows] = out_nJGV.reshape(-1, H, out_THV.shape[2])
        return out_THV[None]

    def visits(self, uses: Sequence[tuple[Pattern, int]], like: Tensor) -> list[Visits] | None:
        """What every segment attends to under each pattern in each table; None where not all are the library's."""
        found = []
        for pattern, table in uses:
            most = self._most(pattern)
            if any(segment.tokens > most for segment in self._tables[table]):
                return None
            plan = self._plan(pattern, table, like)
            if plan.visits is None or plan.others:
                return None
            found.append(plan.visits)
        return found

    def _most(self, pattern: Pattern) -> int:
        """New positions of a session for which the library may attend."""
        if self._library is None:
            return 0
        return self._attends if pattern.function is causal_mask_function else min(1, self._attends)

    def _plan(self, pattern: Pattern, table: int, like: Tensor) -> Plan:
        others: list[tuple[int, View]] = []
        segments, runs, positions = array("q"), array("q"), 0
        causal, most = pattern.function is causal_mask_function, self._most(pattern)
        for index, segment in enumerate(self._tables[table]):
            by_library = segment.tokens <= most
            view = View(segment.runs, None)
            if not (by_library and causal and segment.first == 0):
                sight = pattern.sights.get(index)
                if sight is None:
                    sight = pattern.sights[index] = look(segment, pattern.function, like)
                view = View(skip(segment.runs, sight.skipped), sight.mask_nL)
                by_library = by_library and view.mask_nL is None
            if not by_library:
                others.append((index, view))
                continue
            segments.extend((self._rows[index], segment.tokens, len(runs) // 2, len(view.runs)))
            for first, count in view.runs:
                runs.extend((first, count))
                positions += count
        if not segments:
            return Plan(None, others)
        return Plan(Visits(segments, runs, positions, self._slots[table]), others)


def attend_one(
    q_nJGK: Tensor,
    k_1JLK: Tensor,
    v_1JLV: Tensor,
    mask_nL: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of one segment, [n, J, G, V]. No key or value is repeated for the heads that share it."""
    n, J, G, K = q_nJGK.shape
    if softcap is not None or sinks_H is not None or v_1JLV.shape[3] != K:
        return _attend_written_out(q_nJGK, k_1JLK, v_1JLV, mask_nL, scale, softcap, sinks_H)
    if n == 1 and mask_nL is None:  # heads that share keys stand where queries stand
        return F.scaled_dot_product_attention(q_nJGK, k_1JLK, v_1JLV, scale=scale)
    out_JGnV = F.scaled_dot_product_attention(
        q_nJGK.permute(1, 2, 0, 3),
        k_1JLK.transpose(0, 1).expand(J, G, -1, -1),
        v_1JLV.transpose(0, 1).expand(J, G, -1, -1),
        attn_mask=mask_nL,
        scale=scale,
    )
    return out_JGnV.permute(2, 0, 1, 3)


def _attend_written_out(
    q_nJGK: Tensor,
    k_1JLK: Tensor,
    v_1JLV: Tensor,
    mask_nL: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """The definition, a few queries at a time: scale, cap, mask, sinks, softmax in float32."""
    n, J, G, K = q_nJGK.shape
    k_JKL, v_JLV = k_1JLK[0].transpose(1, 2), v_1JLV[0]
    step = max(1, SCORES_LIMIT // (J * G * k_JKL.shape[2]))
    outputs = []
    for first in range(0, n, step):
        q_mJGK = q_nJGK[first : first + step]
        m = q_mJGK.shape[0]
        scores = torch.bmm(q_mJGK.permute(1, 2, 0, 3).reshape(J, G * m, K), k_JKL).float().view(J, G, m, -1)
        scores *= scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask_nL is not None:
            scores += mask_nL[first : first + step]
        if sinks_H is None:
            weights = torch.softmax(scores, -1)
        else:
            sinks = sinks_H.float().view(J, G, 1, 1).expand(-1, -1, m, -1)
            weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
        out = torch.bmm(weights.to(v_JLV.dtype).reshape(J, G * m, -1), v_JLV)
        outputs.append(out.view(J, G, m, -1).permute(2, 0, 1, 3))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def look(segment: Segment, function: MaskFunction, like: Tensor) -> Sight:
    """What `segment` sees under a mask: from the first key on that any of its queries sees, and the holes.

    The mask is additive, of the dtype and on the device of `like`. Raises NotPluggable where a query would see what is
    there no more: the layer's mask is not what its window said.
    """
    plain, first = function is causal_mask_function, segment.first
    if plain and segment.tokens == 1 and first == 0:
        return Sight(0, None)
    queries_n1 = torch.arange(segment.start, segment.end, device=like.device)[:, None]
    keys_1L = torch.arange(max(0, first - 1), segment.end, device=like.device)[None, :]
    if plain:
        seen_nL = keys_1L <= queries_n1
    else:
        seen_nL = function(0, 0, queries_n1, keys_1L).expand(segment.tokens, keys_1L.shape[1])
    if first:
        if seen_nL[:, 0].any():
            raise NotPluggable(f"a mask that sees positions before {first}, though the layer's window ends there")
        seen_nL = seen_nL[:, 1:]
    skipped = 0 if plain else int(seen_nL.any(0).int().argmax())
    seen_nL = seen_nL[:, skipped:]
    if seen_nL.all():
        return Sight(skipped, None)
    return Sight(skipped, torch.zeros_like(seen_nL, dtype=like.dtype).masked_fill_(~seen_nL, float("-inf")))


class PassThrough(Cache):  # type: ignore[misc]
    """A cache that keeps nothing: the pages do. It stands in the model's way of building masks from its own cache.

    Without one, transformers takes restarting `position_ids` for packed training samples and wraps every mask function
    in a lookup of the packed row, which cannot be asked about absolute positions.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


_active = threading.local()


@contextmanager
def attending(attender: Attender, behind: Callable[[], None] | None = None) -> Iterator[PassThrough]:
    """Every forward of this thread inside the block attends through `attender`; pass it the yielded cache. `behind` is
    called behind the attention of every layer, and may run a forward of others."""
    outer = getattr(_active, "ways", None)
    _active.ways = attender, behind
    try:
        yield PassThrough()
    finally:
        _active.ways = outer


_HARMLESS = frozenset(
    {"dropout", "position_ids", "use_cache", "sliding_window", "is_causal"}
    | {"output_attentions", "output_hidden_states", "output_router_logits"}
)
"""Arguments that say nothing new: inference has no dropout, and positions and windows are in the pattern."""


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function; [1, heads, T, width] in, [1, T, H, V] out. Raises NotPluggable."""
    if not isinstance(attention_mask, Pattern):
        raise NotPluggable(f"{type(module).__name__} does not hand on the mask that the model made")
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS]
    if unknown:
        raise NotPluggable(f"{type(module).__name__} passes {', '.join(unknown)} to its attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attender, behind = cast(tuple[Attender, Callable[[], None] | None], _active.ways)
    output_1THV = attender.attend(query, key, value, attention_mask, scale, softcap, s_aux)
    if behind is not None:
        behind()
    return output_1THV, None


def ragged_mask(
    *, mask_function: MaskFunction, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any
) -> Pattern:
    """transformers' mask function: no mask yet, only the question it answers. Raises NotPluggable."""
    if use_vmap or not (attention_mask is None or attention_mask.all()):
        raise NotPluggable("the model makes a mask that is not a function of positions alone")
    return Pattern(mask_function)


def register() -> None:
    """Make `swarm_ragged` known to transformers; harmless when repeated."""
    AttentionInterface.register(RAGGED, ragged_attention)
    AttentionMaskInterface.register(RAGGED, ragged_mask)


def last_slots(segment: Segment) -> list[int]:
    """The slots of a segment's new positions."""
    slots: list[int] = []
    for first, count in reversed(segment.runs):
        missing = segment.tokens - len(slots)
        slots[:0] = range(first + max(0, count - missing), first + count)
        if len(slots) == segment.tokens:
            break
    return slots


def skip(runs: Sequence[tuple[int, int]], positions: int) -> list[tuple[int, int]]:
    """The runs without their first `positions` slots."""
    kept = []
    for first, count in runs:
        if positions < count:
            kept.append((first + positions, count - positions))
        positions = max(0, positions - count)
    return kept

"""Recorded forwards as one call of the library: the operations of a `program` without Python and torch between them.

Owns the translation of a recording into the instructions of `kernels/tape.cpp` for a given number of positions, and
from some of these into those for any: where every tensor lies in one arena, what is a view of what, and which
operations the library knows. One that it does not know (the choice of experts, and the experts) is called where its
turn comes, on the arena's tensors; then there are several calls of the library instead of one. No architecture is
named here.

Shapes and strides are asked of torch itself, on its `meta` device. Integers that depend on the number of positions are
linear in it, as in `program`.

Legend: T positions, H hidden size.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from peers.model.kernels import FastLinear, PackedLinear, Pool
from peers.model.kernels.pool import INPUTS, WEIGHTS, Visits
from peers.model.support import one_line
from peers.runtime.adapting import Adapting, Place
from peers.runtime.attention import LayerPool, Pattern, RaggedBatch
from peers.runtime.program import TOKENS_MAX, Attention, NotFlat, Programs, Recording, constant_of
from peers.wire.messages import MAX_POSITIONS

logger = logging.getLogger(__name__)
aten = torch.ops.aten

OPS = (
    *("linear", "attend", "copy", "add", "sub", "mul", "div", "neg", "square", "cube", "rsqrt", "silu", "gelu"),
    *("gelu_tanh", "sigmoid", "tanh", "relu", "cos", "sin", "mean", "layer_norm"),
)
UNARY = {
    **{aten.neg: "neg", aten.rsqrt: "rsqrt", aten.silu: "silu", aten.sigmoid: "sigmoid", aten.tanh: "tanh"},
    **{aten.relu: "relu", aten.cos: "cos", aten.sin: "sin", aten._to_copy: "copy", aten.clone: "copy"},
}
BINARY = {aten.add: "add", aten.sub: "sub", aten.mul: "mul", aten.div: "div"}
POWERS = {1: "copy", 2: "square", 3: "cube", -0.5: "rsqrt"}
VIEWS = {
    *(aten.view, aten._unsafe_view, aten.transpose, aten.permute, aten.slice, aten.unsqueeze, aten.squeeze),
    *(aten.expand, aten.select, aten.alias, aten.detach, aten.t),
}
OWN_PRODUCTS = (FastLinear.forward, PackedLinear.forward)
"""As they are while nobody records: another engine's thread may be doing that (`kernels.opaque`)."""
NOTHING_NEW = {"device", "layout", "pin_memory", "non_blocking", "memory_format"}
SEVERAL_VIEWS = {aten.split, aten.split_with_sizes, aten.unbind, aten.chunk}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int64: 2}
HIDDEN, POSITIONS, ARENA, OUTPUT, ABSOLUTE = 0, 1, 2, 3, -1
"""What the offset of an operand counts from."""
ALIGNMENT = 64
ALIKE = 32
"""Positions of which tensors of any width are a multiple of ALIGNMENT, so that their places are linear in them."""
ERROR_MAX = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative distance from the program; measured: 3e-7, and in bfloat16 4e-3 (roundings that fall to the other side)."""
_OPERAND, _HEAD = 11, 17
"""64-bit words of the library's structures."""
_LINEARS, _ATTENDS = slice(6, 9), slice(5, 8)
"""Of these, addresses of weights, scales and bias; and of keys, values and sinks."""


@dataclass(slots=True, eq=False)
class _Region:
    """A part of the arena, until the last instruction that reads it."""

    offset: int
    nbytes: int
    last_use: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies, and on the `meta` device what it looks like from there."""

    base: int
    offset: int
    like: Tensor
    region: _Region | None = None
    constant: Tensor | None = None
    """What lies there, of a place with an absolute address."""

    def at(self, bases: Sequence[Tensor]) -> Tensor:
        """The tensor that lies there now; `bases` holds what offsets count from, in the order of their numbers."""
        like, start, offset = self.like, self.constant, self.like.storage_offset()
        if start is None:
            start, offset = bases[self.base], offset + self.offset // like.itemsize
        if start.dtype is not like.dtype:
            start = start.view(like.dtype)  # the arena is bytes
        return start.as_strided(like.shape, like.stride(), start.storage_offset() + offset)

    def operand(self, shape: Sequence[int] | None = None) -> list[int]:
        """The library's words, repeated to `shape`."""
        like = self.like if shape is None else self.like.expand(shape)
        offset = self.offset + like.storage_offset() * like.itemsize
        while like.dim() > 4 and 1 in like.shape[:-1]:
            like = like.squeeze(like.shape.index(1))
        missing = 4 - like.dim()
        if missing < 0 or like.dtype not in DTYPES:
            raise NotFlat(f"the library knows no tensor of {like.dim()} dimensions in {like.dtype}")
        strides = [0 if size == 1 else stride for size, stride in zip(like.shape, like.stride(), strict=True)]
        return [self.base, offset, DTYPES[like.dtype], *[1] * missing, *like.shape, *[0] * missing, *strides]


@dataclass(frozen=True, slots=True)
class _Adding:
    """Behind a linear layer: what adapters add to its output, in place."""

    layer: Place
    given: _Place
    out: _Place

    def run(self, bases: Sequence[Tensor], adapting: Adapting) -> None:
        if self.layer in adapting.layers:
            adapting.add(self.layer, self.given.at(bases), self.out.at(bases))


@dataclass(frozen=True, slots=True)
class _Outside:
    """An operation that the library does not know."""

    function: Callable[..., Any]
    args: Sequence[Any]
    """Tensors as their places, also within lists."""
    named: dict[str, Any]
    out: Sequence[_Place]

    def run(self, bases: Sequence[Tensor]) -> None:
        result = self.function(*_each(self.args, lambda place: place.at(bases)), **self.named)
        if self.out:  # else it has changed the first of its arguments
            for place, value in zip(self.out, result if isinstance(result, list | tuple) else (result,), strict=True):
                place.at(bases).copy_(value)


def _changed(function: Any) -> list[int]:
    """Which of its arguments an operation of torch changes in place."""
    arguments = function._schema.arguments if hasattr(function, "_schema") else ()
    return [at for at, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write]


def _each(value: Any, change: Callable[[_Place], Tensor]) -> Any:
    """An argument with tensors for its places."""
    match value:
        case _Place():
            return change(value)
        case list() | tuple():
            return [_each(part, change) for part in value]
        case _:
            return value


class _Writer:
    """Writes the instructions for T positions."""

    def __init__(
        self,
        recordings: tuple[Recording, Recording],
        like_H: Tensor,
        tokens: int,
        pools: Iterable[LayerPool],
        adaptable: Mapping[int, Place],
    ) -> None:
        """`adaptable`: the linear layers, by id, behind which there is a stop for what adapters add."""
        self.steps: list[np.ndarray[Any, Any] | _Outside | _Adding] = []
        self.kept: list[Tensor] = []
        """Tensors whose addresses are written."""
        self.uses: list[tuple[int, int]] = []
        """Patterns of attention, by number, and the tables in which they are used."""
        self.arena_bytes = 0
        self.tokens_max = MAX_POSITIONS
        self._first, self._second = recordings
        self._tokens = tokens
        self._pools = iter(pools)
        self._adaptable = adaptable
        self._places: dict[Node, _Place] = {}
        self._parts: dict[Node, list[_Place]] = {}
        """Of operations with several outputs."""
        self._live: list[_Region] = []
        self._free: dict[int, list[int]] = {}
        nodes = list(self._first.graph.nodes)
        order = {node: index for index, node in enumerate(nodes)}
        self._last_use = {node: max((order[user] for user in node.users), default=at) for node, at in order.items()}
        self._index = 0
        hidden = torch.empty(1, tokens, like_H.shape[-1], dtype=like_H.dtype, device="meta")
        positions = torch.empty(1, tokens, dtype=torch.long, device="meta")
        inputs = iter((_Place(HIDDEN, 0, hidden), _Place(POSITIONS, 0, positions)))
        for index, (node, other) in enumerate(zip(nodes, self._second.graph.nodes, strict=True)):
            self._index = index
            match node.op:
                case "placeholder":
                    self._places[node] = next(inputs)
                case "get_attr":
                    self._places[node] = self._constant(constant_of(self._first, self._second, node, other))
                case "call_function" if getattr(node.target, "overloadpacket", None) in SEVERAL_VIEWS:
                    of, *rest = self._resolved(node.args, other.args)
                    self._outlive_parts(node)
                    likes = node.target(of.like, *rest)
                    self._parts[node] = [self._view(node, of, like) for like in likes]
                case "call_function" if node.target is operator.getitem and node.args[0] in self._parts:
                    self._places[node] = self._parts[node.args[0]][node.args[1]]
                case "call_function":
                    self._places[node] = self._call(node, other)
                case "output":
                    result = self._resolved(node.args[0], other.args[0])
                    self._emit("copy", _Place(OUTPUT, 0, hidden), [result])
                case op:
                    raise NotFlat(f"a recorded {op}")
            for region in [region for region in self._live if region.last_use <= self._index]:
                self._live.remove(region)
                self._free.setdefault(region.nbytes, []).append(region.offset)

    def _call(self, node: Node, other: Node) -> _Place:
        target: Any = node.target
        if target is torch.ops.hive_program.opaque.default:
            return self._opaque(node)
        args = self._resolved(node.args, other.args)
        if target is operator.getitem and args[1] == 0:
            return self._view(node, args[0], args[0].like)
        named = {key: self._resolved(value, other.kwargs[key]) for key, value in node.kwargs.items()}
        named = {key: value for key, value in named.items() if key not in NOTHING_NEW}
        packet = getattr(target, "overloadpacket", None)
        if packet is aten.native_layer_norm and len(args[1]) == 1 and (args[2] is not None or args[3] is None):
            given, _, weight, bias, eps = args
            scales = [part for part in (weight, bias) if part is not None]
            return self._compute("layer_norm", node, torch.empty_like(given.like), [given, *scales], eps)
        used: list[_Place] = []

        def like_of(place: _Place) -> Tensor:
            used.append(place)
            return place.like

        like = target(*_each(args, like_of), **named)
        if packet in VIEWS:
            return self._view(node, args[0], like)
        known = isinstance(like, Tensor) and like.dtype in INPUTS
        if not known or any(place.like.dtype not in DTYPES for place in used):
            return self._outside(node, target, args, named, like)
        if packet in (aten.cat, aten.stack):
            return self._join(node, packet, like, args)
        if packet in UNARY:
            return self._compute(UNARY[packet], node, like, args[:1])
        if packet in BINARY and not named:
            left, right = args
            if isinstance(right, _Place):
                return self._compute(BINARY[packet], node, like, [left, right])
            return self._compute(BINARY[packet], node, like, [left], right)
        if packet is aten.gelu:
            kind = "gelu_tanh" if named.get("approximate") == "tanh" else "gelu"
            return self._compute(kind, node, like, args[:1])
        if packet is aten.pow and args[1] in POWERS:
            return self._compute(POWERS[args[1]], node, like, args[:1])
        if packet is aten.mean and not named and args[1:] in ([[-1], True], [[args[0].like.dim() - 1], True]):
            place = self._region(node, like)
            self._emit("mean", place, args[:1], whole=False)
            return place
        return self._outside(node, target, args, named, like)

    def _outside(self, node: Node, function: Any, args: Sequence[Any], named: dict[str, Any], like: Any) -> _Place:
        if _changed(function):
            place = args[0]
            if _changed(function) != [0] or place.base != ARENA:
                raise NotFlat(f"{function} changes what is not its own")
            self.steps.append(_Outside(function, args, named, ()))
            return self._view(node, place, place.like)
        several = isinstance(like, list | tuple)
        if several:
            self._outlive_parts(node)
        likes = like if several else (like,)
        out = [self._region(node, torch.empty(each.shape, dtype=each.dtype, device="meta")) for each in likes]
        self.steps.append(_Outside(function, args, named, out))
        if several:
            self._parts[node] = out
        return out[0]

    def _outlive_parts(self, node: Node) -> None:
        """What `node` gives has several parts: none ends before those who use any of them."""
        self._last_use[node] = max(self._last_use[user] for user in (node, *node.users))

    def _opaque(self, node: Node) -> _Place:
        inputs, number = node.args
        call, owner = self._first.calls[number], self._first.owners[number]  # type: ignore[index]
        places = [self._places[given] for given in inputs]  # type: ignore[union-attr,index]
        if isinstance(call, Attention):
            return self._attend(node, call, *places)
        if not isinstance(owner, FastLinear | PackedLinear) or getattr(call, "__func__", None) not in OWN_PRODUCTS:
            return self._outside(node, call, places, {}, places[0].like)  # experts: [T, H] for [T, H]
        (given,) = places
        K, N = owner.in_features, owner.out_features
        M = given.like.numel() // K
        if owner.rows_max < M or given.like.dtype is not owner.dtype:
            raise NotFlat(f"torch makes the products of {M} rows")
        self.tokens_max = min(self.tokens_max, owner.rows_max * self._tokens // M)
        format_name, weight, scales, bias = owner.operands()
        place = self._region(node, torch.empty((*given.like.shape[:-1], N), dtype=owner.dtype, device="meta"))
        addresses = map(self._address, (weight, scales, bias))
        extra = [INPUTS.index(owner.dtype), WEIGHTS.index(format_name), *addresses, M, N, K]
        self._emit("linear", place, [self._contiguous(given)], extra=extra, whole=False)
        if id(owner) in self._adaptable:
            self.steps.append(_Adding(self._adaptable[id(owner)], given, place))
        return place

    def _attend(self, node: Node, call: Attention, q: _Place, k: _Place, v: _Place, *sinks: _Place) -> _Place:
        pool = next(self._pools)
        pattern, scale, softcap = call.settings
        keys, values = pool.keys_1JSK, pool.values_1JSV
        _, H, T, K = q.like.shape
        _, J, _, V = values.shape
        if {q.like.dtype, k.like.dtype, v.like.dtype} != {keys.dtype} or keys.dtype not in INPUTS:
            raise NotFlat(f"attention in {q.like.dtype} over {keys.dtype}")
        sink = None
        if sinks:
            if sinks[0].base != ABSOLUTE:
                raise NotFlat("sinks that are computed")
            assert sinks[0].constant is not None
            sink = sinks[0].constant.float().contiguous()
        place = self._region(node, torch.empty(1, T, H, V, dtype=keys.dtype, device="meta"))
        use = (pattern, pool.table)
        if use not in self.uses:
            self.uses.append(use)
        addresses = map(self._address, (keys, values, sink))
        strides = [kept.stride(dim) for kept in (keys, values) for dim in (1, 2)]
        extra = [INPUTS.index(keys.dtype), *addresses, H, J, K, V, *strides, self.uses.index(use)]
        operands = [q if q.like.stride(3) == 1 else self._contiguous(q), k, v]
        self._emit("attend", place, operands, scale, softcap or 0.0, extra=extra, whole=False)
        return place

    def _join(self, node: Node, packet: Any, joined: Tensor, args: Sequence[Any]) -> _Place:
        parts, dim = args[0], args[1] if len(args) > 1 else 0
        place = self._region(node, joined)
        at = 0
        for part in parts:
            size = part.like.shape[dim] if packet is aten.cat else 1
            like = joined.narrow(dim, at, size) if packet is aten.cat else joined.select(dim, at)
            self._emit("copy", _Place(ARENA, place.offset, like), [part])
            at += size
        return place

    def _compute(self, op: str, node: Node, like: Tensor, operands: Sequence[_Place], number: float = 0.0) -> _Place:
        place = self._region(node, like)
        self._emit(op, place, operands, float(number))
        return place

    def _view(self, node: Node, of: _Place, like: Tensor) -> _Place:
        if of.region is not None:
            of.region.last_use = max(of.region.last_use, self._last_use[node])
        return _Place(of.base, of.offset, like, of.region, of.constant)

    def _contiguous(self, place: _Place) -> _Place:
        if place.like.is_contiguous():
            return place
        copied = self._region(None, torch.empty(place.like.shape, dtype=place.like.dtype, device="meta"))
        self._emit("copy", copied, [place])
        return copied

    def _constant(self, tensor: Tensor) -> _Place:
        if tensor.device.type != "cpu":
            raise NotFlat("a constant that is not on the CPU")
        self._address(tensor)
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return _Place(ABSOLUTE, tensor.data_ptr(), like, constant=tensor)

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _region(self, node: Node | None, like: Tensor) -> _Place:
        """Memory for a new tensor, until nobody needs it any more."""
        nbytes = -(-like.numel() * like.itemsize // ALIGNMENT) * ALIGNMENT
        free = self._free.get(nbytes)
        if free:
            offset = free.pop()
        else:
            offset, self.arena_bytes = self.arena_bytes, self.arena_bytes + nbytes
        region = _Region(offset, nbytes, self._index if node is None else self._last_use[node])
        self._live.append(region)
        return _Place(ARENA, offset, like, region)

    def _emit(
        self,
        op: str,
        out: _Place,
        operands: Sequence[_Place],
        *numbers: float,
        extra: Sequence[int] = (),
        whole: bool = True,
    ) -> None:
        """`whole`: every operand is repeated to the output's shape."""
        if out.like.dtype not in INPUTS:
            raise NotFlat(f"the library computes nothing in {out.like.dtype}")
        words = np.zeros(_HEAD + 4 * _OPERAND, np.int64)
        words[:2] = OPS.index(op), len(operands)
        words[2 : 2 + len(numbers)].view(np.float64)[:] = numbers
        words[4 : 4 + len(extra)] = extra
        for index, place in enumerate([out, *operands]):
            start = _HEAD + index * _OPERAND
            words[start : start + _OPERAND] = place.operand(out.like.shape if whole else None)
        self.steps.append(words)

    def _resolved(self, value: Any, other: Any) -> Any:
        """An argument for T positions, tensors as their places."""
        match value:
            case Node():
                return self._places[value]
            case list() | tuple():
                return [self._resolved(a, b) for a, b in zip(value, other, strict=True)]
            case bool() | None | str():
                return value
            case int():
                return value + (other - value) * (self._tokens - 2)
            case _:
                return value


@dataclass(frozen=True, slots=True, eq=False)
class _Tape:
    parts: Sequence[Tensor | _Outside | _Adding]
    """Instructions for one call of the library each, and what is called between them."""
    slices: Sequence[Tensor | _Outside | _Adding | None]
    """Likewise, with None in each block, where others may run."""
    uses: list[tuple[int, int]]
    """The pattern and the table of each visit that the instructions name."""
    kept: list[Tensor]
    """Tensors whose addresses are in the instructions."""
    stops: frozenset[Place]
    """Layers to which adapters can add."""
    code: Tensor | None
    """The instructions, where one call of the library is all there is."""
    arena_bytes: int
    tokens_max: int
    """Up to so many positions the library makes the products."""


class Tapes:
    """The tapes of one span over the pools of its layers, made as they are needed."""

    def __init__(
        self,
        programs: Programs,
        like_H: Tensor,
        pools: Sequence[LayerPool],
        library: Pool,
        adaptable: Mapping[int, Place] = MappingProxyType({}),
    ) -> None:
        """`adaptable`: linear layers of the programs, by id."""
        self._programs, self._like_H, self._pools, self._library = programs, like_H, pools, library
        self._adaptable = adaptable
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._room, self._room_at = memoryview(b""), 0
        """What goes in and comes out `at_once`, and its address."""
        self._line: tuple[_Tape, Tensor, Tensor, Sequence[int]] | None = None
        """A tape without instructions; those for ALIKE positions, and what each word grows by with each position; and
        the bytes of the arena for ALIKE positions and for twice as many."""
        self._tapes: dict[int, _Tape | None] = {}
        """By the number of positions."""
        self._stopping: dict[int, _Tape | None] = {}
        """Likewise those that stop behind linear layers, for what adapters add."""

    def __call__(
        self,
        hidden_xTH: Tensor,
        batch: RaggedBatch,
        adapting: Adapting | None = None,
        between: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """What the program makes of [T, H] or [1, T, H], with what `adapting` adds, in the same shape and memory of its
        own; None where the library cannot, and nothing was written. `between` is called once in each block, and may run
        other forwards."""
        tokens = hidden_xTH.shape[-2]
        tapes, adaptable = (self._tapes, {}) if adapting is None else (self._stopping, self._adaptable)
        if tokens in tapes:
            tape = tapes[tokens]
        else:
            tape = self._on_the_line(tokens) if adapting is None else None
            if tape is None and between is None and tokens <= TOKENS_MAX:
                tape = self._write(tokens, adaptable)
            if tokens <= TOKENS_MAX and (tape is not None or between is None):
                tapes[tokens] = tape
        if tape is None or (adapting is not None and not tape.stops.issuperset(adapting.layers)):
            return None
        visits = self._visits(tape, tokens, batch)
        if visits is None:
            return None
        hidden_xTH = hidden_xTH.contiguous()
        output_xTH = torch.empty_like(hidden_xTH)
        positions = batch.positions.buffer_info()[0]
        arena = self._arena_for(tape) if between is None else _arena(tape)  # others will use that of all meanwhile
        bases = (hidden_xTH.data_ptr(), positions, arena.data_ptr(), output_xTH.data_ptr())
        if tape.code is not None and between is None:
            self._library.run(tape.code, bases, visits)
            return output_xTH
        tensors = (hidden_xTH, batch.positions_T, arena, output_xTH)
        for part in tape.parts if between is None else tape.slices:
            if part is None:
                assert between is not None
                between()
            elif isinstance(part, _Outside):
                part.run(tensors)
            elif isinstance(part, _Adding):
                assert adapting is not None
                part.run(tensors, adapting)
            else:
                self._library.run(part, bases, visits)
        return output_xTH

    def at_once(self, rows: memoryview, tokens: int, batch: RaggedBatch) -> memoryview | None:
        """The same of [T, H] as bytes, where `is_plain` of so many positions: torch, whose code is cold when a token
        comes, takes longer to make tensors of them than all else."""
        tape, size = self._tapes[tokens], len(rows)
        assert tape is not None
        assert tape.code is not None
        if (visits := self._visits(tape, tokens, batch)) is None:
            return None
        half = -(-size // ALIGNMENT) * ALIGNMENT
        if len(self._room) < 2 * half:
            room = torch.empty(2 * half, dtype=torch.uint8)
            self._room, self._room_at = room.numpy().data, room.data_ptr()
        self._room[:size] = rows
        positions = batch.positions.buffer_info()[0]
        bases = (self._room_at, positions, self._arena_for(tape).data_ptr(), self._room_at + half)
        self._library.run(tape.code, bases, visits)
        return memoryview(bytes(self._room[half : half + size]))

    def _visits(self, tape: _Tape, tokens: int, batch: RaggedBatch) -> list[Visits] | None:
        patterns = [Pattern(pattern.function) for pattern in self._programs.recordings[tokens > 1][1].patterns]
        return batch.visits([(patterns[number], table) for number, table in tape.uses], self._like_H)

    def is_plain(self, tokens: int) -> bool:
        """Whether there is a tape for so many positions, and it is one call of the library."""
        tape = self._tapes.get(tokens)
        return tape is not None and tape.code is not None

    def agree(self, hidden_1TH: Tensor, batch: RaggedBatch, expected_1TH: Tensor, *, needed: bool) -> bool:
        """Whether there is a tape for this forward, unless none is needed, and it says the same as its program."""
        try:
            output_1TH = self(hidden_1TH, batch)
        except RuntimeError as error:  # of torch: an operation outside gave another shape than it had said
            logger.info("a forward of %d positions does not run as a tape: %s", hidden_1TH.shape[1], one_line(error))
            return False
        if output_1TH is None:
            return not needed
        distance = (output_1TH.double() - expected_1TH.double()).norm()
        return bool(distance <= ERROR_MAX[hidden_1TH.dtype] * expected_1TH.double().norm())

    def prepare(self) -> Iterator[None]:
        """Write for some numbers of positions, in steps between which others may run: where each word is linear in how
        many there are, nothing need be written for any other number."""
        codes, arenas = [], []
        for tokens in (ALIKE, 2 * ALIKE, 3 * ALIKE):
            yield
            tape = self._tapes[tokens] = self._write(tokens, {})
            if tape is None or tape.code is None:
                return
            codes.append(tape.code)
            arenas.append(tape.arena_bytes)
        if len({code.shape for code in codes}) > 1:
            return
        slope, ops = codes[1] - codes[0], codes[0][:, 0]
        if (ops == OPS.index("gelu")).any():
            return  # the library's erf takes a number at a time: torch is faster with many
        offsets = slope[:, _HEAD:].reshape(len(slope), -1, _OPERAND)[:, :, 1]
        absolute = codes[0][:, _HEAD:].reshape(len(slope), -1, _OPERAND)[:, :, 0] == ABSOLUTE
        moved = slope[ops == OPS.index("linear")][:, _LINEARS], slope[ops == OPS.index("attend")][:, _ATTENDS]
        if offsets[absolute].any() or any(addresses.any() for addresses in moved):
            return  # what was made for each of them lies elsewhere each time
        if torch.equal(codes[2] - codes[1], slope) and not ((slope % ALIKE).any() or (offsets % (4 * ALIKE)).any()):
            assert tape is not None
            self._line = replace(tape, parts=(), slices=(), code=None), codes[0], slope // ALIKE, arenas[:2]

    def _on_the_line(self, tokens: int) -> _Tape | None:
        """What would be written for several positions."""
        if self._line is None or not 1 < tokens <= self._line[0].tokens_max:
            return None
        tape, code, slope, (bytes_once, bytes_twice) = self._line
        more = tokens - ALIKE
        code = code + slope * more
        arena_bytes = bytes_once + -(-(bytes_twice - bytes_once) * more // ALIKE)
        return replace(tape, parts=[code], slices=list(_slices(code)), code=code, arena_bytes=arena_bytes)

    def _arena_for(self, tape: _Tape) -> Tensor:
        if self._arena.numel() < tape.arena_bytes + ALIGNMENT:
            self._arena = _arena(tape)
        return self._arena

    def _write(self, tokens: int, adaptable: Mapping[int, Place]) -> _Tape | None:
        recordings = self._programs.recordings[tokens > 1]
        try:
            written = _Writer(recordings, self._like_H, tokens, self._pools, adaptable)
        except (NotFlat, RuntimeError) as error:  # the latter from torch, where a view of T positions is none
            logger.info("forwards of %d positions run as programs: %s", tokens, one_line(error))
            return None
        parts: list[Tensor | _Outside | _Adding] = []
        for inside, group in groupby(written.steps, lambda step: isinstance(step, np.ndarray)):
            steps: list[Any] = list(group)
            parts += [torch.from_numpy(np.stack(steps))] if inside else steps
        stops = frozenset(part.layer for part in parts if isinstance(part, _Adding))
        code = parts[0] if len(parts) == 1 and isinstance(parts[0], Tensor) else None
        slices = [piece for part in parts for piece in (_slices(part) if isinstance(part, Tensor) else [part])]
        return _Tape(parts, slices, written.uses, written.kept, stops, code, written.arena_bytes, written.tokens_max)


def _arena(tape: _Tape) -> Tensor:
    return torch.empty(tape.arena_bytes + ALIGNMENT, dtype=torch.uint8)


def _slices(code: Tensor) -> Iterator[Tensor | None]:
    """Instructions up to each one that attends, of which every block has one, and None behind it."""
    first = 0
    for index, op in enumerate(code[:, 0].tolist()):
        if op == OPS.index("attend"):
            yield code[first : index + 1]
            yield None
            first = index + 1
    if first < len(code):
        yield code[first:]

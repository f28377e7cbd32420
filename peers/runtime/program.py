"""Short forwards as flat programs: the tensor operations that a span's Python would call, without that Python.

Owns the recording of a span's forward, its translation into one function, and the proof that both say the same. One
token through ten layers spends a third of its time in module calls and argument handling, which this leaves out;
nothing is compiled, so a program is there within a second. Every architecture gets one whose forward does not depend on
values; where it does, and where anything else goes wrong, there is none, and the model's own forward runs.

A forward of T positions is recorded at T = 1, 2 and 3. Where the last two differ only in integers, these are taken for
linear in T, so that one program serves every T from 2 on; it is then checked at another T. Linear layers, experts and
attention are recorded as one operation each.

Legend: T positions, H hidden size.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

from peers.model.kernels import opaque
from peers.model.support import one_line
from peers.runtime.attention import Attender, Pattern

TOKENS_MAX = 64
"""Positions up to which a forward goes by a program; beyond, tensors are what takes the time."""
CHECKED_TOKENS = 5
CHECKED_POSITION = 200
"""Where the check begins, far from where was recorded, if the model has that many positions."""


class NotFlat(Exception):
    """This forward cannot be a program; the message says why."""


Forward = Callable[[Tensor, Tensor, Attender], Tensor]
"""(hidden [1, T, H], position ids [1, T], what attends in this forward) → hidden [1, T, H]"""


class Programs:
    """One program for T = 1 and one for all larger T, of one span in one rotary regime."""

    def __init__(self, one: Recording, two: Recording, three: Recording) -> None:
        self.recordings = {False: (one, one), True: (two, three)}
        """Of a forward of one position, and of several: what is linear between the latter two is so everywhere."""
        self._one, self._several = _translate(one, one), _translate(two, three)

    def __call__(self, hidden_1TH: Tensor, position_ids_1T: Tensor, attender: Attender) -> Tensor:
        """For T up to TOKENS_MAX."""
        run = self._one if hidden_1TH.shape[1] == 1 else self._several
        return run(hidden_1TH, position_ids_1T, attender)


def record(
    forward: Forward, like_H: Tensor, rehearsal: Attender, max_positions: int = CHECKED_POSITION * 2
) -> Generator[None, None, Programs]:
    """The programs of `forward`, whose hidden states are like `like_H`.

    Takes about a second in all, in steps between which this thread may run other forwards. `rehearsal` attends in a
    forward that no session is in, and says the same for the same arguments. Raises NotFlat.
    """
    recordings = []
    for tokens in (1, 2, 3):
        recordings.append(_record(forward, like_H, tokens))
        yield
    programs = Programs(*recordings)
    for tokens in (1, CHECKED_TOKENS):
        yield
        hidden_1TH, position_ids_1T = _example(like_H, tokens, max(0, min(CHECKED_POSITION, max_positions - tokens)))
        expected = forward(hidden_1TH, position_ids_1T, rehearsal)
        try:
            same = torch.equal(programs(hidden_1TH, position_ids_1T, rehearsal), expected)
        except RuntimeError as error:  # a shape or a layout that is not linear in T
            raise NotFlat(f"recorded, {tokens} positions do not run ({one_line(error)})") from error
        if not same:
            raise NotFlat(f"recorded and run, {tokens} positions come out differently")
    return programs


class Attention:
    """A recorded call of the attention function."""

    def __init__(self, pattern: int, scale: float, softcap: float | None) -> None:
        self.settings = (pattern, scale, softcap)

    def __call__(self, q_1HTK: Tensor, k_1JTK: Tensor, v_1JTV: Tensor, *sinks: Tensor) -> Tensor:
        _, H, T, _ = q_1HTK.shape
        return q_1HTK.new_zeros(1, T, H, v_1JTV.shape[3])


class Recording:
    """What was called in one recording besides tensor operations."""

    def __init__(self) -> None:
        self.calls: list[Callable[..., Tensor]] = []
        self.owners: list[object] = []
        self.patterns: list[Pattern] = []
        self.graph = Graph()
        self.constants: dict[str, Tensor] = {}
        """By the targets of the graph's `get_attr` nodes: weights, and what else the forward did not make itself."""

    def opaque(self, function: Callable[..., Tensor], owner: object, *inputs: Tensor) -> Tensor:
        """One operation of the recording, whatever `function` does inside; `owner` is what it belongs to."""
        self.calls.append(function)
        self.owners.append(owner)
        output: Tensor = torch.ops.hive_program.opaque(list(inputs), len(self.calls) - 1)
        return output

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
        if not any(pattern is known for known in self.patterns):
            self.patterns.append(pattern)
        number = next(index for index, known in enumerate(self.patterns) if known is pattern)
        sinks = () if sinks_H is None else (sinks_H,)
        return self.opaque(Attention(number, scale, softcap), None, q_1HTK, k_1JTK, v_1JTV, *sinks)


class _Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down each operation that is carried out within, as a node of a recording's graph.

    What `torch.fx`'s own tracer does, without a stand-in for each tensor, which is what takes the tracer's time.
    """

    def __init__(self, recording: Recording, *inputs: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording
        self._known: dict[int, tuple[Tensor, Node]] = {}
        """By identity, which is unique while the tensors are held."""
        for number, tensor in enumerate(inputs):
            self._name(tensor, recording.graph.placeholder(f"input{number}"))
        self._given = {node for _, node in self._known.values()}
        """Nodes whose values depend on the inputs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output  # of operations that were heard instead
        output = func(*args, **kwargs)
        if func is torch.ops.aten.lift_fresh.default:
            return output  # a literal of the forward's
        nodes, named = map_aggregate((args, kwargs), lambda each: self._node(each))
        node = self._recording.graph.call_function(func, nodes, named)
        if not self._given.isdisjoint(node.all_input_nodes):
            self._given.add(node)
        if torch.Tag.data_dependent_output in func.tags:
            if node in self._given:
                raise NotFlat(f"it depends on values, by {func}")
            return output
        if isinstance(output, Tensor):
            self._name(output, node)
        elif isinstance(output, list | tuple):
            for place, each in enumerate(output):
                part = self._recording.graph.call_function(operator.getitem, (node, place))
                if node in self._given:
                    self._given.add(part)
                self._name(each, part)
        return output

    def result(self, output: Tensor) -> None:
        """What the forward returned."""
        self._recording.graph.output(self._node(output))
        self._recording.graph.eliminate_dead_code()

    def _name(self, tensor: Tensor, node: Node) -> None:
        self._known[id(tensor)] = tensor, node

    def _node(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._known:
            name = f"constant{len(self._recording.constants)}"
            self._recording.constants[name] = value
            self._name(value, self._recording.graph.get_attr(name))
        return self._known[id(value)][1]


_active = threading.local()
_recording = threading.Lock()  # what goes through `opaque` does so for one thread at a time
_library = torch.library.Library("hive_program", "DEF")  # type: ignore[no-untyped-call]
_library.define("opaque(Tensor[] inputs, int call) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl(  # type: ignore[no-untyped-call]
    "opaque", lambda inputs, call: _active.recorder.calls[call](*inputs), "CompositeExplicitAutograd"
)


def _record(forward: Forward, like_H: Tensor, tokens: int) -> Recording:
    recorder = _active.recorder = Recording()
    inputs = _example(like_H, tokens, 0)
    try:
        with _recording, torch.inference_mode(False), torch.no_grad(), opaque.through(recorder.opaque):
            with _Listener(recorder, *inputs) as listener:
                output = forward(*inputs, recorder)
            listener.result(output)
    except Exception as error:  # whatever an architecture's own code does not bear: it runs as it is
        raise NotFlat(f"its forward cannot be recorded ({one_line(error)})") from error
    finally:
        del _active.recorder
    return recorder


def _example(like_H: Tensor, tokens: int, start: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(start)
    hidden_1TH = torch.randn(1, tokens, like_H.shape[-1], generator=generator).to(like_H)
    return hidden_1TH, torch.arange(start, start + tokens, device=like_H.device)[None]


def _translate(first: Recording, second: Recording) -> Forward:
    """One function that does what both recordings did, at T = 2 and T = 3 where they differ."""
    nodes, others = list(first.graph.nodes), list(second.graph.nodes)
    if len(nodes) != len(others) or len(first.patterns) != len(second.patterns):
        raise NotFlat("what it does depends on how many positions there are")
    writer = _Writer(first, second)
    for node, other in zip(nodes, others, strict=True):
        if node.op != other.op or (node.op == "call_function" and node.target is not other.target):
            raise NotFlat("what it does depends on how many positions there are")
        writer.write(node, other)
    return writer.function()


class _Writer:
    """Turns nodes into the source of one function; anything that has no literal is bound to a name."""

    def __init__(self, first: Recording, second: Recording) -> None:
        self._first, self._second = first, second
        self._names: dict[Node, str] = {}
        self._bound: dict[str, Any] = {}
        self._lines: list[str] = []
        self._inputs = iter(("hidden", "positions"))
        self._order = {node: index for index, node in enumerate(first.graph.nodes)}

    def write(self, node: Node, other: Node) -> None:
        name = self._names[node] = f"v{len(self._names)}"
        match node.op:
            case "placeholder":
                self._lines.append(f"{name} = {next(self._inputs)}")
            case "get_attr":
                self._names[node] = self._bind(constant_of(self._first, self._second, node, other))
            case "call_function":
                self._lines.append(f"{name} = {self._call(node, other)}")
                dead = [used for used in node.all_input_nodes if max(used.users, key=self._order.__getitem__) is node]
                names = [self._names[used] for used in dead if self._names[used].startswith("v")]
                if names:
                    self._lines.append(f"del {', '.join(names)}")
            case "output":
                self._lines.append(f"return {self._text(node.args[0], other.args[0])}")
            case op:
                raise NotFlat(f"a recorded {op}")

    def function(self) -> Forward:
        functions = [pattern.function for pattern in self._second.patterns]
        self._bound["make_patterns"] = lambda: [Pattern(function) for function in functions]
        body = "\n    ".join(["T, attend, patterns = hidden.shape[1], attender.attend, make_patterns()", *self._lines])
        scope: dict[str, Any] = {}
        source = (
            f"def program(hidden, positions, attender, {', '.join(f'{n}={n}' for n in self._bound)}):\n    {body}\n"
        )
        exec(compile(source, "<recorded forward>", "exec"), dict(self._bound), scope)
        program: Forward = scope["program"]
        return program

    def _call(self, node: Node, other: Node) -> str:
        if node.target is torch.ops.hive_program.opaque.default:
            return self._opaque(node, other)
        target: Any = node.target
        positional = [self._text(a, b) for a, b in zip(node.args, other.args, strict=True)]
        named = [f"{key}={self._text(value, other.kwargs[key])}" for key, value in node.kwargs.items()]
        return f"{self._bind(getattr(target, '_op', target))}({', '.join(positional + named)})"

    def _opaque(self, node: Node, other: Node) -> str:
        inputs, number = node.args
        call, same = self._first.calls[number], self._second.calls[other.args[1]]  # type: ignore[index]
        texts = [self._text(a, b) for a, b in zip(inputs, other.args[0], strict=True)]  # type: ignore[arg-type]
        if isinstance(call, Attention):
            if not isinstance(same, Attention) or call.settings != same.settings:
                raise NotFlat("its attention depends on how many positions there are")
            pattern, scale, softcap = call.settings
            q, k, v, sinks = [*texts, "None"][:4]
            return f"attend({q}, {k}, {v}, patterns[{pattern}], {scale!r}, {softcap!r}, {sinks})"
        if self._first.owners[number] is not self._second.owners[other.args[1]]:  # type: ignore[index]
            raise NotFlat("which layers it uses depends on how many positions there are")
        return f"{self._bind(call)}({', '.join(texts)})"

    def _text(self, value: Any, other: Any) -> str:
        match value:
            case Node():
                return self._names[value]
            case list() | tuple():
                parts = [self._text(a, b) for a, b in zip(value, other, strict=True)]
                return f"[{', '.join(parts)}]"
            case bool() | None | str():
                if value != other:
                    raise NotFlat("an option depends on how many positions there are")
                return repr(value)
            case int():
                slope = other - value  # at T = 2 and T = 3
                return repr(value) if not slope else f"{value - 2 * slope} + {slope} * T"
            case float() if value == other and math.isfinite(value):
                return repr(value)
            case _:
                if value != other:
                    raise NotFlat("a value depends on how many positions there are")
                return self._bind(value)

    def _bind(self, value: Any) -> str:
        for name, known in self._bound.items():
            if known is value:
                return name
        name = f"c{len(self._bound)}"
        self._bound[name] = value
        return name


def constant_of(first: Recording, second: Recording, node: Node, other: Node) -> Tensor:
    """The tensor that both recordings name. Raises NotFlat when it is not the same."""
    value, same = (recording.constants[str(at.target)] for recording, at in ((first, node), (second, other)))
    if value is not same and not (value.shape == same.shape and torch.equal(value, same)):
        raise NotFlat("a tensor that it makes depends on how many positions there are")
    return value.detach()

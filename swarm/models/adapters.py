"""Low-rank adapters that PEFT put on skeleton layers, read anew for each forward.

Owns what can travel: of the active adapters the A and B of linear layers, with their scaling, none while they are
disabled, and their dropout while they train. What cannot (DoRA, biases, experts, anything else inside the layers)
raises UnsupportedAdapter by name; nothing is ignored. Knows PEFT by the attributes of its layers, and imports it never.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from msgspec import structs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peers.model.adapters import Adapter, Dropout
from peers.wire.messages import MAX_RANK, AdapterTarget
from swarm.errors import UnsupportedAdapter

PEFT_NAMES = ("base_layer", "lora_A", "lora_B")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one adapter adds to one layer."""

    target: AdapterTarget
    a_RK: Tensor
    b_NR: Tensor
    versions: tuple[int, int]
    """Of both weights, as torch counts writes."""
    dropout: float
    """Of its inputs, now."""

    def is_still(self, before: Part) -> bool:
        same = self.a_RK is before.a_RK and self.b_NR is before.b_NR
        return same and self.versions == before.versions and self.target == before.target


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """The adapters of one forward."""

    targets: tuple[AdapterTarget, ...]
    weights: tuple[Tensor, ...]
    """A and B of each target in turn: the client's own parameters, or what autograd makes of several adapters'."""
    parts: tuple[Part, ...]
    """What these are made of."""
    dropout: float = 0.0
    """Of the inputs of all of them."""

    @property
    def requires_grad(self) -> bool:
        return any(weight.requires_grad for weight in self.weights)

    def draw_dropout(self) -> Dropout | None:
        """Of one forward; its seed comes from torch's own generator, as local dropout does."""
        return Dropout(self.dropout, int(torch.randint(1 << 62, ()))) if self.dropout else None

    def untouched_since(self, before: Attached) -> bool:
        """Whether these are the adapters of `before`, and nobody wrote to their parameters (but by `.data`)."""
        return len(self.parts) == len(before.parts) and all(
            now.is_still(then) for now, then in zip(self.parts, before.parts, strict=True)
        )

    def adapter(self) -> Adapter:
        """As it is now, to travel."""
        values = torch.cat([weight.detach().flatten().to("cpu", torch.float32) for weight in self.weights])
        return Adapter(self.targets, values)


def with_prefix(one: Attached | None, other: Attached | None) -> Attached | None:
    """Both, in order of blocks."""
    if one is None or other is None:
        return one or other
    each = [
        (target, weights)
        for part in (one, other)
        for target, weights in zip(part.targets, zip(part.weights[::2], part.weights[1::2], strict=True), strict=True)
    ]
    each.sort(key=lambda found: found[0].block)
    weights = tuple(weight for _, pair in each for weight in pair)
    return Attached(
        tuple(target for target, _ in each), weights, one.parts + other.parts, max(one.dropout, other.dropout)
    )


class Reader:
    """Reads what is active on skeleton layers, for each token: they are walked through only after a module was put
    among them or taken out."""

    def __init__(self, layers: nn.Module) -> None:
        self._layers = layers
        self._children: list[tuple[Mapping[str, nn.Module | None], Mapping[str, nn.Module | None]]] = []
        """Of every module its own, and what they were."""
        self._adapted: list[tuple[str, Any]] = []

    def read(self, *, again: bool = False) -> Attached | None:
        """What is active now; None where there is nothing. Raises UnsupportedAdapter.

        `again`: they were read before, in the same sequence, so what else may be inside them is not looked for.
        """
        if not self._children or any(now != before for now, before in self._children):
            self._walk()
        found: dict[tuple[int, str], list[Part]] = {}
        for name, module in self._adapted:
            for part in _parts(name, module):
                found.setdefault((part.target.block, part.target.module), []).append(part)
        if not again:
            _check_nothing_else(self._layers, self._adapted)
        if not found:
            return None
        dropouts = {part.dropout for each in found.values() for part in each}
        if len(dropouts) > 1:
            raise UnsupportedAdapter("active adapters differ in their lora_dropout", hint="train one of them at a time")
        parts = sorted((_together(parts) for parts in found.values()), key=lambda part: part.target.block)
        return Attached(
            targets=tuple(part.target for part in parts),
            weights=tuple(weight for part in parts for weight in (part.a_RK, part.b_NR)),
            parts=tuple(part for each in found.values() for part in each),
            dropout=dropouts.pop(),
        )

    def _walk(self) -> None:
        """As `named_modules` goes, down to LoRA's layers."""
        seen: list[tuple[Mapping[str, nn.Module | None], Mapping[str, nn.Module | None]]] = []
        adapted, left = [], [("", self._layers)]
        while left:
            path, module = left.pop()
            children = module._modules
            seen.append((children, dict(children)))
            if "lora_A" in children and "base_layer" in children:
                adapted.append((path, module))
            else:
                prefix = f"{path}." if path else ""
                left += [(prefix + name, child) for name, child in children.items() if child is not None][::-1]
        self._adapted, self._children = adapted, seen  # whole, as other threads read them


def _check_nothing_else(layers: nn.Module, adapted: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises UnsupportedAdapter for parameters that are neither the skeleton's nor LoRA's."""
    known = {
        f"{path}.{own}"
        for path, module in adapted
        for own, _ in module.named_parameters()
        if own.split(".")[0] in PEFT_NAMES
    }
    for name, weight in layers.named_parameters():
        if weight.numel() > 1 and any(weight.stride()):
            if name not in known:
                raise UnsupportedAdapter(f"{name} is inside the remote layers, and no peer could compute with it")
        elif weight.requires_grad and torch.is_grad_enabled():
            raise UnsupportedAdapter(f"{name} stands at peers, and cannot be trained", hint="freeze the model's own")


def _together(parts: Sequence[Part]) -> Part:
    """Several active adapters of one layer as one of all their ranks. Raises UnsupportedAdapter."""
    if len(parts) == 1:
        return parts[0]
    target, rank = parts[0].target, sum(part.target.rank for part in parts)
    if parts[0].dropout:
        raise UnsupportedAdapter(
            f"several adapters with lora_dropout on block {target.block}, {target.module}: each would draw its own",
            hint="train one of them at a time",
        )
    if rank > MAX_RANK:
        raise UnsupportedAdapter(f"the adapters on block {target.block}, {target.module} have ranks above {MAX_RANK}")
    a_RK = torch.cat([part.a_RK.float() for part in parts])
    b_NR = torch.cat([part.b_NR.float() * part.target.scaling for part in parts], 1)
    return Part(structs.replace(target, rank=rank, scaling=1.0), a_RK, b_NR, (0, 0), 0.0)


def _parts(name: str, module: Any) -> Iterator[Part]:
    if module.merged:
        raise UnsupportedAdapter(f"the adapter on {name} was merged, and the weights it was merged into are at peers")
    if module.disable_adapters:
        return
    block, _, path = name.partition(".")
    if not isinstance(module.get_base_layer(), nn.Linear | Conv1D) or hasattr(module, "parameter_name"):
        raise UnsupportedAdapter(f"{name} is no linear layer: LoRA on experts or other tensors does not travel")
    for active in module.active_adapters:
        if active not in module.lora_A:
            continue
        if getattr(module, "use_dora", {}).get(active):
            raise UnsupportedAdapter(f"DoRA on {name} needs the norms of weights that are at peers")
        if getattr(module, "lora_variant", {}).get(active) is not None:
            raise UnsupportedAdapter(f"{type(module.lora_variant[active]).__name__} on {name} is not plain LoRA")
        if getattr(module, "lora_bias", {}).get(active):
            raise UnsupportedAdapter(f"{name} has a trained bias")
        dropping = module.lora_dropout[active]
        dropout = float(getattr(dropping, "p", 0.0)) if dropping.training else 0.0
        if not 0 <= dropout < 1:
            raise UnsupportedAdapter(f"lora_dropout {dropout} on {name} leaves nothing of its inputs")
        a_RK, b_NR = module.lora_A[active].weight, module.lora_B[active].weight
        if a_RK.ndim != 2 or b_NR.ndim != 2 or len(a_RK) > MAX_RANK:
            raise UnsupportedAdapter(f"the adapter on {name} is of no linear layer, or has a rank above {MAX_RANK}")
        target = AdapterTarget(
            block=int(block),
            module=path,
            rank=len(a_RK),
            inputs=a_RK.shape[1],
            outputs=len(b_NR),
            scaling=float(module.scaling[active]),
        )
        yield Part(target, a_RK, b_NR, (_version(a_RK), _version(b_NR)), dropout)


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version

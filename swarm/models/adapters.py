"""Low-rank adapters that PEFT put on skeleton layers, read anew for each forward.

Owns what can travel: of the active adapters the A and B of linear layers, with their scaling, none while they are
disabled, and their dropout while they train. What cannot (DoRA, biases, experts, anything else inside the layers)
raises UnsupportedAdapter by name; nothing is ignored. Knows PEFT by the attributes of its layers, and imports it never.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peers.model.adapters import Adapter, Dropout
from peers.wire.messages import MAX_RANK, AdapterTarget
from swarm.errors import UnsupportedAdapter

PEFT_NAMES = ("base_layer", "lora_A", "lora_B")


@dataclass(frozen=True, slots=True)
class Attached:
    """The adapters of one forward."""

    targets: tuple[AdapterTarget, ...]
    weights: tuple[Tensor, ...]
    """A and B of each target in turn: the client's own parameters."""
    dropout: float = 0.0
    """Of the inputs of all of them."""

    @property
    def requires_grad(self) -> bool:
        return any(weight.requires_grad for weight in self.weights)

    def draw_dropout(self) -> Dropout | None:
        """Of one forward; its seed comes from torch's own generator, as local dropout does."""
        return Dropout(self.dropout, int(torch.randint(1 << 62, ()))) if self.dropout else None

    def adapter(self) -> Adapter:
        """As it is now, to travel."""
        values = torch.cat([weight.detach().flatten().to("cpu", torch.float32) for weight in self.weights])
        return Adapter(self.targets, values)


def together(one: Attached | None, other: Attached | None) -> Attached | None:
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
    return Attached(tuple(target for target, _ in each), weights, max(one.dropout, other.dropout))


def attached(layers: nn.Module) -> Attached | None:
    """What is active on the skeleton `layers`; None where there is nothing. Raises UnsupportedAdapter."""
    foreign = []
    for name, weight in layers.named_parameters():
        if weight.numel() > 1 and any(weight.stride()):
            foreign.append(name)
        elif weight.requires_grad and torch.is_grad_enabled():
            raise UnsupportedAdapter(f"{name} stands at peers, and cannot be trained", hint="freeze the model's own")
    if not foreign:
        return None
    found: list[tuple[AdapterTarget, Tensor, Tensor, float]] = []
    known: set[str] = set()
    for name, module in layers.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, "base_layer"):
            known.update(f"{name}.{own}" for own, _ in module.named_parameters() if own.split(".")[0] in PEFT_NAMES)
            found += _targets(name, module)
    for name in foreign:
        if name not in known:
            raise UnsupportedAdapter(f"{name} is inside the remote layers, and no peer could compute with it")
    if not found:
        return None
    places = [(target.block, target.module) for target, *_ in found]
    if len(set(places)) < len(places):
        raise UnsupportedAdapter("two adapters are active on one layer", hint="activate one, or combine them")
    dropouts = {dropout for *_, dropout in found}
    if len(dropouts) > 1:
        raise UnsupportedAdapter("active adapters differ in their lora_dropout", hint="train one of them at a time")
    found.sort(key=lambda each: each[0].block)
    weights = tuple(weight for _, a, b, _ in found for weight in (a, b))
    return Attached(tuple(target for target, *_ in found), weights, dropouts.pop())


def _targets(name: str, module: Any) -> Iterator[tuple[AdapterTarget, Tensor, Tensor, float]]:
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
        yield target, a_RK, b_NR, dropout

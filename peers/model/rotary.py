"""Rotary embeddings whose frequencies depend on the longest position of a whole forward.

`longrope` switches between two sets of factors, and `dynamic` rescales, by the largest position id that transformers
sees in one forward. A peer sees chunks of a prompt and packs several users into one forward, so it must say how long
the forward of *this* user is. Owns that rule and its enforcement; knows nothing of batches or caches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryRegime:
    """When two works may share a forward: exactly when the keys of their lengths are equal."""

    kind: Literal["none", "longrope", "dynamic"]
    original_positions: int
    """Up to this length the frequencies are those of pretraining; 0 for kind "none"."""

    def key(self, length: int) -> Hashable:
        """`length`: number of positions of the user's whole forward, counted from position 0."""
        if self.kind == "none" or length <= self.original_positions:
            return 0
        return length if self.kind == "dynamic" else 1


class SteeredRotary:
    """Stands in for the forward of one rotary module, and makes it choose frequencies for `length` positions.

    The dependence on the longest position is transformers' own: a dummy token at position `length - 1` joins the call
    and its angles are dropped. What the module remembers of earlier forwards is forgotten first, so that the result is
    that of a model which runs this forward alone.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self.length = 0
        """Positions of the user's whole forward; 0 leaves the choice to the positions that arrive."""
        self._rotary = rotary
        self._forward: Callable[..., Any] = rotary.forward
        self._attributes = dict(vars(rotary))
        self._buffers = dict(rotary._buffers)
        rotary.forward = self

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if "dynamic" in rope_types(self._rotary):
            self._forget()
        if not self.length:
            return self._forward(x, position_ids, *args, **kwargs)
        longest = position_ids.new_full((*position_ids.shape[:-1], 1), self.length - 1)
        angles = self._forward(x, torch.cat((position_ids, longest), dim=-1), *args, **kwargs)
        if isinstance(angles, tuple):
            return tuple(part[..., :-1, :] for part in angles)
        return angles[..., :-1, :]

    def _forget(self) -> None:
        attributes = vars(self._rotary)
        for name in attributes.keys() - self._attributes.keys() - {"forward"}:
            del attributes[name]
        attributes.update(self._attributes)
        attributes["forward"] = self
        self._rotary._buffers.update(self._buffers)


def rotary_regime(module: nn.Module) -> RotaryRegime:
    """The regime of all rotary embeddings below `module` together (a stricter key than necessary where they differ)."""
    kinds = {kind for rotary in _regime_rotaries(module) for kind in rope_types(rotary)}
    if not kinds & {"dynamic", "longrope"}:
        return RotaryRegime(kind="none", original_positions=0)
    kind: Literal["dynamic", "longrope"] = "dynamic" if "dynamic" in kinds else "longrope"
    limits = [limit for rotary in _regime_rotaries(module) for limit in _original_positions(rotary)]
    return RotaryRegime(kind=kind, original_positions=min(limits))


def steer(module: nn.Module) -> list[SteeredRotary]:
    """Take over every rotary embedding below `module` that has a regime."""
    return [SteeredRotary(rotary) for rotary in _regime_rotaries(module)]


def rope_types(rotary: nn.Module) -> set[str]:
    """The variants that one module computes; some models hold one per layer type in the same module."""
    types = getattr(rotary, "rope_type", None)
    names = types.values() if isinstance(types, dict) else [types] if isinstance(types, str) else []
    return {"dynamic" if "dynamic" in name else name for name in names}  # transformers looks for the substring, too


def _regime_rotaries(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if rope_types(part) & {"dynamic", "longrope"}]


def _original_positions(rotary: Any) -> Iterator[int]:
    parameters = rotary.config.rope_parameters
    for each in parameters.values() if isinstance(rotary.rope_type, dict) else (parameters,):
        if each["rope_type"] == "longrope":
            yield each["original_max_position_embeddings"]
        elif "dynamic" in each["rope_type"]:
            yield rotary.original_max_seq_len

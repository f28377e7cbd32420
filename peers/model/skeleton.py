"""A client's model: the architecture's own class whose blocks cost nothing and whose forward runs a route instead.

Owns what happens in place of the blocks. Embeddings, norm and head are the model's own; the first block hands its input
to the installed route, the others pass through, and each returns what the architecture's loop expects. Knows nothing of
networks: a route is a function.

Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from peers.model.cutting import hollow_meta
from peers.model.support import Anatomy, accepted_names, find_layers

Route = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""`route(hidden_BTH, arguments) -> hidden_BTH`: what all blocks make of their input. `arguments` are the others that
the model's loop gives its first block (`attention_mask`, `position_ids`, `past_key_values`, … where it passes them)."""


def install_skeleton(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Make the blocks of `model` wait for a route, and their weights hollow."""
    hollow_meta(model.get_submodule(anatomy.layers_path), model.device, real_ones=True)
    first, *others = model.get_submodule(anatomy.layers_path).children()
    first.forward = _Entry(first, anatomy.returns)
    for layer in others:
        layer.forward = _Passage(layer, anatomy.returns)


def install_route(model: PreTrainedModel, route: Route) -> None:
    """Let every forward of `model`, which `load_client` made, run `route` in place of its blocks from now on."""
    entry = next(iter(model.get_submodule(find_layers(model)).children())).forward
    assert isinstance(entry, _Entry), "the model was not made by load_client"
    entry.route = route


def embed_only(
    model: nn.Module,
    input_ids_BT: Tensor,
    position_ids_BT: Tensor | None = None,
    attention_mask_BT: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The hidden states [B, T, H] that enter the first block: the model's own preamble, and nothing else.

    Give `position_ids_BT` wherever the tokens do not start at position 0: there is no cache that could tell.
    """
    arguments = {"position_ids": position_ids_BT, "attention_mask": attention_mask_BT, "use_cache": False}
    named = accepted_names(model.forward)
    if "kwargs" in named:  # the head's forward passes on what its decoder may name
        named |= arguments.keys()
    token = _embedding_only.set(True)
    try:
        model(input_ids_BT, **{name: arguments[name] for name in arguments.keys() & named}, **kwargs)
    except _Embedded as embedded:
        return embedded.hidden_BTH
    finally:
        _embedding_only.reset(token)
    raise AssertionError("the first block did not run")


class _Embedded(BaseException):
    """The preamble is done. Not an error: it ends a forward of which nothing else is wanted."""

    def __init__(self, hidden_BTH: Tensor) -> None:
        super().__init__()
        self.hidden_BTH = hidden_BTH


_embedding_only: ContextVar[bool] = ContextVar("embedding_only", default=False)


class _Passage:
    """The forward of a block that passes its hidden states through."""

    def __init__(self, layer: nn.Module, returns: int) -> None:
        self._signature = inspect.signature(layer.forward)
        self._hidden_name = next(iter(self._signature.parameters))
        self._returns = returns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # once per block and token: no more than a lookup
        return self._output(args[0] if args else kwargs[self._hidden_name])

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The hidden states, and all other arguments by name."""
        bound = self._signature.bind(*args, **kwargs).arguments
        others = {**bound, **bound.pop("kwargs", {})}
        return others.pop(self._hidden_name), others

    def _output(self, hidden: Tensor) -> Any:
        return (hidden, *[None] * (self._returns - 1)) if self._returns else hidden


class _Entry(_Passage):
    """The forward of the first block: it runs the route."""

    def __init__(self, layer: nn.Module, returns: int) -> None:
        super().__init__(layer, returns)
        self.route: Route | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden, others = self._arguments(args, kwargs)
        if _embedding_only.get():
            raise _Embedded(hidden)
        assert self.route is not None, "no route is installed"
        return self._output(self.route(hidden, others))

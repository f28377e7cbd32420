"""A span of blocks as a model of its own: the Hugging Face model with its other layers cut away.

Owns the surgery on a loaded model and the way hidden states enter and leave it. Knows no architecture by name (what it
must know stands in `peers.model.support.Anatomy`), reads no files and keeps no keys and values.

The model's own forward runs, so masks, rotary embeddings, sliding windows, experts and soft-capping are its own too.
Hidden states are handed to the first block in place of what the model's preamble made of zeros, and the forward ends
behind the last block, before the final norm. Everything outside the blocks (embeddings, norms, head) is *hollow*: real
modules whose weights are one zero expanded to the right shape, which cost no memory.

Legend: T tokens in one forward, H hidden size; the leading 1 is a batch of one (more rows work wherever the model's own
attention runs).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from peers.model.kernels import PackedLinear
from peers.model.rotary import rotary_regime, steer
from peers.model.support import Anatomy, accepted_names, configs, hidden_argument, renumber, set_attention
from routing.errors import InvalidSpan
from routing.ids import BlockSpan

UNLIMITED_POSITIONS = 1 << 30
"""`max_positions` of an architecture that names no limit (ALiBi, no position embeddings)."""

MAX_VIEWS = 16
"""Sub-spans kept ready: strangers choose them, and each costs about a megabyte of modules and milliseconds to make."""


class SpanModel:
    """The blocks `span` of a model, ready to run. Not thread-safe: one engine thread owns it.

    `model` is loaded: weights inside the span are real, all others hollow. It is consumed.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, span: BlockSpan) -> None:
        decoder = model.get_submodule(anatomy.decoder_path)
        layers = list(model.get_submodule(anatomy.layers_path).children())[span.start : span.end]
        for layer in layers:
            straighten(layer)
        _keep(decoder, anatomy, layers, BlockSpan(0, anatomy.num_blocks), span)
        self.span = span
        self.num_blocks = anatomy.num_blocks
        self.hidden_size = anatomy.hidden_size
        self.pluggable = anatomy.pluggable
        """Whether attention goes through transformers' registry; if not, each session runs alone on `new_cache()`."""
        self.kv_shapes = anatomy.kv_shapes[span.start : span.end]
        """What each block of the span stores for each position."""
        self.windows = anatomy.windows[span.start : span.end]
        """How many positions each block of the span sees; None: all that came before."""
        self.module = decoder
        self.config: PretrainedConfig = decoder.config
        self.max_positions = max_positions(self.config)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.regime = rotary_regime(decoder)
        self.weight_bytes = sum(tensor.nbytes for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
        self._anatomy = anatomy
        self._default_attention: str = self.config._attn_implementation
        self._attention = self._default_attention
        self._views: dict[BlockSpan, _View] = {}

    def forward(
        self,
        hidden_1TH: Tensor,
        position_ids_1T: Tensor,
        *,
        span: BlockSpan | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        regime_length: int = 0,
        between: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the blocks `span` (a part of `self.span`; all of it when None) and return what the last one returns.

        Modules that store keys and values number themselves from 0 at the first block of `span`. `regime_length` is the
        number of positions of the user's whole forward (see `RotaryRegime`); 0 when these positions are all of it.
        `between` is called between one block and the next, and may itself run a forward. Further keywords reach the
        model's decoder. Raises InvalidSpan.
        """
        view = self._view(span or self.span)
        return view.run(hidden_1TH, position_ids_1T, past_key_values, attention_mask, regime_length, between, kwargs)

    def blocks(
        self,
        like_1TH: Tensor,
        position_ids_1T: Tensor,
        *,
        span: BlockSpan | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        regime_length: int = 0,
    ) -> list[tuple[Callable[[Tensor], Tensor], nn.Module]]:
        """The blocks of `span` one by one, as `forward` would call them with hidden states like these, each with its
        module: for who has something else to do between two of them. Arguments and errors as of `forward`."""
        view = self._view(span or self.span)
        return view.split(like_1TH, position_ids_1T, past_key_values, attention_mask, regime_length)

    def layers(self, span: BlockSpan | None = None) -> list[nn.Module]:
        """The modules of the blocks of `span` through which `forward` goes, in order; of whole forwards only."""
        return list(_layer_list(self._view(span or self.span).module, self._anatomy))

    def linear_shape(self, block: int, path: str) -> tuple[int, int] | None:
        """Inputs and outputs of the linear layer at `path` of a block of the span; None where there is none."""
        module = dict(_layer_list(self.module, self._anatomy)[block - self.span.start].named_modules()).get(path)
        if not isinstance(module, nn.Linear | PackedLinear):
            return None
        return module.in_features, module.out_features

    def prefix_shape(self, block: int) -> tuple[int, int]:
        """Elements of the keys, and of the values, that a block of the span stores for each position."""
        shape = self.kv_shapes[block - self.span.start]
        return shape.heads * shape.key_size, shape.heads * shape.value_size

    def new_cache(self, span: BlockSpan | None = None) -> DynamicCache:
        """An empty cache of the model's own kind for one session on `span`.

        Sliding layers keep everything (their masks are the same), so that a session can be cropped to any length.
        """
        cache = DynamicCache(config=self._view(span or self.span).module.config)
        cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
        return cache

    def set_attention(self, name: str | None) -> None:
        """Select a registered attention implementation, or with None the one the model was loaded with."""
        self._attention = name or self._default_attention
        for view in self._views.values():
            set_attention(view.module, self._attention)

    def forget_views(self) -> None:
        """Whoever replaced layers of `module` says so: what forwards run on are copies of it, which are made anew."""
        self._views.clear()

    def _view(self, span: BlockSpan) -> _View:
        view = self._views.pop(span, None)
        if view is None:
            if not self.span.covers(span):
                raise InvalidSpan(f"blocks {span} are not among the {self.span} that are loaded here")
            view = _View(self._cut(span), self._anatomy)
            set_attention(view.module, self._attention)
            if len(self._views) == MAX_VIEWS:
                del self._views[next(iter(self._views))]
        self._views[span] = view  # the last one used comes last
        return view

    def _cut(self, span: BlockSpan) -> nn.Module:
        """A copy of the modules of `span` that shares every tensor."""
        shared = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        decoder: nn.Module = copy.deepcopy(self.module, shared)
        layers = list(_layer_list(decoder, self._anatomy))[span.start - self.span.start : span.end - self.span.start]
        _keep(decoder, self._anatomy, layers, self.span, span)
        return decoder


def straighten(block: nn.Module) -> None:
    """Make a linear layer of each `Conv1D` in `block`, which is one whose weights are kept the other way round."""
    layer: Any
    for parent in list(block.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is Conv1D:
                straight = nn.Linear(layer.nx, layer.nf, device="meta")
                straight.weight = nn.Parameter(layer.weight.detach().t().contiguous(), layer.weight.requires_grad)
                straight.bias = layer.bias
                setattr(parent, name, straight)


class _View:
    """A decoder with entrance and exit: hidden states go in before its first block and come out behind its last."""

    def __init__(self, decoder: nn.Module, anatomy: Anatomy) -> None:
        self.module = decoder
        self._names = accepted_names(decoder.forward)
        self._rotaries = steer(decoder)
        self._embedding_size = anatomy.embedding_size
        self._hidden: Tensor | None = None
        self._between: Callable[[], None] | None = None
        layers = _layer_list(decoder, anatomy)
        self._layers = [(layer, hidden_argument(layer), layer.forward) for layer in layers]
        """Each with the forward that is its own, whatever stands in its place."""
        self._returns = anatomy.returns
        first, last = layers[0], layers[-1]
        name, run_first = hidden_argument(first), first.forward

        def enter(*args: Any, **kwargs: Any) -> Any:
            if args:
                return run_first(self._hidden, *args[1:], **kwargs)
            kwargs[name] = self._hidden
            return run_first(**kwargs)

        first.forward = enter
        run_last = last.forward

        def leave(*args: Any, **kwargs: Any) -> Any:
            output = run_last(*args, **kwargs)
            raise _Reached(output[0] if isinstance(output, tuple) else output)

        last.forward = leave
        for layer in layers[1:]:
            layer.register_forward_pre_hook(self._pause)

    def run(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        cache: Cache | None,
        attention_mask: Tensor | None,
        regime_length: int,
        between: Callable[[], None] | None,
        others: dict[str, Any],
    ) -> Tensor:
        outer = self._hidden, self._between  # of a forward that pauses
        self._hidden, self._between = hidden, between
        try:
            with self._steered(regime_length):
                return self._call(hidden, position_ids, cache, attention_mask, others)
        finally:
            self._hidden, self._between = outer

    def split(
        self,
        like: Tensor,
        position_ids: Tensor,
        cache: Cache | None,
        attention_mask: Tensor | None,
        regime_length: int,
    ) -> list[tuple[Callable[[Tensor], Tensor], nn.Module]]:
        """Let the model's own loop call its blocks, note with what, and run none of them. That is all there is to know:
        what a block takes beside its hidden states depends on no hidden states (`peers.model.support`)."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def noting(hidden_name: str) -> Callable[..., Any]:
            def note(*args: Any, **kwargs: Any) -> Any:
                calls.append((args, kwargs))
                hidden = args[0] if args else kwargs[hidden_name]
                if len(calls) == len(self._layers):
                    raise _Reached(hidden)
                return (hidden, *[None] * (self._returns - 1)) if self._returns else hidden

            return note

        def calling(run: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            def block(hidden: Tensor) -> Tensor:
                with self._steered(regime_length):
                    output = run(hidden, *args[1:], **kwargs) if args else run(**{**kwargs, name: hidden})
                return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

            return block

        outer = [layer.forward for layer, _, _ in self._layers]
        try:
            for layer, name, _ in self._layers:
                layer.forward = noting(name)
            with self._steered(regime_length), torch.no_grad():
                self._call(like, position_ids, cache, attention_mask, {})
        finally:
            for (layer, _, _), forward in zip(self._layers, outer, strict=True):
                layer.forward = forward
        return [
            (calling(run, name, *call), layer) for (layer, name, run), call in zip(self._layers, calls, strict=True)
        ]

    def _call(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        cache: Cache | None,
        attention_mask: Tensor | None,
        others: dict[str, Any],
    ) -> Tensor:
        arguments = {
            "inputs_embeds": hidden.new_zeros((*hidden.shape[:-1], self._embedding_size)),  # some write into it
            "position_ids": position_ids,
            "past_key_values": cache,
            "attention_mask": attention_mask,
            "use_cache": cache is not None,
        }
        try:
            self.module(**{name: value for name, value in arguments.items() if name in self._names}, **others)
        except _Reached as reached:
            return reached.hidden
        raise AssertionError("the last block did not run")

    @contextmanager
    def _steered(self, regime_length: int) -> Iterator[None]:
        lengths = [rotary.length for rotary in self._rotaries]
        for rotary in self._rotaries:
            rotary.length = regime_length
        try:
            yield
        finally:
            for rotary, length in zip(self._rotaries, lengths, strict=True):
                rotary.length = length

    def _pause(self, *_: object) -> None:
        if self._between is not None:
            self._between()


class _Reached(BaseException):
    """The last block has run. Not an error: it ends a forward whose rest (norm, outputs) belongs to the client."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def max_positions(config: PretrainedConfig) -> int:
    """How long a sequence of this language model may be."""
    return int(getattr(config, "max_position_embeddings", None) or UNLIMITED_POSITIONS)


def hollow_meta(model: nn.Module, device: torch.device, *, real_ones: bool = False) -> None:
    """Replace every weight that is still on `meta` by one zero on `device`, expanded to the same shape.

    `real_ones`: parameters that are not, too; some architectures make theirs wherever they are.
    """
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and (weight.is_meta or real_ones):
                module._parameters[name] = nn.Parameter(_hollow(weight, device), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _hollow(buffer, device)


def _hollow(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)


def _layer_list(decoder: nn.Module, anatomy: Anatomy) -> nn.ModuleList:
    layers = decoder.get_submodule(anatomy.layers_path.removeprefix(anatomy.decoder_path).lstrip("."))
    assert isinstance(layers, nn.ModuleList)
    return layers


def _keep(decoder: nn.Module, anatomy: Anatomy, layers: list[nn.Module], old: BlockSpan, new: BlockSpan) -> None:
    """Leave only `layers`, the blocks `new` of a decoder that held `old`, and number them from 0."""
    path = anatomy.layers_path.removeprefix(anatomy.decoder_path).lstrip(".")
    decoder.set_submodule(path, nn.ModuleList(layers))
    for index, layer in enumerate(layers):
        renumber(layer, new.start - old.start + index, index)
    for config in configs(decoder):
        _slice_config(config, old, new)


def _slice_config(config: PretrainedConfig, old: BlockSpan, new: BlockSpan) -> None:
    """Make `config`, which describes the blocks `old`, describe `new`: every list with one entry per block is cut."""
    if getattr(config, "num_hidden_layers", None) != len(old):
        return
    start, end = new.start - old.start, new.end - old.start
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == len(old):
            vars(config)[name] = value[start:end]
    if config.is_heterogeneous:
        spec = config._heterogeneity_spec
        overrides = {index - start: own for index, own in spec.per_layer_overrides.items() if start <= index < end}
        config._heterogeneity_spec = dataclasses.replace(spec, per_layer_overrides=overrides)
    config.num_hidden_layers = end - start

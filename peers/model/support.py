"""Which architectures can be cut into spans, found by watching the whole model run on `meta`.

Owns the refusal of what cannot be cut, and the facts about an architecture that cutting and loading need (`Anatomy`).
Knows no weights: everything here happens from a configuration alone, before any tensor is read, and nothing is decided
by an architecture's name.

The probe builds the model on `meta` (storage-free), replaces the input of every block by a fresh leaf of autograd, and
looks at what each block used to compute its output and its keys and values. Cutting between blocks is right when

- every block runs once, in order, and takes the very tensor that the block before it returned;
- a block's output depends on its own leaf alone, not on another block's (keys and values shared across layers), and no
  other argument depends on the token embeddings (per-layer inputs);
- a block keeps nothing between steps but the keys and values that it hands to its own layer of the cache (no recurrent
  state), under an index that can be renumbered.

`Anatomy.pluggable` says whether ragged batches are possible too: each block must call the attention function of
transformers' registry exactly once, with the mask object that the registered mask function made (any Python object may
travel that way), with as many keys as positions, with no argument of unknown meaning, and must ask nothing of the cache
but to store. How masks reach such a function, measured on transformers 5.23:

- the registered mask function is called once per pattern and forward, and its keyword `mask_function(b, h, q, kv)` is a
  pure function of absolute positions (causal, sliding window, chunked) for integer tensors that broadcast, as long as a
  cache is passed: without cache and 2-D mask, transformers looks for packed sequences in the position ids and remaps
  the indices;
- `sliding_window`, `softcap` and sinks (`s_aux`) arrive as keywords in most families, `scaling` in all, `position_ids`
  not in all.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from peers.errors import UnsupportedModel
from routing.records import MAX_BLOCKS

PROBE_ATTENTION = "swarm_probe"
"""Name under which the probe's attention and mask functions are registered."""

PROBE_TOKENS = 3
FAR = 1 << 17
"""A position so far out that a window which is longer is none."""
MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""Of batch, head, query and key: whether the query sees the key."""
KNOWN_ATTENTION_ARGUMENTS = frozenset(
    {"dropout", "scaling", "sliding_window", "softcap", "s_aux", "position_ids", "use_cache", "is_causal"}
    | {"output_attentions", "output_router_logits", "output_hidden_states"}
)
INDEX_ATTRIBUTES = ("layer_idx", "layer_id")
"""Where modules keep the index under which they store keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValueShape:
    """What one block stores for each position: `heads` keys of `key_size` elements, as many values of `value_size`."""

    heads: int
    key_size: int
    value_size: int

    @property
    def elements(self) -> int:
        return self.heads * (self.key_size + self.value_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """What cutting needs to know about an architecture."""

    model_class: type[PreTrainedModel]
    """The architecture's own class with a language-model head."""
    decoder_path: str
    """Module that owns the blocks and whose forward runs them; "" for the model itself."""
    layers_path: str
    """The list of blocks, seen from the model."""
    num_blocks: int
    hidden_size: int
    embedding_size: int
    """Width of `inputs_embeds`; differs from `hidden_size` where the model projects its embeddings."""
    returns: int
    """What a block returns: 0 for the hidden states alone, n for a tuple of n that starts with them."""
    pluggable: bool
    """Whether attention goes through transformers' registry, so that ragged batches are possible."""
    kv_shapes: tuple[KeyValueShape, ...]
    """What each block stores for each position: where attention is pluggable, the keys and values that reach it (latent
    attention has expanded them by then), else those that reach the cache."""
    windows: tuple[int | None, ...]
    """How many positions each block sees, a position itself included, where attention is pluggable and that is so at
    every position; else None."""
    weights: Mapping[str, int]
    """Bytes of each of the whole model's weights, by the name in its state dict, in the configuration's dtype."""


def language_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration that the causal language model is built from: its text part where it wants only that.

    As `AutoModelForCausalLM` chooses it. Raises UnsupportedModel when there is no causal language model of this type.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise _refusal(config, "transformers has no causal language model of this type")
    if model_class.config_class is not config.sub_configs.get("text_config"):
        return config
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return text


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model without storage, in evaluation mode. Raises UnsupportedModel when there is no such class."""
    config = language_config(config)
    if config.is_encoder_decoder:
        raise _refusal(config, "it is an encoder-decoder")
    blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if isinstance(blocks, int) and blocks > MAX_BLOCKS:  # before as many are made
        raise _refusal(config, f"it has {blocks} of them, and at most {MAX_BLOCKS} can be announced")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops():
            model = model_class._from_config(copy.deepcopy(config))
    except Exception as error:  # whatever a stranger's configuration breaks in the architecture's code, it is refused
        raise _refusal(config, f"its configuration does not work ({one_line(error)})") from error
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def check_supported(config: PretrainedConfig) -> None:
    """Raises UnsupportedModel, naming the model type and what stands in the way, before any weights are read."""
    examine(config)


def examine(config: PretrainedConfig) -> Anatomy:
    """Build the whole model on `meta`, watch it run, and describe it. Raises UnsupportedModel.

    What is known is remembered, wherever the configuration lay: watching takes longer than loading a small span.
    """
    key = f"{type(config)} {config.to_dict() | {'_name_or_path': ''}}"
    if key not in _known:
        _known[key] = _examine(config)
    return _known[key]


_known: dict[str, Anatomy] = {}


@torch.inference_mode(mode=False)  # the probe needs autograd
def _examine(config: PretrainedConfig) -> Anatomy:
    model = build_on_meta(config)
    if model._is_stateful:
        raise _refusal(config, "its blocks keep recurrent state between steps")
    layers_path = find_layers(model)
    decoder_path = find_decoder(model, layers_path)
    decoder = model.get_submodule(decoder_path)
    layers = list(model.get_submodule(layers_path).children())
    for index, layer in enumerate(layers):
        renumber(layer, index, len(layers) - 1 - index)  # any other order shows whether the cache follows the numbers
    embedding_size = int(model.get_input_embeddings().weight.shape[-1])
    model.config._experts_implementation = "batched_mm"  # no data-dependent control flow
    try:
        watch = _watch(config, decoder, layers, embedding_size, attention=PROBE_ATTENTION)
    except _NotPluggable:
        watch = _watch(config, decoder, layers, embedding_size, attention="eager")
        watch.pluggable = False
    return Anatomy(
        model_class=type(model),
        decoder_path=decoder_path,
        layers_path=layers_path,
        num_blocks=len(layers),
        hidden_size=watch.hidden_size,
        embedding_size=embedding_size,
        returns=watch.returns,
        pluggable=watch.pluggable,
        kv_shapes=tuple(watch.kv_shapes),
        windows=tuple(map(_window, watch.masks)) if watch.pluggable else (None,) * len(layers),
        weights={name: tensor.nbytes for name, tensor in model.state_dict().items()},
    )


def find_layers(model: PreTrainedModel) -> str:
    """The path of the list of blocks: the outermost list in the decoder with one module per hidden layer."""
    num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    lists = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    paths = [path for path, part in lists if len(part) == num_layers]
    inside = {id(part) for part in model.get_decoder().modules()}
    paths = [path for path, part in lists if path in paths and id(part) in inside] or paths  # not the vision tower
    if not paths:
        raise _refusal(model.config, f"it has no list of {num_layers} blocks")
    depth = min(path.count(".") for path in paths)
    outermost = [path for path in paths if path.count(".") == depth]
    if len(outermost) > 1:
        raise _refusal(model.config, f"its blocks are spread over several lists ({', '.join(outermost)})")
    return str(outermost[0])


def find_decoder(model: PreTrainedModel, layers_path: str) -> str:
    """The path of the innermost module around the blocks that takes embeddings instead of token ids."""
    path = layers_path
    while path:
        path = path.rpartition(".")[0]
        if "inputs_embeds" in inspect.signature(model.get_submodule(path).forward).parameters:
            return path
    raise _refusal(model.config, "it takes no embeddings")


def renumber(layer: nn.Module, old: int, new: int) -> None:
    """Give `layer`, numbered `old`, the index `new` under which it stores its keys and values."""
    for module in layer.modules():
        for name in INDEX_ATTRIBUTES:
            if module.__dict__.get(name) == old:
                module.__dict__[name] = new


class _NotPluggable(Exception):
    """The probe's attention or mask object was not used as ours would be: look again with the model's own attention."""


@dataclass(slots=True)
class _Watch:
    """What the blocks did while the whole model ran once."""

    config: PretrainedConfig
    attention: str
    num_layers: int
    running: int | None = None
    ran: int = 0
    leaves: list[Tensor] = field(default_factory=list)
    """Of autograd, one for each block that ran: what it was handed."""
    handed_on: Tensor | None = None
    stored: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    attended: int = 0
    attended_to: tuple[Tensor, Tensor] | None = None
    kv_shapes: list[KeyValueShape] = field(default_factory=list)
    masks: list[MaskFunction] = field(default_factory=list)
    """Of each block, where attention is pluggable."""
    hidden_size: int = 0
    returns: int = -1
    pluggable: bool = True

    def refuse(self, reason: str) -> UnsupportedModel:
        return _refusal(self.config, reason)

    def unlike_ours(self) -> None:
        """Called where a ragged batch would go wrong; the model's own attention may do what it likes."""
        if self.attention == PROBE_ATTENTION:
            raise _NotPluggable

    def enter(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of block `index`: check what arrives, and hand in a fresh leaf of autograd."""
        name = hidden_argument(layer)
        hidden = args[0] if args else kwargs.get(name)
        if index != self.ran or self.running is not None:
            raise self.refuse("its blocks do not run once each, in order")
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != (1, PROBE_TOKENS) or hidden.ndim != 3:
            raise self.refuse(f"block {index} does not take hidden states of shape [batch, tokens, width]")
        if self.handed_on is not None and hidden is not self.handed_on:
            raise self.refuse(f"block {index} does not take what block {index - 1} returns")
        others = (*args[1:], *(value for key, value in kwargs.items() if key != name))
        for tensor in _tensors(others):
            if tensor.requires_grad:
                used = _leaves(tensor)
                source = next((block for block, leaf in enumerate(self.leaves) if id(leaf) in used), None)
                if source is None:
                    raise self.refuse("its blocks take inputs of their own beside the hidden states")
                raise self.refuse(
                    f"block {index} is handed what block {source} made, such as keys and values they share"
                )
        self.hidden_size = hidden.shape[-1]
        self.running, self.attended, self.stored = index, 0, []
        self.leaves.append(hidden.detach().requires_grad_())
        fresh = self.leaves[-1].clone()  # not the leaf itself: blocks may work in place
        return ((fresh, *args[1:]), kwargs) if args else (args, {**kwargs, name: fresh})

    def leave(self, index: int, output: Any) -> Any:
        """Forward hook of block `index`: check what it used, and hand on a tensor without history."""
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or hidden.shape != (1, PROBE_TOKENS, self.hidden_size):
            raise self.refuse(f"block {index} does not return hidden states of the shape it takes")
        cache_index = self.num_layers - 1 - index
        if not self.stored:
            raise self.refuse(f"block {index} stores no keys and values of its own")
        if len(self.stored) > 1:
            raise self.refuse(f"block {index} stores keys and values more than once")
        if any(stored_under != cache_index for stored_under, _, _ in self.stored):
            raise self.refuse(f"block {index} stores keys and values under another block's number")
        for tensor in (hidden, *(tensor for _, *pair in self.stored for tensor in pair)):
            if _leaves(tensor) - {id(self.leaves[-1])}:
                raise self.refuse(f"block {index} uses the state of another block")
        if self.attended != 1:
            self.unlike_ours()
        _, keys, values = self.stored[0]
        keys, values = self.attended_to or (keys, values)
        self.kv_shapes.append(KeyValueShape(heads=keys.shape[1], key_size=keys.shape[-1], value_size=values.shape[-1]))
        self.returns = len(output) if isinstance(output, tuple) else 0
        self.running, self.ran = None, index + 1
        self.handed_on = hidden.detach().requires_grad_().clone()
        return (self.handed_on, *output[1:]) if isinstance(output, tuple) else self.handed_on


def _watch(
    config: PretrainedConfig, decoder: nn.Module, layers: list[nn.Module], embedding_size: int, *, attention: str
) -> _Watch:
    watch = _Watch(config, attention, len(layers))
    set_attention(decoder, attention)
    hooks = []
    for index, layer in enumerate(layers):
        enter = functools.partial(watch.enter, index)
        hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(layer.register_forward_hook(lambda _layer, _args, output, i=index: watch.leave(i, output)))
    token = _watching.set(watch)
    try:
        with torch.enable_grad(), torch.device("meta"), _ConstantAnswers():  # type: ignore[no-untyped-call]
            embeddings = torch.zeros(1, PROBE_TOKENS, embedding_size).requires_grad_().clone()
            arguments = {
                "inputs_embeds": embeddings,
                "position_ids": torch.arange(PROBE_TOKENS)[None],
                "past_key_values": _ProbeCache(watch),
                "use_cache": True,
            }
            named = accepted_names(decoder.forward)
            result = next(_tensors(decoder(**{name: arguments[name] for name in arguments.keys() & named})))
    except (UnsupportedModel, _NotPluggable):
        raise
    except Exception as error:
        watch.unlike_ours()
        if "per_layer_inputs" in accepted_names(decoder.forward):  # refused either way, but this says more
            raise watch.refuse("its blocks take inputs of their own that are made of the token ids") from error
        raise watch.refuse(f"it does not run on embeddings alone ({one_line(error)})") from error
    finally:
        _watching.reset(token)
        for hook in hooks:
            hook.remove()
    if watch.ran != len(layers):
        raise watch.refuse("its blocks do not run once each, in order")
    assert watch.handed_on is not None
    if not _leaves(result) <= _leaves(embeddings) | _leaves(watch.handed_on):
        raise watch.refuse("its output uses more than the last block's")
    return watch


class _ProbeCache(Cache):  # type: ignore[misc]  # transformers is untyped to mypy here
    """Stores nothing, returns what it is given, and reports everything that is not a plain key-value cache."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__(layers=[])
        self.watch = watch

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.watch.stored.append((layer_idx, key_states, value_states))
        return key_states, value_states

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        self.watch.unlike_ours()
        return indexer_key_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self.watch.running is not None:  # a block that counts the past itself is wrong in a ragged batch
            self.watch.unlike_ours()
        return 0

    def _recurrent(self, *_: Any, **__: Any) -> Any:
        raise self.watch.refuse("its blocks keep recurrent state between steps")

    has_previous_state = get_conv_state = update_conv_state = _recurrent
    get_recurrent_state = update_recurrent_state = is_recording_past = _recurrent


@dataclass(frozen=True, slots=True)
class _ProbeMask:
    function: MaskFunction


def _probe_mask(**kwargs: Any) -> object:
    watch = _watching.get()
    if "allow_is_bidirectional_skip" in kwargs:  # only transformers' bidirectional masks pass it
        raise watch.refuse("its attention is not causal")
    return _ProbeMask(kwargs["mask_function"])


def _window(function: MaskFunction) -> int | None:
    """How many positions a query sees under this mask, itself included, if that is the same everywhere.

    Asked far out and where a mask of another kind would differ; whoever leans on it asks again (`runtime.attention`).
    """

    def seen(query: int) -> Tensor:
        return function(0, 0, torch.tensor([[query]]), torch.arange(query + 1)[None])[0]

    window = FAR + 1 - int(seen(FAR).int().argmax())
    for query in (0, 1, window - 2, window - 1, window, window + 1, 2 * window - 1, 2 * window, FAR - 1, FAR):
        if not torch.equal(seen(max(0, query)), torch.arange(max(0, query) + 1) > query - window):
            return None
    return window if window <= FAR else None


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: Any
) -> tuple[Tensor, None]:
    watch = _watching.get()
    unknown = {name for name, argument in kwargs.items() if argument is not None} - KNOWN_ATTENTION_ARGUMENTS
    same_length = key.shape[2] == value.shape[2] == query.shape[2] == PROBE_TOKENS
    if isinstance(attention_mask, _ProbeMask) and not unknown and same_length:
        watch.masks.append(attention_mask.function)
    else:
        watch.unlike_ours()
    watch.attended += 1
    watch.attended_to = key, value
    used = query.sum() + key.sum() + value.sum()
    return used.expand(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


_watching: ContextVar[_Watch] = ContextVar("watching")
AttentionInterface.register(PROBE_ATTENTION, _probe_attention)
AttentionMaskInterface.register(PROBE_ATTENTION, _probe_mask)


class _ConstantAnswers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers questions about values, which `meta` tensors cannot, with zero, and "which ones?" with "none"."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.long)
        if func is torch.ops.aten.split_with_sizes.default:
            tensor, sizes, *dim = args  # the sizes may have been such answers: they must still fill the dimension
            return func(tensor, [*sizes[:-1], tensor.shape[dim[0] if dim else 0] - sum(sizes[:-1])], *dim)
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
        return func(*args, **kwargs)


def set_attention(module: nn.Module, name: str) -> None:
    """Select an attention implementation on every configuration that `module` or a module below it looks at."""
    for config in configs(module):
        config._attn_implementation = name


def configs(module: nn.Module) -> list[PretrainedConfig]:
    """The configuration objects held by `module` and the modules below it; most of these share one."""
    held = (part.__dict__.get("config") for part in module.modules())
    return list({id(config): config for config in held if isinstance(config, PretrainedConfig)}.values())


def hidden_argument(layer: nn.Module) -> str:
    """The name under which a block takes its hidden states: its first parameter."""
    return next(iter(inspect.signature(layer.forward).parameters))


def accepted_names(function: Callable[..., Any]) -> frozenset[str]:
    """The parameters that `function` names; a `**kwargs` is no place for what it does not know."""
    return frozenset(inspect.signature(function).parameters)


def _leaves(tensor: Tensor) -> set[int]:
    """Ids of the leaves of autograd that `tensor` was computed from."""
    found, seen, stack = set(), set(), [tensor.grad_fn]
    if tensor.is_leaf and tensor.requires_grad:
        found.add(id(tensor))
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for item in value.values() for tensor in _tensors(item))
    elif isinstance(value, tuple | list):
        yield from (tensor for item in value for tensor in _tensors(item))


def one_line(error: Exception) -> str:
    """Type and first line of a foreign error."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """What a foreign error says first; others may follow with a page."""
    return str(error).strip().partition("\n")[0]


def _refusal(config: PretrainedConfig, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{config.model_type} models cannot be cut into blocks: {reason}",
        hint="choose a decoder-only transformer whose blocks depend on nothing but each other's hidden states",
    )

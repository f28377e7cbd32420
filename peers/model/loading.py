"""Reading a checkpoint in part: the blocks of a span for a peer, everything but the blocks for a client.

Owns the choice of tensors and the call of transformers' own loading, so that dtype, weight conversion (fused experts)
and quantization are theirs. Knows files only through a `Checkpoint`, and decides nothing by an architecture's name.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.logging import set_tqdm_hook

from peers.errors import CorruptCheckpoint, UnsupportedModel
from peers.model.cutting import SpanModel, hollow_meta, straighten
from peers.model.grouped import check_apart
from peers.model.prequantized import form_loaded, kept_form, quantizer_of, settle
from peers.model.progress import Progress, Silent
from peers.model.quantization import NONE, quantize
from peers.model.quantization import check as check_quantization
from peers.model.skeleton import install_skeleton
from peers.model.support import Anatomy, build_on_meta, check_supported, examine, find_layers, language_config, one_line
from routing.errors import InvalidSpan
from routing.ids import BlockSpan


class Weights(Protocol):
    """What loading needs of `peers.model.catalog.Checkpoint`."""

    @property
    def folder(self) -> Path: ...

    @property
    def weight_map(self) -> Mapping[str, str]: ...

    def fetch(self, tensors: Iterable[str], progress: Progress | None = None) -> Path: ...

    def num_bytes(self, tensors: Iterable[str]) -> int: ...


def load_config(checkpoint: Weights, *, device: torch.device | str | None = None) -> PretrainedConfig:
    """The configuration of the checkpoint's language model, to be loaded on `device` (None: wherever this machine loads
    it best). Runs no code of the checkpoint.

    Raises UnsupportedModel and, for weights in a form whose package is not installed, MissingExtra.
    """
    return _config_in(checkpoint.folder, device)


def check_folder(folder: Path) -> None:
    """Raises UnsupportedModel or MissingExtra when the model whose config.json is in `folder` cannot be cut or loaded
    here; reads no weights."""
    check_supported(_config_in(folder, None))


def kept_block_bytes(checkpoint: Weights, config: PretrainedConfig) -> int | None:
    """What the largest block takes in the checkpoint's own form, where it is loaded in that; from headers alone, which
    a hub has to send once of weights that are not here. None where weights are plain or made whole.

    Raises CorruptCheckpoint, HubUnreachable.
    """
    if kept_form(config) == NONE:
        return None
    model = build_on_meta(config)
    layers = find_layers(model) + "."
    blocks: dict[str, list[str]] = {}
    for stored, name in _renamed(checkpoint, model, _device(None)).items():
        if name.startswith(layers):
            blocks.setdefault(name.removeprefix(layers).partition(".")[0], []).append(stored)
    return max(map(checkpoint.num_bytes, blocks.values()), default=0)


def _config_in(folder: Path, device: torch.device | str | None) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a stranger's configuration runs through the architecture's own code
        raise UnsupportedModel(
            f"transformers cannot read the configuration ({one_line(error)})",
            hint="a newer transformers may know the architecture",
        ) from error
    config = language_config(config)
    if getattr(config, "quantization_config", None) is None:
        check_apart(folder)
    settle(config, _device(device))
    return config


def _device(wanted: torch.device | str | None) -> torch.device | str:
    return wanted or torch.accelerator.current_accelerator(check_available=True) or "cpu"


def span_tensors(
    checkpoint: Weights, config: PretrainedConfig, span: BlockSpan, *, device: torch.device | str = "cpu"
) -> list[str]:
    """The tensors of the checkpoint that the blocks `span` are made of."""
    model = build_on_meta(config)
    return _needed(checkpoint, model, device, _in_blocks(find_layers(model), span))


def client_tensors(checkpoint: Weights, config: PretrainedConfig, *, device: torch.device | str = "cpu") -> list[str]:
    """The tensors of the checkpoint that a client keeps: embeddings, norms, head; all but the blocks."""
    model = build_on_meta(config)
    blocks = find_layers(model) + "."
    known = model.state_dict().keys()
    return _needed(checkpoint, model, device, lambda name: name in known and not name.startswith(blocks))


@torch.inference_mode(mode=False)  # weights stay usable for training
def load_span(
    checkpoint: Weights,
    span: BlockSpan,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str,
    quantization: str = NONE,
    progress: Progress | None = None,
) -> SpanModel:
    """Download what is missing, read the blocks `span` and nothing else, and cut the rest of the model away.

    `quantization` (see `peers.model.quantization`, or the form in which the checkpoint keeps its weights) changes the
    blocks after they were read. Raises CallerError and UnsupportedModel (before any weights are touched), InvalidSpan,
    CorruptCheckpoint, and what `fetch` raises.
    """
    config = load_config(checkpoint, device=device)
    if form_loaded(config, quantization) == kept_form(config):
        quantization = NONE  # they come in it
    check_quantization(quantization)
    anatomy = examine(config)
    if span.end > anatomy.num_blocks:
        raise InvalidSpan(f"blocks {span} are outside the model, which has {anatomy.num_blocks}")
    folder = checkpoint.fetch(span_tensors(checkpoint, config, span, device=device), progress)

    def read(part: BlockSpan) -> PreTrainedModel:
        keep, label = _in_blocks(anatomy.layers_path, part), f"blocks {part}"
        return _read(folder, config, anatomy, keep, dtype=dtype, device=device, label=label, progress=progress)

    if quantization == NONE:
        return SpanModel(read(span).requires_grad_(False), anatomy, span)
    model: PreTrainedModel | None = None
    for block in span:  # one at a time: they never all stand here whole
        loaded = read(BlockSpan(block, block + 1))
        layers = cast(nn.ModuleList, loaded.get_submodule(anatomy.layers_path))
        straighten(layers[block])
        quantize(layers[block], quantization)
        model = model or loaded
        cast(nn.ModuleList, model.get_submodule(anatomy.layers_path))[block] = layers[block]
    assert model is not None, "a span is not empty"
    return SpanModel(model.requires_grad_(False), anatomy, span)


@torch.inference_mode(mode=False)
def load_client(
    checkpoint: Weights,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """The architecture's own model with real embeddings, norms and head, and blocks that wait for a route.

    The blocks are real modules under their real names, with weights that cost no memory; see
    `peers.model.skeleton.install_route`. Raises as `load_span` does.
    """
    config = load_config(checkpoint, device=device)
    anatomy = examine(config)
    folder = checkpoint.fetch(client_tensors(checkpoint, config, device=device), progress)
    blocks = anatomy.layers_path + "."
    model = _read(
        folder,
        config,
        anatomy,
        lambda name: not name.startswith(blocks),
        dtype=dtype,
        device=device,
        label="embeddings and head",
        progress=progress,
    )
    install_skeleton(model, anatomy)
    return model


def _in_blocks(layers_path: str, span: BlockSpan) -> Callable[[str], bool]:
    prefixes = tuple(f"{layers_path}.{block}." for block in span)
    return lambda name: name.startswith(prefixes)


def _needed(
    checkpoint: Weights, model: PreTrainedModel, device: torch.device | str, keep: Callable[[str], bool]
) -> list[str]:
    """Tensors of the checkpoint that end up, under the names that transformers gives them, where `keep` says yes."""
    return [stored for stored, name in _renamed(checkpoint, model, device).items() if keep(name)]


def _renamed(checkpoint: Weights, model: PreTrainedModel, device: torch.device | str) -> dict[str, str]:
    """Every tensor of the checkpoint, and the name that transformers gives it."""
    conversions = get_model_conversion_mapping(model, hf_quantizer=quantizer_of(model.config, device))
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    known = model.state_dict()

    def renamed(name: str) -> str:
        new, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if new not in known and name in known:
            return name
        return cast(str, new)

    return {name: renamed(name) for name in checkpoint.weight_map}


def _read(
    folder: Path,
    config: PretrainedConfig,
    anatomy: Anatomy,
    keep: Callable[[str], bool],
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str,
    label: str,
    progress: Progress | None,
) -> PreTrainedModel:
    """The whole model with the weights that `keep` names; all others are hollow and were never read."""
    base = anatomy.model_class
    made_whole = (getattr(config, "quantization_config", None) or {}).get("dequantize", False)
    dtypes: dict[str, torch.dtype] = {}

    def state_dict(self: PreTrainedModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kept = {name: tensor for name, tensor in base.state_dict(self, *args, **kwargs).items() if keep(name)}
        dtypes.update(
            {name: tensor.dtype for name, tensor in kept.items() if name not in dtypes}
        )  # before they are read
        return kept

    def finalize(model: PreTrainedModel, load_config: Any, found: Any) -> Any:
        _refuse(folder, {*found.conversion_errors, *(name for name, *_ in found.mismatched_keys)})
        for name, weight in model.named_parameters():
            if not keep(name):
                weight._is_hf_initialized = True  # so that nothing is drawn at random for what stays hollow
        return base._finalize_model_loading(model, load_config, found)

    # transformers loads what the model's state dict names. Class and module names stay true: its tables go by them.
    partial: Any = type(
        base.__name__,
        (base,),
        {
            "state_dict": state_dict,
            "_finalize_model_loading": staticmethod(finalize),
            "_keys_to_ignore_on_load_unexpected": [".*"],
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
        },
    )
    target = torch.device(device)
    sizes = {name: size for name, size in anatomy.weights.items() if keep(name)}
    with _shown(progress or Silent(), f"loading {label}", sizes):
        model, found = partial.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=None if target.type == "cpu" else {"": target},
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    _refuse(folder, found["missing_keys"])
    if made_whole:
        _cast(model, dtypes)
    model.__class__ = base
    hollow_meta(model, target)
    return cast(PreTrainedModel, model)


def _cast(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give weights the dtypes that `dtypes` and the architecture name: where transformers makes others whole, it leaves
    those that were not quantized in the checkpoint's dtype."""
    kept = model._get_dtype_plan(model.config.dtype)
    for name, weight in model.named_parameters():
        if name in dtypes and weight.is_floating_point():
            wanted = next((dtype for part, dtype in kept.items() if re.search(part, name)), dtypes[name])
            weight.data = weight.data.to(wanted)


def _refuse(folder: Path, broken: Collection[str]) -> None:
    """Raises CorruptCheckpoint when there are weights that transformers could not make from the checkpoint."""
    if broken:
        raise CorruptCheckpoint(
            f"{len(broken)} weights, for example {min(broken)}, are missing from {folder} or do not fit its config.json"
        )


@contextlib.contextmanager
def _shown(progress: Progress, label: str, sizes: Mapping[str, int]) -> Iterator[None]:
    """Tell `progress`, instead of transformers' own bar, about the weights that are loaded meanwhile."""

    def told(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        progress.start(label, sum(sizes.values()))
        for name, item in items:
            yield name, item
            progress.advance(sizes.get(name, 0))
        progress.done()

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return told(args[0]) if kwargs.get("desc") == "Loading weights" else factory(*args, **kwargs)

    previous = set_tqdm_hook(hook)
    try:
        yield
    finally:
        set_tqdm_hook(previous)

"""Any GGUF file that transformers has a mapping for → a Hugging Face checkpoint folder in the cache, made once.

Owns the walk over the file, weight by weight and, of large ones, piece by piece: a piece is in memory at a time, or a
matrix that transformers lays out anew, while transformers' own `gguf_file=` loading holds the whole model. Names,
layouts, configuration and tokenizer are transformers' mapping. Values that were quantized are kept as bfloat16, others
as what they are. (The built-in model's conversion, whose every byte is pinned, is its own: `gguf_conversion`.)
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    GGUFTensor,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from peers.errors import UnsupportedModel
from peers.model.gguf_conversion import write_index
from peers.model.hashes import sha256_of
from peers.model.progress import Progress
from peers.model.safetensors_header import encode_header
from peers.model.storage import locked, require_disk
from peers.model.support import build_on_meta, language_config, one_line

logger = logging.getLogger(__name__)

VERSION = 1
"""Of what this module makes of a file; another one is another folder, and another model id."""
KEPT = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
UNPACKED = torch.bfloat16
PIECE = 1 << 22
"""Values that are in memory at a time, in float32, a few times over; more where one row or one expert has more."""
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BLOCK = re.compile(r"blk\.(\d+)\.")


def converted(gguf: Path, cache: Path, progress: Progress, accept: Callable[[Path], None]) -> Path:
    """The folder of the checkpoint that `gguf` holds, converted on the first call.

    `accept` sees the folder with the configuration before any tensor is read. Raises UnsupportedModel for a file, an
    architecture or a tokenizer that transformers does not read as GGUF, NotEnoughDisk, and what `accept` raises.
    """
    folder = cache / "gguf" / f"{sha256_of(gguf, cache=cache, progress=progress)[:32]}-{VERSION}"
    with locked(folder):
        if folder.is_dir():
            accept(folder)
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
            draft = Path(work, "result")
            draft.mkdir()
            _convert(gguf, draft, progress, accept)
            draft.rename(folder)
    logger.info("converted %s in %s", gguf.name, folder)
    return folder


def _convert(gguf: Path, folder: Path, progress: Progress, accept: Callable[[Path], None]) -> None:
    try:
        reader = GGUFReader(gguf)
        parsed = load_gguf_checkpoint(gguf)
        config = language_config(
            AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False)
        )
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
        )
    except UnsupportedModel:
        raise
    except Exception as error:  # a stranger's file runs through transformers' own mapping
        raise UnsupportedModel(
            f"transformers cannot read {gguf.name} as GGUF ({one_line(error)})",
            hint="look for the same model as safetensors; a newer transformers may know its architecture",
        ) from error
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    accept(folder)
    model = build_on_meta(config)
    architecture = reader.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed["config"])
    names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    shards = [[weight for weight in group if weight.name in shapes] for group in _groups(reader, names)]
    found = {  # experts are made of several tensors, and would be zeros in part without one of them
        weight.name for weight in itertools.chain(*shards) if weight.elements >= math.prod(shapes[weight.name])
    }
    untied = {name for name, _ in model.named_parameters() if name not in model.all_tied_weights_keys}
    if absent := untied - found:
        raise _refusal(gguf, absent)
    sizes = {weight.name: math.prod(shapes[weight.name]) * weight.dtype.itemsize for weight in itertools.chain(*shards)}
    total_bytes = sum(sizes.values())
    require_disk(folder, total_bytes, f"converting {gguf.name}")
    progress.start(f"converting {gguf.name}", total_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        path = folder / f"model-{number:05}.safetensors"
        with open(path, "wb") as file:
            file.write(encode_header((weight.name, _NAMES[weight.dtype], shapes[weight.name]) for weight in shard))
            for weight in shard:
                pieces = _pieces(weight, processor, names, parsed)
                if not _written(file, pieces, shapes[weight.name], progress.advance):
                    raise _refusal(gguf, {weight.name})
        weight_map |= dict.fromkeys((weight.name for weight in shard), path.name)
    progress.done()
    write_index(folder, weight_map, total_bytes)


def _written(file: BinaryIO, pieces: Iterator[Tensor], shape: tuple[int, ...], advance: Callable[[int], None]) -> bool:
    """Write what is, piece by piece, one weight; False as soon as that is not of `shape`."""
    rows = 0
    for piece in pieces:
        rows += len(piece)
        if piece.shape[1:] != shape[1:] or (rows,) > shape[:1]:
            return False
        file.write(_bytes(piece))
        advance(piece.nbytes)
    return (rows,) == shape[:1]


def _refusal(gguf: Path, names: set[str]) -> UnsupportedModel:
    return UnsupportedModel(
        f"{len(names)} weights of the model, for example {min(names)}, are not in {gguf.name} in that shape",
        hint="a file in several parts must be merged first (llama-gguf-split --merge); "
        "else look for the same model as safetensors",
    )


@dataclass(frozen=True, slots=True)
class _Weight:
    """One of the model's, and the tensors of the file that it is made of (of experts, several)."""

    name: str
    sources: list[Any]

    @property
    def elements(self) -> int:
        return sum(math.prod(map(int, source.shape)) for source in self.sources)

    @property
    def dtype(self) -> torch.dtype:
        return functools.reduce(
            torch.promote_types, (KEPT.get(source.tensor_type, UNPACKED) for source in self.sources)
        )


def _groups(reader: GGUFReader, names: Mapping[str, str]) -> Iterator[list[_Weight]]:
    """What the file's tensors become: first what is outside the blocks, then block by block. What an architecture
    computes for itself, such as rotary frequencies, becomes nothing."""
    groups: dict[int, dict[str, _Weight]] = {}
    for tensor in reader.tensors:
        block = _BLOCK.match(tensor.name)
        group = groups.setdefault(int(block[1]) if block else -1, {})
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is not None:
            group.setdefault(name, _Weight(name, [])).sources.append(tensor)
    yield from (list(group.values()) for _, group in sorted(groups.items()))


def _pieces(
    weight: _Weight, processor: TensorProcessor, names: dict[str, str], parsed: dict[str, Any]
) -> Iterator[Tensor]:
    """The weight, cut along its first dimension, in its new layout; as `load_gguf_checkpoint` makes it, as a whole.

    It is cut between experts, each of which is laid out alone, and where sources are passed through as they are.
    """
    *inner, rows = (int(size) for size in weight.sources[0].shape)  # GGUF names the innermost dimension first
    step = max(1, PIECE // max(1, math.prod(inner)))
    alone = len(inner) > 1 or (len(inner) == 1 and _passed(weight, processor, names, parsed))
    if not alone or any(int(source.shape[-1]) != rows for source in weight.sources):
        step = max(1, rows)
    for start in range(0, rows, step):
        parsed["tensors"] = merged = {}  # where processors put what they make of several tensors
        for source in weight.sources:
            values = dequantize(source.data[slice(start, start + step) if step < rows else ...], source.tensor_type)
            result = _processed(values, source, processor, names, parsed)
            if result.name is not None:
                merged[weight.name] = torch.from_numpy(np.array(result.weights))
        if weight.name in merged:
            yield merged[weight.name].to(weight.dtype).contiguous()


def _passed(weight: _Weight, processor: TensorProcessor, names: dict[str, str], parsed: dict[str, Any]) -> bool:
    """Whether transformers leaves these matrices as they are, whatever is in them."""
    parsed["tensors"] = {}
    for source in weight.sources:
        blank = np.broadcast_to(np.float32(0), tuple(map(int, reversed(source.shape))))  # costs no memory
        result = _processed(blank, source, processor, names, parsed)
        if result.name is None or result.weights is not blank:
            return False
    return True


def _processed(
    values: Any, source: Any, processor: TensorProcessor, names: dict[str, str], parsed: dict[str, Any]
) -> GGUFTensor:
    return processor.process(weights=values, name=source.name, tensor_key_mapping=names, parsed_parameters=parsed)


def _bytes(values: Tensor) -> memoryview:
    return values.reshape(-1).view(torch.uint8).numpy().data

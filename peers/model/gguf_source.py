"""Any GGUF file that transformers has a mapping for → a Hugging Face checkpoint folder in the cache, made once.

Owns the walk over the file, block by block: one block's tensors are in memory at a time, while transformers' own
`gguf_file=` loading holds the whole model. Names, layouts, configuration and tokenizer are transformers' mapping.
Values that were quantized are kept as bfloat16, others as what they are. (The built-in model has a conversion of its
own, `gguf_conversion`, whose every byte is pinned.)
"""

from __future__ import annotations

import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from peers.errors import UnsupportedModel
from peers.model.gguf_conversion import write_index, write_shard
from peers.model.hashes import sha256_of
from peers.model.progress import Progress
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
    total_bytes = sum(
        math.prod(map(int, tensor.shape)) * KEPT.get(tensor.tensor_type, UNPACKED).itemsize for tensor in reader.tensors
    )
    require_disk(folder, total_bytes, f"converting {gguf.name}")
    progress.start(f"converting {gguf.name}", total_bytes)
    expected = {
        name: weight.shape for name, weight in model.named_parameters() if name not in model.all_tied_weights_keys
    }
    weight_map: dict[str, str] = {}
    written_bytes = 0
    for number, tensors in enumerate(_groups(reader)):
        file = f"model-{number:05}.safetensors"
        values = _converted(tensors, processor, names, parsed)
        written_bytes += write_shard(
            folder / file,
            [(name, _NAMES[value.dtype], tuple(value.shape), _bytes(value)) for name, value in values.items()],
            progress.advance,
        )
        weight_map |= dict.fromkeys(values, file)
        expected = {
            name: shape for name, shape in expected.items() if name not in values or values[name].shape != shape
        }
    progress.done()
    if expected:
        raise UnsupportedModel(
            f"{len(expected)} weights of the model, for example {min(expected)}, are not in {gguf.name} in that shape",
            hint="a file in several parts must be merged first (llama-gguf-split --merge); "
            "else look for the same model as safetensors",
        )
    write_index(folder, weight_map, written_bytes)


def _groups(reader: GGUFReader) -> Iterator[list[Any]]:
    """The file's tensors: those outside the blocks, then block by block."""
    groups: dict[int, list[Any]] = {}
    for tensor in reader.tensors:
        block = _BLOCK.match(tensor.name)
        groups.setdefault(int(block[1]) if block else -1, []).append(tensor)
    yield from (group for _, group in sorted(groups.items()))


def _converted(
    tensors: list[Any], processor: TensorProcessor, names: dict[str, str], parsed: dict[str, Any]
) -> dict[str, Tensor]:
    """Under their new names and in their new layout; as `load_gguf_checkpoint` does it for a whole file."""
    parsed["tensors"] = merged = {}  # where processors put what they make of several tensors
    dtypes: dict[str, torch.dtype] = {}
    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        result = processor.process(weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed)
        new = names.get(result.name or tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if new is None:
            continue  # what the architecture computes for itself, such as rotary frequencies
        if result.name is not None:
            merged[new] = torch.from_numpy(np.array(result.weights))
        dtype = KEPT.get(tensor.tensor_type, UNPACKED)
        dtypes[new] = torch.promote_types(dtypes.get(new, dtype), dtype)
    return {name: values.to(dtypes.get(name, UNPACKED)).contiguous() for name, values in merged.items()}


def _bytes(values: Tensor) -> memoryview:
    return values.reshape(-1).view(torch.uint8).numpy().data

"""The files of a Hugging Face checkpoint: their names, and what their JSON must look like.

Knows a folder on this disk, not where it came from.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from peers.errors import CorruptCheckpoint, UnknownModel, UnsupportedModel
from routing.records import MAX_BLOCKS

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

COMPANION_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})
"""Configuration, tokenizer and templates; nothing that is code, and no weights."""

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_MAX_INDEX_BYTES = 64 << 20
_MAX_CONFIG_BYTES = 4 << 20
"""Some name a few ten thousand labels. More would take gigabytes to read."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def is_companion(name: str) -> bool:
    """Whether a file belongs beside the weights in every folder that we hand out."""
    return Path(name).suffix in COMPANION_SUFFIXES and not name.startswith(".") and not name.endswith(".index.json")


def weight_files(folder: Path, present: Collection[str], name: str) -> list[str]:
    """The safetensors files that make up the checkpoint, of those `present` (names; they need not be in `folder` yet).

    As transformers does, one `model.safetensors` goes before an index. Raises UnsupportedModel when there are only
    pickles, UnknownModel when there is nothing, CorruptCheckpoint.
    """
    if SINGLE_FILE in present:
        return [SINGLE_FILE]
    if INDEX in present:
        return sorted(set(read_index(folder).values()))
    if pickles := sorted(file for file in present if Path(file).suffix in _PICKLE_SUFFIXES):
        raise UnsupportedModel(
            f"{name} offers its weights as {pickles[0]}, a pickle that could run code when it is read",
            hint="only safetensors are read: look for a converted copy, or save it with transformers' save_pretrained",
        )
    raise UnknownModel(f"{name} holds neither {SINGLE_FILE} nor {INDEX}", hint="is the checkpoint complete?")


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name → file name, each a plain `*.safetensors` in the same folder. Raises CorruptCheckpoint."""
    try:
        index = msgspec.json.decode(_bounded(folder / INDEX, _MAX_INDEX_BYTES), type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{folder / INDEX} cannot be read: {error}") from error
    for file in set(index.weight_map.values()):
        if "/" in file or "\\" in file or file.startswith(".") or not file.endswith(".safetensors"):
            raise CorruptCheckpoint(f"{folder / INDEX} names {file[:80]!r}, which is not a safetensors file beside it")
    return index.weight_map


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as it stands. Raises CorruptCheckpoint."""
    try:
        text = _bounded(folder / CONFIG, _MAX_CONFIG_BYTES)
        config = json.loads(text)  # not msgspec: configurations in the wild hold Infinity
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CorruptCheckpoint(f"{folder / CONFIG} is not a JSON object")
    for part in (config, config.get("text_config")):  # some architectures make a list as long as that at once
        blocks = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(blocks, int) and blocks > MAX_BLOCKS:
            raise CorruptCheckpoint(
                f"{folder / CONFIG} claims {blocks} blocks, and at most {MAX_BLOCKS} can be announced"
            )
    return config


def _bounded(path: Path, max_bytes: int) -> bytes:
    if path.stat().st_size > max_bytes:
        raise CorruptCheckpoint(f"{path} is larger than any such file should be")
    return path.read_bytes()

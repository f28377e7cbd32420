"""What makes two checkpoints the same: the configuration that shapes the computation, and every weight's bytes.

Knows nothing of where a checkpoint comes from or how its files were hashed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from routing.ids import ModelId

_LABEL = b"hiveswarm checkpoint v1\n"

VOLATILE_FIELDS = frozenset(
    {
        # who wrote the file, and from where
        "transformers_version",
        "_name_or_path",
        "_commit_hash",
        "auto_map",  # code of the repository, which never runs here
        # hints for the loader: the weights carry their own dtype, and a peer announces the one it computes in
        "dtype",
        "torch_dtype",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        # what a call returns, not what it computes
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    }
)
"""Config fields that differ between copies of one model without changing any number it computes.

Named one by one: a private field can matter (Gemma 3's `_sliding_window_pattern` chooses each layer's mask)."""

_VERBATIM = "quantization_config"
"""Kept whole: there, even a dtype decides what is computed."""


def canonical_config(config: Mapping[str, Any]) -> bytes:
    """`config.json`, parsed, as bytes that do not depend on the order of fields or on VOLATILE_FIELDS at any depth."""
    return json.dumps(_stripped(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def model_id(config: Mapping[str, Any], weight_hashes: Mapping[str, str]) -> ModelId:
    """`weight_hashes`: the name of every weight file of the checkpoint → its SHA-256 in hexadecimal."""
    weights = json.dumps(weight_hashes, sort_keys=True, separators=(",", ":")).encode()
    return ModelId(hashlib.sha256(_LABEL + canonical_config(config) + b"\n" + weights).digest())


def _stripped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: item if key == _VERBATIM else _stripped(item)
            for key, item in value.items()
            if key not in VOLATILE_FIELDS
        }
    if isinstance(value, (list, tuple)):
        return [_stripped(item) for item in value]
    return value

"""One Llama-family GGUF file → a Hugging Face checkpoint folder that is the same bytes on every machine.

Owns the correspondence of names and layouts. Deterministic by construction (NumPy element-wise float32 arithmetic, our
own header writer, no library's version in any file), so the caller can pin the hash of every shard; one shard is in
memory at a time. Equal to transformers' `from_pretrained(gguf_file=…)`, which needs four times the time and memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

from peers.model.layout import INDEX
from peers.model.safetensors_header import encode_header

Tensor = np.ndarray[Any, np.dtype[np.float32]]

_OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.v_proj": "attn_v",
}
_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def convert(
    gguf: Path, folder: Path, config: Mapping[str, Any], blocks_per_shard: int, advance: Callable[[int], None]
) -> list[str]:
    """Write config, generation config, tokenizer, chat template and float32 safetensors shards with their index.

    The first shard holds what is outside the blocks, each further one `blocks_per_shard` blocks. `advance` hears of
    the bytes written. Returns the names of the shards.
    """
    reader = GGUFReader(gguf)
    num_blocks: int = config["num_hidden_layers"]
    shards = [_OUTSIDE]
    for start in range(0, num_blocks, blocks_per_shard):
        blocks = range(start, min(start + blocks_per_shard, num_blocks))
        shards.append(
            {
                f"model.layers.{block}.{ours}.weight": f"blk.{block}.{theirs}.weight"
                for block in blocks
                for ours, theirs in _IN_BLOCK.items()
            }
        )
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file, shard in zip(names, shards, strict=True):
        tensors = {ours: _values(stored[theirs], config) for ours, theirs in shard.items()}
        entries = [(name, "F32", values.shape, values.data) for name, values in tensors.items()]
        total_bytes += write_shard(folder / file, entries, advance)
        weight_map |= dict.fromkeys(tensors, file)
    write_index(folder, weight_map, total_bytes)
    _write_json(folder / "config.json", config)
    special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special_ids)
    _write_tokenizer(reader, folder, config)
    return names


def _values(stored: Any, config: Mapping[str, Any]) -> Tensor:
    values: Tensor = np.ascontiguousarray(dequantize(stored.data, stored.tensor_type), dtype="<f4")
    if stored.name.endswith("attn_q.weight"):
        return _unpermuted(values, config["num_attention_heads"])
    if stored.name.endswith("attn_k.weight"):
        return _unpermuted(values, config["num_key_value_heads"])
    return values


def _unpermuted(values: Tensor, heads: int) -> Tensor:
    """GGUF interleaves the two halves of each head's rotary pairs (llama.cpp, convert_hf_to_gguf.py, `permute`)."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, values.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def write_shard(
    path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...], memoryview]], advance: Callable[[int], None]
) -> int:
    """Write `(name, dtype as safetensors calls it, shape, values)`; returns the bytes of all values."""
    with open(path, "wb") as file:
        file.write(encode_header((name, dtype, shape) for name, dtype, shape, _ in tensors))
        for *_, values in tensors:
            file.write(values)
            advance(values.nbytes)
    return sum(values.nbytes for *_, values in tensors)


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    _write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _write_tokenizer(reader: GGUFReader, folder: Path, config: Mapping[str, Any]) -> None:
    """Byte-level BPE that splits digits first, which is what the file calls the pre-tokenizer "smollm"."""
    tokens: Sequence[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    merges: Sequence[str] = reader.fields["tokenizer.ggml.merges"].contents()
    types: Sequence[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": token_id, "content": tokens[token_id], **plain}
                for token_id, kind in enumerate(types)
                if kind == _CONTROL_TOKEN
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
            },
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: token_id for token_id, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in merges],
            },
        },
    )
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "pad_token_id"}
    _write_json(
        folder / "tokenizer_config.json",
        {name: tokens[config[key]] for name, key in names.items()}
        | {
            "unk_token": tokens[reader.fields["tokenizer.ggml.unknown_token_id"].contents()],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (folder / "chat_template.jinja").write_text(
        reader.fields["tokenizer.chat_template"].contents(), encoding="utf-8", newline="\n"
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")

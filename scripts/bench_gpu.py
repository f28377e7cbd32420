#!/usr/bin/env python3
"""What `scripts/bench --device cuda` needs beside the rest: an 8B-shaped model, and how fast the card moves memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

EIGHT_B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
CACHE_TOKENS = 16_384
"""Of every peer, each of which would take what is free of the card they share; enough for 64 sessions."""
SESSIONS = 64
BANDWIDTH = "decode bandwidth used / measured copy bandwidth"
MUST = {BANDWIDTH: 0.6}
AT_MOST = {"gap while a 4,000-token prompt arrives / undisturbed": 2.0}
COPIED_BYTES = 1 << 30
"""Far more than any cache of a card holds."""


def write_random(folder: Path, settings: dict[str, object]) -> None:
    """A random bfloat16 Llama, made and written shard by shard: a block at a time, and what is outside the blocks."""
    config = LlamaConfig(**settings, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).named_parameters()}
    generator, shards = torch.Generator().manual_seed(0), dict[str, list[str]]()
    for name in shapes:
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "ends", []).append(name)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map, total_bytes = dict[str, str](), 0
    for label, names in shards.items():
        file = f"model-{label}.safetensors"
        shard = {name: _drawn(shapes[name], generator) for name in names}
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total_bytes += sum(weight.nbytes for weight in shard.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)  # last: a folder that has it is whole


def _drawn(shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)


def token_bytes(model: torch.nn.Module) -> int:
    """What one token makes a device read of a model: every weight once, but of embeddings that are apart a row."""
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is model.get_output_embeddings().weight
    weights = sum(weight.nbytes for weight in model.parameters())
    return weights if tied else weights - embeddings.nbytes


def copy_bandwidth(
    device: str, *, num_bytes: int = COPIED_BYTES, rounds: int = 20, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Bytes per second that one large copy within the device's memory reads and writes, in the fastest of `rounds`."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best_s = float("inf")
    for _ in range(rounds):
        synchronize(device)
        started_s = clock()
        target.copy_(source)
        synchronize(device)
        best_s = min(best_s, clock() - started_s)
    return 2 * num_bytes / best_s


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)

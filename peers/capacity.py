"""How much of a model this machine can host: device, dtype, blocks and cache from what memory allows.

Owns the arithmetic; sizes come from the architecture alone, so nothing is downloaded or loaded for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch
from transformers import PretrainedConfig

from peers.errors import PeerTooSmall
from peers.model.quantization import NONE, bytes_in
from peers.model.quantization import check as check_quantization
from peers.model.support import examine
from peers.runtime.engine import EngineConfig
from peers.wire.tensors import DTYPES, NAMES
from routing.errors import CallerError, InvalidSpan
from routing.ids import BlockSpan

PROCESS_BYTES = 700 << 20
"""What a peer's process needs besides weights and KV pool."""
MEMORY_SHARE = 0.8
"""Of the memory that is free now, what a peer takes unless told otherwise."""
CACHE_TOKENS_DEFAULT = 16_384
CACHE_TOKENS_MIN = 256
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What this peer will be."""

    device: torch.device
    dtype: torch.dtype
    num_blocks: int
    """Of the whole model."""
    max_blocks: int
    """That this peer can host."""
    cache_tokens: int
    quantization: str = NONE

    @property
    def dtype_name(self) -> str:
        return NAMES[self.dtype]


def check_options(*, dtype: str, device: str, cache_tokens: int | None, quantization: str = NONE) -> None:
    """What can be refused before the model is known: dtype, device, quantization, cache. Raises CallerError."""
    check_quantization(quantization)
    _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise CallerError(f"unknown dtype {dtype!r}", hint=f"use auto, {', '.join(DTYPES)}")
    if cache_tokens is not None:
        try:
            EngineConfig(cache_tokens=cache_tokens)
        except ValueError as error:
            raise CallerError(str(error), hint="give --cache-tokens more, or leave it out") from error


def plan_capacity(
    config: PretrainedConfig,
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_memory_bytes: int | None = None,
    cache_tokens: int | None = None,
    blocks: BlockSpan | None = None,
    num_blocks: int | None = None,
    quantization: str = NONE,
) -> Plan:
    """Raises what `check_options` raises, InvalidSpan for blocks that the model does not have, PeerTooSmall when memory
    does not hold what is asked, or not even one block."""
    check_options(dtype=dtype, device=device, cache_tokens=cache_tokens, quantization=quantization)
    anatomy = examine(config)
    total_blocks = anatomy.num_blocks
    if blocks is not None and blocks.end > total_blocks:
        raise InvalidSpan(f"blocks {blocks}, but this model has {total_blocks}", hint=f"choose within 0:{total_blocks}")
    if num_blocks is not None and not 0 < num_blocks <= total_blocks:
        raise InvalidSpan(f"{num_blocks} blocks, but this model has {total_blocks}", hint=f"choose 1 to {total_blocks}")
    chosen_device = _device(device)
    stored_dtype: torch.dtype = getattr(config, "dtype", None) or torch.float32
    chosen_dtype = _dtype(dtype, chosen_device, stored_dtype)
    budget = max_memory_bytes if max_memory_bytes is not None else int(_free_bytes(chosen_device) * MEMORY_SHARE)
    budget -= PROCESS_BYTES if chosen_device.type == "cpu" else 0
    scale = chosen_dtype.itemsize / stored_dtype.itemsize
    block_bytes = int(
        max(
            sum(size for name, size in anatomy.weights.items() if name.startswith(f"{anatomy.layers_path}.{block}."))
            for block in range(total_blocks)
        )
        * scale
    )
    budget -= block_bytes if quantization != NONE else 0  # each block stands here whole for a moment
    block_bytes = bytes_in(block_bytes, chosen_dtype.itemsize, quantization)
    token_bytes = max(shape.elements for shape in anatomy.kv_shapes) * chosen_dtype.itemsize
    wanted = len(blocks) if blocks is not None else num_blocks
    if cache_tokens is None:
        affordable = int((budget / (wanted or 1) - block_bytes) / token_bytes)
        cache_tokens = max(CACHE_TOKENS_MIN, min(CACHE_TOKENS_DEFAULT, affordable))
    max_blocks = min(total_blocks, int(budget // (block_bytes + cache_tokens * token_bytes)))
    if max_blocks < (wanted or 1):
        raise PeerTooSmall(
            f"{wanted or 1} block(s) of this model with a cache of {cache_tokens} tokens take "
            f"{_mib((wanted or 1) * (block_bytes + cache_tokens * token_bytes) + PROCESS_BYTES)}, "
            f"this peer may use {_mib(budget + PROCESS_BYTES)}",
            hint="host fewer blocks (--num-blocks), a smaller --cache-tokens or dtype, try --quantize int8 or int4, "
            "or allow more --max-memory",
        )
    return Plan(
        device=chosen_device,
        dtype=chosen_dtype,
        num_blocks=total_blocks,
        max_blocks=wanted or max_blocks,
        cache_tokens=cache_tokens,
        quantization=quantization,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not _DEVICE.fullmatch(name):
        raise CallerError(f"unknown device {name!r}", hint="use auto, cpu, cuda, cuda:1 or mps")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise CallerError(
            f"device {name} is not here ({torch.cuda.device_count()} CUDA devices)", hint="use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise CallerError("device mps is not here", hint="use --device cpu")
    return device


def _dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    if stored not in NAMES:
        return torch.float32
    # half precision without hardware for it is slower on a CPU than float32, and float16 loses range
    if device.type == "cpu" and (stored == torch.float16 or not _fast_bfloat16()):
        return torch.float32
    return stored


def _fast_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"

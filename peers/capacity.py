"""How much of a model this machine can host: device, dtype, blocks and cache from what memory allows.

Owns the arithmetic; sizes come from the architecture alone, so nothing is downloaded or loaded for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from transformers import PretrainedConfig

from peers import platform
from peers.errors import PeerTooSmall
from peers.model.cutting import max_positions
from peers.model.lora import AdapterFolder
from peers.model.prequantized import form_loaded
from peers.model.quantization import NONE, bytes_in
from peers.model.quantization import check as check_quantization
from peers.model.support import examine
from peers.runtime.sizing import Request, Share, Sizes, divide
from peers.runtime.works import EngineConfig
from peers.wire.messages import UNDER_WAY_BYTES
from peers.wire.tensors import DTYPES, NAMES
from routing.errors import CallerError, InvalidSpan
from routing.ids import BlockSpan, BlockSpans

PROCESS_BYTES = 700_000_000
"""What a peer's process needs besides weights and KV pool, a forward of FORWARD_BYTES included."""
FORWARD_BYTES = 200_000_000
"""What is set aside for the largest forward before it was measured, and at least."""
JOURNAL_SHARE = 1 / 16
"""Of what a peer may use beyond its process, the most for its journal (`serving.journal`); JOURNAL_BYTES at most."""
JOURNAL_BYTES = 256 << 20
TRAINING_SHARE = 1 / 16
"""Likewise for what is kept for backwards (`serving.training`)."""
TRAINING_BYTES = 256 << 20
ADAPTER_SHARE = 1 / 16
"""Likewise for adapters that clients send (`serving.adapters`)."""
ADAPTER_BYTES = 256 << 20
IN_FLIGHT_SHARE = 1 / 32
"""Likewise for what came and was not computed yet (`serving.admission`), works of training above all; but never less
than IN_FLIGHT_BYTES_MIN, which are among PROCESS_BYTES."""
IN_FLIGHT_BYTES = 512 << 20
IN_FLIGHT_BYTES_MIN = 2 * UNDER_WAY_BYTES
"""Of which one client may have half."""
GRAPHS_SHARE = 1 / 32
"""Of what a peer may use of a GPU, for CUDA graphs of steps (`runtime.graphs`), of all of its engines together."""
MEMORY_SHARE = 0.8
"""Of the memory that is free now, what a peer takes unless told otherwise."""
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What this peer will be."""

    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    num_blocks: int
    """Of the whole model."""
    quantization: str = NONE
    request: Request
    share: Share
    """What came of it."""
    forwards: int = 1
    """That may run on one device at the same time: every span has an engine of its own."""
    journal_bytes: int = JOURNAL_BYTES
    """Of host memory, for what sessions sent on."""
    training_bytes: int = 0
    """Of the devices' memory, for what is kept between a forward and its backward; 0: no training."""
    adapter_bytes: int = ADAPTER_BYTES
    """Of host memory, and of each other device's, for adapters that clients send."""
    in_flight_bytes: int = IN_FLIGHT_BYTES
    """Of host memory, for what came and was not computed yet."""
    graph_bytes: int = 0
    """Of each GPU's memory, for the CUDA graphs of each engine."""
    max_memory_bytes: int | None = None
    """What was asked for, on all devices together."""

    @property
    def max_blocks(self) -> int:
        """That this peer can host."""
        return sum(self.share.blocks)

    @property
    def cache_tokens(self) -> int:
        return self.share.cache_tokens

    @property
    def forward_bytes(self) -> int:
        """Set aside, beside weights and pool, for each forward that may run."""
        return self.request.sizes.forward_bytes // self.forwards

    @property
    def dtype_name(self) -> str:
        return NAMES[self.dtype]

    @property
    def device_names(self) -> str:
        return ",".join(map(str, self.devices))

    def parts(self, spans: BlockSpans) -> list[tuple[torch.device, BlockSpan]]:
        """Which blocks of `spans`, `max_blocks` together, each device takes; of several spans the later ones go to the
        later devices, and a device may take parts of several."""
        parts, left = [], list(spans)
        for device, blocks in zip(self.devices, self.share.blocks, strict=True):
            while blocks:
                span = left.pop(0)
                end = min(span.end, span.start + blocks)
                parts.append((device, BlockSpan(span.start, end)))
                blocks -= end - span.start
                if end < span.end:
                    left.insert(0, BlockSpan(end, span.end))
        return parts

    def beside(self, forward_bytes: int, *, blocks: BlockSpans | None = None) -> Plan:
        """What remains beside a forward that was found to take so much; `blocks`: which are settled by now.

        Raises PeerTooSmall.
        """
        sizes = replace(self.request.sizes, forward_bytes=self.forwards * max(FORWARD_BYTES, forward_bytes))
        request = replace(self.request, sizes=sizes, blocks=blocks or self.request.blocks)
        return replace(self, request=request, share=_share(request))

    def within(self, limits_bytes: Sequence[int]) -> Plan:
        """The same blocks with what the devices have free now, at most these limits; where they do not fit beside the
        usual reserve, which was kept once, without it. Raises PeerTooSmall."""

        def of(share: float) -> Plan:
            free_bytes = (_limit_bytes(device, self.devices, self.max_memory_bytes, share) for device in self.devices)
            request = replace(self.request, limits_bytes=tuple(map(min, limits_bytes, free_bytes)))
            return replace(self, request=request, share=_share(request))

        try:
            return of(MEMORY_SHARE)
        except PeerTooSmall:
            return of(1.0)


def check_options(*, dtype: str, device: str, cache_tokens: int | None, quantization: str = NONE) -> None:
    """What can be refused before the model is known: dtype, device, quantization, cache. Raises CallerError."""
    _devices(device)
    check_quantization(quantization)
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
    blocks: BlockSpans | None = None,
    num_blocks: int | None = None,
    quantization: str = NONE,
    training: bool = False,
    hosted: Iterable[AdapterFolder] = (),
    kept_block_bytes: int | None = None,
) -> Plan:
    """With the adapters `hosted` for everybody, which take their part of every block, and blocks of `kept_block_bytes`
    (`peers.model.loading`) where they keep the checkpoint's own form.

    Raises what `check_options` raises, InvalidSpan for blocks that the model does not have, CallerError for adapters
    that are not of this model or weights that cannot be quantized so, PeerTooSmall when memory does not hold what is
    asked, or not even one block.
    """
    check_options(dtype=dtype, device=device, cache_tokens=cache_tokens, quantization=quantization)
    quantization = form_loaded(config, quantization)
    anatomy = examine(config)
    total_blocks = anatomy.num_blocks
    if blocks is not None and blocks.end > total_blocks:
        raise InvalidSpan(f"blocks {blocks}, but this model has {total_blocks}", hint=f"choose within 0:{total_blocks}")
    if num_blocks is not None and not 0 < num_blocks <= total_blocks:
        raise InvalidSpan(f"{num_blocks} blocks, but this model has {total_blocks}", hint=f"choose 1 to {total_blocks}")
    devices = _devices(device)
    stored_dtype: torch.dtype = getattr(config, "dtype", None) or torch.float32
    chosen_dtype = _dtype(dtype, devices[0], stored_dtype)
    scale = chosen_dtype.itemsize / stored_dtype.itemsize
    whole_block_bytes = int(
        max(
            sum(size for name, size in anatomy.weights.items() if name.startswith(f"{anatomy.layers_path}.{block}."))
            for block in range(total_blocks)
        )
        * scale
    )
    packed = quantization != NONE and kept_block_bytes is None
    block_bytes = kept_block_bytes
    if block_bytes is None:
        block_bytes = bytes_in(whole_block_bytes, chosen_dtype.itemsize, quantization)
    forwards = 1 if blocks is None else len(blocks.parts)
    limits_bytes = tuple(_limit_bytes(one, devices, max_memory_bytes) for one in devices)
    on_host = devices[0].type != "cuda"
    spare_bytes = max(0, sum(limits_bytes) - len(devices) * PROCESS_BYTES)
    journal_bytes = min(JOURNAL_BYTES, int(JOURNAL_SHARE * spare_bytes)) if on_host else JOURNAL_BYTES
    training_bytes = min(TRAINING_BYTES, int(TRAINING_SHARE * spare_bytes)) if training else 0
    adapter_bytes = min(ADAPTER_BYTES, int(ADAPTER_SHARE * spare_bytes))
    in_flight_bytes = min(IN_FLIGHT_BYTES, int(IN_FLIGHT_SHARE * spare_bytes)) if on_host else IN_FLIGHT_BYTES
    in_flight_bytes = max(in_flight_bytes, IN_FLIGHT_BYTES_MIN)
    graph_bytes = 0 if on_host else int(GRAPHS_SHARE * min(limits_bytes)) // forwards
    hosted_bytes = sum(adapter.block_bytes(anatomy.layers_path, total_blocks) for adapter in hosted)
    request = Request(
        limits_bytes=limits_bytes,
        sizes=Sizes(
            block_bytes=block_bytes + hosted_bytes,
            token_bytes=tuple(shape.elements * chosen_dtype.itemsize for shape in anatomy.kv_shapes),
            # where they are packed here, each block stands here whole for a moment
            process_bytes=PROCESS_BYTES
            - FORWARD_BYTES
            + (whole_block_bytes if packed else 0)
            + ((journal_bytes + in_flight_bytes - IN_FLIGHT_BYTES_MIN) // len(devices) if on_host else 0)
            + training_bytes // len(devices)
            + (adapter_bytes // len(devices) if on_host else adapter_bytes)
            + forwards * graph_bytes,
            forward_bytes=forwards * FORWARD_BYTES,
        ),
        max_positions=max_positions(config),
        windows=anatomy.windows,
        blocks=num_blocks if blocks is None else blocks,
        cache_tokens=cache_tokens,
    )
    return Plan(
        devices=devices,
        dtype=chosen_dtype,
        num_blocks=total_blocks,
        quantization=quantization,
        request=request,
        share=_share(request),
        forwards=forwards,
        journal_bytes=journal_bytes,
        training_bytes=training_bytes,
        adapter_bytes=adapter_bytes,
        in_flight_bytes=in_flight_bytes,
        graph_bytes=graph_bytes,
        max_memory_bytes=max_memory_bytes,
    )


def _share(request: Request) -> Share:
    share = divide(request)
    if not share.fits(request):
        needed_bytes = sum(share.num_bytes(request, blocks) for blocks in share.blocks if blocks)
        raise PeerTooSmall(
            f"{sum(share.blocks)} block(s) of this model with a cache of {share.cache_tokens} tokens take "
            f"{_mib(needed_bytes)}, this peer may use {_mib(sum(request.limits_bytes))}",
            hint="host fewer blocks (--num-blocks), a smaller --cache-tokens or dtype, try --quantize int8 or int4, "
            "or allow more --max-memory",
        )
    return share


def _limit_bytes(
    device: torch.device, devices: Sequence[torch.device], max_memory_bytes: int | None, share: float = MEMORY_SHARE
) -> int:
    """What this one of `devices`, of which the CPU may be several, may use; together they may use the maximum, or this
    share of what is free."""
    free_bytes = _free_bytes(device) // devices.count(device)
    if max_memory_bytes is None:
        return int(free_bytes * share)
    return min(max_memory_bytes // len(devices), free_bytes)


def _devices(names: str) -> tuple[torch.device, ...]:
    """`auto`: every GPU of the kind of the first, which is the fastest kind; parts of the same size suit no others."""
    if names == "auto" and torch.cuda.is_available():
        kinds = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return tuple(torch.device("cuda", index) for index, kind in enumerate(kinds) if kind == kinds[0])
    devices = tuple(_device(name) for name in names.split(","))
    if len({device.type for device in devices}) > 1:
        raise CallerError(f"{names} are devices of different kinds", hint="use several of one kind: cuda:0,cuda:1")
    if devices[0].type != "cpu" and len({device.index or 0 for device in devices}) < len(devices):
        raise CallerError(f"{names} names a device twice", hint="give each device once")
    return devices


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not _DEVICE.fullmatch(name):
        raise CallerError(f"unknown device {name!r}", hint="use auto, cpu, cuda, cuda:1, mps or cuda:0,cuda:1")
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
    return min(int(psutil.virtual_memory().available), _container_bytes())


def _container_bytes() -> int:
    """What the container has left, its file caches included; no limit where there is none."""
    try:
        limit, used = (int((platform.CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (platform.CONTAINER / "memory.stat").read_text().splitlines())
        return limit - used + int(statistics["active_file"]) + int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):  # no container, or "max"
        return sys.maxsize


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"

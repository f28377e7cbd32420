"""Probes of earlier starts, so that a start need not measure what is known: one small file for each kind of start.

A probe holds for a week, and for an hour if other programs disturbed it. Drivers, cooling and neighbours change a
machine slowly, and clients go by the times that they see themselves, so that an old probe misleads nobody for long; a
new one costs a start two seconds.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from peers.model.storage import write_atomically
from peers.runtime.probe import Probe
from routing.ids import ModelId
from routing.version import VERSION

LIFETIME_S = 7 * 86_400.0
DISTURBED_LIFETIME_S = 3600.0


class _Kept(msgspec.Struct):
    measured_at_s: float
    probe: Probe


def probe_file(
    cache: Path,
    model: ModelId,
    blocks: int,
    *,
    dtype: str,
    quantization: str,
    devices: Sequence[torch.device],
    threads: int,
) -> Path:
    """Where the probe of such a start is kept below `cache`; machines with the same home directory do not share it."""
    facts = (
        model.hex,
        blocks,
        dtype,
        quantization,
        [str(device) for device in devices],
        threads,
        VERSION,
        torch.__version__,
    )
    key = repr((*facts, platform.node(), platform.machine(), os.cpu_count(), _processor(devices[0])))
    return cache / "probes" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def recall(file: Path, now_s: float) -> Probe | None:
    """What was measured, unless that is too long ago."""
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=_Kept)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None  # never measured, or the note is damaged: measure now
    lifetime_s = DISTURBED_LIFETIME_S if kept.probe.disturbed else LIFETIME_S
    return kept.probe if 0 <= now_s - kept.measured_at_s < lifetime_s else None


def remember(file: Path, probe: Probe, now_s: float) -> None:
    with suppress(OSError):  # the next start measures again
        write_atomically(file, msgspec.json.encode(_Kept(now_s, probe)))


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith("model name")), platform.processor())

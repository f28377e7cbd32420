"""What other programs use of the GPUs on which this peer computes, as NVIDIA's management library (NVML) tells it.

Owns the question whether that can be told at all. NVML says who used how much by process ids, in a container perhaps by
those that processes have outside of it: where it does not name this process, its work would count as somebody else's.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import torch

from peers.model.support import one_line

logger = logging.getLogger(__name__)


def uuids_of(devices: Iterable[torch.device]) -> list[str]:
    """How NVML calls those of them that are CUDA devices, whatever their numbers are in this process."""
    return [f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices if device.type == "cuda"]


def used_by_others(samples: Iterable[tuple[int, float]], own: int) -> float:
    """Of one GPU, in percent, given the process id and the percentage of each sample; a program may have several."""
    by_program: dict[int, list[float]] = {}
    for process, percent in samples:
        if process != own:
            by_program.setdefault(process, []).append(percent)
    return min(100.0, sum(map(fmean, by_program.values())))


class _Untold(Exception):
    """Why it cannot be told what others use."""


class OtherGpuPrograms:
    """What everybody but this process uses of some GPUs. Where that cannot be told they count as idle, and the log says
    so once."""

    def __init__(self, uuids: Sequence[str]) -> None:
        self._seen_us = dict.fromkeys(uuids, time.time_ns() // 1000)
        """Of each GPU, the time of the last sample that was counted."""
        self._nvml: Any = None
        self._said = False

    def percent(self) -> float:
        """Since the last call, of the one GPU of which they used the most: 0 to 100."""
        try:
            nvml = self._nvml = self._nvml or _nvml()
            try:
                return max(map(self._percent_of, self._seen_us))
            except nvml.NVMLError as error:
                raise _Untold(one_line(error)) from error
        except _Untold as untold:
            if not self._said:
                self._said = True
                logger.warning("what other programs use of the GPU is not told, and no reason to pause: %s", untold)
            return 0.0

    def _percent_of(self, uuid: str) -> float:
        nvml, own = self._nvml, os.getpid()
        card = nvml.nvmlDeviceGetHandleByUUID(uuid)
        if own not in {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(card)}:
            raise _Untold("the driver does not name this process, as in a container")
        try:
            samples = nvml.nvmlDeviceGetProcessUtilization(card, self._seen_us[uuid])
        except nvml.NVMLError_NotFound:  # nobody used it
            return 0.0
        # some drivers fill up with what was there before: older rows, and numbers that are no percentages
        now_us, seen_us = time.time_ns() // 1000, self._seen_us[uuid]
        sound = [row for row in samples if seen_us < row.timeStamp <= now_us and row.smUtil <= 100]
        self._seen_us[uuid] = max([row.timeStamp for row in sound], default=seen_us)
        return used_by_others(((row.pid, row.smUtil) for row in sound), own)


def _nvml() -> Any:
    """The library, ready to be asked. Raises _Untold."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise _Untold("pip install 'hiveswarm[gpu]' for it") from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:  # another maker's GPU, say
        raise _Untold(one_line(error)) from error
    return nvml

"""What other programs use of a GPU, from what NVIDIA's library would say: there is no GPU here, nor that library."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peers.serving import gpus
from peers.serving.gpus import OtherGpuPrograms, used_by_others, uuids_of

OWN = os.getpid()
GAME, RENDERER = OWN + 1, OWN + 2


Used = dict[str, list[tuple[int, int, int]]]
"""Of each GPU: process, percent, and the time in microseconds."""


class NotTold(Exception):
    pass


class NotFound(NotTold):
    pass


def library(there: dict[str, list[int]], used: Used, *, fails: bool = False) -> Any:
    """As `pynvml`, of the GPUs named, with the processes that are there."""

    def init() -> None:
        if fails:
            raise NotTold("Driver Not Loaded")

    def samples(card: str, since_us: int) -> list[Any]:
        new = [sample for sample in used[card] if sample[2] > since_us]
        if not new:
            raise NotFound
        return [SimpleNamespace(pid=process, smUtil=percent, timeStamp=at_us) for process, percent, at_us in new]

    return SimpleNamespace(
        NVMLError=NotTold,
        NVMLError_NotFound=NotFound,
        nvmlInit=init,
        nvmlDeviceGetHandleByUUID=str,
        nvmlDeviceGetComputeRunningProcesses=lambda card: [SimpleNamespace(pid=process) for process in there[card]],
        nvmlDeviceGetProcessUtilization=samples,
    )


START_US, LATER_US, END_US = 1000, 2000, 9000


def test_what_is_not_ours_adds_up_program_by_program() -> None:
    assert used_by_others([], OWN) == 0
    assert used_by_others([(OWN, 90)], OWN) == 0
    assert used_by_others([(OWN, 30), (GAME, 20), (GAME, 40), (RENDERER, 5)], OWN) == 35
    assert used_by_others([(GAME, 80), (RENDERER, 70)], OWN) == 100


def since_the_start(monkeypatch: pytest.MonkeyPatch, nvml: Any, uuids: list[str]) -> OtherGpuPrograms:
    now_us = [START_US]
    monkeypatch.setattr(gpus, "importlib", SimpleNamespace(import_module=lambda _: nvml))
    monkeypatch.setattr(gpus, "time", SimpleNamespace(time_ns=lambda: 1000 * now_us[0]))
    others = OtherGpuPrograms(uuids)
    now_us[0] = END_US
    return others


def test_the_gpu_that_others_use_most_counts_and_each_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    used: Used = {
        "GPU-a": [(GAME, 99, 1), (GAME, 20, LATER_US)],
        "GPU-b": [(OWN, 90, LATER_US), (RENDERER, 50, LATER_US)],
    }
    nvml = library({"GPU-a": [OWN, GAME], "GPU-b": [RENDERER, OWN]}, used)
    others = since_the_start(monkeypatch, nvml, ["GPU-a", "GPU-b"])
    assert others.percent() == 50, "what was used before is nothing"
    assert others.percent() == 0
    used["GPU-a"].append((GAME, 70, LATER_US + 1))
    assert others.percent() == 70


def test_rows_that_no_program_can_have_made_count_for_nothing_and_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    used: Used = {"GPU-a": [(GAME, 2**32 - 1, LATER_US), (0, 80, END_US + 1), (RENDERER, 30, LATER_US)]}
    others = since_the_start(monkeypatch, library({"GPU-a": [OWN]}, used), ["GPU-a"])
    assert others.percent() == 30
    used["GPU-a"].append((GAME, 70, LATER_US + 1))
    assert others.percent() == 70


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        (library({"GPU-a": [GAME]}, {"GPU-a": [(GAME, 90, LATER_US)]}), "does not name this process"),
        (library({"GPU-a": [OWN]}, {"GPU-a": []}, fails=True), "Driver Not Loaded"),
        (None, "pip install 'hiveswarm[gpu]'"),
    ],
)
def test_where_it_cannot_be_told_gpus_count_as_idle_and_that_is_said_once(
    nvml: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def found(name: str) -> Any:
        if nvml is None:
            raise ImportError(name)
        return nvml

    monkeypatch.setattr(gpus, "importlib", SimpleNamespace(import_module=found))
    others = OtherGpuPrograms(["GPU-a"])
    assert [others.percent(), others.percent()] == [0, 0]
    (record,) = caplog.records
    assert reason in record.getMessage()


def test_only_cuda_devices_are_asked_for_by_what_they_are_and_not_by_their_numbers_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"u{device.index}"))
    assert uuids_of([torch.device("cuda:1"), torch.device("cpu")]) == ["GPU-u1"]

"""Settings for all tests, before anything heavy is imported."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.helpers.late_loop import at_once

# One thread per process: with several processes on a few cores, OpenMP's waiting threads burn what others need.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no failure. A failing example is printed with what reproduces it. Everybody has the same examples,
# so that a change fails for what is wrong with it; `pytest --hypothesis-profile explore` looks for others.
settings.register_profile("explore", deadline=None, print_blob=True, derandomize=False)
settings.register_profile("swarm", settings.get_profile("explore"), derandomize=True)
settings.load_profile("swarm")

# looptime asks for the current event loop before each test; unless it was told that there is none, asyncio makes one
# up, nobody closes it, and its ResourceWarning fails whatever test is running when it is collected.
asyncio.set_event_loop(None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported until the first test stays: going through it again and again, for cycles to free, would take a
    third of the time that collecting the tests takes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup() -> None:
    """A test draws the same numbers whichever ran before it in this process."""
    random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` prepares devices, too, which takes a millisecond


@pytest.fixture(autouse=True)
def threads_take_no_virtual_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a virtual clock they would take as long as this machine likes, or as there is until the next timer."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("looptime") is not None:
            patch.setattr(asyncio, "to_thread", at_once)
        yield


@pytest.fixture
def plain_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward is the model's own: recording others takes most of the time that a small peer takes to start, and
    that they say the same is seen in `tests/peers/runtime`."""
    from peers.runtime.cache import PagedCache

    monkeypatch.setattr(PagedCache, "prepare", lambda _: iter(()))

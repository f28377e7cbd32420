"""Settings for all tests, before anything heavy is imported."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# One thread per process: with several processes on a few cores, OpenMP's waiting threads burn what others need.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no failure. A failing example is printed with what reproduces it.
settings.register_profile("swarm", deadline=None, print_blob=True)
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


@pytest.fixture
def plain_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward is the model's own: recording others takes most of the time that a small peer takes to start, and
    that they say the same is seen in `tests/peers/runtime`."""
    from peers.runtime.cache import PagedCache

    monkeypatch.setattr(PagedCache, "prepare", lambda _: iter(()))

"""A tiny Llama on disk and beside it, and swarms of it in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.families import FAMILIES, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    """The model that is saved in `folder`."""
    return save_checkpoint(FAMILIES["llama"], folder)


@pytest.fixture
def make_swarm(folder: Path, local: Any, tmp_path: Path) -> Iterator[Callable[..., MemorySwarm]]:
    """Takes what `MemorySwarm` takes, from the spans on; closes them all."""
    swarms: list[MemorySwarm] = []

    def make(spans: list[tuple[int, int] | str], **options: Any) -> MemorySwarm:
        swarms.append(MemorySwarm(folder, spans, cache=tmp_path, **options))
        return swarms[-1]

    yield make
    for swarm in swarms:
        swarm.close()

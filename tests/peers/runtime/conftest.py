"""What several tests of the runtime need."""

from __future__ import annotations

import pytest

from peers.model.kernels import linear
from peers.runtime import engine
from peers.runtime.scheduler import Tempo


@pytest.fixture
def momentary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library multiplies, and whatever it does takes but a moment."""
    monkeypatch.setattr(linear, "_fastest_s", lambda *_: (0.0, 1.0))
    monkeypatch.setattr(engine, "MOMENT_S", 1e9)
    monkeypatch.setattr(Tempo, "is_long", lambda *_: False)

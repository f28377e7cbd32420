"""What no node can be told is refused before anything takes time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peers.host.config import BootstrapConfig, PeerConfig
from routing.errors import CallerError


def peer(tmp_path: Path, **options: Any) -> PeerConfig:
    return PeerConfig(**{"model": "./nowhere", "network": "hive", "identity": tmp_path / "own.key"} | options)


@pytest.mark.parametrize("option", [{"name": "n" * 49}, {"name": "\x1b[2J"}, {"network": "My Network"}])
def test_a_name_that_no_record_can_carry_is_refused_at_once(option: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(CallerError) as caught:
        peer(tmp_path, **option)
    assert caught.value.hint
    with pytest.raises(CallerError):
        BootstrapConfig(network="My Network", identity=tmp_path / "own.key")


@pytest.mark.parametrize(
    "wish", [{"nice": 20}, {"pause_on_load_percent": 0.0}, {"max_bytes_per_s": 1}], ids=lambda wish: next(iter(wish))
)
def test_a_comfort_that_makes_no_sense_is_refused_at_once(wish: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CallerError) as caught:
        peer(tmp_path, **wish)
    assert caught.value.hint

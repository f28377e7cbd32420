"""A gateway from its configuration to its end."""

from __future__ import annotations

import gc

import pytest

from routing.identity import SigningKey
from swarm.gateway import host
from swarm.gateway.host import GatewayConfig, RunningGateway
from swarm.network import Entrance


async def test_nobody_who_asks_waits_while_all_that_was_loaded_is_looked_through_for_garbage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "return_large_buffers", lambda: None)
    monkeypatch.setattr(host, "load", lambda config, progress: {})
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{SigningKey.from_seed(bytes(32)).peer_id}"
    entrance = Entrance.of(initial_peers=[address], invite=None, network="test")
    spared: list[bool] = []

    def ready(running: RunningGateway) -> None:
        spared.append(gc.get_freeze_count() > 0)
        running.stop()

    await host.run(GatewayConfig(models=("tiny",), entrance=entrance, port=0), ready=ready)
    assert spared == [True]
    assert not gc.get_freeze_count()

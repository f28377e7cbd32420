"""A gateway serves a model with the adapters that peers host as models of their own."""

from __future__ import annotations

from typing import Any

import pytest

from routing.errors import CallerError
from routing.identity import SigningKey
from swarm.gateway import host
from swarm.gateway.host import GatewayConfig
from swarm.network import Entrance


def config(*models: str, adapters: tuple[str, ...] = ()) -> GatewayConfig:
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{SigningKey.from_seed(bytes(32)).peer_id}"
    entrance = Entrance.of(initial_peers=[address], invite=None, network="test")
    return GatewayConfig(models=models, entrance=entrance, adapters=adapters)


def test_the_model_with_each_adapter_is_a_model_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, Any]] = []

    class Ends:
        @staticmethod
        def from_pretrained(checkpoint: str, *, adapter: str | None, **_: Any) -> str:
            loaded.append((checkpoint, adapter))
            return f"{checkpoint} with {adapter}"

    class Served:
        def __init__(self, name: str, model: str, *_: Any, **__: Any) -> None:
            self.name, self.model, self.grammars = name, model, self

        def prepare(self) -> None:
            pass

    monkeypatch.setattr(host, "resolve", lambda name, **_: name)
    monkeypatch.setattr(host, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(host, "SwarmModelForCausalLM", Ends)
    monkeypatch.setattr(host, "Served", Served)
    served = host.load(config("tiny", adapters=("pirate", "poet@ab")))
    assert {name: each.model for name, each in served.items()} == {
        "tiny": "tiny with None",
        "tiny:pirate": "tiny with pirate",
        "tiny:poet@ab": "tiny with poet@ab",
    }
    assert [each.name for each in served.values()] == list(served)


def test_adapters_are_of_one_model() -> None:
    for wrong in (("a", "b"), ("pirate",)), (("a",), ("pirate", "pirate")):
        with pytest.raises(CallerError, match="adapters are of one model"):
            config(*wrong[0], adapters=wrong[1])

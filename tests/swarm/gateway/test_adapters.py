"""A gateway serves a model with the adapters that peers host, and with those of its own, as models of their own."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

from routing.errors import CallerError
from routing.identity import SigningKey
from swarm.gateway import host
from swarm.gateway.engine import Ask
from swarm.gateway.host import GatewayConfig
from swarm.gateway.sampling import Sampling
from swarm.gateway.served import Served
from swarm.network import Entrance
from tests.helpers.gateway import GatewayWorld


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


@pytest.mark.usefixtures("plain_forwards")
def test_an_adapter_of_ones_own_answers_as_it_does_locally(tmp_path: Path) -> None:
    world = GatewayWorld(tmp_path)
    model = world.swarm.model(guest=True)
    torch.manual_seed(2)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    tuned = get_peft_model(copy.deepcopy(world.local), lora).eval()
    tuned.save_pretrained(tmp_path / "own")
    get_peft_model(
        copy.deepcopy(world.local), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    ).save_pretrained(tmp_path / "prompt")
    with pytest.raises(CallerError, match="learned prompt"):
        host._put_on(world.swarm.model(guest=True), str(tmp_path / "prompt"))
    host._put_on(model, str(tmp_path / "own"))
    served = Served("talker:own", model, world.tokenizer)

    async def answers(of: Served, prompt: list[int]) -> list[str]:
        """The same one twice, the second one a fork."""
        ask = Ask(prompt=prompt, max_tokens=12, sampling=Sampling(temperature=0), owner="x", n=2, ignore_eos=True)
        texts = ["", ""]
        async for piece in of.engine.submit([ask]):
            texts[piece.choice] += piece.text
        return texts

    prompt = world.tokenizer("Who are you?").input_ids
    plain = world.text("Who are you?", 12)
    world.local = tuned
    expected = world.text("Who are you?", 12)
    try:
        assert asyncio.run(answers(served, prompt)) == [expected] * 2 != [plain] * 2
        assert asyncio.run(answers(world.served, prompt)) == [plain] * 2
    finally:
        served.close()
        world.close()


def test_adapters_are_of_one_model(tmp_path: Path) -> None:
    one, other = f"{tmp_path}/a/pirate", f"{tmp_path}/b/pirate"
    for wrong in (("a", "b"), ("pirate",)), (("a",), ("pirate", "pirate")), (("a",), (one, other)):
        with pytest.raises(CallerError, match="adapters are of one model"):
            config(*wrong[0], adapters=wrong[1])

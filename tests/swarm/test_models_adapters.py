"""What PEFT puts on skeleton layers: read as it is, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

from swarm.errors import UnsupportedAdapter
from swarm.models.adapters import Attached, Reader
from tests.helpers.local_remote import make_world

pytestmark = pytest.mark.filterwarnings("ignore:.*lora_bias", "ignore:.*target_parameters")


def tuned(family: str = "llama", **settings: Any) -> Any:
    config = LoraConfig(**{"task_type": TaskType.CAUSAL_LM, "r": 4, "target_modules": ["q_proj"]} | settings)
    return get_peft_model(make_world(family).model, config).train()


def read(model: Any) -> Attached | None:
    return Reader(model.base_model.model._remote_layers._adapters._layers).read()


def test_active_adapters_are_read_anew_each_time_and_travel_in_order() -> None:
    model = tuned(target_modules=["q_proj", "down_proj"], lora_alpha=12)
    found = read(model)
    assert found is not None
    assert [(t.block, t.module, t.rank, t.scaling) for t in found.targets] == [
        (block, module, 4, 3.0) for block in (0, 1) for module in ("self_attn.q_proj", "mlp.down_proj")
    ]
    before = found.adapter()
    assert before.name == found.adapter().name
    with torch.no_grad():
        found.weights[0].add_(1.0)
    assert found.adapter().name != before.name
    for (a, b), (own_a, own_b) in zip(
        found.adapter().weights(), zip(found.weights[::2], found.weights[1::2], strict=True), strict=True
    ):
        assert torch.equal(a, own_a)
        assert torch.equal(b, own_b)
    with model.disable_adapter():
        assert read(model) is None
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"], r=2))
    model.set_adapter("other")
    assert [target.module for target in read(model).targets] == ["self_attn.v_proj"] * 2
    model.base_model.set_adapter(["default", "other"])
    assert len(read(model).targets) == 6


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("llama", {"use_dora": True}, "DoRA on 0.self_attn.q_proj|Dora"),
        ("llama", {"lora_bias": True}, "trained bias"),
        ("llama", {"lora_dropout": 1.0}, "lora_dropout 1.0 on 0.self_attn.q_proj"),
        ("llama", {"r": 300}, "rank above 256"),
        ("gpt-neox", {"target_modules": ["query_key_value"], "bias": "all"}, "bias stands at peers"),
        ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, "experts"),
        ("llama", {"modules_to_save": ["input_layernorm"]}, "input_layernorm"),
    ],
    ids=str,
)
def test_what_cannot_travel_is_refused_by_name(family: str, settings: dict[str, Any], named: str) -> None:
    model = tuned(family, **settings)
    with pytest.raises(UnsupportedAdapter, match=named):
        read(model)


def test_dropout_is_nothing_in_evaluation_and_in_training_drawn_from_torchs_own_seed() -> None:
    model = tuned(lora_dropout=0.1)
    training, evaluating, plain = read(model), read(model.eval()), read(tuned())
    assert [each.dropout for each in (training, evaluating, plain)] == [0.1, 0.0, 0.0]
    before = torch.get_rng_state()
    assert evaluating.draw_dropout() is plain.draw_dropout() is None
    assert torch.equal(torch.get_rng_state(), before), "what draws nothing changes nothing of what others draw"
    seeds = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        seeds.append(training.draw_dropout())
    assert seeds[0] == seeds[1] != seeds[2]


def test_adapters_of_different_dropout_are_refused() -> None:
    model = tuned(lora_dropout=0.1)
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UnsupportedAdapter, match="differ in their lora_dropout"):
        read(model)


def test_dropout_is_nothing_in_evaluation_and_two_adapters_on_one_layer_are_their_sum() -> None:
    model = tuned(lora_dropout=0.1, init_lora_weights=False).eval()
    assert read(model) is not None
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=7, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    found = read(model)
    assert [(target.module, target.rank, target.scaling) for target in found.targets] == [
        ("self_attn.q_proj", 6, 1.0)
    ] * 2
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = sum(
        layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name] for name in ("default", "other")
    )
    a, b = found.adapter().weights()[0]
    torch.testing.assert_close(b @ a, expected)
    (b.sum() + found.weights[1].sum()).backward()
    assert layer.lora_B["other"].weight.grad is not None, "gradients reach each adapter's own parameters"
    model.add_adapter("wide", LoraConfig(target_modules=["q_proj"], r=255))
    model.base_model.set_adapter(["default", "wide"])
    with pytest.raises(UnsupportedAdapter, match="ranks above 256"):
        read(model)


def test_a_parameter_that_was_written_to_is_not_what_it_was() -> None:
    model = tuned()
    before = read(model)
    assert read(model).untouched_since(before)
    with torch.no_grad():
        before.weights[1].add_(1.0)
    assert not read(model).untouched_since(before)
    before = read(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling["default"] *= 2
    assert not read(model).untouched_since(before)


def test_what_is_put_among_the_layers_or_taken_out_is_seen_at_once() -> None:
    model = tuned()
    reader = Reader(model.base_model.model._remote_layers._adapters._layers)
    assert [target.module for target in reader.read().targets] == ["self_attn.q_proj"] * 2
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert {target.module for target in reader.read(again=True).targets} == {"self_attn.q_proj", "self_attn.v_proj"}
    model.unload()
    assert reader.read(again=True) is None

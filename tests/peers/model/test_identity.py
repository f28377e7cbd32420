from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers.model.identity import VOLATILE_FIELDS, canonical_config, model_id

CONFIG: dict[str, Any] = {
    "model_type": "gemma3",
    "hidden_size": 64,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "text_config": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
HASHES = {"model-1.safetensors": "aa" * 32, "model-2.safetensors": "bb" * 32}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize("field", sorted(VOLATILE_FIELDS))
def test_a_volatile_field_changes_no_id_at_any_depth(field: str) -> None:
    noisy = CONFIG | {field: "anything", "text_config": CONFIG["text_config"] | {field: "else"}}
    assert model_id(noisy, HASHES) == model_id(CONFIG, HASHES)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 65},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"text_config": CONFIG["text_config"] | {"layer_types": ["full_attention", "full_attention"]}},
        {"_sliding_window_pattern": 6},
        {"quantization_config": {"quant_type": {"dtype": "int4"}}},
    ],
)
def test_a_field_that_changes_the_computation_changes_the_id(change: dict[str, Any]) -> None:
    assert model_id(CONFIG | change, HASHES) != model_id(CONFIG, HASHES)


def test_a_dtype_inside_the_quantization_counts() -> None:
    def quantized(dtype: str) -> dict[str, Any]:
        return CONFIG | {"quantization_config": {"quant_type": {"dtype": dtype}}}

    assert model_id(quantized("int4"), HASHES) != model_id(quantized("int8"), HASHES)


def test_the_order_of_fields_and_files_does_not_count() -> None:
    assert model_id(dict(reversed(CONFIG.items())), dict(reversed(HASHES.items()))) == model_id(CONFIG, HASHES)


def test_every_weight_file_counts() -> None:
    ids = {
        model_id(CONFIG, HASHES),
        model_id(CONFIG, HASHES | {"model-2.safetensors": "cc" * 32}),
        model_id(CONFIG, HASHES | {"model-3.safetensors": "bb" * 32}),
        model_id(CONFIG, {"model-1.safetensors": "aa" * 32}),
    }
    assert len(ids) == 4


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_the_canonical_form_is_its_own_canonical_form(config: dict[str, Any]) -> None:
    once = canonical_config(config)
    assert canonical_config(json.loads(once)) == once

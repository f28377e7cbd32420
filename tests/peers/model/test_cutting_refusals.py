from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig

from peers.errors import UnsupportedModel
from peers.model.loading import check_folder
from peers.model.support import check_supported, examine
from tests.helpers.families import ALTERNATING, COMMON, GROUPED

WIDE_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
ALTERNATE = {**GROUPED, "layer_types": ALTERNATING}
HYBRID = ["linear_attention", "full_attention"] * 2
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("recurrent state", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97}),
    "mamba2": ("recurrent state", {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8}),
    "rwkv": ("recurrent state", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97}),
    "xlstm": ("recurrent state", {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "vocab_size": 97}),
    "recurrent_gemma": ("recurrent state", GROUPED),
    "jamba": ("recurrent state", {**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "qwen3_next": ("recurrent state", {**GROUPED, "layer_types": HYBRID}),
    "lfm2": ("recurrent state", {**GROUPED, "layer_types": ["conv", "full_attention"] * 2}),
    "gemma3n_text": (
        "block 0 does not take hidden states",
        {**ALTERNATE, "num_kv_shared_layers": 0},
    ),
    "gemma4_text": ("inputs of their own that are made of the token ids", ALTERNATE),
    "gemma4_unified_text": (
        "block 1 is handed what block 0 made, such as keys and values",
        {**ALTERNATE, "num_kv_shared_layers": 2},
    ),
    "t5": ("no causal language model", {}),
    "bart": ("encoder-decoder", {}),
    "bert": ("not causal", COMMON),
    "roberta": ("not causal", COMMON),
}


def config_of(model_type: str, settings: dict[str, Any]) -> PretrainedConfig:
    config: PretrainedConfig = transformers.AutoConfig.for_model(model_type, **settings)
    return config


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name_where_there_is_no_weight_file(model_type: str, tmp_path: Path) -> None:
    reason, settings = REFUSED[model_type]
    config_of(model_type, settings).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(UnsupportedModel, match=f"^{model_type} models cannot be cut.*({reason})"):
        check_folder(tmp_path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(UnsupportedModel, match="no_such_architecture"):
        check_folder(tmp_path)


def test_a_configuration_that_asks_for_its_own_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(UnsupportedModel):
        check_folder(tmp_path)


def test_a_configuration_that_breaks_its_own_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="configuration does not work"):
        check_supported(config_of("llama", {**GROUPED, "hidden_act": "no such function"}))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    with pytest.raises(UnsupportedModel, match="cannot read the configuration"):
        check_folder(tmp_path)


def test_more_blocks_than_can_be_announced_are_refused_before_as_many_are_made() -> None:
    with pytest.raises(UnsupportedModel, match="4096 can be announced"):
        check_supported(config_of("llama", {**GROUPED, "num_hidden_layers": 10**6}))


def test_the_same_type_without_the_obstacle_is_accepted() -> None:
    check_supported(config_of("lfm2", {**GROUPED, "layer_types": ["full_attention"] * 4}))
    check_supported(config_of("gemma4_unified_text", {**ALTERNATE, "num_kv_shared_layers": 0}))


def test_a_model_of_32_layers_is_examined_within_two_seconds() -> None:
    check_supported(config_of("llama", GROUPED))  # imports

    def seconds(vocab_size: int) -> float:
        started_s = time.process_time()
        check_supported(config_of("llama", {**WIDE_LLAMA, "vocab_size": vocab_size}))
        return time.process_time() - started_s

    assert min(seconds(vocab_size) for vocab_size in (1000, 2000, 3000)) < 2


def test_the_probe_works_under_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(UnsupportedModel):
        check_supported(config_of("gemma3n_text", {**ALTERNATE, "num_kv_shared_layers": 0}))


def test_examining_leaves_the_configuration_alone() -> None:
    config = config_of("mixtral", GROUPED)
    before = config.to_json_string(use_diff=False)
    examine(config)
    assert config.to_json_string(use_diff=False) == before

"""Adapters as PEFT writes them: read as PEFT computes with them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from peers.errors import CorruptCheckpoint
from peers.model.lora import CONFIG, WEIGHTS, open_adapter
from routing.errors import CallerError
from tests.helpers.families import FAMILIES, NUM_BLOCKS, random_model

PATH = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


def written(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> str:
    """A rank of 2 on one layer, and what the test says otherwise."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | settings))
    plain = {f"{PATH}A.weight": torch.ones(2, 32), f"{PATH}B.weight": torch.ones(32, 2)}
    save_file(plain | (tensors or {}), folder / WEIGHTS)
    return str(folder)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scalings_are_those_of_peft(rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.2.mlp.down_proj": 3},
        alpha_pattern={"q_proj": 5, r"layers\.2\.mlp\.down_proj": 9},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    tuned = get_peft_model(random_model(FAMILIES["llama"].config()), config)
    tuned.save_pretrained(tmp_path)
    folder = open_adapter(str(tmp_path))
    adapter = folder.read("model.layers", NUM_BLOCKS, range(1, 3))
    assert adapter is not None
    assert [(t.block, t.module) for t in adapter.targets] == [
        (block, path) for block in (1, 2) for path in ("mlp.down_proj", "self_attn.q_proj")
    ]
    for target, (a, b) in zip(adapter.targets, adapter.weights(), strict=True):
        layer = tuned.base_model.model.model.layers[target.block].get_submodule(target.module)
        assert (target.scaling, target.rank) == (layer.scaling["default"], layer.r["default"])
        assert torch.equal(a, layer.lora_A["default"].weight)
        assert torch.equal(b, layer.lora_B["default"].weight)
    assert folder.read("model.layers", NUM_BLOCKS, []) is None
    assert folder.digest == open_adapter(str(tmp_path)).digest


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"r": 300}, "256"),
        ({"r": "many"}, "int"),
    ],
    ids=str,
)
def test_settings_that_peers_do_not_compute_with_are_refused_by_name(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(CallerError, match=named):
        open_adapter(written(tmp_path / "adapter", **settings))


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, "lm_head, which is no part"),
        ({PATH.replace("layers.1", "layers.4") + "A.weight": torch.ones(2, 32)}, "layers.4"),
        ({f"{PATH}magnitude_vector.weight": torch.ones(32)}, "not LoRA of a linear layer"),
        ({f"{PATH}A.bias": torch.ones(2)}, "not LoRA of a linear layer"),
        ({PATH.replace("q_proj", "k_proj") + "A.weight": torch.ones(2, 32)}, "no A and B of rank 2 for .*k_proj"),
        ({f"{PATH}A.weight": torch.ones(3, 32)}, "no A and B of rank 2"),
    ],
)
def test_tensors_that_are_not_lora_of_the_blocks_are_refused_by_name(
    tensors: dict[str, torch.Tensor], named: str, tmp_path: Path
) -> None:
    with pytest.raises(CallerError, match=named):
        open_adapter(written(tmp_path / "adapter", tensors)).read("model.layers", NUM_BLOCKS, range(NUM_BLOCKS))


def test_files_that_are_missing_damaged_or_pickled_are_not_read(tmp_path: Path) -> None:
    folder = Path(written(tmp_path / "adapter", {f"{PATH}A.weight": torch.full((2, 32), float("nan"))}))
    with pytest.raises(CorruptCheckpoint, match="NaN"):
        open_adapter(str(folder)).read("model.layers", NUM_BLOCKS, range(NUM_BLOCKS))
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CorruptCheckpoint):
        open_adapter(str(folder))
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CallerError, match=r"holds no adapter_model\.safetensors"):
        open_adapter(str(folder))
    with pytest.raises(CallerError, match="not a folder"):
        open_adapter(str(tmp_path / "nowhere"))

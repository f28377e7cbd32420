"""What `scripts/bench --device cuda` computes, as far as a CPU shows it."""

from __future__ import annotations

import runpy
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from peers.model.catalog import resolve
from peers.model.loading import check_folder, load_span
from routing.ids import BlockSpan

BENCH: dict[str, Any] = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "bench_gpu.py"))
TINY = BENCH["EIGHT_B"] | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


def test_the_eight_b_shape_has_eight_billion_weights() -> None:
    sizes = BENCH["EIGHT_B"]
    hidden, kv = (
        sizes["hidden_size"],
        sizes["hidden_size"] * sizes["num_key_value_heads"] // sizes["num_attention_heads"],
    )
    block = hidden * (2 * hidden + 2 * kv + 3 * sizes["intermediate_size"] + 2)
    weights = sizes["num_hidden_layers"] * block + hidden * (2 * sizes["vocab_size"] + 1)
    assert weights == 8_030_261_248


def test_a_random_model_is_written_shard_by_shard_and_loads_whole_and_cut(tmp_path: Path) -> None:
    BENCH["write_random"](tmp_path / "model", TINY)
    shards = {}
    for file in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            shards[file.stem] = set(stored.keys())
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert shards.keys() == {"model-0", "model-1", "model-2", "model-ends"}
    assert shards["model-ends"] == ends
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert set(chain.from_iterable(shards.values())) == set(whole.state_dict())
    assert {weight.dtype for weight in whole.parameters()} == {torch.bfloat16}
    weights = [weight.detach() for weight in whole.parameters() if weight.ndim == 2]
    assert all(0.018 < float(weight.float().std()) < 0.022 for weight in weights)
    checkpoint = resolve(str(tmp_path / "model"), cache=tmp_path / "cache", accept=check_folder)
    span = load_span(checkpoint, BlockSpan(1, 2), dtype=torch.bfloat16, device="cpu")
    assert torch.equal(span.module.layers[0].mlp.up_proj.weight, whole.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_every_weight_once_and_a_row_of_embeddings(tied: bool, tmp_path: Path) -> None:
    BENCH["write_random"](tmp_path, TINY | {"tie_word_embeddings": tied})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    read = sum(weight.nbytes for name, weight in model.named_parameters() if name != "model.embed_tokens.weight")
    head = model.lm_head.weight.nbytes if tied else 0
    assert BENCH["token_bytes"](model) == read + head


def test_the_bandwidth_of_a_copy_counts_what_is_read_and_what_is_written_in_the_fastest_round() -> None:
    times_s = chain([0.0, 4.0, 10.0, 12.0, 20.0, 23.0], repeat(0.0))
    bandwidth = BENCH["copy_bandwidth"]("cpu", num_bytes=1000, rounds=3, clock=lambda: next(times_s))
    assert bandwidth == 2 * 1000 / 2.0

"""Runs of a tiny local model: what goes on after a stop ends as what was never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.training.data import IGNORED, Encoded
from swarm.training.finetune import CURVE_FILE, SETTINGS_FILE, FinetuneConfig, RunMismatch, Step, finetune
from tests.helpers.tokenizers import VOCABULARY, save_tokenizer

VALIDATION = [Encoded([5, 6, 7, 8], [IGNORED, 6, 7, 8])]


def model(vocabulary: int = 40) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def examples(count: int = 12) -> list[Encoded]:
    """Counting, from somewhere on."""
    rows = [list(range(1 + number, 5 + number + number % 3)) for number in range(count)]
    return [Encoded(row, [IGNORED, *row[1:]]) for row in rows]


def config(method: Any) -> FinetuneConfig:
    return FinetuneConfig(method=method, steps=6, batch_size=4, save_every=4, learning_rate=0.05)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_a_run_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(method: Any, tmp_path: Path) -> None:
    steps: list[Step] = []
    whole = finetune(model(), examples(), VALIDATION, tmp_path / "whole", config(method), on_step=steps.append)
    assert whole.finished
    assert [step.step for step in steps if step.loss is not None] == [1, 2, 3, 4, 5, 6]
    assert method == "prompt" or (steps[0].loss or 0) > (whole.loss or 9)

    parts = tmp_path / "parts"
    stopped = finetune(model(), examples(), VALIDATION, parts, config(method), stop=iter([False, True]).__next__)
    assert (stopped.steps, stopped.finished) == (2, False)
    outcome = finetune(model(), examples(), VALIDATION, parts, config(method))
    assert (outcome.resumed_from, outcome.steps) == (2, 6)
    assert outcome.validation_loss == pytest.approx(whole.validation_loss, rel=1e-5)
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (parts, tmp_path / "whole"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-6, rtol=1e-5)

    batch = torch.tensor([VALIDATION[0].input_ids])
    loaded = PeftModel.from_pretrained(model(), parts).eval()
    loss = loaded(input_ids=batch, labels=torch.tensor([VALIDATION[0].labels])).loss.item()
    assert loss == pytest.approx(outcome.validation_loss, rel=1e-5)
    assert (parts / CURVE_FILE).read_bytes().startswith(b"\x89PNG")


def test_a_prompt_begins_as_text_or_as_tokens_that_a_seed_draws(tmp_path: Path) -> None:
    tokenizer, base = save_tokenizer(tmp_path / "base"), model(VOCABULARY)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    embeddings = base.get_input_embeddings().weight.detach()

    def begun(name: str, **options: Any) -> torch.Tensor:
        untaught: dict[str, Any] = {"method": "prompt", "virtual_tokens": 5, "steps": 1, "learning_rate": 1e-9}
        finetune(base, examples(), [], tmp_path / name, FinetuneConfig(**untaught | options))
        return load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"]

    text = embeddings[tokenizer("bee").input_ids]
    torch.testing.assert_close(begun("text", prompt_text="bee"), text[[0, 1, 2, 0, 1]])
    drawn = begun("drawn")
    torch.testing.assert_close(drawn, embeddings[torch.cdist(drawn, embeddings).argmin(1)])
    assert torch.equal(begun("again"), drawn)
    assert not torch.equal(begun("other", seed=1), drawn)


def test_another_run_in_the_folder_is_never_overwritten(tmp_path: Path) -> None:
    finetune(model(), examples(), [], tmp_path, config("lora"), stop=lambda: True)
    with pytest.raises(RunMismatch, match=r"holds a run with other examples$"):
        finetune(model(), examples(8), [], tmp_path, config("lora"))
    with pytest.raises(RunMismatch, match=r"with other method$"):
        finetune(model(), examples(), [], tmp_path, config("prompt"))
    (tmp_path / SETTINGS_FILE).write_text(json.dumps([]))
    with pytest.raises(RunMismatch, match="cannot be used"):
        finetune(model(), examples(), [], tmp_path, config("lora"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(RunMismatch, match="not empty"):
        finetune(model(), examples(), [], other, config("lora"))

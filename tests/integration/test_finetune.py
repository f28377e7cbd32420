"""`swarm finetune` over real peers: what it writes is an adapter that the local model, generation and hosts can use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from swarm.testing import LocalSwarm, model_folder
from swarm.training.data import encode_all, read_examples
from tests.integration.conftest import MODEL, Commands, generate


@pytest.fixture
def fresh() -> Any:
    """A local model of one's own: an adapter changes it."""
    return AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=torch.float32).eval()


def test_a_fine_tuned_adapter_says_locally_what_it_says_through_peers_private_or_hosted(
    command: Commands, swarm: LocalSwarm, model: Any, fresh: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{a} plus {b} is", "completion": f" {a + b} bees."} for a in range(2, 6) for b in range(2, 5)]
    data.write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "adapter"
    options = ["--steps", "3", "--batch-size", "4", "--learning-rate", "0.003", "--rank", "4", "--json"]
    done = command("finetune", MODEL, "--invite", swarm.invite, "--data", str(data), "--output", str(output), *options)
    assert done.returncode == 0, done.stderr
    *steps, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert (end["event"], end["steps"]) == ("finished", 3)
    losses = [step["loss"] for step in steps if step["loss"] is not None]
    assert losses[-1] < losses[0]

    ((example,), _) = encode_all(tokenizer, [read_examples(data)[9]], max_tokens=64)  # the only tenth one
    tuned = PeftModel.from_pretrained(fresh, str(output))
    with torch.no_grad():
        loss = tuned(torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
    assert loss.item() == pytest.approx(end["validation_loss"], rel=1e-3)

    prompt_ids = tuple(tokenizer("2 plus 2 is").input_ids)
    plain, expected = (generate(base, prompt_ids, 8, min_new_tokens=0) for base in (model, tuned))
    assert plain != expected, "it has learned nothing"
    private = PeftModel.from_pretrained(model, str(output)).eval()
    try:
        assert generate(private, prompt_ids, 8, min_new_tokens=0) == expected
    finally:
        private.unload()
    asked = ["-p", "2 plus 2 is", "--raw", "--max-new-tokens", "8", "--dtype", "float32", "--json", "--adapter"]
    with LocalSwarm(MODEL, dtype="float32") as hosting:
        host = hosting.add_peer((0, 30), "--adapter", f"bees={output}")
        told = [
            json.loads(command("generate", MODEL, "--invite", hosting.invite, *asked, name).stdout)
            for name in ("bees", str(output))
        ]
    assert [each["token_ids"] for each in told] == [expected, expected]
    assert {hop["peer"] for hop in told[0]["route"]} == {host.peer_id}

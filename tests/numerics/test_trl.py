"""TRL's trainers run unchanged over peers, and their losses are those of a local run.

Real engines, handlers and drivers in one process.
"""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from swarm import SwarmModelForCausalLM
from swarm.cli import finetune as view
from swarm.session.exchange import TrainingTraffic
from swarm.session.training import TrainingConfig, TrainingRoute
from swarm.training.finetune import CURVE_FILE, LOSSES_FILE, FinetuneConfig, Step
from tests.helpers.families import FAMILIES, GROUPED, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm
from tests.helpers.tokenizers import VOCABULARY, save_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing\\S* is deprecated:FutureWarning",  # TRL asks transformers by the old names
)

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.02,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "max_length": 48,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "report_to": [],
    "seed": 1,
}
QUESTIONS = [(f"{a}+{b}=", f"{a + b}.", f"{a * b + 1} bees?") for a in range(2, 5) for b in range(2, 5)]


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return save_tokenizer(folder)


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    family = replace(FAMILIES["llama"], settings=GROUPED | {"vocab_size": VOCABULARY})
    return save_checkpoint(family, folder)


@pytest.fixture(scope="module")
def swarm(folder: Path, local: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemorySwarm]:
    cache = tmp_path_factory.mktemp("cache")
    with MemorySwarm(folder, [(0, 1), (1, 4)], cache=cache, training=True) as swarm:
        yield swarm


@pytest.fixture
def model(swarm: MemorySwarm) -> Any:
    return swarm.model(guest=True, training=TrainingConfig(micro_batch_tokens=64))


def lora() -> LoraConfig:
    return LoraConfig(task_type=TaskType.CAUSAL_LM, r=3, target_modules=["q_proj", "up_proj"])


def losses(trainer: Any, *, resume: Path | None = None, also: tuple[str, ...] = ()) -> list[float]:
    """Of a run, with what it says of its evaluations."""
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    names = ("loss", "eval_loss", *also)
    return [entry[name] for entry in trainer.state.log_history for name in names if name in entry]


def traffic_of(model: Any) -> TrainingTraffic:
    route: TrainingRoute = model._remote_layers.remote.training
    return route.traffic


@pytest.mark.parametrize("packing", [False, True])
def test_sft_gives_the_losses_of_a_local_run_and_goes_on_from_its_checkpoint(
    local: Any, swarm: MemorySwarm, model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, packing: bool
) -> None:
    rows = Dataset.from_list([{"prompt": prompt, "completion": right} for prompt, right, _ in QUESTIONS])

    def trainer(base: Any, output: Path) -> SFTTrainer:
        arguments = SFTConfig(output_dir=str(output), packing=packing, **SETTINGS)
        return SFTTrainer(
            model=base,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            processing_class=tokenizer,
            peft_config=lora(),
        )

    expected = losses(trainer(copy.deepcopy(local), tmp_path / "local"))
    assert len(expected) == 6
    tuned = trainer(model, tmp_path / "remote")
    assert tuned.args.gradient_checkpointing
    assert losses(tuned) == pytest.approx(expected, rel=1e-3)
    if packing:
        return  # it is the data's affair, and no checkpoint's
    fresh = swarm.model(guest=True)
    again = losses(trainer(fresh, tmp_path / "remote"), resume=tmp_path / "remote" / "checkpoint-2")
    assert again == pytest.approx(expected, rel=1e-3), "the history of the first half comes from the checkpoint"
    assert traffic_of(fresh).backwards < traffic_of(model).backwards


def test_dpo_takes_the_model_without_its_adapter_as_the_reference(
    local: Any, model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = Dataset.from_list([{"prompt": p, "chosen": right, "rejected": wrong} for p, right, wrong in QUESTIONS])

    def trainer(base: Any, output: Path) -> DPOTrainer:
        arguments = DPOConfig(output_dir=str(output), beta=0.5, **SETTINGS | {"eval_strategy": "no"})
        return DPOTrainer(
            model=base, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora()
        )

    also = ("rewards/margins",)
    expected = losses(trainer(copy.deepcopy(local), tmp_path / "local"), also=also)
    assert expected[0] == pytest.approx(0.6931, abs=1e-3), "both are the same model yet"
    assert losses(trainer(model, tmp_path / "remote"), also=also) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    traffic = traffic_of(model)
    assert traffic.forwards == traffic.backwards > 0, "neither checkpointing nor the reference sends one twice"


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_the_command_stops_at_ctrl_c_and_goes_on_from_its_checkpoint(
    swarm: MemorySwarm,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: Literal["lora", "prompt"],
) -> None:
    def say(step: Step) -> None:
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(view, "_say_some", say)
    connection: Any = SimpleNamespace(model="tiny", open=lambda: (swarm.model(guest=True), swarm.checkpoint))
    data, output = tmp_path / "data.jsonl", tmp_path / "adapter"
    rows = [{"prompt": prompt, "completion": right} for prompt, right, _ in QUESTIONS]
    data.write_text("\n".join(map(json.dumps, rows * 3)))
    config = FinetuneConfig(method=method, rank=3, steps=5, batch_size=4, learning_rate=0.01)
    said = []
    for _ in range(2):
        view.run(connection, data, None, output, config, max_tokens=64, as_json=False)
        said.append(capsys.readouterr().err.splitlines())
        monkeypatch.setattr(view, "_say_some", lambda _: None)
    assert said[0][-2:] == [
        "writing a checkpoint after this step; again to leave at once",
        "stopped after step 3 of 5; the same command goes on from there",
    ]
    assert said[1][0] == "going on from the checkpoint of step 3"
    assert re.match(r"2 steps in \d+ s, validation loss \d", said[1][-3])
    assert said[1][-2:] == [
        f"the adapter is in {output}, its losses in {output / CURVE_FILE}",
        f"to use it: swarm generate tiny --adapter {output}",
    ]
    losses = json.loads((output / LOSSES_FILE).read_text())
    assert [entry["step"] for entry in losses if "loss" in entry] == [1, 2, 3, 4, 5]
    assert (output / CURVE_FILE).read_bytes().startswith(b"\x89PNG")


EXAMPLES = {
    "finetune_trainer.py": [{"prompt": prompt, "completion": right} for prompt, right, _ in QUESTIONS],
    "finetune_sft.py": [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": right}]}
        for p, right, _ in QUESTIONS
    ],
    "finetune_dpo.py": [{"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in QUESTIONS],
}


@pytest.mark.parametrize("script", EXAMPLES)
def test_an_example_that_people_copy_writes_an_adapter_that_loads_locally(
    script: str, local: Any, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SwarmModelForCausalLM, "from_pretrained", lambda name, invite: model)
    traffic = traffic_of(model)  # which the script closes
    data, output = tmp_path / "data.jsonl", tmp_path / "adapter"
    line = [script, "tiny", "swarm://memory", str(data), str(output), "--steps", "2"]
    monkeypatch.setattr("sys.argv", line)
    lines = [json.dumps(row) for row in EXAMPLES[script]]
    data.write_text("\n".join([*lines, "{}"]))
    with pytest.raises(SystemExit, match=rf"line {len(lines) + 1}: .*\n.*write .*{{"):
        runpy.run_path(str(SCRIPTS / script))
    data.write_text("\n".join(lines))
    runpy.run_path(str(SCRIPTS / script))
    assert traffic.backwards
    tuned = PeftModel.from_pretrained(copy.deepcopy(local), str(output))
    assert any(weight.any() for name, weight in tuned.named_parameters() if "lora_B" in name)

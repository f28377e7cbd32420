"""One fine-tuning run: transformers' Trainer over a model whose blocks may be elsewhere, with an adapter of PEFT's.

Owns the settings, what a folder must hold for a later call to go on, and the curve of the losses. The loop, the
optimizer and the checkpoints are transformers' own; a run that was stopped and goes on ends with the same adapter as
one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, PeftConfig, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from routing.errors import CallerError
from swarm.training.data import IGNORED, Encoded

SETTINGS_FILE: Final = "finetune.json"
"""Of the run whose checkpoints lie beside it."""
CHECKPOINTS: Final = "checkpoints"
CURVE_FILE: Final = "loss.png"
LOSSES_FILE: Final = "losses.json"
LEARNING_RATES: Final = {"lora": 2e-4, "prompt": 1e-3}


class RunMismatch(CallerError):
    """The output folder holds another run, or something else."""

    default_hint = "name another --output folder, or repeat the settings and the data of that run to go on with it"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """What is trained, and how."""

    method: Literal["lora", "prompt"] = "lora"
    rank: int = 8
    alpha: int = 16
    target_modules: tuple[str, ...] = ()
    """Linear layers that get an adapter, by the ends of their names; empty: all of every block."""
    virtual_tokens: int = 16
    """Of `prompt`."""
    prompt_text: str | None = None
    """What a `prompt` begins as, cut or repeated to its length. None: tokens of the vocabulary, drawn by `seed`."""
    epochs: float = 3.0
    steps: int | None = None
    """Instead of `epochs`."""
    batch_size: int = 8
    accumulate: int = 1
    """Batches to a step."""
    learning_rate: float | None = None
    """At its highest; it rises for a thirtieth of the steps and falls to 0. None: of LEARNING_RATES."""
    save_every: int = 50
    """Steps between two checkpoints, and two looks at the validation loss."""
    seed: int = 0

    def adapter(self, tokenizer: str) -> PeftConfig:
        """`tokenizer`: the folder of the model's."""
        if self.method == "prompt":
            # PEFT would begin with random numbers, which are far from every embedding: such runs are chaotic
            return PromptTuningConfig(
                task_type=TaskType.CAUSAL_LM,
                num_virtual_tokens=self.virtual_tokens,
                prompt_tuning_init=PromptTuningInit.TEXT if self.prompt_text else PromptTuningInit.SAMPLE_VOCAB,
                prompt_tuning_init_text=self.prompt_text,
                tokenizer_name_or_path=tokenizer if self.prompt_text else None,
            )
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.target_modules) or "all-linear",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is known after a step, or after a look at the validation loss."""

    step: int
    of: int
    loss: float | None = None
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one call."""

    steps: int
    of: int
    resumed_from: int
    loss: float | None
    """Of the last step."""
    validation_loss: float | None
    """At the end; None without examples to validate with, and where the run was stopped."""
    seconds: float

    @property
    def finished(self) -> bool:
        return self.steps >= self.of


def finetune(
    model: PreTrainedModel,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    output: Path,
    config: FinetuneConfig,
    *,
    on_resume: Callable[[int], None] = lambda _: None,
    on_step: Callable[[Step], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train an adapter for `model`, whose own parameters stay as they are, and write it to `output`.

    Goes on where an earlier call with the same settings and examples was stopped, and tells `on_resume` behind which
    step. `stop` is asked after every step; when it says so, a checkpoint is written and the call returns. Raises
    RunMismatch, and what the model raises.
    """
    resumed = _resumable(output, config, train, validation)
    resumed_from = int(resumed.rpartition("-")[2]) if resumed else 0
    if resumed:
        on_resume(resumed_from)
    set_seed(config.seed)
    adapted = get_peft_model(model, config.adapter(model.name_or_path))
    trainer = Trainer(
        model=adapted,
        args=_arguments(output, config, len(train), validating=bool(validation), on_cpu=model.device.type == "cpu"),
        train_dataset=list(train),
        eval_dataset=list(validation) or None,
        data_collator=_padded,
        callbacks=[_Watch(on_step, stop)],
    )
    trainer.remove_callback(PrinterCallback)
    started_s = time.monotonic()
    trainer.train(resume_from_checkpoint=resumed)
    state = trainer.state
    finished = state.global_step >= state.max_steps
    if finished and validation and not _said(state, "eval_loss", at=state.global_step):
        trainer.evaluate()
    adapted.save_pretrained(str(output))
    losses = [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
    (output / LOSSES_FILE).write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    draw(losses, output / CURVE_FILE)
    return Outcome(
        steps=state.global_step,
        of=state.max_steps,
        resumed_from=resumed_from,
        loss=next(reversed(_said(state, "loss")), None),
        validation_loss=next(reversed(_said(state, "eval_loss")), None) if finished else None,
        seconds=time.monotonic() - started_s,
    )


def _said(state: TrainerState, what: str, *, at: int | None = None) -> list[float]:
    """What the run's history has of one figure, of all steps or of one."""
    return [entry[what] for entry in state.log_history if what in entry and at in (None, entry["step"])]


def draw(history: Sequence[dict[str, Any]], file: Path) -> None:
    """The losses of a run, over its steps, as a picture."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1)
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(file, dpi=120)


def _resumable(
    output: Path, config: FinetuneConfig, train: Sequence[Encoded], validation: Sequence[Encoded]
) -> str | None:
    """The last checkpoint of this run, if there is one; what the run is, written down, if not. Raises RunMismatch."""
    settings = asdict(config) | {"examples": _digest(train), "validation_examples": _digest(validation)}
    settings = json.loads(json.dumps(settings))
    file = output / SETTINGS_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        if file.exists():
            known = json.loads(file.read_text(encoding="utf-8"))
            unlike = sorted(name for name in settings.keys() | known.keys() if settings.get(name) != known.get(name))
            if unlike:
                raise RunMismatch(f"{output} holds a run with other {', '.join(unlike)}")
            return get_last_checkpoint(str(output / CHECKPOINTS)) if (output / CHECKPOINTS).exists() else None
        if any(output.iterdir()):
            raise RunMismatch(f"{output} is not empty and holds no run", hint="name another --output folder")
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError, AttributeError) as error:
        raise RunMismatch(f"{output} cannot be used: {error}") from error
    return None


def _digest(examples: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.input_ids, example.labels]).encode() + b"\n")
    return digest.hexdigest()


def _arguments(
    output: Path, config: FinetuneConfig, examples: int, *, validating: bool, on_cpu: bool
) -> TrainingArguments:
    steps = config.steps
    if steps is None:
        steps = math.ceil(config.epochs * math.ceil(examples / (config.batch_size * config.accumulate)))
    return TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate or LEARNING_RATES[config.method],
        warmup_steps=math.ceil(steps / 30),
        save_steps=config.save_every,
        save_total_limit=2,
        eval_strategy="steps" if validating else "no",
        eval_steps=config.save_every,
        logging_steps=1,
        seed=config.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )


def _padded(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """A batch, padded on the right with what is neither attended to nor learned."""
    width = max(len(row.input_ids) for row in rows)

    def filled(values: Sequence[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in values])

    return {
        "input_ids": filled([row.input_ids for row in rows], 0),
        "attention_mask": filled([[1] * len(row.input_ids) for row in rows], 0),
        "labels": filled([row.labels for row in rows], IGNORED),
    }


@dataclass(eq=False)
class _Watch(TrainerCallback):  # type: ignore[misc]
    """Tells what happens, and ends the run when asked to."""

    on_step: Callable[[Step], None]
    stop: Callable[[], bool]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        loss, validation_loss = (logs or {}).get("loss"), (logs or {}).get("eval_loss")
        if loss is None and validation_loss is None:
            return
        self.on_step(Step(step=state.global_step, of=state.max_steps, loss=loss, validation_loss=validation_loss))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        if self.stop():
            control.should_save = control.should_training_stop = True
        return control

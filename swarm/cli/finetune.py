"""`swarm finetune`: examples in, an adapter out, with a bar or a line for every step."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import typer

from swarm.answers import load_tokenizer
from swarm.cli import signals
from swarm.cli.conversation import Connection
from swarm.cli.output import say
from swarm.training.data import Example, encode_all, read_examples
from swarm.training.finetune import CURVE_FILE, FinetuneConfig, Outcome, Step, finetune

VALIDATION_PART = 10
"""One of so many examples is not learned, where no others are given to validate with."""
LINE_EVERY = 10
"""Steps between two lines where stderr is no terminal."""


def run(
    connection: Connection,
    data: Path,
    validation: Path | None,
    output: Path,
    config: FinetuneConfig,
    *,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Train until the end, or until Ctrl-C. Raises SwarmError; bad data are found before anything is opened."""
    examples, apart = split(read_examples(data), None if validation is None else read_examples(validation))
    model, checkpoint = connection.open()
    with model:
        tokenizer = load_tokenizer(checkpoint)
        train, shortened = encode_all(tokenizer, examples, max_tokens=max_tokens)
        held, more = encode_all(tokenizer, apart, max_tokens=max_tokens) if apart else ([], 0)
        if shortened + more:
            say(f"{shortened + more} of {len(examples) + len(apart)} examples are longer than {max_tokens} tokens: cut")
        with signals.noticed(_say_stopping) as asked, _shown(as_json=as_json) as show:
            outcome = finetune(
                model, train, held, output, config, on_resume=_say_resuming, on_step=show, stop=lambda: bool(asked)
            )
    _end(outcome, connection.model, output, as_json=as_json)


def split(examples: list[Example], apart: list[Example] | None) -> tuple[list[Example], list[Example]]:
    """What is learned, and what is only looked at: by default every tenth."""
    if apart is not None:
        return examples, apart
    last = VALIDATION_PART - 1
    learned = [example for index, example in enumerate(examples) if index % VALIDATION_PART != last]
    return learned, examples[last::VALIDATION_PART]


def _say_stopping() -> None:
    say("\nwriting a checkpoint after this step; again to leave at once")


def _say_resuming(step: int) -> None:
    say(f"going on from the checkpoint of step {step}")


@contextmanager
def _shown(*, as_json: bool) -> Iterator[Callable[[Step], None]]:
    """What shows each step: an event on stdout, a bar, or now and then a line."""
    if as_json:
        yield lambda step: typer.echo(json.dumps({"event": "step", **asdict(step)}))
        return
    if not sys.stderr.isatty():
        yield _say_some
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task, said = bar.add_task("training", total=None), {"loss": "", "validation": ""}

        def show(step: Step) -> None:
            if step.loss is not None:
                said["loss"] = f"loss {step.loss:.3f}"
            if step.validation_loss is not None:
                said["validation"] = f"validation {step.validation_loss:.3f}"
            words = ", ".join(word for word in said.values() if word)
            bar.update(task, completed=step.step, total=step.of, description=words)

        yield show


def _say_some(step: Step) -> None:
    if step.validation_loss is not None:
        say(f"step {step.step} of {step.of}: validation loss {step.validation_loss:.4f}")
    elif step.loss is not None and (step.step % LINE_EVERY == 0 or step.step in (1, step.of)):
        say(f"step {step.step} of {step.of}: loss {step.loss:.4f}")


def _end(outcome: Outcome, model: str, output: Path, *, as_json: bool) -> None:
    if as_json:
        kind = "finished" if outcome.finished else "stopped"
        typer.echo(json.dumps({"event": kind, **asdict(outcome), "output": str(output)}))
    elif outcome.finished:
        loss = "" if outcome.validation_loss is None else f", validation loss {outcome.validation_loss:.4f}"
        say(f"{outcome.steps - outcome.resumed_from} steps in {outcome.seconds:.0f} s{loss}")
        say(f"the adapter is in {output}, its losses in {output / CURVE_FILE}")
        say(f"to use it: swarm generate {model} --adapter {output}")
    else:
        say(f"stopped after step {outcome.steps} of {outcome.of}; the same command goes on from there")

"""`swarm generate` and `swarm chat`: one model, opened through the Python API, and what is said with it."""

from __future__ import annotations

import io
import json
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from transformers import PreTrainedTokenizerBase

from peers.model.catalog import Checkpoint, resolve
from peers.model.loading import check_folder
from routing.errors import SwarmError
from swarm import SwarmModelForCausalLM
from swarm.answers import Answer, Message, Sampling, answer, encode_chat, encode_prompt, load_tokenizer
from swarm.cli import signals
from swarm.cli.output import Bars, print_error, say, write
from swarm.errors import ContextTooLong
from swarm.models.own import is_folder, with_adapter
from swarm.models.tracing import traced
from swarm.network import Entrance
from swarm.session.remote import Resilience
from swarm.session.training import TrainingConfig

HELP = "/reset begins a new conversation · /exit or Ctrl-D leaves · Ctrl-C stops an answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Which model, through which network."""

    model: str
    entrance: Entrance
    dtype: str
    token: str | None
    min_precision: str | None
    adapter: str | None = None
    """That peers host; or a folder here, whose adapter only travels with what is asked."""
    background: bool = False
    resilience: Resilience = "replay"
    training: TrainingConfig | None = None

    def open(self) -> tuple[Any, Checkpoint]:
        """The remote model (close it) and its checkpoint. Raises SwarmError."""
        with Bars() as bars:
            checkpoint = resolve(self.model, token=self.token, progress=bars, accept=check_folder)
            model = SwarmModelForCausalLM.from_pretrained(
                checkpoint,
                initial_peers=self.entrance.addresses,
                network=self.entrance.network,
                dtype=self.dtype,
                progress=bars,
                min_precision=self.min_precision,
                adapter=None if self.adapter and is_folder(self.adapter) else self.adapter,
                background=self.background,
                resilience=self.resilience,
                training=self.training,
            )
        return model, checkpoint

    def speaker(self, model: Any) -> Any:
        """What generates: the model that was opened, or that with one's own adapter. Raises CallerError."""
        return with_adapter(model, self.adapter) if self.adapter and is_folder(self.adapter) else model


def generate(
    connection: Connection,
    prompt: str,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    chat_template: bool | None,
    as_json: bool,
    trace: Path | None = None,
) -> None:
    """Answer one prompt on stdout. `trace`: a file that then says where the time went."""
    model, checkpoint = connection.open()
    with model, nullcontext() if trace is None else traced(model, trace):
        tokenizer = load_tokenizer(checkpoint)
        as_chat = bool(tokenizer.chat_template) if chat_template is None else chat_template
        prompt_ids = (
            encode_chat(tokenizer, [{"role": "user", "content": prompt}])
            if as_chat
            else encode_prompt(tokenizer, prompt)
        )
        result = answer(
            connection.speaker(model),
            tokenizer,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            write=_silent if as_json else write,
        )
        if as_json:
            typer.echo(json.dumps(_as_json(result, model)))
        else:
            write("\n")


def _as_json(result: Answer, model: Any) -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "route": [{"peer": hop.peer_id, "span": [hop.span.start, hop.span.end]} for hop in model.route.hops],
        "timings": {name: value and round(value, 4) for name, value in asdict(result.timings).items()},
    }


def chat(connection: Connection, *, system: str | None, sampling: Sampling, max_new_tokens: int) -> None:
    """Talk until the end of standard input."""
    model, checkpoint = connection.open()
    with model:
        tokenizer = load_tokenizer(checkpoint)
        start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        encode_chat(tokenizer, [*start, {"role": "user", "content": ""}])  # refuses a model that cannot chat
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a line that is no text ends no conversation
        if sys.stdin.isatty():
            import readline  # noqa: F401  # gives input() its line editing and history

            say(f"{checkpoint.name} through the swarm. {HELP}")
        speaker = connection.speaker(model)
        with model.session():
            _converse(speaker, tokenizer, start, sampling=sampling, max_new_tokens=max_new_tokens)
            signals.raise_on_signal()


def _converse(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    start: list[Message],
    *,
    sampling: Sampling,
    max_new_tokens: int,
) -> None:
    """Turn by turn. An answer that was stopped stays in the conversation as far as it came."""
    messages = list(start)
    while (line := _read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                messages = list(start)
                say("a new conversation")
                continue
            case "/help":
                say(HELP)
                continue
        messages.append({"role": "user", "content": line})
        pieces: list[str] = []

        def take(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            write(piece)

        try:
            prompt_ids = encode_chat(tokenizer, messages)
            with signals.stoppable():
                answer(model, tokenizer, prompt_ids, max_new_tokens=max_new_tokens, sampling=sampling, write=take)
        except SwarmError as error:
            messages.pop()
            if isinstance(error, ContextTooLong):
                error.hint = "/reset begins a new conversation"
            print_error(error)
            continue
        except signals.Interrupted as interruption:
            if interruption.number != signal.SIGINT:
                raise
        write("\n")
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _read_line() -> str | None:
    """The next line, or None at the end of standard input."""
    while True:
        try:
            with signals.stoppable():
                return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                say("")
            return None
        except signals.Interrupted as interruption:
            if interruption.number != signal.SIGINT or not sys.stdin.isatty():
                raise
            say("\n(Ctrl-D leaves)")


def _silent(text: str) -> None:
    """Where the text comes with everything else at the end."""

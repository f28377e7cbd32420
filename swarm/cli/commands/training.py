"""The command that trains an adapter through the swarm: `finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from swarm.cli import signals
from swarm.cli.options import (
    Debug,
    Dtype,
    InitialPeers,
    InviteLink,
    Json,
    MinPrecision,
    Model,
    Network,
    Token,
    Verbose,
    entrance_of,
    finite,
)
from swarm.cli.output import command


def finetune(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help='Examples, one JSON object a line: {"text": …}, {"prompt": …, "completion": …} or {"messages": […]}.',
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="DIR", file_okay=False, help="Where the adapter goes; empty, or holding this run."
        ),
    ],
    initial_peers: InitialPeers = None,
    invite: InviteLink = None,
    method: Annotated[
        Literal["lora", "prompt"],
        typer.Option("--method", help="lora: small matrices beside those of every block; prompt: a learned beginning."),
    ] = "lora",
    validation: Annotated[
        Path | None,
        typer.Option(
            "--validation",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Examples to look at and not to learn. Default: a tenth of --data.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        float, typer.Option("--epochs", min=0.01, callback=finite, help="How often each example is learned.")
    ] = 3.0,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Batches to learn, instead of --epochs.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=1024, help="Examples in a batch.")] = 8,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Batches to an update.")] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", min=1e-8, max=10.0, help="Default: 2e-4 for lora, 1e-3 for prompt.", show_default=False
        ),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", min=1, max=256, help="Of lora: the width of its matrices.")] = 8,
    alpha: Annotated[int, typer.Option("--alpha", min=1, help="Of lora: it counts alpha/rank times.")] = 16,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--target-module",
            metavar="NAME",
            help="Of lora: the layers that get one, e.g. q_proj; may be repeated. Default: all linear ones.",
            show_default=False,
        ),
    ] = None,
    virtual_tokens: Annotated[
        int, typer.Option("--virtual-tokens", min=1, max=1024, help="Of prompt: how long the beginning is.")
    ] = 16,
    prompt_text: Annotated[
        str | None,
        typer.Option(
            "--prompt-text",
            metavar="TEXT",
            help="Of prompt: what it begins as. Default: tokens of the vocabulary, drawn with --seed.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="Longer examples are cut.")] = 512,
    save_every: Annotated[
        int, typer.Option("--save-every", min=1, help="Steps between checkpoints and looks at the validation loss.")
    ] = 50,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=(1 << 32) - 1, help="The same seed and data give the same adapter.")
    ] = 0,
    dtype: Dtype = "float32",
    wire_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            "--wire-dtype",
            help="Number format of what travels; bfloat16 halves it, for slow lines. Default: that of --dtype.",
            show_default=False,
        ),
    ] = None,
    min_precision: MinPrecision = None,
    network: Network = None,
    token: Token = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Train an adapter for a model that peers hold; the adapter, the data and the optimizer stay here.

    Writes an adapter as PEFT does, the losses as JSON and as a picture, and checkpoints, to --output. Ctrl-C writes a
    checkpoint and ends; the same command goes on from there. Peers can read what you send. Needs:
    pip install 'hiveswarm[train]'.
    """
    with command(verbose=verbose, debug=debug):
        entrance = entrance_of(initial_peers, invite, network)
        from swarm.extras import require_extra

        require_extra("train", "accelerate", "matplotlib", "peft")
        from swarm.cli import finetune as view
        from swarm.cli.conversation import Connection
        from swarm.session.training import TrainingConfig
        from swarm.training import FinetuneConfig

        with signals.interruptible():
            connection = Connection(
                model=model,
                entrance=entrance,
                dtype=dtype,
                token=token,
                min_precision=min_precision,
                training=TrainingConfig(dtype=wire_dtype),
            )
            config = FinetuneConfig(
                method=method,
                rank=rank,
                alpha=alpha,
                target_modules=tuple(target_modules or ()),
                virtual_tokens=virtual_tokens,
                prompt_text=prompt_text or None,
                epochs=epochs,
                steps=steps,
                batch_size=batch_size,
                accumulate=accumulate,
                learning_rate=learning_rate,
                save_every=save_every,
                seed=seed,
            )
            view.run(connection, data, validation, output, config, max_tokens=max_tokens, as_json=as_json)

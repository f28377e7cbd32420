"""Commands that write text through the swarm: `generate` and `chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli import signals
from swarm.cli.options import (
    Adapter,
    Debug,
    Dtype,
    InitialPeers,
    InviteLink,
    Json,
    MaxNewTokens,
    MinP,
    MinPrecision,
    Model,
    Network,
    NumBeams,
    Prompt,
    RepetitionPenalty,
    Resilience,
    Seed,
    Temperature,
    Token,
    TopK,
    TopP,
    Verbose,
    entrance_of,
    prompt_of,
)
from swarm.cli.output import command


def generate(
    model: Model,
    prompt: Prompt = None,
    initial_peers: InitialPeers = None,
    invite: InviteLink = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Use the chat template, or take the prompt as it is. Default: chat where there is a template.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    num_beams: NumBeams = 1,
    seed: Seed = None,
    dtype: Dtype = "auto",
    min_precision: MinPrecision = None,
    adapter: Adapter = None,
    resilience: Resilience = "replay",
    background: Annotated[
        bool, typer.Option("--background", help="Give way to everybody who waits for an answer.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            dir_okay=False,
            writable=True,
            help="Write where the time went, step by step and hop by hop, for ui.perfetto.dev or chrome://tracing. It "
            "holds no text.",
            show_default=False,
        ),
    ] = None,
    network: Network = None,
    token: Token = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Generate text through the swarm, printed as it comes.

    Greedy, unless --temperature, --top-p, --top-k, --min-p or --seed asks for sampling. Peers can read what you send.
    With --json: one object with the text, its token ids, the route and timings.
    """
    with command(verbose=verbose, debug=debug):
        entrance = entrance_of(initial_peers, invite, network)
        text = prompt_of(prompt)
        from swarm.answers import Sampling
        from swarm.cli import conversation

        with signals.interruptible():
            connection = conversation.Connection(
                model=model,
                entrance=entrance,
                dtype=dtype,
                token=token,
                min_precision=min_precision,
                adapter=adapter,
                background=background,
                resilience=resilience,
            )
            sampling = Sampling(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                num_beams=num_beams,
                seed=seed,
            )
            conversation.generate(
                connection,
                text,
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                chat_template=chat_template,
                as_json=as_json,
                trace=trace,
            )


def chat(
    model: Model,
    initial_peers: InitialPeers = None,
    invite: InviteLink = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="How the model should behave.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    min_precision: MinPrecision = None,
    adapter: Adapter = None,
    resilience: Resilience = "replay",
    network: Network = None,
    token: Token = None,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Talk with a model through the swarm.

    The peers keep the conversation between turns, so a new question costs only its own tokens. Ctrl-C stops an answer,
    Ctrl-D leaves; /reset begins anew, /help lists the rest. Peers can read what you send.
    """
    with command(verbose=verbose, debug=debug):
        entrance = entrance_of(initial_peers, invite, network)
        from swarm.answers import Sampling
        from swarm.cli import conversation

        with signals.interruptible():
            connection = conversation.Connection(
                model=model,
                entrance=entrance,
                dtype=dtype,
                token=token,
                min_precision=min_precision,
                adapter=adapter,
                resilience=resilience,
            )
            sampling = Sampling(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
            )
            conversation.chat(connection, system=system, sampling=sampling, max_new_tokens=max_new_tokens)

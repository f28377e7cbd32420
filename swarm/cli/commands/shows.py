"""Commands that need no swarm: `simulate` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli import signals
from swarm.cli.options import Debug, Json, MaxNewTokens, Verbose, finite
from swarm.cli.output import Bars, command, say, write


def simulate(
    peers: Annotated[int, typer.Option("--peers", min=1, max=20_000, help="So many peers.")] = 1000,
    users: Annotated[int | None, typer.Option("--users", min=1, help="Default: ten for each peer.")] = None,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Nodes through which the users come.")] = 10,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.1, callback=finite, help="Of virtual time, after two of warm-up.")
    ] = 10.0,
    churn: Annotated[
        float, typer.Option("--churn", min=0.0, callback=finite, help="The share of peers that leaves per hour.")
    ] = 0.2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw curves: FILE.png or FILE.html.", show_default=False),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Run a swarm of thousands on a virtual clock: real routing and placement, simulated peers, links and users.

    Nothing goes over the network. A model of 32 blocks; speeds, distances and memory are drawn from what volunteers
    have. Shows tokens per second against the most that these peers could carry, coverage, moves and fairness.
    """
    with command(verbose=verbose, debug=debug):
        from swarm.cli import simulate as view
        from swarm.simulation.world import USERS_PER_PEER, SimulationConfig

        with signals.interruptible():
            try:
                config = SimulationConfig(
                    peers=peers,
                    users=users or max(clients, USERS_PER_PEER * peers),
                    clients=clients,
                    minutes=minutes,
                    churn_per_hour=churn,
                    seed=seed,
                )
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
            view.simulate(config, plot=plot, as_json=as_json)


def demo(
    prompt: Annotated[str, typer.Argument(metavar="[PROMPT]", help="What to ask.")] = "What is the capital of France?",
    max_new_tokens: MaxNewTokens = 128,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """See it work on this machine: an entry node and three peers as processes of their own, and an answer through them.

    The small built-in model is fetched first (93 MB, once). Everything stops at the end.
    """
    with command(verbose=verbose, debug=debug):
        from swarm import demo as show

        with signals.interruptible(), Bars() as bars:
            show.run(prompt, max_new_tokens=max_new_tokens, say=say, write=write, progress=bars)

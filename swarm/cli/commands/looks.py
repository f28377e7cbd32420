"""Commands that look at a swarm from outside: `status`, `top` and `route`."""

from __future__ import annotations

from typing import Annotated

import typer

from swarm.cli.options import Debug, InitialPeers, InviteLink, Json, Network, Verbose, entrance_of
from swarm.cli.output import command, say

ENTERING = "entering network {!r} …"
"""Said before anything that takes time: how long the rest takes is the network's affair."""


def status(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Only this one: its announced name, or how its id begins.")
    ] = None,
    initial_peers: InitialPeers = None,
    invite: InviteLink = None,
    network: Network = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Show what a swarm can do now: models, holders of every block, gaps, and peers with their measured latency."""
    with command(verbose=verbose, debug=debug):
        entrance = entrance_of(initial_peers, invite, network)
        if not as_json:
            say(ENTERING.format(entrance.network))
        from swarm.cli import status as view

        view.status(entrance, model=model, as_json=as_json)


def top(
    initial_peers: InitialPeers = None,
    invite: InviteLink = None,
    once: Annotated[bool, typer.Option("--once", help="Print what there is now, and end.")] = False,
    network: Network = None,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Watch a swarm in this terminal: coverage, peers, speed, events; q leaves.

    The same view as the dashboard's, for a terminal, over SSH for example.
    """
    with command(verbose=verbose, debug=debug):
        entrance = entrance_of(initial_peers, invite, network)
        say(ENTERING.format(entrance.network))
        from swarm.cli import top as view

        view.top(entrance, once=once)


def route(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Its announced name, or how its id begins.")],
    explain: Annotated[
        bool, typer.Option("--explain", help="Show every candidate for each hop, its price, and why one won.")
    ] = False,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, max=65_536, help="Of one step: 1 to write, many to read a prompt.")
    ] = 1,
    bytes_per_token: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of hidden state: the model's hidden size times the bytes of its dtype (default: 4,096 times 4).",
        ),
    ] = None,
    initial_peers: InitialPeers = None,
    invite: InviteLink = None,
    network: Network = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Show the way that your tokens would go now, and why.

    Peers are measured from here once; a client that runs longer knows their queues and true speeds as well.
    """
    with command(verbose=verbose, debug=debug):
        entrance = entrance_of(initial_peers, invite, network)
        if not as_json:
            say(ENTERING.format(entrance.network))
        from swarm.cli import route as view

        view.route(
            entrance,
            model=model,
            tokens=tokens,
            bytes_per_token=bytes_per_token,
            explain=explain,
            as_json=as_json,
        )

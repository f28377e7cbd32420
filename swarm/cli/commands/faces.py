"""Commands that serve HTTP: `gateway` for programs and a chat page, `dashboard` for who watches over a swarm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli import signals
from swarm.cli.options import (
    Debug,
    Dtype,
    ExitWithParent,
    InitialPeers,
    InviteLink,
    Json,
    MinPrecision,
    Network,
    Resilience,
    Token,
    Verbose,
    entrance_of,
    finite,
)
from swarm.cli.output import command, say


def gateway(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="What to serve: built-in names, hub ids, folders or GGUF files. Clients use the names given here.",
        ),
    ],
    initial_peers: InitialPeers = None,
    invite: InviteLink = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="SWARM_API_KEY",
            metavar="KEY",
            help="Answer only who brings this key (16 characters or more); may be repeated. Others on this machine can "
            "see options of running programs: better in the variable, or in --api-keys.",
            show_default=False,
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys",
            metavar="FILE",
            help="Keys as hashes, one a line: NAME SHA256 [REQUESTS-PER-MINUTE]. The hash: printf %s KEY | sha256sum.",
            show_default=False,
        ),
    ] = None,
    rate_limit: Annotated[
        float | None,
        typer.Option(
            "--rate-limit",
            min=0.01,
            callback=finite,
            metavar="N",
            help="Requests a minute that each key may make, where the file says nothing else. Default: any number.",
            show_default=False,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            metavar="ORIGIN",
            help="Let the scripts of this web page ask, e.g. https://chat.example.org; may be repeated. Default: none.",
            show_default=False,
        ),
    ] = None,
    max_streams: Annotated[
        int, typer.Option("--max-streams", min=1, help="Answers at once per model; others are told to try again.")
    ] = 256,
    keep_sessions: Annotated[
        int,
        typer.Option(
            "--keep-sessions",
            min=0,
            help="Conversations per model that stay at the peers for 5 minutes between turns, so that the next turn "
            "costs only its own tokens.",
        ),
    ] = 64,
    drain: Annotated[
        float, typer.Option("--drain", min=0.0, max=3600.0, help="Seconds that open answers have after Ctrl-C.")
    ] = 30.0,
    dtype: Dtype = "auto",
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME|FOLDER",
            help="Serve the model with this adapter too, which peers host, as MODEL:NAME; or your own LoRA, in a "
            "folder that `swarm finetune` or PEFT wrote, under the folder's name. Repeatable.",
            show_default=False,
        ),
    ] = None,
    min_precision: MinPrecision = None,
    resilience: Resilience = "replay",
    network: Network = None,
    token: Token = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    debug: Debug = False,
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Answer programs that speak OpenAI's API, through the swarm.

    Open http://127.0.0.1:8000 in a browser to chat, or point a client at http://127.0.0.1:8000/v1. Chat and plain
    completions, streams, tools, JSON schemas and probabilities work; /docs describes them all, /health and /metrics
    watch over it. Needs: pip install 'hiveswarm[gateway]'.

    Without keys everybody who can reach the port may ask, which is nobody but this machine unless --host says so. Peers
    can read what is sent. Ctrl-C takes no new requests and lets open answers end; a second one leaves at once.
    """
    with command(verbose=verbose, debug=debug):
        if exit_with_parent:
            signals.end_with_parent()
        entrance = entrance_of(initial_peers, invite, network)
        from swarm.extras import require_extra

        require_extra("gateway", "fastapi", "fastapi_offline", "llguidance", "sse_starlette", "uvicorn")
        from swarm.cli import gateway as view
        from swarm.gateway.host import GatewayConfig
        from swarm.gateway.kept import KeptLimits
        from swarm.gateway.keys import accounts_of

        config = GatewayConfig(
            models=tuple(models),
            entrance=entrance,
            host=host,
            port=port,
            accounts=tuple(accounts_of(api_key or (), api_keys)),
            requests_per_minute=rate_limit,
            cors_origins=tuple(cors_origin or ()),
            max_streams=max_streams,
            keep=KeptLimits(strands=keep_sessions),
            drain_s=drain,
            dtype=dtype,
            token=token,
            min_precision=min_precision,
            adapters=tuple(adapters or ()),
            resilience=resilience,
        )
        view.run(config, as_json=as_json)


def dashboard(
    initial_peers: InitialPeers = None,
    invite: InviteLink = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8080,
    history: Annotated[
        Path | None,
        typer.Option(
            "--history",
            metavar="FILE",
            help="Where the last week is kept. Default: one of this network's, in the cache folder.",
            show_default=False,
        ),
    ] = None,
    network: Network = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    debug: Debug = False,
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Show a swarm in a browser: coverage, peers, links, events, history, and how to join.

    Read-only; needs no model files and lends nothing. It reads the signed records and asks each live peer now and then
    how it is; everything says how old it is. /docs describes the JSON under /api/v1/, /api/v1/badge.svg is an image to
    embed, /metrics is for Prometheus. Needs: pip install 'hiveswarm[dashboard]'.
    """
    with command(verbose=verbose, debug=debug):
        if exit_with_parent:
            signals.end_with_parent()
        entrance = entrance_of(initial_peers, invite, network)
        from swarm.extras import require_extra

        if not as_json:
            say(f"starting a dashboard of network {entrance.network!r} …")
        require_extra("dashboard", "fastapi", "fastapi_offline", "prometheus_client", "sse_starlette", "uvicorn")
        from swarm.cli import dashboard as view
        from swarm.dashboard.history import default_file
        from swarm.dashboard.host import DashboardConfig

        config = DashboardConfig(
            entrance=entrance, host=host, port=port, history=history or default_file(entrance.network)
        )
        view.run(config, as_json=as_json)

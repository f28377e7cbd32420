"""The commands and their options, in words for people. Each one parses, checks what can be checked at once, and runs.

Owns the flags and the help. Imports no torch: a mistyped address is answered before anything is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from routing.addresses import validate_multiaddr
from routing.errors import CallerError, InvalidAddress
from routing.ids import BlockSpans
from routing.precision import Precision
from routing.records import check_network
from swarm.cli import signals
from swarm.cli.output import Bars, command, say, write

if TYPE_CHECKING:
    from swarm.network import Entrance

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Run large language models together: every peer hosts some blocks of a model, and text flows through them.\n\n"
    "Try it on this machine alone with swarm demo.",
)

# --- options that several commands share ---

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A built-in name (smollm2-135m-instruct), a hub id (org/name), a folder with a checkpoint, or a GGUF file "
        "(a path or org/name:file.gguf).",
    ),
]
InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--initial-peers",
        metavar="MULTIADDR…",
        help="Nodes already in the network, e.g. /ip4/203.0.113.7/tcp/4001/p2p/12D3Koo…; several may follow.",
        show_default=False,
    ),
]
InviteLink = Annotated[
    str | None,
    typer.Option("--invite", metavar="LINK", help="A swarm://… link, as `swarm bootstrap` prints it, instead."),
]
Network = Annotated[
    str | None,
    typer.Option("--network", metavar="NAME", help="The network's name. Default: hive, or what the invite says."),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="HF_TOKEN", metavar="TOKEN", help="Access token of the model hub.", show_envvar=True
    ),
]
Listen = Annotated[
    list[str] | None,
    typer.Option(
        "--listen",
        metavar="MULTIADDR…",
        help="Where to listen, e.g. /ip4/0.0.0.0/tcp/4001. Default: all interfaces, on the port of last time.",
        show_default=False,
    ),
]
Announce = Annotated[
    list[str] | None,
    typer.Option(
        "--announce",
        metavar="MULTIADDR…",
        help="Where others reach this node, behind a port forward or in a cloud, e.g. /ip4/203.0.113.7/tcp/4001.",
        show_default=False,
    ),
]
Identity = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        metavar="FILE",
        help="This node's key, made on first use (mode 0600). Default: one of your own that no other node uses.",
        show_default=False,
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Number format; auto: the checkpoint's, or float32 on CPUs that are slow with it."),
]
MinPrecision = Annotated[
    Precision | None,
    typer.Option(
        "--min-precision",
        help="Use only peers whose weights and dtype are at least so precise. Default: any.",
        show_default=False,
    ),
]
Resilience = Annotated[
    Literal["replay", "standby"],
    typer.Option(
        "--resilience",
        help="When a peer is lost, compute again elsewhere what it held (about a second), or keep a second peer filled "
        "for every hop meanwhile, where the swarm has any to spare.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output: JSON on stdout.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Say more on stderr; -vv: everything.", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ExitWithParent = Annotated[bool, typer.Option("--exit-with-parent", hidden=True)]

Prompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", metavar="TEXT", help="The text to go on from; absent or '-': standard input."),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Stop after so many tokens.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="Sample; higher is wilder, 0 is greedy.")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the likeliest, of this total probability."),
]
TopK = Annotated[int | None, typer.Option("--top-k", min=0, help="Sample from the k likeliest.")]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", min=0.0, max=1.0, help="Sample from those at least so likely, relative to the likeliest."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", min=0.01, help="Above 1: avoid what was said before.")
]
NumBeams = Annotated[int, typer.Option("--num-beams", min=1, help="Beam search over so many; prints at the end.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Sample, and repeatably so.")]


def _example(text: str) -> str:
    return f"Example:  {text}"


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import importlib.metadata

        typer.echo(f"hiveswarm {importlib.metadata.version('hiveswarm')}")
        raise typer.Exit


@app.command(epilog=_example("swarm bootstrap --listen /ip4/0.0.0.0/tcp/4001"))
def bootstrap(
    listen: Listen = None,
    announce: Announce = None,
    identity: Identity = None,
    network: Network = None,
    initial_peers: InitialPeers = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    debug: Debug = False,
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Start an entry node: the first to run, the one that newcomers dial.

    It needs no model and little memory. It prints its addresses and an invite link to give to others, and runs until
    Ctrl-C. Several of them (each with the others as --initial-peers) keep a network open when one is down.
    """
    with command(verbose=verbose, debug=debug):
        if exit_with_parent:
            signals.end_with_parent()
        entrance = _entrance(initial_peers, None, network) if initial_peers else None
        options = _node_options("bootstrap", entrance, network, listen, announce, identity)
        from peers.host import BootstrapConfig
        from swarm.cli import node

        node.bootstrap(BootstrapConfig(**options), as_json=as_json)


@app.command(epilog=_example("swarm join smollm2-135m-instruct --invite swarm://…"))
def join(
    model: Model,
    initial_peers: InitialPeers = None,
    invite: InviteLink = None,
    new_swarm: Annotated[bool, typer.Option("--new-swarm", help="Be the first node of a network.")] = False,
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            metavar="A:B[,C:D…]",
            help="Serve blocks A to B−1; several spans work too. Default: the least covered that fit.",
        ),
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option("--num-blocks", min=1, metavar="N", help="Serve N blocks, where they are needed most.")
    ] = None,
    stay: Annotated[
        bool,
        typer.Option(
            "--stay",
            help="Serve the same blocks to the end. Default: go where blocks are missing, unless --blocks names yours.",
        ),
    ] = False,
    dtype: Dtype = "auto",
    quantize: Annotated[
        str,
        typer.Option(
            "--quantize",
            metavar="none|int8|int4|nf4",
            help="Keep the weights in 8 bits (answers nearly the same) or 4 (half as much memory again).",
        ),
    ] = "none",
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="auto|cpu|cuda[:i]|mps",
            help="Where to compute. Several share the blocks by their memory: cuda:0,cuda:1.",
        ),
    ] = "auto",
    listen: Listen = None,
    announce: Announce = None,
    identity: Identity = None,
    name: Annotated[str, typer.Option("--name", help="What others see beside your peer id.")] = "",
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", metavar="SIZE", help="Use no more than, e.g., 6GB. Default: 80 % of free."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            "--cache-tokens",
            min=1,
            metavar="N",
            help="Tokens that users' sessions may hold here, together; more where blocks see no further than a window. "
            "Default: as many as memory holds.",
            show_default=False,
        ),
    ] = None,
    share_prefixes: Annotated[
        bool,
        typer.Option(
            "--share-prefixes",
            help="Let one user's session begin with what another's same prompt left here, where they share a prefix "
            "secret. Answers then come sooner for what somebody else asked before, and so give it away: for private "
            "swarms whose members trust each other.",
        ),
    ] = False,
    nice: Annotated[
        int | None, typer.Option("--nice", min=0, max=19, help="Let other programs go first: 19 takes what they leave.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule", metavar="HH:MM-HH:MM,…", help="Serve only then (local time), e.g. 22:00-08:00,12:00-13:00."
        ),
    ] = None,
    pause_on_load: Annotated[
        float | None,
        typer.Option(
            "--pause-on-load", metavar="PERCENT", help="Pause while other programs use so much of all CPUs together."
        ),
    ] = None,
    max_bandwidth: Annotated[
        str | None,
        typer.Option(
            "--max-bandwidth", metavar="SIZE/s", help="Send no more than, e.g., 2MB/s, and receive no more than that."
        ),
    ] = None,
    journal_disk: Annotated[
        str | None,
        typer.Option(
            "--journal-disk",
            metavar="SIZE",
            help="Disk to remember by what sessions sent on, so that a lost neighbour can be rebuilt. Default: none.",
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port",
            min=0,
            max=65535,
            metavar="PORT",
            help="Tell Prometheus at http://127.0.0.1:PORT/metrics what this peer does. 0: any free port. Default: no.",
            show_default=False,
        ),
    ] = None,
    metrics_host: Annotated[
        str,
        typer.Option("--metrics-host", metavar="ADDRESS", help="Where --metrics-port listens; it asks for no key."),
    ] = "127.0.0.1",
    network: Network = None,
    token: Token = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    debug: Debug = False,
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Lend this machine to a swarm: host some of a model's blocks until Ctrl-C.

    Only the weights of those blocks are downloaded. When others can dial this machine it prints "reachable", otherwise
    what to do about it. It finds its way back by itself after sleep, a network change or a restart of the entry nodes.

    When blocks of the model are missing elsewhere, or carry much less than others, it goes there by itself, never from
    blocks that nobody else holds; what was downloaded stays on disk. With --blocks or --stay it never moves.

    You come first: outside --schedule, and while other programs are above --pause-on-load, it takes no work, tells the
    swarm so, and returns by itself.
    """
    with command(verbose=verbose, debug=debug):
        if exit_with_parent:
            signals.end_with_parent()
        if blocks is not None and num_blocks is not None:
            raise typer.BadParameter("give --blocks or --num-blocks, not both")
        if new_swarm and (initial_peers or invite):
            raise typer.BadParameter("--new-swarm begins a network; --initial-peers and --invite join one")
        if not (new_swarm or initial_peers or invite):
            hint = "give --invite swarm://… or --initial-peers MULTIADDR…, or begin a network with --new-swarm"
            raise InvalidAddress("no way into a network was given", hint=hint)
        entrance = None if new_swarm else _entrance(initial_peers, invite, network)
        spans = None if blocks is None else BlockSpans.parse(blocks)
        memory = None if max_memory is None else _bytes(max_memory)
        bytes_per_s = None if max_bandwidth is None else _bytes(max_bandwidth.strip().removesuffix("/s"))
        from peers.serving.comfort import Schedule

        hours = None if schedule is None else Schedule.parse(schedule)
        options = _node_options("peer", entrance, network, listen, announce, identity)
        from peers.host import PeerConfig
        from swarm.cli import node

        config = PeerConfig(
            **options,
            model=model,
            blocks=spans,
            num_blocks=num_blocks,
            dtype=dtype,
            quantization=quantize,
            device=device,
            name=name,
            max_memory_bytes=memory,
            threads=threads,
            cache_tokens=cache_tokens,
            share_prefixes="network" if share_prefixes else "owner",
            nice=nice,
            schedule=hours,
            pause_on_load_percent=pause_on_load,
            max_bytes_per_s=bytes_per_s,
            journal_disk_bytes=0 if journal_disk is None else _bytes(journal_disk),
            token=token,
            stay=stay,
            metrics_host=metrics_host,
            metrics_port=metrics_port,
        )
        node.join(config, as_json=as_json)


@app.command(epilog=_example('swarm generate smollm2-135m-instruct --invite swarm://… -p "Why is the sky blue?"'))
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
    with command(verbose=verbose, debug=debug), signals.interruptible():
        entrance = _entrance(initial_peers, invite, network)
        text = _prompt(prompt)
        from swarm.answers import Sampling
        from swarm.cli import conversation

        connection = conversation.Connection(
            model=model,
            entrance=entrance,
            dtype=dtype,
            token=token,
            min_precision=min_precision,
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


@app.command(epilog=_example("swarm chat smollm2-135m-instruct --invite swarm://…"))
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
    with command(verbose=verbose, debug=debug), signals.interruptible():
        entrance = _entrance(initial_peers, invite, network)
        from swarm.answers import Sampling
        from swarm.cli import conversation

        connection = conversation.Connection(
            model=model,
            entrance=entrance,
            dtype=dtype,
            token=token,
            min_precision=min_precision,
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


@app.command(epilog=_example("swarm gateway smollm2-135m-instruct --invite swarm://… --port 8000"))
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
        entrance = _entrance(initial_peers, invite, network)
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
            resilience=resilience,
        )
        view.run(config, as_json=as_json)


@app.command(epilog=_example("swarm status --invite swarm://…"))
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
        entrance = _entrance(initial_peers, invite, network)
        from swarm.cli import status as view

        view.status(entrance, model=model, as_json=as_json)


@app.command(epilog=_example("swarm dashboard --invite swarm://… --port 8080"))
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
        entrance = _entrance(initial_peers, invite, network)
        from swarm.extras import require_extra

        require_extra("dashboard", "fastapi", "fastapi_offline", "prometheus_client", "sse_starlette", "uvicorn")
        from swarm.cli import dashboard as view
        from swarm.dashboard.history import default_file
        from swarm.dashboard.host import DashboardConfig

        config = DashboardConfig(
            entrance=entrance, host=host, port=port, history=history or default_file(entrance.network)
        )
        view.run(config, as_json=as_json)


@app.command(epilog=_example("swarm top --invite swarm://…"))
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
        entrance = _entrance(initial_peers, invite, network)
        from swarm.cli import top as view

        view.top(entrance, once=once)


@app.command(epilog=_example("swarm route smollm2-135m-instruct --explain --invite swarm://…"))
def route(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Its announced name, or how its id begins.")],
    explain: Annotated[
        bool, typer.Option("--explain", help="Show every candidate for each hop, its price, and why one won.")
    ] = False,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, max=65_536, help="Of one step: 1 to write, many to read a prompt.")
    ] = 1,
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
        entrance = _entrance(initial_peers, invite, network)
        from swarm.cli import route as view

        view.route(entrance, model=model, tokens=tokens, explain=explain, as_json=as_json)


@app.command(epilog=_example("swarm simulate --peers 1000 --minutes 10 --plot swarm.html"))
def simulate(
    peers: Annotated[int, typer.Option("--peers", min=1, max=20_000, help="So many peers.")] = 1000,
    users: Annotated[int | None, typer.Option("--users", min=1, help="Default: six for each peer.")] = None,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Nodes through which the users come.")] = 10,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="Of virtual time, after two of warm-up.")] = 10.0,
    churn: Annotated[float, typer.Option("--churn", min=0.0, help="The share of peers that leaves per hour.")] = 0.2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write curves into an HTML page.", show_default=False)
    ] = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Run a swarm of thousands on a virtual clock: real routing and placement, simulated peers, links and users.

    Nothing goes over the network. A model of 32 blocks; speeds, distances and memory are drawn from what volunteers
    have. Shows tokens per second against the most that these peers could carry, coverage, moves and fairness.
    """
    with command(verbose=verbose, debug=debug), signals.interruptible():
        from swarm.cli import simulate as view
        from swarm.simulation.world import SimulationConfig

        try:
            config = SimulationConfig(
                peers=peers,
                users=users or max(clients, 6 * peers),
                clients=clients,
                minutes=minutes,
                churn_per_hour=churn,
                seed=seed,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        view.simulate(config, plot=plot, as_json=as_json)


@app.command(epilog=_example('swarm demo "What is a beehive?"'))
def demo(
    prompt: Annotated[str, typer.Argument(metavar="[PROMPT]", help="What to ask.")] = "What is the capital of France?",
    max_new_tokens: MaxNewTokens = 128,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """See it work on this machine: an entry node and three peers as processes of their own, and an answer through them.

    The small built-in model is fetched first (93 MB, once). Everything stops at the end.
    """
    with command(verbose=verbose, debug=debug), signals.interruptible():
        from swarm import demo as show

        with Bars() as bars:
            show.run(prompt, max_new_tokens=max_new_tokens, say=say, write=write, progress=bars)


def spread(arguments: Sequence[str]) -> list[str]:
    """Let several addresses follow one option: `--initial-peers A B` becomes `--initial-peers A --initial-peers B`."""
    spreading, result = "", list[str]()
    for argument in arguments:
        if argument.startswith("-"):
            option = argument.partition("=")[0]
            spreading = option if option in ("--initial-peers", "--listen", "--announce") else ""
        elif spreading and result[-1] != spreading and argument.startswith(("/ip", "/dns")):
            result.append(spreading)
        elif result[-1:] != [spreading]:
            spreading = ""
        result.append(argument)
    return result


def _entrance(initial_peers: list[str] | None, invite: str | None, network: str | None) -> Entrance:
    from swarm.network import DEFAULT_NETWORK, Entrance

    return Entrance.of(initial_peers=initial_peers or (), invite=invite, network=network or DEFAULT_NETWORK)


def _node_options(
    role: str,
    entrance: Entrance | None,
    network: str | None,
    listen: list[str] | None,
    announce: list[str] | None,
    identity: Path | None,
) -> dict[str, Any]:
    """The fields of `peers.host.NodeOptions`. Claims the identity, once the addresses are found to be valid."""
    own = {
        name: tuple(validate_multiaddr(address, need_peer_id=False) for address in addresses or ())
        for name, addresses in (("listen", listen), ("announce", announce))
    }
    from swarm.cli import node
    from swarm.network import DEFAULT_NETWORK

    return {
        "network": entrance.network if entrance else check_network(network or DEFAULT_NETWORK),
        "initial_peers": entrance.addresses if entrance else (),
        "identity": node.claim_identity(identity, role),
        **own,
    }


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        return given
    if sys.stdin.isatty():
        typer.echo("Type the prompt; Ctrl-D ends it.", err=True)
    text = sys.stdin.read().strip("\n")
    if not text:
        raise CallerError("the prompt is empty", hint="give --prompt TEXT, or text on standard input")
    return text


def _bytes(text: str) -> int:
    """`4GB`, `512MiB`, `6G` or a number of bytes."""
    body = text.strip().upper().removesuffix("B")
    base = 1024 if body.endswith("I") else 1000
    body = body.removesuffix("I")
    power = " KMGT".find(body[-1:]) if body else 0
    try:
        value = float(body[:-1] if power > 0 else body) * base ** max(power, 0)
    except ValueError:
        value = 0.0
    if not 0 < value < 1 << 62:  # not a number is refused here, too
        raise typer.BadParameter(f"{text!r} is no size: write for example 6GB or 512MiB")
    return int(value)

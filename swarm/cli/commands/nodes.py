"""Commands that lend this machine to a network: `bootstrap` and `join`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routing.addresses import validate_multiaddr
from routing.errors import InvalidAddress
from routing.ids import BlockSpans
from routing.records import check_network
from swarm.cli import signals
from swarm.cli.options import (
    Announce,
    Debug,
    Dtype,
    ExitWithParent,
    Identity,
    InitialPeers,
    InviteLink,
    Json,
    Listen,
    Model,
    Network,
    Token,
    Verbose,
    bytes_of,
    entrance_of,
)
from swarm.cli.output import command

if TYPE_CHECKING:
    from swarm.network import Entrance


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
        entrance = entrance_of(initial_peers, None, network) if initial_peers else None
        options = _node_options("bootstrap", entrance, network, listen, announce, identity)
        from peers.host.config import BootstrapConfig
        from swarm.cli import node

        node.bootstrap(BootstrapConfig(**options), as_json=as_json)


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
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=FOLDER",
            help="Host a LoRA adapter of the model for everybody, from PEFT's folder or a hub id. Repeatable.",
            show_default=False,
        ),
    ] = None,
    training: Annotated[
        bool,
        typer.Option(
            "--training/--no-training",
            help="Compute gradients, too, for people who fine-tune adapters of their own; generation goes first.",
        ),
    ] = True,
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
            help="Where to compute; auto takes all GPUs of the first one's kind. Several share the blocks by their "
            "memory: cuda:0,cuda:1.",
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
        int | None,
        typer.Option(
            "--threads", min=1, max=4096, help="CPU threads. Default: torch's choice, within the container's."
        ),
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
            "--pause-on-load",
            metavar="PERCENT",
            help="Pause while other programs use so much of all CPUs together, or of an NVIDIA GPU that this peer uses "
            "(needs: pip install 'hiveswarm[gpu]').",
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
    swarm so, and returns by itself; started then, it waits before it loads any weights. Where that lasts ten minutes by
    the schedule, or has lasted two, it gives its memory back, too, and loads the same blocks again afterwards.
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
        entrance = None if new_swarm else entrance_of(initial_peers, invite, network)
        spans = None if blocks is None else BlockSpans.parse(blocks)
        memory = None if max_memory is None else bytes_of(max_memory, "--max-memory")
        bytes_per_s = None
        if max_bandwidth is not None:
            bytes_per_s = bytes_of(max_bandwidth.strip().removesuffix("/s"), "--max-bandwidth")
        from peers.serving.comfort import Schedule

        hours = None if schedule is None else Schedule.parse(schedule)
        options = _node_options("peer", entrance, network, listen, announce, identity)
        from peers.host.config import PeerConfig
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
            alone=True,
            max_memory_bytes=memory,
            threads=threads,
            cache_tokens=cache_tokens,
            share_prefixes="network" if share_prefixes else "owner",
            nice=nice,
            schedule=hours,
            pause_on_load_percent=pause_on_load,
            max_bytes_per_s=bytes_per_s,
            journal_disk_bytes=0 if journal_disk is None else bytes_of(journal_disk, "--journal-disk"),
            token=token,
            stay=stay,
            training=training,
            adapters=tuple(map(_named_adapter, adapters or ())),
            metrics_host=metrics_host,
            metrics_port=metrics_port,
        )
        node.join(config, as_json=as_json)


def _node_options(
    role: str,
    entrance: Entrance | None,
    network: str | None,
    listen: list[str] | None,
    announce: list[str] | None,
    identity: Path | None,
) -> dict[str, Any]:
    """The fields of `peers.host.config.NodeOptions`. Claims the identity, once the addresses are found to be valid."""
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


def _named_adapter(text: str) -> tuple[str, str]:
    """Raises BadParameter."""
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise typer.BadParameter(f"{text!r} is not NAME=FOLDER", param_hint="--adapter")
    return name, source

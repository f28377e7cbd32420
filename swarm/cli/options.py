"""Options that several commands share, in words for people, and what becomes of what was typed.

Imports no torch: a mistyped address is answered before anything is loaded.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from routing.errors import CallerError
from routing.precision import Precision

if TYPE_CHECKING:
    from swarm.network import Entrance


def finite(value: float | None) -> float | None:
    """For options whose range has no upper end."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number to go by")
    return value


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
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="NAME|FOLDER",
        help="With an adapter: one that peers host, by its name (`swarm status` shows which; NAME@DIGEST where several "
        "have it), or your own, in a folder that `swarm finetune` or PEFT wrote, e.g. ./my-adapter.",
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
    float | None, typer.Option("--temperature", min=0.0, callback=finite, help="Sample; higher is wilder, 0 is greedy.")
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
    float | None,
    typer.Option("--repetition-penalty", min=0.01, callback=finite, help="Above 1: avoid what was said before."),
]
NumBeams = Annotated[
    int, typer.Option("--num-beams", min=1, max=64, help="Beam search over so many; prints at the end.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=(1 << 63) - 1, help="Sample, and repeatably so.")]


def entrance_of(initial_peers: list[str] | None, invite: str | None, network: str | None) -> Entrance:
    from swarm.network import DEFAULT_NETWORK, Entrance

    entrance = Entrance.of(initial_peers=initial_peers or (), invite=invite, network=network or DEFAULT_NETWORK)
    if invite is not None and network not in (None, entrance.network):
        raise CallerError(
            f"the invite is to network {entrance.network!r}, not {network!r}", hint="leave out --network, or the invite"
        )
    return entrance


def prompt_of(given: str | None) -> str:
    """Raises CallerError."""
    try:
        text = _standard_input() if given is None or given == "-" else given
        text.encode()
    except UnicodeError as error:
        raise CallerError("the prompt is no text in UTF-8", hint="convert it first, with iconv for example") from error
    return text


def _standard_input() -> str:
    if sys.stdin.isatty():
        typer.echo("Type the prompt; Ctrl-D ends it.", err=True)
    text = sys.stdin.read().strip("\n")
    if not text:
        raise CallerError("the prompt is empty", hint="give --prompt TEXT, or text on standard input")
    return text


def bytes_of(text: str, option: str) -> int:
    """`4GB`, `512MiB`, `6G` or a number of bytes; `option` is where it was given."""
    body = text.strip().upper().removesuffix("B")
    base = 1024 if body.endswith("I") else 1000
    body = body.removesuffix("I")
    power = " KMGT".find(body[-1:]) if body else 0
    try:
        value = float(body[:-1] if power > 0 else body) * base ** max(power, 0)
    except ValueError:
        value = 0.0
    if not 0 < value < 1 << 62:  # not a number is refused here, too
        raise typer.BadParameter(f"{text!r} is no size: write for example 6GB or 512MiB", param_hint=f"'{option}'")
    return int(value)

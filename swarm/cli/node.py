"""`swarm bootstrap` and `swarm join`: run a node of `peers.host`, tell people what it does, stop it when asked."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import typer

from peers.errors import InsecureIdentity
from peers.host.config import BootstrapConfig, PeerConfig
from peers.host.events import Emit, Event
from peers.host.run import run_bootstrap, run_peer
from routing.errors import SwarmError
from routing.invites import MAX_BOOTSTRAPS, Invite
from swarm.cli import signals
from swarm.cli.output import Bars, error_in, event_writer, one_line

MAX_NODES_PER_USER = 64
_locks: list[int] = []
"""Descriptors of identities in use; the kernel lets go of the locks when the process ends, however it ends."""


def bootstrap(config: BootstrapConfig, *, as_json: bool) -> None:
    """Serve as a DHT entry node until a signal comes."""
    _run(lambda emit, stop: run_bootstrap(config, emit=emit, stop=stop), network=config.network, as_json=as_json)


def join(config: PeerConfig, *, as_json: bool) -> None:
    """Serve blocks until a signal comes."""
    with Bars() as bars:
        _run(
            lambda emit, stop: run_peer(config, emit=emit, stop=stop, progress=bars),
            network=config.network,
            as_json=as_json,
        )


def claim_identity(path: Path | None, role: str) -> Path:
    """The identity file to use, locked against other nodes for the life of this process.

    Two nodes under one identity would break each other's connections. Without `path`: the first of this user's
    identities for `role` that no node uses. Raises InsecureIdentity when `path` is taken.
    """
    if path is not None:
        if not path.name:
            raise InsecureIdentity(f"{str(path)!r} is no file", hint="give --identity FILE")
        if not _lock(path):
            raise InsecureIdentity(
                f"{path} is in use by another node on this machine", hint="give each node its own --identity FILE"
            )
        return path
    folder = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "hiveswarm"
    names = [role, *(f"{role}-{number}" for number in range(2, MAX_NODES_PER_USER + 1))]
    candidates = [folder / f"{name}.key" for name in names]
    for candidate in candidates:
        if _lock(candidate):
            return candidate
    raise InsecureIdentity(f"all {len(candidates)} identities in {folder} are in use", hint="give --identity FILE")


def _lock(identity: Path) -> bool:
    import fcntl  # not everywhere: `peers.platform` says so in words

    try:
        identity.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(identity.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InsecureIdentity(f"{identity} cannot be used: {error.strerror}", hint="give --identity FILE") from error
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _locks.append(descriptor)
        return True
    os.close(descriptor)
    return False


def _run(node: Callable[[Emit, asyncio.Event], Coroutine[Any, Any, None]], *, network: str, as_json: bool) -> None:
    stop = asyncio.Event()
    ready = False
    write = event_writer(as_json=as_json, describe=describe)

    def emit(event: Event) -> None:
        nonlocal ready
        if event.kind == "ready":
            ready = True
            event = Event("ready", event.fields | {"invite": _invite(network, event.fields)})
        write(event)

    def drain() -> bool:
        if ready:
            stop.set()
        return ready

    try:
        signals.run(node(emit, stop), stop=drain)
    except signals.Interrupted:
        write(Event("stopped"))
        signals.leave(0)
    except (SwarmError, OSError, BaseExceptionGroup) as error:
        if as_json and (known := error_in(error)) is not None:
            message, hint = one_line(str(known)), one_line(known.hint)
            write(Event("error", {"type": type(known).__name__, "message": message, "hint": hint}))
        raise


def _invite(network: str, fields: dict[str, object]) -> str:
    addresses = cast(list[str], fields["addresses"])
    return Invite(network=network, bootstraps=tuple(addresses[:MAX_BOOTSTRAPS])).to_link()


def describe(event: Event) -> str:
    """An event in words."""
    fields = event.fields
    match event.kind:
        case "connected":
            return f"connected as {fields['peer_id']}"
        case "loading":
            weights = "" if fields["quantization"] == "none" else f", weights in {fields['quantization']}"
            return f"loading blocks {_blocks(fields)} of {fields['model']} in {fields['dtype']}{weights}"
        case "ready" if "spans" in fields:
            disturbed = ", beside busy programs" if fields["probe_disturbed"] else ""
            memory = f", {fields['forward_mib']} MiB" if fields["forward_mib"] else ""
            return (
                f"serving blocks {_blocks(fields)} of {fields['model']} on {fields['device']}; "
                f"cache for {fields['cache_tokens']:,} tokens; per block and token {fields['decode_ms_per_block']} ms, "
                f"{fields['prefill_ms_per_block']} ms in a prompt; up to {fields['token_budget']} tokens a forward"
                f"{memory} (measured {fields['probed']}{disturbed})\n"
                f"{_entry(fields)}\nCtrl-C leaves the swarm"
            )
        case "ready":
            return f"bootstrap of network {fields['network']!r}: {fields['peer_id']}\n{_entry(fields)}\nCtrl-C stops it"
        case "metrics":
            return f"metrics for Prometheus: {fields['url']}"
        case "reachable":
            return "reachable: another node dialled back"
        case "unreachable":
            problems = cast(dict[str, str], fields["problems"])
            lines = [f"  {address}: {problem}" for address, problem in problems.items()]
            return "\n".join(["NOT reachable from outside:", *lines, f"what to do: {fields['hint']}"])
        case "reachability_unknown":
            return f"not known yet whether others reach this node: {fields['reason']}; {fields['hint']}"
        case "unannounced":
            return f"NOT announced, so nobody finds this node: {fields['reason']}\nwhat to do: {fields['hint']}"
        case "clock_wrong":
            skew_s = fields["skew_s"]
            assert isinstance(skew_s, float)
            side = "ahead of" if skew_s > 0 else "behind"
            return f"this machine's clock is {abs(skew_s):.0f} s {side} others'\nwhat to do: {fields['hint']}"
        case "clock_right":
            return "this machine's clock agrees with others' again"
        case "announced":
            return "announced again: others find this node"
        case "moving":
            why = "blocks are missing" if fields["heals"] else "they carry the least"
            return f"moving to blocks {_blocks(fields)}, where {why}"
        case "moved":
            return f"serving blocks {_blocks(fields)}"
        case "paused":
            return f"paused: {_why_paused(fields)}"
        case "gave_back":
            return f"gave {fields['mib']:,} MiB of memory back; its blocks are loaded again after the pause"
        case "not_loaded":
            again = f"this peer tries again every {fields['again_s']:.0f} s"
            return f"NOT serving again: {fields['reason']}\nwhat to do: {fields['hint']}; {again}"
        case "resumed":
            return "resumed: serving again"
        case "draining":
            return "leaving: running steps finish first (Ctrl-C again to end at once)"
        case _:
            return event.kind


def _why_paused(fields: dict[str, object]) -> str:
    if fields["reason"] == "schedule":
        return f"it is outside {fields['schedule']}; back at {fields['resumes_at']}"
    return (
        f"other programs use {fields['load_percent']} % of {fields['of']}, the limit is {fields['limit_percent']:g} %; "
        f"back once that has been below {fields['resume_percent']:g} % for a while"
    )


def _blocks(fields: dict[str, object]) -> str:
    return ",".join(f"{start}:{end}" for start, end in cast(list[list[int]], fields["spans"]))


def _entry(fields: dict[str, object]) -> str:
    addresses = "\n".join(f"  {address}" for address in cast(list[str], fields["addresses"]))
    return f"addresses:\n{addresses}\ninvite:\n  {typer.style(str(fields['invite']), bold=True)}"

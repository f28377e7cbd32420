"""`swarm status`: reads the network's index, pings everybody, and shows who holds what. Needs no model files."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from routing.health import ModelHealth, adapters
from routing.ids import PeerId
from routing.records import Announcement
from swarm.cli import signals
from swarm.health import View, look
from swarm.network import Entrance, enter


def status(entrance: Entrance, *, model: str | None, as_json: bool) -> None:
    """Print what the swarm can do now. Raises CallerError when nobody announces `model`."""
    seen: list[View] = []

    async def main() -> None:
        client = await enter(entrance)
        try:
            seen.append(await look(client, network=entrance.network, model=model))
        finally:
            await client.close()

    signals.run(main())
    if as_json:
        sys.stdout.write(json.dumps(as_plain(seen[0])) + "\n")
    else:
        show(seen[0])


# --- for programs ---


def as_plain(view: View) -> dict[str, Any]:
    """The view as JSON values."""
    return {
        "network": view.network,
        "models": [
            {
                "model": health.model_name,
                "model_id": health.model.hex,
                "num_blocks": health.num_blocks,
                "healthy": health.healthy,
                "replication": health.replication,
                "gaps": [[gap.start, gap.end] for gap in health.gaps],
                "blocks": [list(holders) for holders in health.holders],
                "peers": [_plain_peer(peer, view.rtt_s.get(peer.peer_id)) for peer in health.peers],
            }
            for health in view.models
        ],
    }


def _plain_peer(peer: Announcement, rtt_s: float | None) -> dict[str, Any]:
    return {
        "peer_id": peer.peer_id,
        "name": peer.name,
        **peer.spans.as_fields(),
        "state": peer.state.value,
        "dtype": peer.dtype,
        "quantization": peer.quantization,
        "version": peer.version,
        "protocol": peer.protocol,
        "latency_ms": None if rtt_s is None else round(rtt_s * 1000, 2),
        "decode_ms_per_block": round(peer.decode_s_per_block * 1000, 3),
        "cache_tokens": peer.cache_tokens,
        "free_tokens": peer.free_tokens,
        "max_bytes_per_s": peer.max_bytes_per_s or None,
        "uplink_bytes_per_s": peer.uplink_bytes_per_s or None,
        "adapters": [{"name": adapter.name, "digest": adapter.digest.hex()} for adapter in peer.adapters],
        "addresses": list(peer.addresses),
    }


# --- for people ---


def show(view: View) -> None:
    """Print tables to stdout; as wide as they need to be where it is no terminal."""
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False)
    if not view.models:
        console.print(f"network {view.network!r}: nobody announces a model", markup=False)
    for health in view.models:
        console.print(headline(health), markup=False)
        console.print(_blocks_table(health), "", _peers_table(health.peers, view.rtt_s), sep="\n")
        for line in _adapter_lines(health):
            console.print(line, markup=False)


def headline(health: ModelHealth) -> str:
    """One sentence about a model, with its gaps."""
    if health.healthy:
        rarest = f"{health.replication} peer{'s' if health.replication > 1 else ''}"
        condition = f"healthy, every block at {rarest} or more"
    else:
        condition = f"INCOMPLETE: nobody serves blocks {', '.join(map(str, health.gaps))}"
    return f"\n{health.model_name} ({health.model}) · {health.num_blocks} blocks · {condition}"


def _blocks_table(health: ModelHealth) -> Table:
    table = Table("blocks", "holders", box=None, padding=(0, 3, 0, 0))
    names = {peer.peer_id: _name(peer) for peer in health.peers}
    for (start, end), holders in _runs(health.holders):
        held_by = Text(", ".join(names[peer] for peer in holders)) if holders else Text("nobody", style="bold red")
        table.add_row(f"{start}:{end}", held_by)
    return table


def _adapter_lines(health: ModelHealth) -> Iterable[str]:
    """One sentence about each adapter that peers host."""
    for each in adapters(health):
        missing = ", ".join(map(str, each.gaps))
        condition = f"INCOMPLETE: nobody hosts it for blocks {missing}" if missing else "complete"
        yield f"adapter {each.adapter} · {each.hosts} peer{'' if each.hosts == 1 else 's'} · {condition}"


def _runs(holders: Iterable[tuple[PeerId, ...]]) -> Iterable[tuple[tuple[int, int], tuple[PeerId, ...]]]:
    """Neighbouring blocks with the same holders, together."""
    at = 0
    for peers, group in itertools.groupby(holders):
        count = len(list(group))
        yield (at, at + count), peers
        at += count


def _peers_table(peers: Iterable[Announcement], rtt_s: Mapping[PeerId, float]) -> Table:
    columns = ("peer", "blocks", "dtype", "state", "version", "latency", "free cache", "ms/block", "peer id")
    table = Table(*columns, box=None, padding=(0, 3, 0, 0))
    for peer in peers:
        latency_s = rtt_s.get(peer.peer_id)
        table.add_row(
            Text(_name(peer)),
            str(peer.spans),
            peer.dtype if peer.quantization == "none" else f"{peer.dtype}, {peer.quantization}",
            peer.state.value,
            Text(f"{peer.version} (protocol {peer.protocol})"),
            "no answer" if latency_s is None else f"{latency_s * 1000:.1f} ms",
            f"{peer.free_tokens:,} of {peer.cache_tokens:,}",
            f"{peer.decode_s_per_block * 1000:.2f}",
            Text(peer.peer_id, overflow="fold"),
        )
    return table


def _name(peer: Announcement) -> str:
    """What to call a peer: its name is a claim, the end of its id is not."""
    short = f"…{peer.peer_id[-6:]}"
    return f"{peer.name} ({short})" if peer.name else short

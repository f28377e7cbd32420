"""`swarm route`: the way that a session would go now, and with --explain what other peers would have made of it."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peers.wire.messages import PROTOCOL_VERSION
from routing.cost import BYTES_PER_TOKEN
from routing.errors import CallerError
from routing.explanation import Explanation, Option, Part, Without
from routing.ids import PeerId
from routing.routes import RouteRequest
from swarm.cli import signals
from swarm.health import look
from swarm.network import Entrance, enter

MAX_OPTIONS = 8
"""Shown to people, per hop, and as many who hold some of its blocks; --json holds all."""


def route(
    entrance: Entrance, *, model: str, tokens: int, bytes_per_token: int | None, explain: bool, as_json: bool
) -> None:
    """Print the cheapest route now. Raises NoRoute, and CallerError when nobody announces `model`."""
    found: list[Explanation] = []

    async def main() -> None:
        client = await enter(entrance)
        try:
            view = await look(client, network=entrance.network, model=model)
            if len(view.models) > 1:
                ids = ", ".join(str(health.model) for health in view.models)
                raise CallerError(f"several models are called {model!r}: {ids}", hint="give how the id begins")
            now_s = client.discovery.now_s()
            for peer, rtt_s in view.rtt_s.items():
                client.router.on_rtt(peer, rtt_s, now_s)
            health = view.models[0]
            request = RouteRequest(
                model=health.model,
                num_blocks=health.num_blocks,
                tokens=tokens,
                back_tokens=1,
                bytes_per_token=bytes_per_token or BYTES_PER_TOKEN,
                cache_tokens=tokens,
                protocol=PROTOCOL_VERSION,
            )
            found.append(client.router.explain(request, now_s))
        finally:
            await client.close()

    signals.run(main())
    if as_json:
        sys.stdout.write(json.dumps(as_plain(found[0], explain=explain)) + "\n")
    else:
        show(found[0], explain=explain)


def as_plain(said: Explanation, *, explain: bool) -> dict[str, Any]:
    """As JSON values."""
    plain: dict[str, Any] = {
        "cost_ms": _ms(said.route.cost_s),
        "hops": [{"peer_id": hop.peer_id, "span": [hop.span.start, hop.span.end]} for hop in said.route.hops],
    }
    if explain:
        plain["candidates"] = [[_plain(option) for option in options] for options in said.options]
        plain["parts"] = [[_plain_part(part) for part in parts] for parts in said.parts]
        plain["without"] = [
            other
            and {
                "cost_ms": _ms(other.cost_s),
                "hops": [{"peer_id": peer, "span": [span.start, span.end]} for peer, _, span in other.hops],
            }
            for other in said.without
        ]
        plain["left_out"] = [{"peer": who, "spans": str(spans), "reason": why} for who, spans, why in said.left_out]
    return plain


def _plain(option: Option) -> dict[str, Any]:
    return {
        "peer_id": option.peer_id,
        "name": option.name,
        "spans": str(option.spans),
        "chosen": option.chosen,
        "route_ms": _ms(option.route_s),
        "trip_ms": _ms(option.trip_s),
        "queue_ms": _ms(option.queue_s),
        "compute_ms": _ms(option.compute_s),
        "measured": option.measured,
        "mbit_per_s": round(option.bytes_per_s * 8e-6, 1),
        "mbit_measured": option.bytes_measured,
        "uplink_mbit_per_s": round(option.uplink_bytes_per_s * 8e-6, 1) or None,
        "note": option.note,
    }


def _plain_part(part: Part) -> dict[str, Any]:
    return {
        "peer_id": part.peer_id,
        "name": part.name,
        "spans": str(part.spans),
        "covers": str(part.covers),
        "route_ms": _ms(part.route_s),
        "measured": part.measured,
        "note": part.note,
    }


def show(said: Explanation, *, explain: bool) -> None:
    """Print for people, to stdout."""
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False)
    hops = " → ".join(
        f"{_named(options)} [{hop.span}]" for hop, options in zip(said.route.hops, said.options, strict=True)
    )
    console.print(f"you → {hops} → you · {_ms(said.route.cost_s):.1f} ms per step expected", markup=False)
    if not explain:
        return
    for hop, options, parts, other in zip(said.route.hops, said.options, said.parts, said.without, strict=True):
        console.print(f"\nblocks {hop.span}: {len(options)} can serve them", markup=False)
        table = Table(
            "",
            "peer",
            "serves",
            "route",
            "way",
            "queue",
            "compute",
            "Mbit/s",
            "known by",
            "why",
            box=None,
            padding=(0, 3, 0, 0),
        )
        best = next(option for option in options if option.chosen)
        for option in options[:MAX_OPTIONS]:
            table.add_row(
                "*" if option.chosen else "",
                Text(_name(option.peer_id, option.name)),
                str(option.spans),
                *(
                    f"{_ms(part_s):.1f} ms"
                    for part_s in (option.route_s, option.trip_s, option.queue_s, option.compute_s)
                ),
                _mbit(option),
                "measurement" if option.measured else "its word",
                _why(option, best),
            )
        console.print(table)
        if parts:
            more = f", and {len(parts) - MAX_OPTIONS} more" if len(parts) > MAX_OPTIONS else ""
            some = ", ".join(_some(part, said.route.cost_s) for part in parts[:MAX_OPTIONS])
            console.print(f"or some of them by {some}{more}", markup=False)
        console.print(f"without {_named(options)}: {_other(other, said)}", markup=False)
    for who, spans, reason in said.left_out:
        console.print(f"left out: {who} ({spans}): {reason}", markup=False)


def _other(other: Without | None, said: Explanation) -> str:
    if other is None:
        return "no route"
    hops = " → ".join(f"{_name(peer, name)} [{span}]" for peer, name, span in other.hops)
    return f"{hops} · {_ms(other.cost_s):.1f} ms ({_ms(other.cost_s - said.route.cost_s):+.1f} ms)"


def _mbit(option: Option) -> str:
    """Into the peer, and out of it where it says something."""
    into = f"{option.bytes_per_s * 8e-6:.0f}" + ("" if option.bytes_measured else " assumed")
    return into + (f", {option.uplink_bytes_per_s * 8e-6:.2g} out" if option.uplink_bytes_per_s else "")


def _why(option: Option, best: Option) -> str:
    if option.chosen:
        return "chosen"
    if option.note:
        return f"{option.note}: a last resort"
    parts = {
        "a longer way": option.trip_s - best.trip_s,
        "a longer queue": option.queue_s - best.queue_s,
        "slower": option.compute_s - best.compute_s,
    }
    worst = max(parts, key=lambda part: parts[part])
    slower_ms = _ms(option.route_s - best.route_s)
    return f"{slower_ms:+.1f} ms: {worst}" if parts[worst] > 0 else f"{slower_ms:+.1f} ms: far from the other hops"


def _some(part: Part, cost_s: float) -> str:
    slower = f"{part.note}: a last resort" if part.note else f"{_ms(part.route_s - cost_s):+.1f} ms"
    serves = "" if str(part.spans) == str(part.covers) else f" of {part.spans}"
    return f"{_name(part.peer_id, part.name)} [{part.covers}{serves}] ({slower})"


def _named(options: tuple[Option, ...]) -> str:
    return next(_name(option.peer_id, option.name) for option in options if option.chosen)


def _name(peer: PeerId, name: str) -> str:
    short = f"…{peer[-6:]}"
    return f"{name} ({short})" if name else short


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)

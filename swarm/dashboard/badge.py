"""The health of a swarm as a small image to embed elsewhere, in words as well as in colour. Pure; texts are escaped."""

from __future__ import annotations

from typing import Final
from xml.sax.saxutils import escape, quoteattr

from swarm.dashboard.schemas import ModelView, Overview, State

_CHAR_PX: Final = 6.6
"""Of Verdana and its like at 11 px, on average; `textLength` makes it exact."""
_PAD_PX: Final = 8
GREEN, AMBER, RED, GREY = "#18794e", "#8a5a00", "#b3261e", "#5c5c5c"
"""White on each of them has a contrast of 4.5 or more."""


def of_model(view: ModelView | None, name: str) -> str:
    """An SVG about one model; None: nobody announces it."""
    if view is None:
        return svg(name[:40], "unknown", GREY)
    online = view.states[State.ONLINE]
    if view.gaps:
        return svg(view.name[:40], f"blocks missing · {_peers(online)}", RED)
    colour = GREEN if view.replication > 1 else AMBER
    return svg(view.name[:40], f"healthy ×{view.replication} · {_peers(online)}", colour)


def of_swarm(overview: Overview) -> str:
    totals = overview.totals
    online = totals.states[State.ONLINE]
    if overview.problem:
        return svg("swarm", "not visible now", GREY)
    if not totals.models:
        return svg("swarm", "no model", GREY)
    if totals.healthy_models < totals.models:
        share = f"{totals.healthy_models} of {totals.models} models"
        return svg("swarm", f"{share} healthy · {_peers(online)}", RED if not totals.healthy_models else AMBER)
    return svg("swarm", f"healthy · {_peers(online)}", GREEN)


def svg(label: str, message: str, colour: str) -> str:
    label_px, message_px = (round(len(text) * _CHAR_PX) + 2 * _PAD_PX for text in (label, message))
    width_px = label_px + message_px
    title = quoteattr(f"{label}: {message}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width_px}" height="20" role="img" aria-label={title}>'
        f'<clipPath id="r"><rect width="{width_px}" height="20" rx="3"/></clipPath><g clip-path="url(#r)">'
        f'<rect width="{label_px}" height="20" fill="#444"/>'
        f'<rect x="{label_px}" width="{message_px}" height="20" fill="{colour}"/></g>'
        '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">'
        f"{_text(label, label_px / 2, label_px)}{_text(message, label_px + message_px / 2, message_px)}</g></svg>"
    )


def _text(text: str, x_px: float, width_px: int) -> str:
    return f'<text x="{x_px:g}" y="14" textLength="{width_px - 2 * _PAD_PX}">{escape(text)}</text>'


def _peers(count: int) -> str:
    return "1 peer" if count == 1 else f"{count} peers"

"""`swarm top`: the swarm's health in a terminal, kept fresh. The view is the dashboard's; this draws it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from routing.errors import Unavailable
from routing.router import Router
from swarm.cli import signals
from swarm.dashboard.collector import Collector, entering
from swarm.dashboard.core import Core
from swarm.dashboard.schemas import ModelView, PeerRow, State
from swarm.network import Entrance

FIRST_LOOK_S = 4.0
"""How long `once` waits for the index and the first answers."""
ENTER_S = 60.0
DRAW_S = 1.0
STRIP_CHARS = 100
NAME_CHARS = 24
MAX_MODELS = 4
MAX_EVENTS = 6
MAX_ADAPTERS = 8
"""Of each model."""
MARKS = {
    State.ONLINE: ("●", "green"),
    State.JOINING: ("◌", "cyan"),
    State.PAUSED: ("‖", "yellow"),
    State.DRAINING: ("↓", "yellow"),
    State.LEFT: ("○", "dim"),
    State.LOST: ("✗", "red"),
}
"""A sign and a colour: nothing is said by colour alone."""
COLUMNS = (
    ("state", 0),
    ("peer", 0),
    ("blocks", 0),
    ("rtt", 70),
    ("queue", 90),
    ("sessions", 100),
    ("free cache", 120),
    ("ms/block", 130),
    ("heard", 80),
)
"""Each with the width from which on it is shown."""


def top(entrance: Entrance, *, once: bool) -> None:
    """Draw until q or a signal; `once`: one frame, as wide as it needs to be where that goes to no terminal."""
    core = Core(Router(), network=entrance.network, now_s=time.time())
    collector = Collector(entering(entrance), core, entries=entrance.addresses)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)

    async def main() -> None:
        collecting = asyncio.create_task(collector.run())
        try:
            if once:
                await _first_look(core)
                core.advance(time.time())
                console.print(frame(core, time.time(), width=console.width, height=None))
            else:
                await _watch(core, console, collecting)
        finally:
            collecting.cancel()
            await asyncio.gather(collecting, return_exceptions=True)

    signals.run(main())


async def _first_look(core: Core) -> None:
    """Until the index was read and all that are in it were called, or a while."""
    try:
        async with asyncio.timeout(ENTER_S):
            while core.read_at_s is None:  # noqa: ASYNC110  # the core is pure: it tells nobody
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise Unavailable(core.problem, hint="check the invite and the network") from error
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FIRST_LOOK_S):
            while not core.models or not all(  # noqa: ASYNC110
                row.status_at_s or row.problem for row in core.rows()
            ):
                await asyncio.sleep(0.05)


async def _watch(core: Core, console: Console, collecting: asyncio.Task[None]) -> None:
    leave = asyncio.Event()
    with _quiet(), _keys(leave), Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        leaving = asyncio.create_task(leave.wait())
        try:
            while not leave.is_set():
                live.update(frame(core, time.time(), width=console.width, height=console.height), refresh=True)
                await asyncio.wait({leaving, collecting}, timeout=DRAW_S, return_when=asyncio.FIRST_COMPLETED)
                if collecting.done():
                    collecting.result()
        finally:
            leaving.cancel()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, warnings are not printed: the frame says what is wrong, and lines between would tear it."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _keys(leave: asyncio.Event) -> Iterator[None]:
    """Within, q leaves; where standard input is no terminal, only signals do."""
    if not sys.stdin.isatty():
        yield
        return
    loop, file = asyncio.get_running_loop(), sys.stdin.fileno()
    before = termios.tcgetattr(file)

    def read() -> None:
        keys = os.read(file, 64)
        if not keys or b"q" in keys.lower():
            leave.set()

    tty.setcbreak(file)
    loop.add_reader(file, read)
    try:
        yield
    finally:
        loop.remove_reader(file)
        termios.tcsetattr(file, termios.TCSADRAIN, before)


# --- drawing: what the core knows, as lines; names are claims, and never markup ---


def frame(core: Core, now_s: float, *, width: int, height: int | None) -> RenderableType:
    """Everything, or as much as so many lines hold: coverage first, then what happened, then peers."""
    few = MAX_MODELS if height is None else max(1, min(MAX_MODELS, (height - 12) // 4))
    above = [_head(core, now_s), *(_model(view) for view in core.models[:few])]
    below = [_events(core, MAX_EVENTS if height is None or height > 30 else 2, now_s)]
    if height is not None:
        below.append(_line(("q leaves", "dim")))
    rows = sorted(core.rows(), key=lambda row: (row.gone_at_s is not None, row.model_name, row.spans, row.peer_id))
    room = len(rows)
    if height is not None:
        taken = sum(text.plain.count("\n") + 1 for text in (*above, *below)) + 2  # the heads, and how many are left out
        room = max(1, height - taken)
    if len(rows) > room:
        below.insert(
            0, _line((f"… and {len(rows) - room} more: a larger window shows them, or swarm dashboard", "dim"))
        )
    return Group(*above, _peers(rows[:room], now_s, width), *below)


def _line(*parts: tuple[str, str]) -> Text:
    """Of text and style; too long a line is cut, never wrapped."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for part, style in parts:
        text.append(part, style=style)
    return text


def _head(core: Core, now_s: float) -> Text:
    totals = core.totals()
    states = " · ".join(f"{count} {state}" for state, count in totals.states.items() if count) or "no peers"
    seen = "not read yet" if core.read_at_s is None else f"read {_age(now_s - core.read_at_s)} ago"
    speed = f" · {totals.total_tokens_per_s:,.1f} tokens/s for all" if totals.total_tokens_per_s else ""
    text = _line((f"network {core.network} · {states}{speed}", "bold"), (f" · {seen}", ""))
    if core.problem:
        text.append(f"\n{core.problem}", style="red")
    return text


def _model(view: ModelView) -> Text:
    text = _line(("\n", ""), (view.name, "bold"))
    text.append(f" ({view.model_id[:12]}) · {view.num_blocks} blocks · ")
    if view.gaps:
        missing = ", ".join(f"{start}:{end}" for start, end in view.gaps[:6])
        text.append(f"INCOMPLETE: nobody serves {missing}", style="bold red")
    else:
        text.append(f"every block at {view.replication} or more", style="green" if view.replication > 1 else "yellow")
    one = "no route" if view.stream_tokens_per_s is None else f"{view.stream_tokens_per_s:,.1f} tokens/s for one"
    text.append(f" · {one}, {view.total_tokens_per_s:,.1f} for all · {view.sessions} sessions\n")
    text.append_text(_strip(view.holders))
    if view.route:
        text.append("\nyou → ", style="dim")
        text.append(" → ".join(f"{_short(hop.name, hop.peer_id)} [{hop.span[0]}:{hop.span[1]}]" for hop in view.route))
        text.append(" → you", style="dim")
    elif view.route_problem:
        text.append(f"\n{view.route_problem}", style="red")
    if view.adapters:
        text.append("\nadapters: ", style="dim")
        for at, adapter in enumerate(view.adapters[:MAX_ADAPTERS]):
            text.append(f"{', ' if at else ''}{adapter.name}@{adapter.digest} ×{adapter.hosts}")
            if adapter.gaps:
                text.append(" INCOMPLETE", style="bold red")
        if len(view.adapters) > MAX_ADAPTERS:
            text.append(", …")
    return text


def _strip(holders: Sequence[int]) -> Text:
    """One sign per block (or per few, of a long model: the rarest): how many hold it, ! where nobody does."""
    per = -(-len(holders) // STRIP_CHARS)
    text = Text("blocks ")
    for at in range(0, len(holders), per):
        count = min(holders[at : at + per])
        sign = "!" if count == 0 else str(count) if count < 10 else "+"
        text.append(sign, style="bold white on red" if count == 0 else "black on yellow" if count == 1 else "green")
    return text


def _peers(rows: Sequence[PeerRow], now_s: float, width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    shown = [at for at, (_, least) in enumerate(COLUMNS) if width >= least]
    for at in shown:
        table.add_column(COLUMNS[at][0], no_wrap=True, overflow="ellipsis")
    for row in rows:
        cells = _cells(row, now_s)
        table.add_row(*(cells[at] for at in shown))
    return table


def _cells(row: PeerRow, now_s: float) -> list[Text]:
    """As COLUMNS."""
    sign, style = MARKS[row.state]
    heard = "not yet" if row.status_at_s is None else f"{_age(now_s - row.status_at_s)} ago"
    return [
        Text(f"{sign} {row.state.value}", style=style),
        Text(_short(row.name, row.peer_id)),
        Text(",".join(f"{start}:{end}" for start, end in row.spans)),
        Text("–" if row.rtt_s is None else f"{row.rtt_s * 1000:.1f} ms"),
        Text(f"{row.queue_s * 1000:.0f} ms"),
        Text(str(row.sessions)),
        Text(f"{row.free_tokens:,} of {row.cache_tokens:,}"),
        Text(f"{row.decode_s_per_block * 1000:.2f}"),
        Text(f"{heard}: {row.problem}" if row.problem else heard, style="red" if row.problem else ""),
    ]


def _events(core: Core, most: int, now_s: float) -> Text:
    text = _line()
    for event in list(core.events)[: -most - 1 : -1]:
        text.append(f"\n{_age(now_s - event.at_s):>6} ago  ", style="dim")
        text.append(event.text)
    return text


def _short(name: str, peer_id: str) -> str:
    short = f"…{peer_id[-6:]}"
    name = name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS - 1]}…"
    return f"{name} ({short})" if name else short


def _age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"

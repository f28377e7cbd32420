"""`swarm simulate`: run a swarm on a virtual clock and print what came of it."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

from routing.errors import CallerError
from swarm.cli.output import say
from swarm.extras import require_extra
from swarm.simulation.report import Report
from swarm.simulation.run import simulate as run
from swarm.simulation.world import SimulationConfig


def simulate(config: SimulationConfig, *, plot: Path | None, as_json: bool) -> None:
    """Print the report, and write its curves. Raises CallerError when they cannot be written: as far as that can be
    known, before anything is simulated."""
    draw = None if plot is None else _drawing(plot)
    gc.disable()  # a seventh of the time went into looking for cycles in what stays, and nothing here makes any
    try:
        report = run(config)
    finally:
        gc.enable()
    if plot is not None and draw is not None:
        try:
            draw(report, plot)
        except OSError as error:
            raise CallerError(f"{plot} cannot be written: {error.strerror}", hint="name another file") from error
        say(f"curves are in {plot}")
    sys.stdout.write(json.dumps(report.as_plain()) + "\n" if as_json else "\n".join(report.lines()) + "\n")


def _drawing(plot: Path) -> Callable[[Report, Path], object]:
    """What writes such a file."""
    match plot.suffix.lower():
        case ".html" | ".htm":
            return lambda report, file: file.write_text(report.page(), encoding="utf-8")
        case ".png":
            require_extra("train", "matplotlib")
            from swarm.simulation.picture import draw

            return draw
    raise CallerError(f"{plot} would be neither a picture nor a page", hint="give it a name with .png or .html")

"""`swarm simulate`: run a swarm on a virtual clock and print what came of it."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from routing.errors import CallerError
from swarm.cli.output import say
from swarm.simulation.run import simulate as run
from swarm.simulation.world import SimulationConfig


def simulate(config: SimulationConfig, *, plot: Path | None, as_json: bool) -> None:
    """Print the report, and write its page. Raises CallerError when the page cannot be written."""
    gc.disable()  # a seventh of the time went into looking for cycles in what stays, and nothing here makes any
    try:
        report = run(config)
    finally:
        gc.enable()
    if plot is not None:
        try:
            plot.write_text(report.page(), encoding="utf-8")
        except OSError as error:
            raise CallerError(f"{plot} cannot be written: {error.strerror}", hint="name another file") from error
        say(f"curves are in {plot}")
    sys.stdout.write(json.dumps(report.as_plain()) + "\n" if as_json else "\n".join(report.lines()) + "\n")

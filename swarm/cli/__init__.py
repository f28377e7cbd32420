"""The command line: `swarm COMMAND …`; `app` puts the commands together.

Owns what people see and type: options, exit codes, signals, logging, progress bars. A command is parse → frozen config
→ run → exit code; the work itself is elsewhere. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import gc
import os
import sys

from peers.platform import keep_to_quota, let_threads_sleep, require_platform
from routing.errors import SwarmError


def main() -> None:
    """The console script. From its first lines on, Ctrl-C leaves no traceback."""
    try:
        require_platform()
    except SwarmError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")
    let_threads_sleep()
    keep_to_quota()
    # what torch and transformers are made of stays: looking for garbage among it takes a seventh of their import
    gc.set_threshold(10_000)
    from swarm.cli import signals  # which, as the rest, another platform may not be able to import

    signals.end_at_once()
    from swarm.cli.app import app, spread

    try:
        app(spread(sys.argv[1:]), prog_name="swarm")
    except SystemExit as end:
        # everything is closed by now, and taking torch's modules apart one by one would take another second
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)

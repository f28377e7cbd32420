"""`swarm dashboard`: what its person sees in the terminal while it runs."""

from __future__ import annotations

import json

import typer

from swarm.cli import signals
from swarm.cli.output import say
from swarm.dashboard import host
from swarm.dashboard.host import DashboardConfig, RunningDashboard
from swarm.web.server import is_exposed


def run(config: DashboardConfig, *, as_json: bool) -> None:
    """Until a signal. Raises SwarmError."""
    running: list[RunningDashboard] = []

    def ready(dashboard: RunningDashboard) -> None:
        running.append(dashboard)
        if as_json:
            typer.echo(json.dumps({"event": "ready", "url": dashboard.url, "network": config.entrance.network}))
            return
        typer.echo(f"network {config.entrance.network!r}: {dashboard.url}, described at {dashboard.url}/docs")
        if is_exposed(config.host):
            say("warning: everybody who can reach this port sees the swarm and its invite")

    def stop() -> bool:
        if running:
            running[0].stop()
        return bool(running)

    signals.run(host.run(config, ready=ready), stop=stop)

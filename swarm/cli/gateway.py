"""`swarm gateway`: what its person sees while it runs."""

from __future__ import annotations

import json

import typer

from swarm.cli import signals
from swarm.cli.output import Bars, say
from swarm.gateway import host
from swarm.gateway.host import GatewayConfig, RunningGateway
from swarm.web.server import is_exposed


def run(config: GatewayConfig, *, as_json: bool) -> None:
    """Until a signal; the second one leaves at once. Raises SwarmError."""
    running: list[RunningGateway] = []

    def ready(gateway: RunningGateway) -> None:
        running.append(gateway)
        if as_json:
            typer.echo(json.dumps({"event": "ready", "url": gateway.url, "models": config.models}))
            return
        typer.echo(f"{', '.join(config.models)}: OpenAI's API at {gateway.url}/v1, described at {gateway.url}/docs")
        typer.echo(f"chat in a browser at {gateway.url}")
        if not config.accounts and is_exposed(config.host):
            say("warning: everybody who can reach this port may ask; --api-keys FILE lets in only whom you know")

    def stop() -> bool:
        if not running:
            return False
        say(f"answers under way have {config.drain_s:.0f} s to end; once more leaves at once")
        running[0].stop()
        return True

    with Bars() as bars:
        signals.run(host.run(config, ready=ready, progress=bars), stop=stop)

"""A dashboard from start to end: its view, its file, its socket. The composition root."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from peers.transport.links import Links
from routing.router import Router
from swarm.dashboard.app import Dashboard, make_app
from swarm.dashboard.collector import Collector, entering
from swarm.dashboard.core import Core
from swarm.dashboard.feed import Feed
from swarm.dashboard.history import History
from swarm.network import Entrance, enter
from swarm.web.server import is_exposed, listen, make_server, url

CLOSE_S = 2.0
"""What answers under way have, once the dashboard was told to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DashboardConfig:
    """Raises ValueError on a port that is none."""

    entrance: Entrance
    host: str = "127.0.0.1"
    port: int = 8080
    history: Path | None = None
    """None: in memory only."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"{self.port} is no port")


class RunningDashboard:
    """A view, its pages and their socket. `stop` may come from the loop that runs `serve`."""

    def __init__(self, config: DashboardConfig) -> None:
        """Listen. Raises CallerError where the port is taken."""
        self.listener = listen(config.host, config.port)
        self.url = url(self.listener)
        self._history = History.open(config.history, config.entrance.network)
        router, now_s = Router(), time.time()
        core = Core(router, network=config.entrance.network, now_s=now_s, next_event_id=self._history.last_event_id + 1)
        feed = Feed(core, epoch=secrets.token_hex(4))
        self._collector = Collector(
            entering(config.entrance), core, entries=config.entrance.addresses, feed=feed, history=self._history
        )
        self._dashboard = Dashboard(
            core=core,
            feed=feed,
            history=self._history,
            entrance=config.entrance.addresses,
            news=self._collector.news,
            stranger=lambda: _stranger(config.entrance.network),
            calls=self._collector.calls,
            exposed=is_exposed(config.host),
        )
        self._server = make_server(make_app(self._dashboard), close_within_s=CLOSE_S)

    def stop(self) -> None:
        """`serve` returns soon."""
        self._dashboard.stopping.set()
        self._server.should_exit = True

    async def serve(self) -> None:
        """Until `stop`; raises what no part expected."""
        collecting = asyncio.create_task(self._collector.run(), name="collect")
        serving = asyncio.create_task(self._server.serve(sockets=[self.listener]), name="serve")
        try:
            done, _ = await asyncio.wait({collecting, serving}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self.stop()
            collecting.cancel()
            await asyncio.gather(collecting, serving, return_exceptions=True)
            self._history.close()
            self.listener.close()


@asynccontextmanager
async def _stranger(network: str) -> AsyncIterator[Links]:
    client = await enter(Entrance(network=network, addresses=()))
    try:
        yield client.links
    finally:
        await client.close()


async def run(config: DashboardConfig, *, ready: Callable[[RunningDashboard], None]) -> None:
    """From start to end; `ready` is told when pages are served."""
    running = RunningDashboard(config)
    ready(running)
    await running.serve()

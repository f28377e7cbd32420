"""How a swarm is, seen from outside: one look at its records, and a ping to everybody. Needs no model files.

    with SwarmHealth(invite="swarm://…") as health:
        for model in health.look().models:
            print(model.model_name, model.replication, model.gaps)

Owns the look. What covers what is `routing.health`'s to say; a view that is kept fresh is `swarm.dashboard`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from routing.directory import Snapshot
from routing.errors import CallerError, PeerError
from routing.health import ModelHealth, models
from routing.ids import PeerId
from routing.records import Announcement
from swarm.network import DEFAULT_NETWORK, ClientNode, Entrance, NetworkThread, enter

LOOK_AGAIN_S = 0.5
LOOK_TIMEOUT_S = 2.0
"""How long an empty index is looked at again: a node that has just joined may ask those who know nothing."""
PING_TIMEOUT_S = 2.0
PINGS_TIMEOUT_S = 3.0
"""For all peers together: whoever has not answered by then shows no latency."""
MAX_CONCURRENT_PINGS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one look at the network showed."""

    network: str
    models: tuple[ModelHealth, ...]
    rtt_s: Mapping[PeerId, float]
    """Of the peers that answered a ping."""


class SwarmHealth:
    """A client of its own, for blocking code. Raises SwarmError where the network cannot be entered."""

    def __init__(
        self, *, invite: str | None = None, initial_peers: Sequence[str] = (), network: str = DEFAULT_NETWORK
    ) -> None:
        entrance = Entrance.of(initial_peers=initial_peers, invite=invite, network=network)
        self._network = entrance.network
        self._thread = NetworkThread(lambda: enter(entrance))

    def look(self, model: str | None = None) -> View:
        """What can be seen now: of all models, or of the one with this name or beginning of an id.

        Takes a moment. Raises CallerError when nobody announces `model`.
        """
        return self._thread.call(look(self._thread.client, network=self._network, model=model))

    def close(self) -> None:
        """Leave the network. Idempotent."""
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


async def look(client: ClientNode, *, network: str, model: str | None) -> View:
    """Read the index and ping the peers of what was asked for. Raises CallerError."""
    snapshot = await _snapshot(client)
    found = models(snapshot)
    if model is not None:
        chosen = tuple(health for health in found if is_named(health, model))
        if not chosen:
            names = ", ".join(f"{health.model_name} ({health.model})" for health in found) or "none"
            raise CallerError(f"nobody announces a model {model!r} in network {network!r}", hint=f"announced: {names}")
        found = chosen
    return View(network=network, models=found, rtt_s=await _ping(client, [a for h in found for a in h.peers]))


async def _snapshot(client: ClientNode) -> Snapshot:
    deadline_s = time.monotonic() + LOOK_TIMEOUT_S
    while True:
        began_s = client.discovery.now_s()
        announcements = await client.discovery.read_index()
        if announcements or time.monotonic() > deadline_s:
            client.router.on_announcements(announcements, began_s)
            return client.router.snapshot(client.discovery.now_s())
        await asyncio.sleep(LOOK_AGAIN_S)


def is_named(health: ModelHealth, name: str) -> bool:
    return health.model_name == name or (len(name) >= 4 and health.model.hex.startswith(name.lower()))


async def _ping(client: ClientNode, peers: Sequence[Announcement]) -> dict[PeerId, float]:
    slots = asyncio.Semaphore(MAX_CONCURRENT_PINGS)
    rtt_s: dict[PeerId, float] = {}

    async def ping(peer: Announcement) -> None:
        async with slots:
            try:
                rtt_s[peer.peer_id], _ = await client.links.ping(peer.peer_id, peer.addresses, timeout_s=PING_TIMEOUT_S)
            except PeerError:
                return  # no latency is shown: that is the answer

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PINGS_TIMEOUT_S):
            await asyncio.gather(*map(ping, peers))
    return rtt_s

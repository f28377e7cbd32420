"""Feeds the core from the network: reads the index every few seconds, and asks live peers how they are, in turn.

Owns the rhythm and its bounds; what to make of it is the core's. It keeps trying, for as long as it runs, whatever the
network does: what it knows stays, and gets older.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sqlite3
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from routing.addresses import peer_id_in
from routing.errors import PeerError, SwarmError, Unavailable
from routing.ids import PeerId
from routing.records import Announcement
from routing.router import Router
from swarm.dashboard.core import Core
from swarm.dashboard.feed import Feed
from swarm.dashboard.history import SAMPLE_S, History
from swarm.dashboard.schemas import State
from swarm.network import ClientNode, Entrance, enter

logger = logging.getLogger(__name__)

READ_S: Final = 2.5
TICK_S: Final = 1.0
CALL_S: Final = 5.0
"""Between two calls of one peer, where they are few."""
CALLS_PER_S: Final = 40.0
"""To all peers together: a thousand are each called every 25 s."""
MAX_CALLS: Final = 16
"""At once."""
CALL_TIMEOUT_S: Final = 3.0
ENTER_AGAIN_S: Final = 5.0

Enter = Callable[[Router], Coroutine[Any, Any, ClientNode]]
"""Makes a client whose router is the given one."""


def entering(entrance: Entrance) -> Enter:
    """How a collector gets into this network."""

    async def into(router: Router) -> ClientNode:
        # seconds of imports, once; whoever shows the view goes on meanwhile
        await asyncio.to_thread(importlib.import_module, "peers.transport.hivemind_p2p")
        return await enter(entrance, router=router)

    return into


class Collector:
    """`run` fills `core` until cancelled, tells `feed` and, where there is one, `history`."""

    def __init__(
        self,
        into: Enter,
        core: Core,
        *,
        entries: Sequence[str] = (),
        feed: Feed | None = None,
        history: History | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`entries`: addresses of entry nodes, which are asked whether they are there when nobody else is."""
        self.core = core
        self.calls = {"answered": 0, "silent": 0}
        """How many there were, for metrics."""
        self._into = into
        self._entries = entries
        self._feed = feed
        self._history = history
        self._clock = clock
        self._called_at_s: dict[PeerId, float] = {}
        self._kept_events = 0
        self._news = asyncio.Event()

    async def news(self) -> None:
        """Wait until the feed or the view has something new."""
        await self._news.wait()

    async def run(self) -> None:
        """Until cancelled; raises only what is no SwarmError."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._network())
            group.create_task(self._ticking())

    # --- the network ---

    async def _network(self) -> None:
        told = ""
        while True:
            try:
                await self._visit()
            except SwarmError as error:
                if str(error) != told:
                    logger.warning("no view of the network, trying on: %s", error)
                    told = str(error)
                self.core.failed(f"no way into the network: {error}")
            await asyncio.sleep(ENTER_AGAIN_S)

    async def _visit(self) -> None:
        """In the network until it fails. Raises SwarmError."""
        client = await self._into(self.core.router)
        ending = [asyncio.create_task(client.node.wait_closed()), asyncio.create_task(client.failed())]
        working = [asyncio.create_task(self._reading(client)), asyncio.create_task(self._calling(client))]
        try:
            done, _ = await asyncio.wait({*ending, *working}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (*working, *ending):
                task.cancel()
            await asyncio.gather(*working, *ending, return_exceptions=True)
            await client.close()

    async def _reading(self, client: ClientNode) -> None:
        while True:
            asked_at_s = self._clock()
            announcements = await client.discovery.read_index()
            if announcements or await self._hears_somebody(client):
                self.core.read(announcements, asked_at_s)
            else:
                self.core.failed("the network's index cannot be read, and nobody answers")
            self.core.advance(self._clock())  # so that who is new is called at once
            await asyncio.sleep(READ_S)

    async def _hears_somebody(self, client: ClientNode) -> bool:
        """Whether an empty index is to be believed."""
        if self._clock() - self.core.heard_at_s() < 2 * READ_S:
            return True
        for address in self._entries:
            peer = peer_id_in(address)
            assert peer is not None
            try:
                await client.links.ping(peer, (address,), timeout_s=CALL_TIMEOUT_S)
            except (PeerError, Unavailable) as error:
                logger.info("entry node %s: %s", peer, error)
            else:
                return True
        return False

    async def _calling(self, client: ClientNode) -> None:
        slots = asyncio.Semaphore(MAX_CALLS)
        async with asyncio.TaskGroup() as group:
            while True:
                for record in self._due():
                    await slots.acquire()
                    self._called_at_s[record.peer_id] = self._clock()
                    call = group.create_task(self._call(client, record))
                    call.add_done_callback(lambda _: slots.release())
                    await asyncio.sleep(1 / CALLS_PER_S)
                await asyncio.sleep(TICK_S / 4)

    def _due(self) -> list[Announcement]:
        """Who is to be called, those first who say goodbye, then those not called for longest."""
        live = list(self.core.peers())
        ids = {record.peer_id for record in live}
        self._called_at_s = {peer: at_s for peer, at_s in self._called_at_s.items() if peer in ids}
        called_at_s = self._called_at_s
        before_s = self._clock() - max(CALL_S, len(live) / CALLS_PER_S)
        leaving = [
            record
            for record in live
            if self.core.state(record.peer_id) is State.DRAINING
            and called_at_s.get(record.peer_id, 0.0) <= self._clock() - TICK_S
        ]
        due = [record for record in live if called_at_s.get(record.peer_id, 0.0) <= before_s and record not in leaving]
        due.sort(key=lambda record: called_at_s.get(record.peer_id, 0.0))
        return (leaving + due)[: int(CALLS_PER_S)]

    async def _call(self, client: ClientNode, record: Announcement) -> None:
        try:
            rtt_s, pong = await client.links.ping(
                record.peer_id, record.addresses, timeout_s=CALL_TIMEOUT_S, detail=True
            )
        except Unavailable as error:  # of this machine, out of descriptors for example: no fault of the peer's
            logger.warning("peer %s was not called: %s", record.peer_id, error)
        except PeerError as error:
            self.calls["silent"] += 1
            self.core.silent(record.peer_id, str(error), self._clock())
        else:
            self.calls["answered"] += 1
            self.core.answered(record.peer_id, rtt_s, pong, self._clock())

    # --- the view ---

    async def _ticking(self) -> None:
        sampled_at_s = 0.0
        while True:
            now_s = self._clock()
            self.core.advance(now_s)
            changed = self._feed is None or self._feed.tick(now_s)
            if changed:
                self._news.set()
                self._news = asyncio.Event()
            if self._history is not None and self.core.read_at_s is not None:
                sample = now_s - sampled_at_s >= SAMPLE_S
                sampled_at_s = now_s if sample else sampled_at_s
                await self._keep(self._history, sample, now_s)
            await asyncio.sleep(TICK_S)

    async def _keep(self, history: History, sample: bool, now_s: float) -> None:
        events = self.core.events_after(self._kept_events)
        if not (events or sample):
            return
        self._kept_events = self.core.total_events
        try:
            await asyncio.to_thread(history.add, self.core.models if sample else [], events, now_s)
        except sqlite3.Error as error:
            logger.warning("the history was not written: %s", error)

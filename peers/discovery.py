"""Drives `routing.router` from the network: reads records, measures round trips, and waits for a route to appear.

Owns the rhythm of looking; what to make of it is the router's. Used by clients (to plan routes) and by joining peers
(to see which blocks need holders).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from peers.errors import PeerSilent
from peers.transport.links import Links
from peers.transport.patience import Patience
from peers.transport.tasks import Tasks
from routing.errors import InvalidRecord, NoRoute, PeerError, Unavailable
from routing.ids import ModelId, PeerId
from routing.records import Announcement, index_keys, model_keys, verify_record
from routing.router import Router
from routing.routes import Route, RouteRequest
from routing.store import RecordStore, StoredRecord

logger = logging.getLogger(__name__)

READ_EVERY_S = 4.5
"""Records: who says goodbye is gone for everybody within five seconds."""
READ_TIMEOUT_S = 10.0
NO_ROUTE_PATIENCE_S = 4.0
"""How long a client waits for missing blocks to be announced before it names them."""
LATE_PATIENCE_S = 30.0
"""How long for peers that hold them and do not answer; longer than the records of those last that have died."""
MOMENT_S = 0.001
"""Is not waited for: a clock may not tell it from nothing."""
LOOK_AGAIN_S = 0.5
PING_TIMEOUT_S = 3.0
PING_AGAIN_TIMEOUT_S, PING_AGAIN_TIMEOUT_S_MAX = 1.5, 6.0
"""Of peers that did not answer before, while somebody waits for them: twice as long each time that they do not."""
MISSED_MAX = 2
"""So many pings in a row that nobody answers count as a failure; a connection that ends or is refused does at once."""
PING_SILENT_EVERY_S = READ_EVERY_S / 2
"""Of those that did not answer: at every look, however long this and the last one took to read."""
PING_EVERY_S = 30.0
PING_DOUBTED_EVERY_S = 1.0
MAX_PINGS_PER_ROUND = 8


class Discovery:
    """The node's view of the swarm, kept fresh while `run` runs."""

    def __init__(
        self,
        *,
        store: RecordStore,
        router: Router,
        links: Links,
        network: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.router = router
        self._store = store
        self._links = links
        self._network = network
        self._clock = clock
        self._watched: set[ModelId] = set()
        self._pinged_at_s: dict[PeerId, float] = {}
        self._pinging: Counter[PeerId] = Counter()
        """Pings that wait for an answer."""
        self._missed: dict[PeerId, int] = {}
        """How many pings in a row each has not answered."""
        self._asked: set[PeerId] = set()
        """Whether they answer again, because somebody needs them."""
        self._answered = asyncio.Event()
        """One of those did."""
        self._waiting: dict[object, tuple[ModelId, NoRoute]] = {}
        """Each call that has waited for blocks for longer than NO_ROUTE_PATIENCE_S, and for which."""
        self._tasks = Tasks()
        links.on_transfer = lambda peer, size, seconds: router.on_transfer(peer, size, seconds, clock())
        self._reading: asyncio.Task[None] | None = None

    @property
    def peer_id(self) -> PeerId:
        """Of this node."""
        return self._links.transport.peer_id

    def watch(self, model: ModelId) -> None:
        """Follow this model's peers from the next look on."""
        self._watched.add(model)

    def now_s(self) -> float:
        """The clock that records expire by and the router is told (Unix seconds)."""
        return self._clock()

    async def read(self, keys: Sequence[str]) -> list[Announcement]:
        """Verified announcements under `keys`; bad records are dropped one by one, and logged."""
        try:
            async with Patience(READ_TIMEOUT_S):
                records = await self._store.get(keys)
        except TimeoutError:
            logger.warning("the DHT did not answer within %.0f s", READ_TIMEOUT_S)
            return []
        # a fifth of a millisecond each: thousands of them must not hold up the event loop
        return await asyncio.to_thread(_verified, records, self._clock())

    async def read_index(self) -> list[Announcement]:
        """Every peer of the network, of whatever model."""
        return await self.read(index_keys(self._network))

    async def refresh(self) -> None:
        """Look once at all watched models. Callers at the same time share one look."""
        if self._reading is None or self._reading.done():
            self._reading = self._tasks.spawn(self._refresh(), name="read records")
        await asyncio.shield(self._reading)

    async def _refresh(self) -> None:
        for model in tuple(self._watched):
            began_s = self._clock()
            self.router.on_announcements(await self.read(model_keys(self._network, model)), began_s)

    async def run(self) -> None:
        """Look and measure until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                began_s = loop.time()
                await self.refresh()
                await self.measure(self.router.snapshot(self._clock()).peers)
                await asyncio.sleep(began_s + READ_EVERY_S - loop.time())
        finally:
            await self._tasks.close()

    async def measure(self, peers: Iterable[Announcement]) -> None:
        """Ping the peers whose round trip is unknown or old, a few at a time; and those more often that did not answer,
        so that they are used again soon after they do."""
        now_s = self._clock()
        silent = {peer.peer_id for peer in self.router.silent(now_s)} | self._missed.keys()
        due = [
            peer
            for peer in peers
            if peer.peer_id != self._links.transport.peer_id
            and peer.addresses
            and now_s - self._pinged_at_s.get(peer.peer_id, 0.0)
            >= (PING_SILENT_EVERY_S if peer.peer_id in silent else PING_EVERY_S)
        ]
        known = {peer.peer_id for peer in peers}
        self._pinged_at_s = {peer: at_s for peer, at_s in self._pinged_at_s.items() if peer in known}
        self._missed = {peer: missed for peer, missed in self._missed.items() if peer in known}
        due.sort(key=lambda peer: self._pinged_at_s.get(peer.peer_id, 0.0))
        await self._ping_all(due[:MAX_PINGS_PER_ROUND])

    def doubt(self, peers: Iterable[PeerId]) -> None:
        """The way to one of these seems to have become longer: ask them soon, not only when they are due."""
        before_s = self._clock() - PING_DOUBTED_EVERY_S
        due = [
            record
            for peer in peers
            if peer not in self._pinging and self._pinged_at_s.get(peer, 0.0) <= before_s
            if (record := self.router.record_of(peer)) is not None
        ]
        self._tasks.spawn(self._ping_all(due), name="ping those in doubt")

    async def answering(self, peers: Sequence[Announcement], *, timeout_s: float) -> set[PeerId]:
        """Those that answer a ping now; all are asked at once."""
        answers = await asyncio.gather(*(self._ping(peer, timeout_s=timeout_s) for peer in peers))
        return {peer.peer_id for peer, answers_now in zip(peers, answers, strict=True) if answers_now}

    async def _ping_all(self, peers: Iterable[Announcement]) -> None:
        await asyncio.gather(*(self._ping(peer) for peer in peers))

    async def _ping(self, peer: Announcement, *, timeout_s: float = PING_TIMEOUT_S, needed: bool = False) -> bool:
        """Whether it answers."""
        self._pinged_at_s[peer.peer_id] = self._clock()
        self._pinging[peer.peer_id] += 1
        try:
            rtt_s, _ = await self._links.ping(peer.peer_id, peer.addresses, timeout_s=timeout_s)
        except Unavailable as error:  # of this node, out of descriptors for example: no fault of the peer's
            logger.warning("peer %s was not measured: %s", peer.peer_id, error)
        except PeerError as error:
            logger.info("peer %s: %s", peer.peer_id, error)
            late = isinstance(error, PeerSilent)
            missed = self._missed[peer.peer_id] = self._missed.get(peer.peer_id, 0) + 1
            if missed >= MISSED_MAX or not late:
                self.router.on_failure(
                    peer.peer_id, self._clock(), "does not answer pings", unreachable=True, late=late
                )
        else:
            self._missed.pop(peer.peer_id, None)
            self.router.on_rtt(peer.peer_id, rtt_s, self._clock(), needed=needed)
            return True
        finally:
            self._pinging -= Counter([peer.peer_id])
        return False

    async def _look_again(self, model: ModelId, delay_s: float) -> None:
        """Returns once the records were read again, after `delay_s`, or a peer answers that did not before."""
        self._answered.clear()
        silent = self.router.silent(self._clock())
        for peer in sorted(silent, key=lambda peer: self._pinged_at_s.get(peer.peer_id, 0.0)):
            if peer.model == model and peer.peer_id not in self._asked and len(self._asked) < MAX_PINGS_PER_ROUND:
                self._asked.add(peer.peer_id)
                self._tasks.spawn(self._ask_again(peer), name=f"ping {peer.peer_id[-8:]} again")

        async def read() -> None:
            await asyncio.sleep(delay_s)
            await self.refresh()

        waits = [asyncio.create_task(read()), asyncio.create_task(self._answered.wait())]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _ask_again(self, peer: Announcement) -> None:
        try:
            timeout_s = PING_AGAIN_TIMEOUT_S * 2 ** self._missed.get(peer.peer_id, 0)
            await self._ping(peer, timeout_s=min(timeout_s, PING_AGAIN_TIMEOUT_S_MAX), needed=True)
            if peer.peer_id not in {silent.peer_id for silent in self.router.silent(self._clock())}:
                self._answered.set()
        finally:
            self._asked.discard(peer.peer_id)

    async def route(self, request: RouteRequest, *, patience_s: float | None = None) -> Route:
        """A route now, or as soon as the missing blocks are announced, or a peer that has them answers again or has
        been left alone for long enough.

        Raises NoRoute after `patience_s` (default NO_ROUTE_PATIENCE_S), or LATE_PATIENCE_S where that is more, while
        peers that have them may only be late. What is waited for longer than NO_ROUTE_PATIENCE_S is named in the log,
        and by `waited_for`.
        """
        self.watch(request.model)
        clock_s = asyncio.get_running_loop().time
        began_s, looked, me = clock_s(), False, object()
        least_s = NO_ROUTE_PATIENCE_S if patience_s is None else patience_s
        try:
            while True:
                try:
                    return self.router.plan(request, self._clock())
                except NoRoute as error:
                    # whatever this machine does meanwhile, nothing is missing before the records were read once
                    waited_s = clock_s() - began_s if looked else 0.0
                    left_s = (max(least_s, LATE_PATIENCE_S) if error.late else least_s) - waited_s
                    if left_s < MOMENT_S:
                        raise
                    if waited_s >= NO_ROUTE_PATIENCE_S:
                        if me not in self._waiting:
                            logger.warning("waiting for up to %.0f s more: %s", left_s, error)
                        self._waiting[me] = request.model, error
                with suppress(TimeoutError):  # a DHT that does not answer must not hide what is missing
                    async with Patience(left_s):
                        await self._look_again(request.model, LOOK_AGAIN_S if looked else 0.0)
                looked = True
        finally:
            self._waiting.pop(me, None)

    def waited_for(self, model: ModelId) -> NoRoute | None:
        """Why some route of the model has been waited for, for longer than NO_ROUTE_PATIENCE_S; None where none has."""
        return next((error for waited, error in self._waiting.values() if waited == model), None)


def _verified(records: Iterable[StoredRecord], now_s: float) -> list[Announcement]:
    announcements = []
    for record in records:
        try:
            announcements.append(
                verify_record(
                    record.value,
                    key=record.key,
                    subkey=record.subkey,
                    stored_expiry_s=record.expires_at_s,
                    now_s=now_s,
                )
            )
        except InvalidRecord as error:
            logger.info("dropped a record of %s: %s", record.subkey[:64], error)
    return announcements

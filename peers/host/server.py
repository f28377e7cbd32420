"""One serving node: builds the parts, wires them, has them serve other blocks or none, takes them down in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType

from peers import garbage
from peers.capacity import Plan
from peers.discovery import Discovery
from peers.errors import Paused, PeerTooSmall
from peers.host.absence import Absence, Wish
from peers.host.blocks import Blocks, Fit
from peers.host.events import Emit, Event, loading, not_loaded
from peers.host.presence import Presence
from peers.model.catalog import Checkpoint
from peers.model.lora import AdapterFolder
from peers.model.progress import Progress
from peers.model.storage import cache_folder
from peers.runtime.cost import CLEARLY, slower
from peers.runtime.joined import AnyEngine
from peers.runtime.memory import give_back
from peers.runtime.probe import Probe, measure
from peers.runtime.rough import Speed
from peers.runtime.works import EngineConfig, Sharing
from peers.serving.adapters import AdapterLimits
from peers.serving.admission import Admission, AdmissionLimits
from peers.serving.handler import PAUSED_RETRY_S, Handler, Served
from peers.serving.joining import settle
from peers.serving.journal import Journal, JournalLimits
from peers.serving.ledger import Ledger, LedgerLimits
from peers.serving.metrics import PeerMetrics
from peers.serving.push import Delivery
from peers.serving.reachability import DialBackService
from peers.serving.rebalance import Rebalance
from peers.serving.shelves import TrainingLimits
from peers.serving.spill import Disk
from peers.serving.status import StatusReport, used_bytes
from peers.serving.training import Training
from peers.transport.base import Transport
from peers.transport.links import Link, Links
from peers.transport.tasks import Tasks
from peers.wire.messages import PROTOCOL_VERSION
from routing.errors import SwarmError, Unavailable
from routing.identity import SigningKey
from routing.ids import BlockSpan, BlockSpans
from routing.placement import MAX_PARTS, Move, before_me, choose_span, shorten, usable
from routing.records import MAX_MODEL_NAME_CHARS, Announcement, HostedAdapter, PeerState
from routing.router import Router
from routing.store import RecordStore
from routing.version import SOFTWARE, VERSION

logger = logging.getLogger(__name__)

MOVE_DRAIN_TIMEOUT_S = 5.0
"""A step that takes longer is repeated elsewhere: somebody waits for the blocks to which this peer goes."""
LEAVE_TIMEOUT_S = 20.0
"""Clients that have not gone elsewhere by then begin anew there: somebody waits for the memory."""
UNLOAD_TIMEOUT_S = 60.0
"""Of the engine's thread, which may wait for a compiler; weights are gone only after its end."""
QUIET_LOOK_S = 1.0
"""How often it is looked whether nobody is served, before this peer measures itself again or gives memory back."""
EXPECTED_POSITIONS = 512
"""Of a session before any was seen, where the cache has room for sixteen of them."""
LOOK_AROUND_S = 3.0
"""How long a joining peer without `--blocks` looks for others before it chooses."""


class ServerPeer:
    """Over any transport: the real one in a process, the memory twin in tests."""

    def __init__(
        self,
        transport: Transport,
        store: RecordStore,
        *,
        key: SigningKey,
        network: str,
        name: str = "",
        lease_s: float = 60.0,
        max_bytes_per_s: int | None = None,
        journal_disk_bytes: int = 0,
        adapters: Mapping[str, AdapterFolder] = MappingProxyType({}),
        outage: Callable[[Unavailable | None], None] | None = None,
    ) -> None:
        """`adapters` are hosted, by name. `outage` hears when no other node takes this peer's record any more, and
        (None) when that is over."""
        self.tasks = Tasks()
        self.links = Links(transport, network=network, software=SOFTWARE, max_bytes_per_s=max_bytes_per_s)
        self.router = Router()
        self.discovery = Discovery(store=store, router=self.router, links=self.links, network=network)
        self.presence = Presence(store, key, network=network, momentary=self._momentary, outage=outage)
        self.handler: Handler
        self.training: Training
        self.engine: AnyEngine
        self.probe: Probe
        self.cache_tokens = 0
        self._transport = transport
        self._key = key
        self._name = name
        self._lease_s = lease_s
        self._max_bytes_per_s = max_bytes_per_s
        self._journal_disk_bytes = journal_disk_bytes
        self._adapters = adapters
        self._blocks: Blocks
        self._plan: Plan
        """Of the blocks that are served."""
        self._limits_bytes: tuple[int, ...] = ()
        """Of what it was started with."""
        self._max_blocks = 0
        """That it may move to, if any."""
        self._status: StatusReport
        self._announcing: asyncio.Task[None] | None = None
        """While it is not served yet: that it will be."""
        self._loaded = False
        self._withdrawn: frozenset[str] = frozenset()
        """Addresses at which another node found nobody."""
        self._watching: asyncio.Task[None] | None = None
        self._wish = Wish()
        self._changing = asyncio.Lock()
        """Held by whatever replaces the engine."""
        self._measuring = False
        """Whether `measure_again` has the engine in its hands."""
        self._absent = self._spared = False
        """Whether it has given its memory back; and whether collections passed that by."""
        DialBackService(self.links)

    async def choose_span(
        self, checkpoint: Checkpoint, plan: Plan, speed: Speed | None, *, alone: bool = False
    ) -> BlockSpans:
        """The least-covered span that fits and that is fair at this speed, by the peers that serve clients who would
        use this one. Looks around for a moment first, and unless it is `alone` announces its choice, which others that
        join at the same time go round or before."""
        self.discovery.watch(checkpoint.model_id)
        mine = self._static(checkpoint, BlockSpans.of(BlockSpan(0, 1)), plan, 0.0, 0.0)  # whatever it will serve
        deadline_s = time.monotonic() + LOOK_AROUND_S
        while True:
            await self.discovery.refresh()
            others = self.router.snapshot(self.discovery.now_s()).of_model(checkpoint.model_id)
            if others or time.monotonic() >= deadline_s:
                break
            await asyncio.sleep(0.5)

        def choose(others: list[Announcement]) -> BlockSpan:
            alike, now_s = usable(others, self._momentary(mine)), self.discovery.now_s()
            counted = before_me(alike, self._key.peer_id)
            decode_s = None if speed is None else speed.decode_s_per_block
            return choose_span(counted, plan.num_blocks, plan.max_blocks, now_s, decode_s_per_block=decode_s)

        async def announce(span: BlockSpan) -> None:
            self.presence.offer(self._static(checkpoint, BlockSpans.of(span), plan, *(speed or (0.0, 0.0))))
            await self.presence.intend(span)

        if alone:
            return BlockSpans.of(choose(list(others)))
        span = await settle(self.discovery, checkpoint.model_id, choose, announce, rng=random.Random())
        self.presence.join(BlockSpans.of(span))
        self._announcing = self.tasks.spawn(self.presence.run(), name="announce that it joins")
        return BlockSpans.of(span)

    async def load(
        self,
        checkpoint: Checkpoint,
        spans: BlockSpans,
        plan: Plan,
        *,
        threads: int,
        progress: Progress | None = None,
        page_size: int | None = None,
        share_prefixes: Sharing = "owner",
        probe: Probe | None = None,
        movable: bool = False,
        max_blocks: int | None = None,
        fit: bool = False,
    ) -> None:
        """Load the weights, start the engine, measure it unless that is known. Raises SwarmError.

        `movable`: `rebalance` may load other blocks later, up to `max_blocks`; as many as `plan` allows by default.
        `fit`: the one span was chosen by `choose_span`; should it be longer than is fair at the speed that is measured,
        some of it is served.
        """
        config = EngineConfig(cache_tokens=plan.cache_tokens, threads=threads, share_prefixes=share_prefixes)
        if page_size is not None:
            config = replace(config, page_size=page_size)
        self._blocks = Blocks(checkpoint=checkpoint, config=config, adapters=self._adapters)
        self._max_blocks = (max_blocks or plan.max_blocks) if movable else 0
        self._limits_bytes = plan.request.limits_bytes
        await self._run_blocks(spans, plan, probe=probe, fit=self._fit if fit else None, progress=progress)

    async def _fit(self, probe: Probe) -> BlockSpans:
        """What of its announced span this peer should serve at this speed; others hear of it."""
        await self.discovery.refresh()
        mine, now_s = self.presence.describe(), self.discovery.now_s()
        others = [a for a in self.router.snapshot(now_s).of_model(mine.model) if a.peer_id != mine.peer_id]
        spans = mine.spans
        if not probe.disturbed:
            spans = BlockSpans.of(shorten(usable(others, mine), mine, now_s, probe.decode_s_per_block))
        if spans != mine.spans:
            logger.info("blocks %s are too many at the speed that was measured: this peer serves %s", mine.spans, spans)
            self.presence.join(spans)
        return spans

    async def fetch(self, spans: BlockSpans) -> None:
        """What `move` needs for these blocks: room in memory, and files on this disk. Raises SwarmError."""
        self._fitting(spans)
        await self._blocks.fetch(spans, self._plan.devices[0])

    def _fitting(self, spans: BlockSpans) -> Plan:
        """Raises PeerTooSmall."""
        plan, forwards = self._plan, len(spans.parts)
        plan = replace(plan, forwards=forwards, graph_bytes=plan.graph_bytes * plan.forwards // forwards)
        return plan.beside(self.probe.forward_bytes, blocks=spans)

    async def _reload(self, spans: BlockSpans) -> None:
        await self._run_blocks(spans, self._fitting(spans), probe=self.probe)

    async def _run_blocks(
        self,
        spans: BlockSpans,
        plan: Plan,
        *,
        probe: Probe | None,
        fit: Fit | None = None,
        progress: Progress | None = None,
    ) -> None:
        checkpoint = self._blocks.checkpoint
        running = await self._blocks.start(spans, plan, probe=probe, fit=fit, progress=progress)
        self.engine, self._plan, self.probe = running.engine, running.plan, running.probe
        model, stats = self.engine.model, self.engine.stats()
        self.cache_tokens = stats.longest_tokens
        ledger: Ledger[Delivery, Link] = Ledger(
            LedgerLimits(
                max_positions=min(stats.longest_tokens, model.max_positions),
                pool_positions=stats.total_tokens,
                weight=lambda length: self.engine.weight(length),  # of the engine itself nothing holds on to it
                free_positions=lambda: 0 if (stats := self.handler.stats()) is None else stats.free_tokens,
                expected_positions=min(EXPECTED_POSITIONS, stats.total_tokens // 16),
                lease_s=self._lease_s,
            )
        )
        served = Served(model=checkpoint.model_id, spans=running.spans, hidden_size=model.hidden_size)
        if self._loaded:
            self.handler.settle(engine=self.engine, served=served, ledger=ledger)
        else:
            self._wire(served, ledger, running.plan)
            self._loaded = True
        self.handler.adapters.hosted = running.adapters
        self._offer()

    def _offer(self) -> None:
        speeds = self.probe.decode_s_per_block, self.probe.prefill_s_per_token_block
        said = self._static(self._blocks.checkpoint, self.handler.served.spans, self._plan, *speeds)
        self.presence.offer(replace(said, max_blocks=self._most_blocks()))

    def _most_blocks(self) -> int:
        """That it may move to, if any: fewer than at the start where it came back to less memory."""
        if self._plan.request.limits_bytes == self._limits_bytes:
            return self._max_blocks
        plan = replace(self._plan, request=replace(self._plan.request, blocks=None)).beside(self.probe.forward_bytes)
        return min(self._max_blocks, max(plan.max_blocks, self.handler.served.spans.num_blocks))

    @property
    def slower(self) -> float:
        """How many times as long as was measured forwards take lately; 1 where that is not clear."""
        engine = self.handler.engine if self._loaded else None
        return 1.0 if engine is None else slower(engine.times(self.probe.block_cost))  # None: others are loaded now

    async def measure_again(self) -> None:
        """Once the engine is prepared and serves nobody, find out whether it is faster than was measured when other
        programs were busy, or it was not prepared yet, or than its last forwards, and whether its forwards may be
        larger; and announce that. Not while the owner wants the machine: who comes back meanwhile ends it. Raises
        SwarmError."""
        while True:
            engine = self.handler.engine
            if engine is None:
                return  # blocks will be loaded
            await engine.prepared()
            if self._quiet and not self._wish.paused.is_set():
                break
            del engine  # whose memory the owner may want meanwhile
            await asyncio.sleep(QUIET_LOOK_S)  # nobody tells
        if self.handler.engine is not engine:
            return  # other blocks are served, or will be
        found = await self._measure(engine)
        if found is not None and self.handler.engine is engine:
            self.probe = replace(
                self.probe,
                decode_s_per_block=min(found.decode_s_per_block, self.probe.decode_s_per_block),
                prefill_s_per_token_block=min(found.prefill_s_per_token_block, self.probe.prefill_s_per_token_block),
                block_cost=min(found, self.probe, key=lambda probe: probe.decode_s_per_block).block_cost,
                token_budget=max(found.token_budget, self.probe.token_budget),
                forward_bytes=max(found.forward_bytes, self.probe.forward_bytes),
                disturbed=found.disturbed,
            )
            engine.set_token_budget(self.probe.token_budget)
            if found.decode_s_per_block < CLEARLY * self.probe.decode_s_per_block:
                engine.forget_lately()
            self._offer()
            self.presence.changed()

    async def _measure(self, engine: AnyEngine) -> Probe | None:
        """None where this peer was paused meanwhile."""
        self._measuring = True
        measuring = asyncio.ensure_future(measure(engine, room_bytes=self._plan.forward_bytes))
        pausing = asyncio.ensure_future(self._wish.paused.wait())
        try:
            await asyncio.wait((measuring, pausing), return_when=asyncio.FIRST_COMPLETED)
            return None if pausing.done() else measuring.result()
        finally:
            for task in (measuring, pausing):
                task.cancel()
            await asyncio.gather(measuring, pausing, return_exceptions=True)
            engine.set_token_budget(self.probe.token_budget)
            self._measuring = False

    def _wire(self, served: Served, ledger: Ledger[Delivery, Link], plan: Plan) -> None:
        """What stays for good, whichever blocks are served."""
        self.handler = Handler(
            links=self.links,
            engine=self.engine,
            served=served,
            ledger=ledger,
            admission=Admission(
                AdmissionLimits(
                    max_bytes_in_flight=plan.in_flight_bytes,
                    max_bytes_in_flight_per_peer=plan.in_flight_bytes // 2,
                    max_bytes_in_flight_per_link=plan.in_flight_bytes * 3 // 4,
                )
            ),
            journal=self._journal(plan.journal_bytes),
            adapters=AdapterLimits(max_bytes=plan.adapter_bytes, max_bytes_per_peer=plan.adapter_bytes // 2),
        )
        limits = TrainingLimits(max_bytes=plan.training_bytes, max_bytes_per_peer=plan.training_bytes)
        self.training = Training(links=self.links, handler=self.handler, limits=limits)
        self._status = self.links.status = StatusReport(
            self.handler,
            self.router,
            memory_offered_bytes=sum(plan.request.limits_bytes),
            device=plan.device_names,
            discovery_s=self.discovery.now_s,
        )

    def _journal(self, max_bytes: int) -> Journal:
        limits = JournalLimits(max_bytes=max_bytes, max_bytes_per_peer=max_bytes // 2)
        if not self._journal_disk_bytes:
            return Journal(limits)
        folder = cache_folder()
        with suppress(OSError):  # a full disk: the journal goes without, and says so
            folder.mkdir(parents=True, exist_ok=True)
        return Journal(limits, Disk(folder, self._journal_disk_bytes, self.tasks))

    async def serve(self) -> None:
        """Accept sessions and announce until cancelled; raises what no part expected."""
        await self.links.serve()
        self.presence.serve(paused=self.handler.paused)
        self._watching = self.tasks.spawn(self.engine.broken(), name="engine")
        if self._announcing is not None:
            self._announcing.cancel()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.handler.run(), name="handler")
                group.create_task(self.training.run(), name="training")
                group.create_task(self.presence.run(), name="announce")
                group.create_task(self.tasks.failed(), name="background")
        finally:
            await self.tasks.close()

    async def announced(self) -> None:
        """Wait until others have taken this peer's record for the first time."""
        await self.presence.heard.wait()

    def metrics(self) -> PeerMetrics:
        """What it counts, from `load` on."""
        return PeerMetrics(self.handler, self.training, self.links, self.presence.describe)

    def pause(self, paused: bool) -> None:
        """Step back for the owner, or return, and announce it at once. Steps that run finish; sessions go elsewhere.
        Before blocks are loaded there is nothing to step back from. Who has given memory back (`give_way`) stays paused
        until the blocks are loaded again."""
        self._wish.pause(paused)
        if self._absent:
            return
        if self._loaded:
            self.handler.pause(paused)
        if self.presence.state in (PeerState.ONLINE, PeerState.PAUSED):
            self.presence.serve(paused=paused)

    def give_back(self) -> None:
        """The owner, for whom this peer is paused, wants its memory as well, until the pause ends: see `give_way`."""
        self._wish.give_back()

    @property
    def absent(self) -> bool:
        """Whether it has given its memory back, and is paused also where its owner wants nothing any more."""
        return self._absent

    async def give_way(self, emit: Emit) -> None:
        """Give the memory back whenever the owner wants it, and load the same blocks again once he does not, until
        cancelled. What cannot be loaded is told, and tried again while the machine is spared."""

        async def leave() -> bool:
            before_bytes = used_bytes()
            if left := await self._leave():
                emit(Event("gave_back", {"mib": max(0, before_bytes - used_bytes()) >> 20}))
            return left

        async def come_back() -> None:
            await self._come_back(emit)
            if not self.handler.paused:
                emit(Event("resumed"))

        await Absence(self._wish, leave, come_back, lambda error: emit(not_loaded(error))).run()

    async def _leave(self) -> bool:
        """Free what it has loaded, once nobody is served or LEAVE_TIMEOUT_S have passed; False, and nothing was given
        up, where the owner does not want it any more by then."""
        async with self._changing:
            deadline_s = time.monotonic() + LEAVE_TIMEOUT_S
            while self._wish.memory.is_set() and time.monotonic() < deadline_s:
                if self._quiet and not self._measuring:
                    break
                await asyncio.sleep(QUIET_LOOK_S)  # nobody tells
            if not self._wish.memory.is_set():
                return False
            self._absent = True
            self._spared = await self._unload(deadline_s=UNLOAD_TIMEOUT_S)
            give_back(())
            self.presence.changed()
            return True

    async def _come_back(self, emit: Emit) -> None:
        """Raises SwarmError, as when others have the memory now, or the disk is gone; then, and when this is cancelled,
        it is where it was."""
        async with self._changing:
            spans = self.handler.served.spans
            plan = self._plan.within(self._limits_bytes).beside(self.probe.forward_bytes, blocks=spans)
            await self._blocks.fetch(spans, plan.devices[0])
            emit(loading(self._blocks.checkpoint, spans, plan))
            self.presence.join(spans)
            try:
                await self._run_blocks(spans, plan, probe=self.probe)
            except (SwarmError, asyncio.CancelledError) as error:
                error.with_traceback(None)  # which holds on to weights that were loaded by then
                gc.collect()
                give_back(())
                if self.presence.state is PeerState.JOINING:  # else it leaves
                    self.presence.serve(paused=True)
                raise
            self._absent = False
            self.handler.pause(self._wish.paused.is_set())
            self._go_on(spare=self._spared)

    @property
    def _quiet(self) -> bool:
        return not (len(self.handler.ledger) or self.training.waiting_tokens)

    def withdraw(self, addresses: frozenset[str]) -> None:
        """These are announced no more, until they are not among those that are withdrawn: nobody is sent there. Without
        any address its blocks are as good as missing."""
        if addresses != self._withdrawn:
            self._withdrawn = addresses
            self.presence.changed()

    async def drain(self, *, timeout_s: float) -> None:
        """Tell the swarm that this peer leaves, take nothing new, hand sessions over to others."""
        await asyncio.gather(self.presence.leave(), self.handler.drain(timeout_s=timeout_s))  # records may take long

    async def rebalance(self, emit: Emit) -> None:
        """Serve other blocks whenever the swarm needs that more, until cancelled; where it may not, return."""
        if not self._max_blocks:
            return

        async def fetch(move: Move) -> None:
            await self.fetch(move.spans)

        async def move(move: Move) -> None:
            emit(Event("moving", {**move.spans.as_fields(), "heals": move.heals}))
            try:
                await self.move(move.spans)
            finally:
                emit(Event("moved", self.presence.describe().spans.as_fields()))

        await Rebalance(
            self.discovery,
            self.presence.describe,
            self.presence.intend,
            fetch,
            move,
            rng=random.Random(),
            max_parts=self._max_parts(),
        ).run()

    def _max_parts(self) -> int:
        """How many spans fit here in which to heal a gap: each has an engine, and a forward, of its own."""
        request = replace(self._plan.request, blocks=self._max_blocks)
        try:
            replace(self._plan, request=request, forwards=MAX_PARTS).beside(self.probe.forward_bytes)
        except PeerTooSmall:
            return 1
        return MAX_PARTS

    async def move(self, spans: BlockSpans) -> None:
        """Serve other blocks instead, under the same identity, addresses and links; sessions here go elsewhere.

        Raises Paused, and stays where it is, while the owner wants the machine; SwarmError when they cannot be loaded:
        then it serves what it served before, and where it cannot do that either, `serve` ends.
        """
        async with self._changing:
            if self._absent or self._wish.paused.is_set():
                raise Paused("its owner needs the machine", retry_after_s=PAUSED_RETRY_S)
            before = self.presence.describe().spans
            await self.drain(timeout_s=MOVE_DRAIN_TIMEOUT_S)
            spared = await self._unload()
            try:
                await self._settle(spans, spare=spared)
            except SwarmError as error:
                error.with_traceback(None)  # which holds on to weights that were loaded by then
                gc.collect()
                self._watching = self.tasks.spawn(self._settle(before, spare=spared), name="serve what was served")
                await asyncio.wait([self._watching])
                raise
            self._status.moved = (before, time.monotonic())

    async def _unload(self, *, deadline_s: float = 10.0) -> bool:
        """Nothing is left of the blocks that were served. Says whether collections passed them by."""
        self.handler.vacate()
        self.training.vacate()
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        await self.engine.stop(deadline_s=deadline_s)
        self.training.vacate()  # also what came of its last forwards
        await self.handler.settled(timeout_s=MOVE_DRAIN_TIMEOUT_S)  # what the engine failed as it stopped
        self.handler.leave_engine()
        del self.engine
        for _ in range(8):  # whoever awaited that it be prepared lets go of it now, in turns of its own
            await asyncio.sleep(0)
        spared = garbage.spare_nothing()
        gc.collect()  # the weights must be gone before others are loaded, and models hold themselves
        return spared

    async def _settle(self, spans: BlockSpans, *, spare: bool) -> None:
        self.presence.join(spans)
        await self._reload(spans)
        self._go_on(spare=spare)

    def _go_on(self, *, spare: bool) -> None:
        if spare:
            garbage.spare()
        self._watching = self.tasks.spawn(self.engine.broken(), name="engine")
        self.presence.serve(paused=self.handler.paused)

    async def close(self) -> None:
        """End links and engine. The transport belongs to the caller."""
        await self.tasks.close()
        await self.links.close()
        if hasattr(self, "engine"):  # also where somebody was about to stop it, and was cancelled
            await self.engine.stop()

    def _static(
        self, checkpoint: Checkpoint, spans: BlockSpans, plan: Plan, decode_s: float, prefill_s: float
    ) -> Announcement:
        """What does not change while these blocks are served."""
        return Announcement(
            peer_id=self._transport.peer_id,
            model=checkpoint.model_id,
            model_name=checkpoint.name[-MAX_MODEL_NAME_CHARS:],
            num_blocks=plan.num_blocks,
            spans=spans,
            state=PeerState.JOINING,
            dtype=plan.dtype_name,
            quantization=plan.quantization,
            version=VERSION,
            protocol=PROTOCOL_VERSION,
            name=self._name,
            addresses=(),
            decode_s_per_block=decode_s,
            prefill_s_per_token_block=prefill_s,
            cache_tokens=self.cache_tokens,
            free_tokens=self.cache_tokens,
            max_bytes_per_s=self._max_bytes_per_s or 0,
            adapters=tuple(HostedAdapter(name, folder.digest) for name, folder in self._adapters.items()),
            sequence=0,
            expires_at_s=0.0,
        )

    def _momentary(self, announcement: Announcement) -> Announcement:
        """With what is another number at every moment."""
        addresses = tuple(address for address in self._transport.addresses if address not in self._withdrawn)
        serving, slower = self._loaded and self.presence.state is not PeerState.JOINING, self.slower
        return replace(
            announcement,
            decode_s_per_block=slower * announcement.decode_s_per_block,
            prefill_s_per_token_block=slower * announcement.prefill_s_per_token_block,
            addresses=addresses[:4],
            free_tokens=self.handler.room_tokens if serving else 0,
            queue_s=self.handler.queue_s if self._loaded else 0.0,
            sessions=len(self.handler.ledger) if self._loaded else 0,
            place=self.router.here,
            uplink_bytes_per_s=self.router.uplink_bytes_per_s(self.discovery.now_s()),
        )

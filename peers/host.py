"""The composition root of a node: builds the parts, wires them, runs them, takes them down in order.

Two kinds of node: a bootstrap (DHT and dial-back only, no model) and a server peer. Owns the order of events and what
is told to people (`Event`); every decision is made elsewhere.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import random
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peers.platform import let_threads_sleep, require_platform

THREADS_SLEEP = let_threads_sleep()  # programs that embed a peer come in here

import torch
from prometheus_client import CollectorRegistry, ProcessCollector

from peers.capacity import FORWARD_BYTES, Plan, check_options, plan_capacity
from peers.discovery import Discovery
from peers.errors import AddressInUse
from peers.exposition import told
from peers.identity import load_identity
from peers.model.adapters import Adapter
from peers.model.catalog import Checkpoint, resolve
from peers.model.loading import check_folder, load_config, load_span
from peers.model.lora import AdapterFolder, open_adapter
from peers.model.progress import Progress
from peers.model.quantization import NONE
from peers.model.storage import cache_folder
from peers.model.support import examine
from peers.runtime.engine import Engine, EngineConfig, Sharing
from peers.runtime.joined import AnyEngine, JoinedEngine
from peers.runtime.probe import Probe, measure
from peers.runtime.probe_cache import probe_file, recall, remember
from peers.serving.adapters import AdapterLimits
from peers.serving.admission import Admission, AdmissionLimits
from peers.serving.announce import Announcer
from peers.serving.comfort import Comfort, Reason, Schedule, clock_time
from peers.serving.handler import Handler, Served
from peers.serving.joining import settle
from peers.serving.journal import Journal, JournalLimits
from peers.serving.ledger import Ledger, LedgerLimits
from peers.serving.metrics import PeerMetrics
from peers.serving.owner import Owner, be_nice
from peers.serving.owner import check as check_comfort
from peers.serving.push import Delivery
from peers.serving.reachability import RETRY_S, DialBackService, Verdict, watch_reachability
from peers.serving.rebalance import Rebalance
from peers.serving.shelves import TrainingLimits
from peers.serving.spill import Disk
from peers.serving.status import StatusReport
from peers.serving.training import Training
from peers.transport.base import Transport
from peers.transport.links import Link, Links
from peers.transport.tasks import Tasks
from peers.wire.messages import PROTOCOL_VERSION
from routing.errors import CallerError, SwarmError, Unavailable
from routing.identity import SigningKey
from routing.ids import BlockSpan, BlockSpans
from routing.placement import Move, before_me, choose_span
from routing.records import (
    CLOCK_SLACK_S,
    MAX_ADAPTERS,
    MAX_MODEL_NAME_CHARS,
    Announcement,
    HostedAdapter,
    PeerState,
    check_adapter_name,
    check_network,
    check_peer_name,
)
from routing.router import Router
from routing.store import RecordStore
from routing.version import SOFTWARE, VERSION

if TYPE_CHECKING:
    from peers.transport.hivemind_p2p import HivemindNode

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 20.0
MOVE_DRAIN_TIMEOUT_S = 5.0
"""A step that takes longer is repeated elsewhere: somebody waits for the blocks to which this peer goes."""
CLOCK_LOOK_S = 2.0
LOOK_AROUND_S = 3.0
"""How long a joining peer without `--blocks` looks for others before it chooses."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that people or programs want to know: printed as one line, or as one JSON object."""

    kind: str
    fields: dict[str, object] = field(default_factory=dict)


Emit = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """What every node is told. Raises CallerError on a bad network name."""

    network: str
    identity: Path
    listen: tuple[str, ...] = ()
    """Multiaddrs; empty: all interfaces, on the port used last time."""
    announce: tuple[str, ...] = ()
    """Addresses that others reach this node by, where they differ from those it listens on."""
    initial_peers: tuple[str, ...] = ()
    """Nodes of the network to join through; empty: this one begins a network."""

    def __post_init__(self) -> None:
        check_network(self.network)


class BootstrapConfig(NodeOptions):
    """A DHT entry node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig(NodeOptions):
    """A server peer. Raises CallerError also on a name that no record can carry."""

    model: str
    blocks: BlockSpans | None = None
    num_blocks: int | None = None
    """With neither `blocks` nor `num_blocks`, as many as memory holds, where they are missing most."""
    dtype: str = "auto"
    quantization: str = NONE
    """Of the weights; see `peers.model.quantization`. Activations stay in `dtype`."""
    device: str = "auto"
    name: str = ""
    """What others see beside the peer id."""
    max_memory_bytes: int | None = None
    threads: int | None = None
    cache_tokens: int | None = None
    nice: int | None = None
    """Priority of this process, 0 (usual) to 19 (only what others leave)."""
    schedule: Schedule | None = None
    """When to serve, in local time; None: always."""
    pause_on_load_percent: float | None = None
    """Of all CPUs together: step back while other programs use so much."""
    max_bytes_per_s: int | None = None
    """Each way, for all that links carry."""
    journal_disk_bytes: int = 0
    """Of the cache folder's disk, for what sessions sent downstream and memory has no room for."""
    share_prefixes: Sharing = "owner"
    """Whose sessions may begin with what another one computed: see `EngineConfig`."""
    training: bool = True
    """Compute gradients, too, for clients that fine-tune adapters of their own."""
    adapters: tuple[tuple[str, str], ...] = ()
    """To host for whoever asks for them: a name, and a folder or hub id."""
    token: str | None = None
    """Access token of the model hub."""
    stay: bool = False
    """Serve what was chosen at the start, also when other blocks need this peer more; with `blocks` it always does."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    """Where Prometheus may ask, without a key; None: nowhere, 0: any port that is free."""

    def __post_init__(self) -> None:
        NodeOptions.__post_init__(self)
        check_peer_name(self.name)
        if self.threads is not None and self.threads < 1:
            raise ValueError("threads is at least 1")
        names = [check_adapter_name(name) for name, _ in self.adapters]
        if len(names) > MAX_ADAPTERS or len(set(names)) < len(names):
            raise CallerError(
                f"a peer hosts up to {MAX_ADAPTERS} adapters, each under a name of its own",
                hint="leave some out, or rename them in --adapter NAME=FOLDER",
            )
        if self.metrics_port is not None and not 0 <= self.metrics_port < 1 << 16:
            raise ValueError(f"{self.metrics_port} is no port")
        check_comfort(nice=self.nice, load_percent=self.pause_on_load_percent, max_bytes_per_s=self.max_bytes_per_s)


async def run_bootstrap(config: BootstrapConfig, *, emit: Emit, stop: asyncio.Event) -> None:
    """Serve until `stop` is set. Raises SwarmError when the node cannot start."""
    async with AsyncExitStack() as stack:
        node, _ = await _start_node(config, stack)
        links = Links(node.transport, network=config.network, software=SOFTWARE)
        stack.push_async_callback(links.close)
        DialBackService(links)
        await links.serve()
        emit(
            Event(
                "ready",
                {
                    "peer_id": node.transport.peer_id,
                    "addresses": list(node.transport.addresses),
                    "network": config.network,
                },
            )
        )
        living = asyncio.create_task(node.wait_closed(), name="daemon")
        stack.push_async_callback(_cancelled, living)
        await _unless_ended(living, stop.wait())
    emit(Event("stopped"))


async def run_peer(config: PeerConfig, *, emit: Emit, stop: asyncio.Event, progress: Progress | None = None) -> None:
    """Join, serve until `stop` is set, drain, leave. Raises SwarmError when joining fails.

    What can be refused without the model (options, identity, port, entry nodes) is refused before it is downloaded.
    """
    if not THREADS_SLEEP:
        logger.warning(
            "torch was here before peers.host: its threads spin while they wait, and take the processor from other "
            "peers and programs; import peers.host first, or start this program with OMP_WAIT_POLICY=PASSIVE"
        )
    check_options(
        dtype=config.dtype,
        device=config.device,
        cache_tokens=config.cache_tokens,
        quantization=config.quantization,
    )
    adapters = {
        name: await asyncio.to_thread(open_adapter, source, token=config.token, progress=progress)
        for name, source in config.adapters
    }
    if config.nice is not None:
        be_nice(config.nice)
    async with AsyncExitStack() as stack:
        node, key = await _start_node(config, stack)
        peer = ServerPeer(
            node.transport,
            node.store,
            key=key,
            network=config.network,
            name=config.name,
            max_bytes_per_s=config.max_bytes_per_s,
            journal_disk_bytes=config.journal_disk_bytes,
            adapters=adapters,
            outage=lambda problem: emit(_outage(problem, node.clock_skew_s)),
        )
        stack.push_async_callback(peer.close)
        tell_metrics = None if config.metrics_port is None else _metrics(peer, config, stack, emit)
        emit(Event("connected", {"peer_id": key.peer_id, "addresses": list(node.transport.addresses)}))
        checkpoint = await asyncio.to_thread(
            resolve, config.model, token=config.token, progress=progress, accept=check_folder
        )
        plan = await asyncio.to_thread(
            plan_capacity,
            await asyncio.to_thread(load_config, checkpoint),
            dtype=config.dtype,
            device=config.device,
            max_memory_bytes=config.max_memory_bytes,
            cache_tokens=config.cache_tokens,
            quantization=config.quantization,
            blocks=config.blocks,
            num_blocks=config.num_blocks,
            training=config.training,
            hosted=adapters.values(),
        )
        threads = config.threads or torch.get_num_threads()
        file = _probe_file(checkpoint, plan, threads)
        if (probe := recall(file, time.time())) is not None:
            plan = plan.beside(probe.forward_bytes)
            file = _probe_file(checkpoint, plan, threads)
            probe = recall(file, time.time())  # of fewer blocks, where it is about those that fit beside such a forward
        peer.discovery.watch(checkpoint.model_id)
        spans = config.blocks or await peer.choose_span(
            checkpoint,
            plan,
            None if probe is None or config.num_blocks else probe.decode_s_per_block,
            alone=not config.initial_peers,
        )
        max_blocks = plan.max_blocks
        plan = plan.beside(FORWARD_BYTES if probe is None else probe.forward_bytes, blocks=spans)
        format_ = {"dtype": plan.dtype_name, "quantization": plan.quantization}
        emit(Event("loading", {"model": checkpoint.name, **spans.as_fields(), **format_}))
        await peer.load(
            checkpoint,
            spans,
            plan,
            threads=threads,
            share_prefixes=config.share_prefixes,
            progress=progress,
            probe=probe,
            movable=config.blocks is None and not config.stay,
            max_blocks=max_blocks,
        )
        if tell_metrics is not None:
            tell_metrics()
        owner = Owner(Comfort(config.schedule, config.pause_on_load_percent), peer.pause)
        await owner.look()
        if probe is None:
            remember(file, peer.probe, time.time())
        serving = asyncio.create_task(peer.serve(), name="serve")
        stack.push_async_callback(_cancelled, serving)
        peer.tasks.spawn(node.wait_closed(), name="daemon")
        await _unless_ended(serving, peer.announced())
        emit(
            Event(
                "ready",
                {
                    "peer_id": key.peer_id,
                    "addresses": list(node.transport.addresses),
                    "model": checkpoint.name,
                    "model_id": checkpoint.model_id.hex,
                    **spans.as_fields(),
                    **format_,
                    "device": plan.device_names,
                    "cache_tokens": peer.cache_tokens,
                    "decode_ms_per_block": round(peer.probe.decode_s_per_block * 1000, 3),
                    "prefill_ms_per_block": round(peer.probe.prefill_s_per_token_block * 1000, 4),
                    "token_budget": peer.engine.config.token_budget,
                    "forward_mib": peer.probe.forward_bytes >> 20,
                    "probed": "now" if probe is None else "before",
                    "probe_disturbed": peer.probe.disturbed,
                },
            )
        )
        reachability = watch_reachability(
            peer.links, config.initial_peers, lambda verdict: emit(_reachability(verdict))
        )
        peer.tasks.spawn(reachability, name="reachability")
        peer.tasks.spawn(_watch_clock(peer.links, emit), name="clock")
        peer.tasks.spawn(owner.watch(lambda: emit(_comfort(owner))), name="owner")
        peer.tasks.spawn(peer.discovery.run(), name="discovery")
        moving = peer.tasks.spawn(peer.rebalance(emit), name="rebalance")
        await _unless_ended(serving, stop.wait())
        moving.cancel()
        emit(Event("draining"))
        await peer.drain(timeout_s=DRAIN_TIMEOUT_S)
    emit(Event("stopped"))


class ServerPeer:
    """One serving node over any transport: the real one in a process, the memory twin in tests."""

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
        self.state = PeerState.JOINING
        self.handler: Handler
        self.training: Training
        self.engine: AnyEngine
        self.probe: Probe
        self.cache_tokens = 0
        self._transport = transport
        self._store = store
        self._key = key
        self._network = network
        self._name = name
        self._lease_s = lease_s
        self._max_bytes_per_s = max_bytes_per_s
        self._journal_disk_bytes = journal_disk_bytes
        self._adapters = adapters
        self._status: StatusReport
        self._describe_static: Announcement | None = None
        self._announcing: asyncio.Task[None] | None = None
        """While it is not served yet: that it will be."""
        self._loaded = False
        self._intent: BlockSpan | None = None
        self._engine_closer = AsyncExitStack()
        self._watching: asyncio.Task[None] | None = None
        self._reload: Callable[[BlockSpans], Coroutine[Any, Any, None]]
        self._announcer = Announcer(
            store, key, network=network, describe=self._describe, outage=outage or self._log_outage
        )
        DialBackService(self.links)

    async def choose_span(
        self, checkpoint: Checkpoint, plan: Plan, decode_s_per_block: float | None, *, alone: bool = False
    ) -> BlockSpans:
        """The least-covered span that fits and that is fair at this speed. Looks around for a moment first, and unless
        it is `alone` announces its choice, which others that join at the same time go round or before."""
        self.discovery.watch(checkpoint.model_id)
        deadline_s = time.monotonic() + LOOK_AROUND_S
        while True:
            await self.discovery.refresh()
            others = self.router.snapshot(self.discovery.now_s()).of_model(checkpoint.model_id)
            if others or time.monotonic() >= deadline_s:
                break
            await asyncio.sleep(0.5)

        def choose(others: list[Announcement]) -> BlockSpan:
            counted, now_s = before_me(others, self._key.peer_id), self.discovery.now_s()
            return choose_span(counted, plan.num_blocks, plan.max_blocks, now_s, decode_s_per_block=decode_s_per_block)

        async def announce(span: BlockSpan) -> None:
            self._describe_static = self._static(checkpoint, BlockSpans.of(span), plan, decode_s_per_block or 0.0, 0.0)
            await self._intend(span)

        if alone:
            return BlockSpans.of(choose(list(others)))
        span = await settle(self.discovery, checkpoint.model_id, choose, announce, rng=random.Random())
        self._describe_static = replace(self._present(), spans=BlockSpans.of(span))
        self._intent = None
        self._announcing = self.tasks.spawn(self._announcer.run(), name="announce that it joins")
        return BlockSpans.of(span)

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
            state=self.state,
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
    ) -> None:
        """Load the weights, start the engine, measure it unless that is known. Raises SwarmError.

        `movable`: `rebalance` may load other blocks later, up to `max_blocks`; as many as `plan` allows by default.
        """
        most = max_blocks or plan.max_blocks
        again = functools.partial(
            self.load,
            checkpoint,
            threads=threads,
            page_size=page_size,
            share_prefixes=share_prefixes,
            movable=movable,
            max_blocks=most,
        )
        models = [
            await asyncio.to_thread(
                load_span,
                checkpoint,
                part,
                dtype=plan.dtype,
                device=device,
                quantization=plan.quantization,
                progress=progress,
            )
            for device, part in plan.parts(spans)
        ]
        engine_config = EngineConfig(
            cache_tokens=plan.cache_tokens,
            threads=threads,
            share_prefixes=share_prefixes,
        )
        if page_size is not None:
            engine_config = replace(engine_config, page_size=page_size)
        hosted = await asyncio.to_thread(self._read_adapters, checkpoint, spans)
        async with AsyncExitStack() as trial:
            engines = [Engine(model, engine_config) for model in models]
            self.engine = engines[0] if len(engines) == 1 else JoinedEngine(engines)
            trial.push_async_callback(self.engine.stop)
            await self.engine.start()
            for name, adapter in hosted.items():
                self._check_adapter(name, adapter)
            self.probe = probe or await measure(self.engine)
            final = plan.beside(self.probe.forward_bytes, blocks=spans)
            fits = plan.cache_tokens <= final.cache_tokens
            if fits:
                self._engine_closer = trial.pop_all()
        if not fits:
            logger.warning("a forward takes %d MiB: starting again with less cache", self.probe.forward_bytes >> 20)
            del models, engines, self.engine
            await again(spans, final, progress=progress, probe=self.probe)
            return
        model, stats = self.engine.model, self.engine.stats()
        self.cache_tokens = stats.longest_tokens
        ledger: Ledger[Delivery, Link] = Ledger(
            LedgerLimits(
                max_positions=min(stats.longest_tokens, model.max_positions),
                pool_positions=stats.total_tokens,
                weight=self.engine.weight,
                lease_s=self._lease_s,
            )
        )
        served = Served(model=checkpoint.model_id, spans=spans, hidden_size=model.hidden_size)
        if not self._loaded:
            self.handler = Handler(
                links=self.links,
                engine=self.engine,
                served=served,
                ledger=ledger,
                admission=Admission(
                    AdmissionLimits(
                        max_bytes_in_flight=plan.in_flight_bytes, max_bytes_in_flight_per_peer=plan.in_flight_bytes // 2
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
        else:
            self.handler.settle(engine=self.engine, served=served, ledger=ledger)
        self.handler.adapters.hosted = {self._adapters[name].digest: adapter for name, adapter in hosted.items()}

        async def reload(spans: BlockSpans) -> None:
            fitting = replace(plan, forwards=len(spans.parts))
            await again(spans, fitting.beside(self.probe.forward_bytes, blocks=spans), probe=self.probe)

        self._reload = reload
        self._loaded = True
        static = self._static(
            checkpoint, spans, plan, self.probe.decode_s_per_block, self.probe.prefill_s_per_token_block
        )
        self._describe_static = replace(static, max_blocks=most if movable else 0)

    def _read_adapters(self, checkpoint: Checkpoint, spans: BlockSpans) -> dict[str, Adapter | None]:
        """What of each hosted adapter is of these blocks. Raises CallerError, CorruptCheckpoint."""
        if not self._adapters:
            return {}
        anatomy, blocks = examine(load_config(checkpoint)), {block for span in spans for block in span}
        return {
            name: folder.read(anatomy.layers_path, anatomy.num_blocks, blocks)
            for name, folder in self._adapters.items()
        }

    def _check_adapter(self, name: str, adapter: Adapter | None) -> None:
        """Raises CallerError."""
        for engine, part in self.engine.parts(self.engine.model.span):
            for target in () if adapter is None else adapter.targets:
                shape = (target.inputs, target.outputs)
                if target.block in part and engine.linear_shape(target.block, target.module) != shape:
                    raise CallerError(
                        f"adapter {name} does not fit: block {target.block} has no linear layer {target.module} of "
                        f"{shape[0]} inputs and {shape[1]} outputs",
                        hint="an adapter goes with the model that it was trained on",
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
        self.state = PeerState.PAUSED if self.handler.paused else PeerState.ONLINE
        self._watching = self.tasks.spawn(self.engine.broken(), name="engine")
        if self._announcing is not None:
            self._announcing.cancel()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.handler.run(), name="handler")
                group.create_task(self.training.run(), name="training")
                group.create_task(self._announcer.run(), name="announce")
                group.create_task(self.tasks.failed(), name="background")
        finally:
            await self.tasks.close()

    async def announced(self) -> None:
        """Wait until others have taken this peer's record for the first time."""
        await self._announcer.heard.wait()

    def metrics(self) -> PeerMetrics:
        """What it counts, from `load` on."""
        return PeerMetrics(self.handler, self.training, self.links, self._present)

    def pause(self, paused: bool) -> None:
        """Step back for the owner, or return, and announce it at once. Steps that run finish; sessions go elsewhere."""
        self.handler.pause(paused)
        if self.state in (PeerState.ONLINE, PeerState.PAUSED):
            self.state = PeerState.PAUSED if paused else PeerState.ONLINE
            self._announcer.soon()

    async def drain(self, *, timeout_s: float) -> None:
        """Tell the swarm that this peer leaves, take nothing new, hand sessions over to others."""
        self.state = PeerState.DRAINING
        try:
            await self._announcer.announce()
        except Unavailable as error:
            logger.info("nobody could be told that this peer leaves: %s", error)
        await self.handler.drain(timeout_s=timeout_s)

    async def rebalance(self, emit: Emit) -> None:
        """Serve other blocks whenever the swarm needs that more, until cancelled; where it may not, return."""
        assert self._describe_static is not None
        if not self._describe_static.max_blocks:
            return

        async def move(move: Move) -> None:
            emit(Event("moving", {**move.spans.as_fields(), "heals": move.heals}))
            try:
                await self.move(move.spans)
            finally:
                emit(Event("moved", self._present().spans.as_fields()))

        await Rebalance(self.discovery, self._present, self._intend, move, rng=random.Random()).run()

    async def move(self, spans: BlockSpans) -> None:
        """Serve other blocks instead, under the same identity, addresses and links; sessions here go elsewhere.

        Raises SwarmError when they cannot be loaded; then it serves what it served before, and where it cannot do that
        either, `serve` ends.
        """
        before = self._present().spans
        await self.drain(timeout_s=MOVE_DRAIN_TIMEOUT_S)
        self.handler.vacate()
        self.training.vacate()
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        await self._engine_closer.aclose()
        await self.handler.drain(timeout_s=MOVE_DRAIN_TIMEOUT_S)  # what the engine failed as it stopped
        self.handler.leave_engine()
        del self.engine
        gc.collect()  # the weights of before must be gone before others are loaded, and models hold themselves
        try:
            await self._settle(spans)
        except SwarmError:
            self._watching = self.tasks.spawn(self._settle(before), name="serve what was served before")
            await asyncio.wait([self._watching])
            raise
        self._status.moved = (before, time.monotonic())

    async def _settle(self, spans: BlockSpans) -> None:
        self.state, self._intent = PeerState.JOINING, None
        self._describe_static = replace(self._present(), spans=spans)
        self._announcer.soon()
        await self._reload(spans)
        self._watching = self.tasks.spawn(self.engine.broken(), name="engine")
        self.state = PeerState.PAUSED if self.handler.paused else PeerState.ONLINE
        self._announcer.soon()

    async def _intend(self, intent: BlockSpan | None) -> None:
        self._intent = intent
        try:
            await self._announcer.announce()
        except Unavailable as error:
            logger.info("nobody could be told what this peer intends: %s", error)

    async def close(self) -> None:
        """End links and engine. The transport belongs to the caller."""
        await self.tasks.close()
        await self.links.close()
        await self._engine_closer.aclose()

    def _present(self) -> Announcement:
        """What this peer would announce now."""
        assert self._describe_static is not None
        return self._describe(self._describe_static.sequence, self._describe_static.expires_at_s)

    def _describe(self, sequence: int, expires_at_s: float) -> Announcement:
        assert self._describe_static is not None
        return replace(
            self._describe_static,
            state=self.state,
            addresses=self._transport.addresses[:4],
            free_tokens=0 if self.state is PeerState.JOINING else self.engine.stats().room_tokens,
            queue_s=self.handler.queue_s if self._loaded else 0.0,
            sessions=len(self.handler.ledger) if self._loaded else 0,
            place=self.router.here,
            intent=self._intent,
            sequence=sequence,
            expires_at_s=expires_at_s,
        )

    @staticmethod
    def _log_outage(problem: Unavailable | None) -> None:
        if problem is None:
            logger.warning("others hold this peer's record again")
        else:
            logger.warning("nobody takes this peer's record; trying on: %s", problem)


def _metrics(peer: ServerPeer, config: PeerConfig, stack: AsyncExitStack, emit: Emit) -> Callable[[], None]:
    """Tell metrics until `stack` ends: of the process at once, of the peer once what this returns is called."""
    assert config.metrics_port is not None
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    url = stack.enter_context(told(registry, config.metrics_host, config.metrics_port))
    emit(Event("metrics", {"url": url}))
    return lambda: registry.register(peer.metrics())


def _probe_file(checkpoint: Checkpoint, plan: Plan, threads: int) -> Path:
    return probe_file(
        cache_folder(),
        checkpoint.model_id,
        plan.max_blocks,
        dtype=plan.dtype_name,
        quantization=plan.quantization,
        devices=plan.devices,
        threads=threads,
    )


def _reachability(verdict: Verdict) -> Event:
    if verdict.reached:
        return Event("reachable", {"addresses": list(verdict.reached)})
    if verdict.unasked:
        hint = f"this node asks again every {RETRY_S:.0f} s"
        return Event("reachability_unknown", {"reason": verdict.unasked, "hint": hint})
    hint = "forward the TCP port to this machine and give --announce /ip4/PUBLIC_IP/tcp/PORT; "
    hint += "until then others cannot send work here"
    return Event("unreachable", {"problems": dict(verdict.problems), "hint": hint})


def _outage(problem: Unavailable | None, clock_skew_s: float | None) -> Event:
    if problem is None:
        return Event("announced")
    reason, hint = str(problem), problem.hint
    if clock_skew_s is not None and abs(clock_skew_s) > CLOCK_SLACK_S:
        reason = (
            f"this machine's clock is {abs(clock_skew_s):.0f} s {'ahead' if clock_skew_s > 0 else 'behind'}: {reason}"
        )
        hint = "set the clock, best by NTP"
    return Event("unannounced", {"reason": reason, "hint": hint})


def _comfort(owner: Owner) -> Event:
    schedule, gate = owner.comfort.schedule, owner.comfort.gate
    match owner.reason:
        case Reason.SCHEDULE:
            assert schedule is not None
            resumes_at = clock_time(schedule.opens_at(owner.minute))
            return Event("paused", {"reason": "schedule", "schedule": str(schedule), "resumes_at": resumes_at})
        case Reason.LOAD:
            assert gate is not None
            percents = {"load_percent": round(owner.load_percent), "limit_percent": gate.limit_percent}
            return Event("paused", {"reason": "load", **percents, "resume_percent": gate.resume_percent})
        case None:
            return Event("resumed")


async def _watch_clock(links: Links, emit: Emit) -> None:
    """Say when this machine's clock begins to differ from others' by more than records bear, and when that is over."""
    wrong = False
    while True:
        await asyncio.sleep(CLOCK_LOOK_S)
        skew_s = links.clock_skew_s
        if skew_s is None or (abs(skew_s) > CLOCK_SLACK_S) == wrong:
            continue
        wrong = not wrong
        if wrong:
            hint = "set the clock, best by NTP; until then others refuse its records, and nobody new finds this node"
            emit(Event("clock_wrong", {"skew_s": round(skew_s, 1), "hint": hint}))
            logger.warning("this machine's clock is %.0f s %s", abs(skew_s), "ahead" if skew_s > 0 else "behind")
        else:
            emit(Event("clock_right"))


async def _unless_ended(serving: asyncio.Task[None], event: Coroutine[Any, Any, object]) -> None:
    """Wait for `event`; raises what ended `serving`, should that come first."""
    waiting = asyncio.create_task(event)
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        try:
            await serving
        except BaseExceptionGroup as group:  # of the task group inside; its first member says what happened
            raise group.exceptions[0] from group


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _start_node(config: NodeOptions, stack: AsyncExitStack) -> tuple[HivemindNode, SigningKey]:
    """The transport and DHT under the node's remembered identity and, unless told where to listen, remembered port."""
    require_platform()
    from peers.transport.hivemind_p2p import HivemindNode, NodeConfig  # only where the platform has what it needs

    key = load_identity(config.identity)
    port_file = config.identity.with_suffix(".port")
    remembered = port_file.read_text().strip() if port_file.exists() else ""
    port = remembered if remembered.isdecimal() else _free_port()

    def node_config(port: str) -> NodeConfig:
        return NodeConfig(
            signing_key=key,
            listen=config.listen or (f"/ip4/0.0.0.0/tcp/{port}",),
            announce=config.announce,
            initial_peers=config.initial_peers,
            network=config.network,
        )

    try:
        node = await HivemindNode.create(node_config(port))
    except AddressInUse:
        if config.listen:
            raise
        logger.warning("port %s of last time is taken; using another for this time", port)
        # not remembered: a router may forward last time's port to this machine
        node, port = await HivemindNode.create(node_config(_free_port())), remembered
    stack.push_async_callback(node.close)
    if not config.listen and port != remembered:
        with suppress(OSError):  # the disk is full, or not ours: the next start takes another port
            port_file.write_text(port)
    return node, key


def _free_port() -> str:
    with socket.create_server(("", 0)) as server:
        return str(server.getsockname()[1])

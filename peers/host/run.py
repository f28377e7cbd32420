"""The order in which a node starts, serves and leaves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from prometheus_client import CollectorRegistry, ProcessCollector

from peers import garbage, host
from peers.capacity import FORWARD_BYTES, Plan, check_options, plan_capacity
from peers.exposition import told
from peers.host import events
from peers.host.config import BootstrapConfig, PeerConfig
from peers.host.events import Emit, Event
from peers.host.node import start_node
from peers.host.server import ServerPeer
from peers.model.catalog import Checkpoint, resolve
from peers.model.loading import check_folder, kept_block_bytes, load_config
from peers.model.lora import AdapterFolder, open_adapter
from peers.model.progress import Progress
from peers.model.storage import cache_folder
from peers.model.support import examine
from peers.platform import container_cpus
from peers.runtime.probe import Probe
from peers.runtime.probe_cache import probe_file, recall, remember
from peers.runtime.rough import Speed, rough_speed
from peers.serving.comfort import Comfort
from peers.serving.gpus import uuids_of
from peers.serving.owner import Owner, be_nice
from peers.serving.reachability import DialBackService, watch_reachability
from peers.transport.links import Links
from routing.errors import SwarmError
from routing.version import SOFTWARE

if TYPE_CHECKING:
    from peers.transport.hivemind_p2p import HivemindNode

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 20.0
MEASURE_AGAIN_S, MEASURE_AGAIN_S_MAX = 15.0, 600.0
"""The first time at once, when the engine is prepared; then after this time, and twice as long each time."""


async def run_bootstrap(config: BootstrapConfig, *, emit: Emit, stop: asyncio.Event) -> None:
    """Serve until `stop` is set. Raises SwarmError when the node cannot start."""
    async with AsyncExitStack() as stack:
        node, _ = await start_node(config, stack)
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
    While the owner wants the machine, no weights are loaded and nothing is announced.
    """
    if not host.THREADS_SLEEP:
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
    threads = config.threads or min(torch.get_num_threads(), container_cpus())
    torch.set_num_threads(threads)  # of whatever thread reads or packs weights, too
    async with AsyncExitStack() as stack:
        node, key = await start_node(config, stack)
        peer = ServerPeer(
            node.transport,
            node.store,
            key=key,
            network=config.network,
            name=config.name,
            max_bytes_per_s=config.max_bytes_per_s,
            journal_disk_bytes=config.journal_disk_bytes,
            adapters=adapters,
            outage=lambda problem: emit(events.outage(problem, node.clock_skew_s)),
        )
        stack.push_async_callback(peer.close)
        tell_metrics = None if config.metrics_port is None else _metrics(peer, config, stack, emit)
        emit(Event("connected", {"peer_id": key.peer_id, "addresses": list(node.transport.addresses)}))
        checkpoint = await asyncio.to_thread(
            resolve, config.model, token=config.token, progress=progress, accept=check_folder
        )
        plan, probe, probed_in = await _plan(config, checkpoint, adapters.values(), threads)
        comfort = Comfort(config.schedule, config.pause_on_load_percent)
        owner = Owner(comfort, peer.pause, peer.give_back, gpus=uuids_of(plan.devices))
        if owner.comfort.watches:
            if not await _spared(owner, node, emit, stop):
                await stack.aclose()
                emit(Event("stopped"))
                return
            plan, probe, probed_in = await _plan(config, checkpoint, adapters.values(), threads)  # of what is free now
        peer.discovery.watch(checkpoint.model_id)
        alone = not config.initial_peers
        by_speed = not (alone or config.blocks or config.num_blocks)
        speed = await _speed(checkpoint, plan, probe, threads) if by_speed else None
        spans = config.blocks or await peer.choose_span(checkpoint, plan, speed, alone=alone)
        max_blocks = plan.max_blocks
        plan = plan.beside(FORWARD_BYTES if probe is None else probe.forward_bytes, blocks=spans)
        emit(events.loading(checkpoint, spans, plan))
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
            fit=by_speed,
        )
        spans = peer.handler.served.spans
        if config.alone:
            stack.callback(garbage.spare_nothing)
            garbage.spare()
        if tell_metrics is not None:
            tell_metrics()
        await owner.look()
        if probe is None:
            remember(probed_in, peer.probe, time.time())
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
                    "dtype": plan.dtype_name,
                    "quantization": plan.quantization,
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
            peer.links, config.initial_peers, lambda verdict: emit(events.reachability(verdict)), peer.withdraw
        )
        peer.tasks.spawn(reachability, name="reachability")
        peer.tasks.spawn(events.watch_clock(peer.links, emit), name="clock")
        peer.tasks.spawn(owner.watch(lambda: _tell_comfort(owner, peer, emit)), name="owner")
        giving_way = peer.tasks.spawn(peer.give_way(emit), name="give way")
        peer.tasks.spawn(peer.discovery.run(), name="discovery")
        peer.tasks.spawn(_measure_again(peer, probed_in), name="measure again")
        moving = peer.tasks.spawn(peer.rebalance(emit), name="rebalance")
        await _unless_ended(serving, stop.wait())
        emit(Event("draining"))
        await asyncio.gather(_cancelled(moving), _cancelled(giving_way), peer.drain(timeout_s=DRAIN_TIMEOUT_S))
    emit(Event("stopped"))


async def _spared(owner: Owner, node: HivemindNode, emit: Emit, stop: asyncio.Event) -> bool:
    """Wait until the owner can spare the machine; False if `stop` was set first. Raises what ended the node."""
    ways = owner.spared(lambda: emit(events.comfort(owner))), node.wait_closed(), stop.wait()
    tasks = [asyncio.create_task(way) for way in ways]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return not stop.is_set()
    finally:
        for task in tasks:
            await _cancelled(task)


def _tell_comfort(owner: Owner, peer: ServerPeer, emit: Emit) -> None:
    if owner.reason is not None or not peer.absent:  # else it says itself when its blocks are loaded again
        emit(events.comfort(owner))


async def _plan(
    config: PeerConfig, checkpoint: Checkpoint, adapters: Iterable[AdapterFolder], threads: int
) -> tuple[Plan, Probe | None, Path]:
    """What this peer will be, how fast it is if that was measured before, and where that is kept. Raises SwarmError."""
    model_config = await asyncio.to_thread(load_config, checkpoint)
    plan = await asyncio.to_thread(
        plan_capacity,
        model_config,
        dtype=config.dtype,
        device=config.device,
        max_memory_bytes=config.max_memory_bytes,
        cache_tokens=config.cache_tokens,
        quantization=config.quantization,
        blocks=config.blocks,
        num_blocks=config.num_blocks,
        training=config.training,
        hosted=adapters,
        kept_block_bytes=await asyncio.to_thread(kept_block_bytes, checkpoint, model_config),
    )
    file = _probe_file(checkpoint, plan, threads)
    if (probe := recall(file, time.time())) is not None:
        plan = plan.beside(probe.forward_bytes)
        file = _probe_file(checkpoint, plan, threads)
        probe = recall(file, time.time())  # of fewer blocks, where it is about those that fit beside such a forward
    return plan, probe, file


async def _measure_again(peer: ServerPeer, probed_in: Path) -> None:
    """Where something disturbed what was measured, or forwards take longer than that lately: who looks slow is used by
    nobody. As long as it is so, more and more rarely."""
    wait_s, spans = 0.0, peer.handler.served.spans
    while True:
        await asyncio.sleep(wait_s)
        if not peer.probe.disturbed and peer.slower == 1:
            wait_s = MEASURE_AGAIN_S
            continue
        wait_s = min(max(MEASURE_AGAIN_S, 2 * wait_s), MEASURE_AGAIN_S_MAX)
        try:
            await peer.measure_again()
        except SwarmError as error:
            logger.info("this peer could not measure itself again: %s", error)
        else:
            if peer.handler.served.spans == spans and peer.slower == 1:
                remember(probed_in, peer.probe, time.time())


async def _speed(checkpoint: Checkpoint, plan: Plan, probe: Probe | None, threads: int) -> Speed | None:
    """For the choice of blocks, where memory alone does not decide: as measured, or by a guess; None for a first start
    with experts, of which no more is known than that a token passes some."""
    if probe is not None:
        return Speed(probe.decode_s_per_block, probe.prefill_s_per_token_block)
    anatomy = examine(await asyncio.to_thread(load_config, checkpoint))
    if any(".experts." in name for name in anatomy.weights):
        return None
    block_bytes = plan.request.sizes.block_bytes
    return await asyncio.to_thread(rough_speed, block_bytes, plan.dtype, plan.devices[0], threads=threads)


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


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

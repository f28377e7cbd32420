"""Blocks of a model on this machine: loaded, run by engines, measured, with as much cache as fits beside a forward.

Knows nothing of other nodes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace

import torch

from peers.capacity import FORWARD_BYTES, Plan
from peers.errors import CorruptCheckpoint, PeerTooSmall
from peers.model.adapters import Adapter
from peers.model.catalog import Checkpoint
from peers.model.cutting import SpanModel
from peers.model.kernels import pool_for
from peers.model.loading import load_config, load_span, span_tensors
from peers.model.lora import AdapterFolder
from peers.model.progress import Progress, Silent
from peers.model.support import examine, one_line
from peers.runtime.engine import Engine
from peers.runtime.joined import AnyEngine, JoinedEngine
from peers.runtime.probe import Probe, measure
from peers.runtime.works import EngineConfig
from routing.errors import CallerError, SwarmError
from routing.ids import BlockSpan, BlockSpans

logger = logging.getLogger(__name__)

PREPARATION_S = 1.5
"""So long blocks whose speed is known wait to be as fast as that: where what was compiled is kept, they soon are."""
_NO_MEMORY = "can't allocate memory", "out of memory", "ALLOC_FAILED"
"""How torch says MemoryError, of which it has several kinds."""
Fit = Callable[[Probe], Awaitable[BlockSpans]]
"""What to serve of the blocks that were loaded, now that this was measured of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An engine that was started; whoever has it stops it."""

    engine: AnyEngine
    plan: Plan
    """What was left of the one that was asked for, once a forward had been measured."""
    probe: Probe
    spans: BlockSpans
    adapters: dict[bytes, Adapter | None]
    """Hosted ones by digest: what of each is of these blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """What blocks are taken from, and how they are to be run."""

    checkpoint: Checkpoint
    config: EngineConfig
    """Whose cache tokens are the plan's."""
    adapters: Mapping[str, AdapterFolder]
    """Hosted, by name."""

    async def fetch(self, spans: BlockSpans, device: torch.device) -> None:
        """Bring to this disk what is to be loaded on `device`; once cancelled, end with the piece that arrives.

        Raises SwarmError.
        """
        awaited = _Awaited(Silent())
        config = await asyncio.to_thread(load_config, self.checkpoint, device=device)
        try:
            for span in spans:
                tensors = await asyncio.to_thread(span_tensors, self.checkpoint, config, span, device=device)
                await asyncio.to_thread(self.checkpoint.fetch, tensors, awaited)
        except OSError as error:
            raise _broken_disk(spans, error) from error
        finally:
            awaited.over = True

    async def start(
        self,
        spans: BlockSpans,
        plan: Plan,
        *,
        probe: Probe | None = None,
        fit: Fit | None = None,
        progress: Progress | None = None,
    ) -> Running:
        """Load the weights, start the engine, measure it unless that is known; after that `fit` may say that some of
        the blocks will do. Raises SwarmError."""
        try:
            return await self._start(spans, plan, probe, fit, progress)
        except (torch.OutOfMemoryError, MemoryError) as error:
            problem: SwarmError = PeerTooSmall(f"there is no memory left for blocks {spans}: {one_line(error)}")
        except OSError as error:
            problem = _broken_disk(spans, error)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_MEMORY):
                raise
            problem = PeerTooSmall(f"there is no memory left for blocks {spans}: {one_line(error)}")
        raise problem  # out here: what was caught holds on to the weights that were loaded by then

    async def _start(
        self, spans: BlockSpans, plan: Plan, probe: Probe | None, fit: Fit | None, progress: Progress | None
    ) -> Running:
        while True:
            fitting = spans
            models = [await self._load(part, device, plan, progress) for device, part in plan.parts(spans)]
            config = replace(self.config, cache_tokens=plan.cache_tokens, graph_bytes=plan.graph_bytes)
            adapters = await asyncio.to_thread(self._read_adapters, spans)
            async with AsyncExitStack() as trial:
                engines = await self._engines(models, config)
                engine: AnyEngine = engines[0] if len(engines) == 1 else JoinedEngine(engines)
                trial.push_async_callback(engine.stop)
                await engine.start()
                for name, adapter in adapters.items():
                    _check_adapter(engine, name, adapter)
                if probe is None:
                    probe = await measure(engine, room_bytes=FORWARD_BYTES)
                    fitting = spans if fit is None else await fit(probe)
                else:
                    with suppress(TimeoutError):  # it goes on in the background
                        async with asyncio.timeout(PREPARATION_S):
                            await engine.prepared()
                engine.set_token_budget(probe.token_budget)
                final = plan.beside(probe.forward_bytes, blocks=fitting)
                if fitting == spans and plan.cache_tokens <= final.cache_tokens:
                    trial.pop_all()
                    by_digest = {self.adapters[name].digest: adapter for name, adapter in adapters.items()}
                    return Running(engine=engine, plan=plan, probe=probe, spans=spans, adapters=by_digest)
            if fitting == spans:
                logger.warning("a forward takes %d MiB: starting again with less cache", probe.forward_bytes >> 20)
            del models, engines, engine
            gc.collect()  # these weights must be gone before they are loaded again, and models hold themselves
            plan, spans = final, fitting

    async def _load(self, part: BlockSpan, device: torch.device, plan: Plan, progress: Progress | None) -> SpanModel:
        """Once cancelled, ends with the tensor that is read, and leaves nothing behind."""
        awaited = _Awaited(progress or Silent())
        loading = asyncio.ensure_future(
            asyncio.to_thread(
                load_span,
                self.checkpoint,
                part,
                dtype=plan.dtype,
                device=device,
                quantization=plan.quantization,
                progress=awaited,
            )
        )
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            awaited.over = True
            await asyncio.wait([loading])
            loading.exception()  # marked as seen
            raise

    async def _engines(self, models: Sequence[SpanModel], config: EngineConfig) -> list[Engine]:
        """One for each; those on the CPU share its threads."""
        library = None
        if len(models) > 1 and models[0].device.type == "cpu":
            library = await asyncio.to_thread(pool_for, models[0].device, config.threads)
            config = replace(config, threads=max(1, config.threads // len(models)))
        return [Engine(model, config, library) for model in models]

    def _read_adapters(self, spans: BlockSpans) -> dict[str, Adapter | None]:
        """What of each hosted adapter is of these blocks. Raises CallerError, CorruptCheckpoint."""
        if not self.adapters:
            return {}
        anatomy, blocks = examine(load_config(self.checkpoint)), {block for span in spans for block in span}
        return {
            name: folder.read(anatomy.layers_path, anatomy.num_blocks, blocks) for name, folder in self.adapters.items()
        }


class _Abandoned(Exception):
    """In a thread whose result nobody awaits any more; told to nobody."""


class _Awaited:
    """Ends the work that it watches once that is `over`: a process that leaves would wait for its thread."""

    def __init__(self, shown: Progress) -> None:
        self.over = False
        self._shown = shown

    def start(self, label: str, total: int) -> None:
        self._shown.start(label, total)

    def advance(self, n: int) -> None:
        if self.over:
            raise _Abandoned
        self._shown.advance(n)

    def done(self) -> None:
        self._shown.done()


def _broken_disk(spans: BlockSpans, error: OSError) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"the weights of blocks {spans} cannot be read: {one_line(error)}")


def _check_adapter(engine: AnyEngine, name: str, adapter: Adapter | None) -> None:
    """Raises CallerError."""
    for part_engine, part in engine.parts(engine.model.span):
        for target in () if adapter is None else adapter.targets:
            shape = (target.inputs, target.outputs)
            if target.block in part and part_engine.linear_shape(target.block, target.module) != shape:
                raise CallerError(
                    f"adapter {name} does not fit: block {target.block} has no linear layer {target.module} of "
                    f"{shape[0]} inputs and {shape[1]} outputs",
                    hint="an adapter goes with the model that it was trained on",
                )

"""Blocks of a model on this machine: loaded, run by engines, measured, with as much cache as fits beside a forward.

Knows nothing of other nodes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from peers.capacity import Plan
from peers.model.adapters import Adapter
from peers.model.catalog import Checkpoint
from peers.model.loading import load_config, load_span
from peers.model.lora import AdapterFolder
from peers.model.progress import Progress
from peers.model.support import examine
from peers.runtime.engine import Engine, EngineConfig
from peers.runtime.joined import AnyEngine, JoinedEngine
from peers.runtime.probe import Probe, measure
from routing.errors import CallerError
from routing.ids import BlockSpans

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An engine that was started; whoever has it stops it."""

    engine: AnyEngine
    plan: Plan
    """What was left of the one that was asked for, once a forward had been measured."""
    probe: Probe
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

    async def start(
        self, spans: BlockSpans, plan: Plan, *, probe: Probe | None = None, progress: Progress | None = None
    ) -> Running:
        """Load the weights, start the engine, measure it unless that is known. Raises SwarmError."""
        while True:
            models = [
                await asyncio.to_thread(
                    load_span,
                    self.checkpoint,
                    part,
                    dtype=plan.dtype,
                    device=device,
                    quantization=plan.quantization,
                    progress=progress,
                )
                for device, part in plan.parts(spans)
            ]
            config = replace(self.config, cache_tokens=plan.cache_tokens)
            adapters = await asyncio.to_thread(self._read_adapters, spans)
            async with AsyncExitStack() as trial:
                engines = [Engine(model, config) for model in models]
                engine: AnyEngine = engines[0] if len(engines) == 1 else JoinedEngine(engines)
                trial.push_async_callback(engine.stop)
                await engine.start()
                for name, adapter in adapters.items():
                    _check_adapter(engine, name, adapter)
                probe = probe or await measure(engine)
                final = plan.beside(probe.forward_bytes, blocks=spans)
                if plan.cache_tokens <= final.cache_tokens:
                    trial.pop_all()
                    by_digest = {self.adapters[name].digest: adapter for name, adapter in adapters.items()}
                    return Running(engine=engine, plan=plan, probe=probe, adapters=by_digest)
            logger.warning("a forward takes %d MiB: starting again with less cache", probe.forward_bytes >> 20)
            del models, engines, engine  # these weights must be gone before they are loaded again
            plan = final

    def _read_adapters(self, spans: BlockSpans) -> dict[str, Adapter | None]:
        """What of each hosted adapter is of these blocks. Raises CallerError, CorruptCheckpoint."""
        if not self.adapters:
            return {}
        anatomy, blocks = examine(load_config(self.checkpoint)), {block for span in spans for block in span}
        return {
            name: folder.read(anatomy.layers_path, anatomy.num_blocks, blocks) for name, folder in self.adapters.items()
        }


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

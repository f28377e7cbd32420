"""A gateway from its configuration to its end: models, network, server.

The composition root: owns the order in which things start and stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from peers import garbage
from peers.model.catalog import resolve
from peers.model.loading import check_folder
from peers.model.progress import Progress
from routing.errors import CallerError, SwarmError, Unavailable
from swarm.answers import load_tokenizer
from swarm.gateway.allocation import return_large_buffers
from swarm.gateway.app import Gateway, make_app
from swarm.gateway.kept import KeptLimits
from swarm.gateway.keys import Account, Keys
from swarm.gateway.served import Served
from swarm.models import SwarmModelForCausalLM
from swarm.models.own import is_folder, with_adapter
from swarm.network import Entrance
from swarm.session.remote import Resilience
from swarm.web.server import Server, listen, make_server, url

logger = logging.getLogger(__name__)

SETTLE_S = 5.0
"""After the deadline for open answers: to tell their readers."""
MAX_DRAIN_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """One gateway."""

    models: tuple[str, ...]
    """Built-in names, hub ids, folders or GGUF files; clients name them as they are named here."""
    entrance: Entrance
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    accounts: tuple[Account, ...] = ()
    """Who may ask; none: everybody."""
    requests_per_minute: float | None = None
    """Of each account that sets none."""
    cors_origins: tuple[str, ...] = ()
    """Web pages whose scripts may ask; none unless named."""
    max_streams: int = 256
    """Answers under way of one model; more are refused with 429."""
    keep: KeptLimits = field(default_factory=KeptLimits)
    drain_s: float = 30.0
    """How long open answers may go on after the gateway was told to end."""
    dtype: str = "auto"
    token: str | None = None
    min_precision: str | None = None
    adapters: tuple[str, ...] = ()
    """That peers host, or folders of one's own: the model with each of them is served too, as MODEL:NAME."""
    resilience: Resilience = "replay"

    def __post_init__(self) -> None:
        if not self.models or len({*self.models}) < len(self.models):
            raise CallerError("a model is named twice, or none is", hint="name each model once")
        if len({*map(_shown, self.adapters)}) < len(self.adapters) or (self.adapters and len(self.models) > 1):
            raise CallerError("adapters are of one model, each named once", hint="start a gateway for each model")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"{self.port} is no port")
        if self.max_streams < 1:
            raise ValueError("max_streams is at least 1")
        if not 0 <= self.drain_s <= MAX_DRAIN_S:
            raise ValueError(f"drain_s is 0 to {MAX_DRAIN_S:.0f} seconds")
        if self.requests_per_minute is not None and not self.requests_per_minute > 0:
            raise ValueError("requests_per_minute is above 0")


class RunningGateway:
    """An application, its models and its socket. `stop` may come from the loop that runs `serve`."""

    def __init__(self, served: dict[str, Served], listener: socket.socket, app: FastAPI, *, drain_s: float) -> None:
        self.url = url(listener)
        self._served, self.listener, self._drain_s = served, listener, drain_s
        self._server: Server = make_server(app, close_within_s=drain_s + SETTLE_S)
        self._gateway: Gateway = app.state.gateway
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Take no new requests; `serve` returns when the open ones have ended."""
        self._gateway.stopping = True
        self._stopping.set()

    async def serve(self) -> None:
        """Until `stop`."""
        serving = asyncio.create_task(self._server.serve(sockets=[self.listener]))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            self._server.should_exit = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._drain_s):
                    await asyncio.shield(serving)
            for served in self._served.values():
                served.engine.interrupt(Unavailable("the gateway has ended", hint="ask again, here or elsewhere"))
            await serving
        finally:
            stopping.cancel()
            serving.cancel()


def load(config: GatewayConfig, *, progress: Progress | None = None) -> dict[str, Served]:
    """Fetch the models' own ends and enter the network with each. Raises SwarmError; then nothing stays open."""
    served: dict[str, Served] = {}
    try:
        for name in config.models:
            served[name] = _load_one(name, config, None, progress)
            for adapter in config.adapters:
                served[f"{name}:{_shown(adapter)}"] = _load_one(name, config, adapter, progress)
    except BaseException:  # also an interrupt
        close(served.values())
        raise
    return served


def _load_one(name: str, config: GatewayConfig, adapter: str | None, progress: Progress | None) -> Served:
    checkpoint = resolve(name, token=config.token, progress=progress, accept=check_folder)
    tokenizer = load_tokenizer(checkpoint)
    own = adapter if adapter is not None and is_folder(adapter) else None
    model: Any = SwarmModelForCausalLM.from_pretrained(
        checkpoint,
        initial_peers=config.entrance.addresses,
        network=config.entrance.network,
        dtype=config.dtype,
        progress=progress,
        min_precision=config.min_precision,
        adapter=None if own else adapter,
        resilience=config.resilience,
    )
    try:
        if own is not None:
            _put_on(model, own)
        shown = name if adapter is None else f"{name}:{_shown(adapter)}"
        served = Served(shown, model, tokenizer, max_answers=config.max_streams, kept=config.keep)
    except SwarmError:
        model.close()
        raise
    try:
        served.grammars.prepare()  # a second now, rather than of somebody's request
    except SwarmError as error:
        logger.warning("%s: %s", name, error)
    return served


def _put_on(model: Any, folder: str) -> None:
    """An adapter in the layers of this very model. Raises CallerError."""
    if with_adapter(model, folder).active_peft_config.is_prompt_learning:
        raise CallerError(
            f"{folder} is a learned prompt or prefix, which stands before texts and not in the layers",
            hint="a gateway serves LoRA; ask behind a prompt by swarm chat or in Python",
        )


def _shown(adapter: str) -> str:
    """What it is called here."""
    return Path(adapter).expanduser().resolve().name if is_folder(adapter) else adapter


def close(served: Iterable[Served]) -> None:
    """Free everything at peers and leave the network."""
    for each in list(served):
        each.close()
        each.model.close()


async def run(
    config: GatewayConfig,
    *,
    ready: Callable[[RunningGateway], None],
    progress: Progress | None = None,
) -> None:
    """A gateway from start to end, which has the process to itself; `ready` is told when it takes requests. Raises
    SwarmError."""
    return_large_buffers()
    listener = listen(config.host, config.port)  # a port that is taken is said before anything is loaded
    try:
        served = await asyncio.to_thread(load, config, progress=progress)
        try:
            keys = Keys(config.accounts, requests_per_minute=config.requests_per_minute)
            app = make_app(served, keys, cors_origins=config.cors_origins)
            running = RunningGateway(served, listener, app, drain_s=config.drain_s)
            garbage.spare()
            ready(running)
            await running.serve()
        finally:
            garbage.spare_nothing()
            await asyncio.to_thread(close, served.values())
    finally:
        listener.close()

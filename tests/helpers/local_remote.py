"""A `Remote` without a network: a whole local model runs every session, and objects to everything sloppy. `world_of`
puts it behind a client, next to the plain local model that client must equal.

Strict on purpose: a step may not leave a gap, a parent must be alive and long enough when its child takes its first
step, sessions of one `run` are distinct, and what was released may not be used. `assert_clean` shows that everything
opened was released.
"""

from __future__ import annotations

import copy
import functools
import inspect
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from peers.model.adapters import Adapter
from peers.model.support import examine
from swarm.models import SwarmModelForCausalLM
from swarm.session.remote import RemoteSession, Resilience, RowStep
from tests.helpers.families import FAMILIES, random_model


class LocalSession(RemoteSession):
    __slots__ = ("cache", "offset", "parent")

    def __init__(self, parent: tuple[LocalSession, int] | None) -> None:
        super().__init__()
        self.parent = parent
        self.cache: DynamicCache | None = None
        self.offset: int | None = None


class LocalRemote:
    def __init__(self, model: PreTrainedModel) -> None:
        self.embed: Callable[[Tensor, int], Tensor] | None = None
        """When set, every step that carries token ids must be what this makes of them."""
        self.route = self.training = self.callers = None
        self.before_run: Callable[[Sequence[RowStep]], None] | None = None
        self.model = copy.deepcopy(model).eval()
        anatomy = examine(model.config)
        self.layers = self.model.get_submodule(anatomy.layers_path)
        self.decoder = self.model.get_submodule(anatomy.decoder_path)
        self.takes_position_ids = "position_ids" in inspect.signature(self.decoder.forward).parameters
        self.embedding_size = self.model.get_input_embeddings().weight.shape[-1]
        self.open_sessions: set[LocalSession] = set()
        self.opened = self.forks = 0
        self.runs: list[list[RowStep]] = []
        """Every batch of steps that arrived."""
        self.closed = False
        self._lock = threading.RLock()
        self._hidden: Tensor | None = None
        self._output: Tensor | None = None
        self._regime_length = 0
        self.layers[0].register_forward_pre_hook(self._inject, with_kwargs=True)
        self.layers[-1].register_forward_hook(self._take)
        for module in self.model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                self._fix_regime(module)

    @property
    def tokens_sent(self) -> int:
        return sum(len(step.hidden_TD) for steps in self.runs for step in steps)

    @property
    def outputs_wanted(self) -> int:
        return sum(len(step.hidden_TD) - step.want_from for steps in self.runs for step in steps)

    def reset(self) -> None:
        """Forget what was counted so far."""
        self.assert_clean()
        self.opened = self.forks = 0
        self.before_run = None
        self.runs.clear()

    def assert_clean(self) -> None:
        assert not self.open_sessions, f"{len(self.open_sessions)} of {self.opened} sessions were never released"

    def open(
        self,
        parent: RemoteSession | None = None,
        position: int = 0,
        *,
        resilience: Resilience | None = None,
        adapter: Adapter | None = None,
    ) -> RemoteSession:
        with self._lock:
            assert not self.closed
            assert adapter is None, "its own model runs every session"
            if parent is not None:
                assert isinstance(parent, LocalSession)
                assert parent in self.open_sessions, "forks a session that was released"
                assert 0 < position <= parent.length
                self.forks += 1
            session = LocalSession(None if parent is None else (parent, position))
            self.open_sessions.add(session)
            self.opened += 1
            return session

    def run(self, steps: Sequence[RowStep]) -> list[Tensor]:
        with self._lock:
            assert not self.closed
            assert len({step.session for step in steps}) == len(steps)
            if self.before_run is not None:
                self.before_run(steps)
            self.runs.append(list(steps))
            outputs: dict[RemoteSession, Tensor] = {}
            # Parents before and after their children in turn: both orders must be right.
            for step in steps if len(self.runs) % 2 else reversed(steps):
                outputs[step.session] = self._step(step)
            return [outputs[step.session] for step in steps]

    def release(self, sessions: Sequence[RemoteSession]) -> None:
        with self._lock:
            for session in sessions:
                assert isinstance(session, LocalSession)
                self.open_sessions.discard(session)
                session.cache = None

    def close(self) -> None:
        with self._lock:
            self.release(list(self.open_sessions))
            self.closed = True

    def _step(self, step: RowStep) -> Tensor:
        session, count = step.session, len(step.hidden_TD)
        assert isinstance(session, LocalSession)
        assert session in self.open_sessions, "steps a session that was released"
        if session.cache is None:
            session.cache = DynamicCache()
            if session.parent is not None:
                parent, position = session.parent
                assert parent in self.open_sessions, "the parent was released before the child's first step"
                assert parent.length >= position, "the parent was truncated before the child's first step"
                assert step.start == position
                session.cache, session.length = copy.deepcopy(parent.cache), parent.length
                session.offset = parent.offset
                session.parent = None
        assert count > 0
        assert step.start <= session.length, "leaves a gap"
        assert step.want_from <= count
        assert step.regime_length >= step.start + step.position_offset + count
        if step.start == 0:
            session.offset = step.position_offset
        assert session.offset == step.position_offset
        if self.embed is not None and step.token_ids_T is not None:
            again_TD = self.embed(step.token_ids_T, step.start + step.position_offset)
            assert torch.allclose(again_TD, step.hidden_TD, atol=1e-5), "the ids would not give this input again"
        assert session.cache is not None
        session.cache.crop(step.start - session.length)
        self._hidden, self._regime_length = step.hidden_TD[None].to(self.model.dtype), step.regime_length
        positions_1T = torch.arange(step.start, step.start + count)[None]
        with torch.no_grad():
            arguments = {"position_ids": positions_1T} if self.takes_position_ids else {}
            self.decoder(
                inputs_embeds=torch.zeros(1, count, self.embedding_size, dtype=self.model.dtype),
                past_key_values=session.cache,
                use_cache=True,
                **arguments,
            )
        session.length = step.start + count
        assert self._output is not None
        return self._output[0, step.want_from :].to(step.hidden_TD.dtype, copy=True)

    def _inject(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._hidden, *args[1:]), kwargs
        return args, {**kwargs, first_parameter(layer): self._hidden}

    def _take(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._output = output[0] if isinstance(output, tuple) else output

    def _fix_regime(self, rotary: nn.Module) -> None:
        """Choose frequencies by `regime_length`, as the user's whole forward would."""
        own_forward = rotary.forward

        def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            last_11 = torch.full_like(position_ids[:, :1], self._regime_length - 1)
            angles = own_forward(x, torch.cat((position_ids, last_11), dim=1), *args, **kwargs)
            return tuple(part[:, :-1] for part in angles) if isinstance(angles, tuple) else angles[:, :-1]

        rotary.forward = forward


def first_parameter(layer: nn.Module) -> str:
    return next(iter(inspect.signature(layer.forward).parameters))


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A local model, and a client of the same checkpoint."""

    local: Any
    model: Any
    remote: LocalRemote


def make_world(family: str) -> World:
    """Two blocks are enough for a client, which never looks inside."""
    with tempfile.TemporaryDirectory() as folder:
        config = FAMILIES[family].config()
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
        local = random_model(config)
        local.save_pretrained(folder)
        remote = LocalRemote(local)
        model = SwarmModelForCausalLM.from_pretrained(folder, cache=Path(folder) / "cache", remote=remote)
    remote.embed = model._remote_layers.embed
    return World(local=local, model=model, remote=remote)


world_of = functools.cache(make_world)

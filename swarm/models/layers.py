"""A client model's decoder layers, which stand at peers.

Owns one forward on its way through the model: what was asked for is noted before the embedding and answered where the
first layer would run, in the thread that asked. Nothing is kept between forwards; what a sequence holds lives in its
cache. Knows how a batch becomes rows (`swarm.models.layout`), but not how rows travel.

Tensor names: B rows, T new columns, D the model's hidden size.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peers.model.adapters import Adapter, same
from peers.model.rotary import rotary_regime
from peers.model.skeleton import embed_only, install_route
from peers.model.support import find_decoder, find_layers
from swarm.errors import SessionClosed, UnsupportedAdapter, UnsupportedGradient, UnsupportedOutput
from swarm.models.adapters import Attached, Reader, with_prefix
from swarm.models.cache import SwarmCache
from swarm.models.generation import current_generation
from swarm.models.gradients import Documents, documents_of, packed_documents, run
from swarm.models.layout import Layout, PositionRules, lay_out
from swarm.models.prefixes import prefix_of
from swarm.session.remote import Remote

INSIDE_THE_LAYERS = ("output_attentions", "output_hidden_states", "output_router_logits")

WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
"""How configurations call the columns that a layer looks back at most."""

KNOWN_TENSORS = ("input_ids", "attention_mask", "position_ids", "cache_position", "labels", "logits_to_keep")
"""With these alone, token ids and positions make again what enters the first layer; any other may have changed it."""

_asked: ContextVar[Mapping[str, Any] | None] = ContextVar("asked", default=None)
_current: ContextVar[_Forward | None] = ContextVar("current", default=None)
_embedding: ContextVar[bool] = ContextVar("embedding", default=False)
_behind: ContextVar[Tensor | None] = ContextVar("behind", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forward:
    """One forward between the embedding and the first layer."""

    cache: SwarmCache
    layout: Layout | None
    """None where rows hold several documents, which no cache can hold."""
    documents: Documents | None
    attached: Attached | None
    """The client's own adapters inside the layers, and its prefix."""
    prefixed: bool
    """Whether there is one, and no `generate` that would go on behind it."""
    kept: bool
    """Whether the cache outlives the forward, or a `generate` runs."""
    token_ids_BT: Tensor | None
    want_from: int
    repeat_last: bool


@contextmanager
def asked_of_model(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Within runs the forward of a whole model with these arguments, of which its decoder sees only a part.

    `logits_to_keep` says which outputs are worth fetching; and a model around the decoder may have made 4-D masks of
    `attention_mask` and embeddings of `input_ids`.
    """
    token = _asked.set(arguments)
    try:
        yield
    finally:
        _asked.reset(token)


class RemoteLayers:
    """Runs the layers of one model at `remote`, which is set before the first forward. Safe in several threads."""

    def __init__(self, model: Any) -> None:
        """`model` was made by `peers.model.loading.load_client`, and is changed in place."""
        self.remote: Remote | None = None
        self.pools_last = False
        """Whether the model takes what it wants from the last column, wherever a row's last token is."""
        self.hosted: str | None = None
        """The adapter with which peers compute, where it is theirs."""
        self.on_route: Callable[[float, float], None] | None = None
        """Is told when a forward went to the peers and when it was back, by `time.perf_counter`."""
        self._last_adapter: tuple[Attached, Adapter] | None = None
        """What it was read from, and what travelled last."""
        layers_path = find_layers(model)
        layers = model.get_submodule(layers_path)
        self._adapters = Reader(layers)
        self.num_blocks = len(layers)
        self.regime = rotary_regime(model)
        self._decoder = model.get_submodule(find_decoder(model, layers_path))
        self._config = self._decoder.config
        self._own_forward = self._decoder.forward
        self._parameters = tuple(inspect.signature(self._own_forward).parameters)
        self._rules = self._learn_position_rules()
        self._decoder.forward = functools.wraps(self._own_forward)(lambda *a, **kw: self._forward(*a, **kw))
        install_route(model, self._route)

    def new_cache(self, prefix: Attached | None = None) -> SwarmCache:
        """A cache that is empty but for a prefix, which belongs to the running `generate` where there is one. Raises
        SessionClosed."""
        if self.remote is None:
            raise SessionClosed("this model was closed")
        generation = current_generation(self)
        if generation is None:
            return SwarmCache(self.remote, self.num_blocks, prefix=prefix)
        cache = SwarmCache(
            self.remote, self.num_blocks, generation.held, resilience=generation.resilience, prefix=prefix
        )
        generation.caches.add(cache)
        return cache

    def own_adapter(self) -> Adapter | None:
        """What is active in the layers now, for who asks the remote himself. Raises UnsupportedAdapter."""
        attached = self._adapters.read()
        return None if attached is None else attached.adapter()

    def embed(self, token_ids_T: Tensor, first_position: int) -> Tensor:
        """What enters block 0, `[T, D]`, for tokens at position ids `first_position, first_position + 1, …`."""
        return self.embed_at(token_ids_T, torch.arange(first_position, first_position + len(token_ids_T)))

    def embed_at(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """What enters block 0, `[T, D]`, for tokens at any position ids; they may be of different sequences."""
        device = self._decoder.device
        token = _embedding.set(True)
        try:
            with torch.no_grad():
                return embed_only(self._decoder, token_ids_T[None].to(device), positions_T[None].to(device))[0]
        finally:
            _embedding.reset(token)

    def logits(self, model: Any, hidden_MD: Tensor) -> Tensor:
        """What `model`, to which these layers belong, makes of `[M, D]` behind its last block: `[M, V]`, a row each."""
        token = _behind.set(hidden_MD[:, None])
        try:
            with torch.no_grad():
                ids_M1 = torch.zeros(len(hidden_MD), 1, dtype=torch.long, device=hidden_MD.device)
                logits_MV: Tensor = model(input_ids=ids_M1, use_cache=False).logits[:, -1]
                return logits_MV
        finally:
            _behind.reset(token)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the decoder's forward."""
        kwargs.update(zip(self._parameters, args, strict=False))
        token_ids_BT, embeds_BTD = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        shaped = embeds_BTD if token_ids_BT is None else token_ids_BT
        if shaped is None or _embedding.get() or _behind.get() is not None:
            return self._own_forward(**kwargs)  # without any input it raises as the architecture does
        for name in INSIDE_THE_LAYERS:
            if self._argument(kwargs, name):
                raise UnsupportedOutput(f"{name}: what happens inside the layers stays at the peers that run them")

        cache, one_shot = kwargs.get("past_key_values"), None
        if cache is None:
            cache = self.new_cache()
            if self._argument(kwargs, "use_cache"):
                kwargs["past_key_values"] = cache
            else:
                one_shot = cache
        elif not isinstance(cache, SwarmCache):
            kwargs["past_key_values"] = cache = self.new_cache(prefix_of(cache, self.num_blocks))
        kept = one_shot is None or current_generation(self) is not None
        token = _current.set(self._lay_out(cache, shaped.shape[0], shaped.shape[1], kwargs, kept))
        try:
            return self._own_forward(**kwargs)
        finally:
            _current.reset(token)
            if one_shot is not None:
                one_shot.close()

    def _argument(self, kwargs: dict[str, Any], name: str) -> object:
        value = kwargs.get(name)
        return getattr(self._config, name, None) if value is None else value

    def _lay_out(self, cache: SwarmCache, batch: int, width: int, kwargs: dict[str, Any], kept: bool) -> _Forward:
        if self.remote is None:
            raise SessionClosed("this model was closed")
        past = cache.get_seq_length()
        cache.prepare(self.remote, batch)
        asked = _asked.get() or kwargs
        mask, position_ids = asked.get("attention_mask"), kwargs.get("position_ids")
        documents = None
        if not past and self.remote.training is not None:
            documents = packed_documents(self._rules, position_ids, mask, batch=batch)
        from_ids_alone = all(name in KNOWN_TENSORS or not isinstance(asked[name], Tensor) for name in asked)
        return _Forward(
            cache=cache,
            layout=None
            if documents is not None
            else lay_out(
                self._rules,
                batch=batch,
                width=width,
                past=past,
                cached_BC=cache.kept_BC,
                lengths=[row.length or cache.before for row in cache.rows],
                offsets=[row.offset for row in cache.rows],
                mask=mask,
                position_ids=position_ids,
                gaps=self.remote.training is not None and current_generation(self) is None and past == 0,
                alone=current_generation(self) is not None,
            ),
            documents=documents,
            attached=with_prefix(self._adapters.read(again=past > cache.before), cache.prefix),
            prefixed=cache.prefix is not None and current_generation(self) is None,
            kept=kept,
            token_ids_BT=asked.get("input_ids") if from_ids_alone else None,
            want_from=_first_wanted(asked.get("logits_to_keep", 0), width),
            repeat_last=self.pools_last or current_generation(self) is not None,
        )

    def _route(self, hidden_BTD: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Stands in for all layers."""
        if (hidden_M1D := _behind.get()) is not None:
            return hidden_M1D
        forward = _current.get()
        assert forward is not None, "the layers run only inside the decoder's own forward"
        begun_s = time.perf_counter()
        layout = forward.layout
        if layout is None or forward.prefixed or any(layout.jumps) or self._is_whole(hidden_BTD, forward):
            output_BTD = self._run_whole(hidden_BTD, forward)
        else:
            output_BTD = forward.cache.advance(
                hidden_BTD,
                layout,
                token_ids_BT=forward.token_ids_BT,
                want_from=forward.want_from,
                repeat_last=forward.repeat_last,
                regime=self.regime.key(layout.regime_length),
                adapter=self._adapter_of(forward),
            )
        if self.on_route is not None:
            self.on_route(begun_s, time.perf_counter())
        return output_BTD

    def _is_whole(self, hidden_BTD: Tensor, forward: _Forward) -> bool:
        """Whether the forward goes as training does: for gradients; and with an adapter also where nothing is kept, as
        in an evaluation between steps."""
        adapters = forward.attached
        if torch.is_grad_enabled() and (hidden_BTD.requires_grad or (adapters is not None and adapters.requires_grad)):
            return True
        trains = self.remote is not None and self.remote.training is not None
        return adapters is not None and trains and not forward.kept

    def _adapter_of(self, forward: _Forward) -> Adapter | None:
        """What the layers hold now. What a cache holds is gone on with where no weight was touched since."""
        adapters, last = forward.attached, self._last_adapter
        if adapters is None:
            return None
        assert forward.layout is not None
        if adapters.dropout:
            raise UnsupportedAdapter(
                "lora_dropout is on, and outside of training peers drop nothing", hint="call eval() before generating"
            )
        if last is not None and forward.layout.past and adapters.untouched_since(last[0]):
            return last[1]
        adapter = adapters.adapter()
        if last is not None and same(last[1], adapter):
            adapter = last[1]  # whose parts and names are known
        self._last_adapter = (adapters, adapter)
        return adapter

    def _run_whole(self, hidden_BTD: Tensor, forward: _Forward) -> Tensor:
        """As autograd wants it, or where rows hold several documents or gaps: no cache holds anything afterwards."""
        remote = None if self.remote is None else self.remote.training
        if self.hosted is not None:
            raise UnsupportedGradient(
                f"peers compute no gradients through adapter {self.hosted}, which they host for everybody",
                hint="load the model without adapter=… to train; what they host can be trained on as your own, by PEFT",
            )
        if remote is None:
            raise UnsupportedGradient("no gradient flows through these remote layers, but their input requires one")
        documents = forward.documents
        if documents is None:
            assert forward.layout is not None
            if forward.layout.past and not forward.prefixed:
                raise UnsupportedGradient(
                    "gradients do not reach what a cache holds", hint="train on whole sequences, with use_cache=False"
                )
            documents = documents_of(forward.layout)
        forward.cache.close()  # whoever goes on with it is told that it holds nothing
        return run(remote, hidden_BTD, documents, repeat_last=forward.repeat_last, attached=forward.attached)

    def _learn_position_rules(self) -> PositionRules:
        takes_position_ids = "position_ids" in self._parameters
        counts_kept, embeds_positions = False, True
        if takes_position_ids:
            # A padded pair of tokens: is the second one at position 1, its column, or at 0, the first that is kept?
            device = self._decoder.device
            pair_12 = torch.zeros(1, 2, dtype=torch.long, device=device)
            mask_12 = positions_12 = torch.tensor([[0, 1]], device=device)
            default_12D = embed_only(self._decoder, pair_12, attention_mask_BT=mask_12)
            by_column_12D = embed_only(self._decoder, pair_12, positions_12, mask_12)
            counts_kept = not torch.equal(default_12D[0, 1], by_column_12D[0, 1])
            further_12D = embed_only(self._decoder, pair_12, positions_12 + 1, mask_12)
            embeds_positions = not torch.equal(further_12D, by_column_12D)
        unbounded = getattr(self._config, "alibi", False) or self.regime.kind == "dynamic"
        windows = [getattr(self._config, name, None) for name in WINDOWS]
        return PositionRules(
            takes_position_ids=takes_position_ids,
            counts_kept=counts_kept,
            embeds_positions=embeds_positions,
            max_positions=None if unbounded else getattr(self._config, "max_position_embeddings", None),
            window=min((window for window in windows if window), default=None),
        )


def _first_wanted(logits_to_keep: int | Tensor, width: int) -> int:
    """The first of `width` columns whose output is needed."""
    if isinstance(logits_to_keep, Tensor):
        return min((index % width for index in logits_to_keep.tolist()), default=width)
    return slice(-logits_to_keep, None).indices(width)[0]

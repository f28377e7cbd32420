"""The Hugging Face model whose layers stand at peers.

Owns the object a user holds: an instance of the architecture's own class whose embeddings, norm and head are real. What
differs from the local model is only what must: nothing from inside the layers, no saving.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, Self, cast

from torch import Tensor

from routing.routes import Route
from swarm.errors import SessionClosed, UnsupportedOutput, WeightsAreRemote
from swarm.models.cache import SwarmCache
from swarm.models.generation import Session, current_session, generation
from swarm.models.layers import RemoteLayers
from swarm.session.remote import Remote, Resilience, check_resilience


class SwarmModel:
    """What an architecture's own class becomes when its layers are remote; mixed in in front of it.

    Padding never travels: where a column is padding the hidden state behind the layers is zero, a label that would be
    predicted from there is ignored, and `generate` goes on behind a right-padded row's last token, where a local model
    would go on behind its padding; behind a learned prompt a row leaves no positions for padding, as it would alone.
    Several threads may use one object.
    """

    _remote_layers: RemoteLayers

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`. What it holds at the peers is released when it ends, fails or is interrupted,
        unless it runs in a `session()` or returns its cache (`return_dict_in_generate`)."""
        self._remote()  # a closed model says so before anything else is looked at
        session = current_session(self._remote_layers)
        with generation(self._remote_layers) if session is None else session.generation() as call:
            result = super().generate(*args, **kwargs)  # type: ignore[misc]
            if session is None and (cache := getattr(result, "past_key_values", None)) is not None:
                call.caches.discard(cache)
            return result

    def session(self, *, resilience: Resilience | None = None) -> Session:
        """Keep what the peers hold from one `generate` to the next: `with model.session(): …`.

        `resilience`: as of `from_pretrained`, for this session only. Raises CallerError.
        """
        if resilience is not None:
            check_resilience(resilience)
        return Session(self._remote_layers, self._remote(), self.generate, resilience)

    @property
    def route(self) -> Route | None:
        """The peers that ran the last steps, in order; None before the first one."""
        return self._remote().route

    def close(self) -> None:
        """Release everything at the peers and end the connection. Idempotent; later calls raise SessionClosed."""
        remote, self._remote_layers.remote = self._remote_layers.remote, None
        if remote is not None:
            remote.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises WeightsAreRemote, unless a module around this one collects its parts (PEFT, to pick its adapter)."""
        if not args and "destination" not in kwargs:
            raise WeightsAreRemote("the weights of the layers are at peers, not in this object")
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise WeightsAreRemote("the weights of the layers are at peers, so this object cannot be saved")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half` and `cuda` call. A weight of the layers is one number seen as many; let it stay one."""
        hollow = [
            (tensors, name, tensor.shape)
            for module in self.modules()  # type: ignore[attr-defined]
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None and tensor.numel() > 1 and not any(tensor.stride())
        ]
        for tensors, name, _ in hollow:
            tensors[name].data = tensors[name].data.as_strided((), ())
        try:
            return cast(Self, super()._apply(fn, recurse))  # type: ignore[misc]
        finally:
            for tensors, name, shape in hollow:
                tensors[name].data = tensors[name].data.expand(shape)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedOutput(
            "transformers' continuous batching pages keys and values here; those of this model are at peers",
            hint="call generate from several threads: peers batch all that arrives",
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _remote(self) -> Remote:
        if self._remote_layers.remote is None:
            raise SessionClosed("this model was closed")
        return self._remote_layers.remote

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by `generate`; whatever `cache_implementation` says, the keys and values are at peers.

        `max_cache_length`: of all but the last token; `max_length` does not count what came as embeddings.
        """
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache:
            cache = model_kwargs["past_key_values"] = self._remote_layers.new_cache()
        if isinstance(cache, SwarmCache):
            cache.expects = max_cache_length + 1

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """Called by `generate`, which counts on from the last column: padding there has its row's last position."""
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)  # type: ignore[misc]
        return (mask.long().cumsum(-1) - 1).clamp(min=0)

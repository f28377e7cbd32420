"""Making a model whose layers stand at peers: the checkpoint's own ends, and the way into a network.

Owns the steps from a model's name to a usable object. Knows neither how a forward travels nor how tensors are read.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.nn import functional as F

from peers.model.catalog import Checkpoint, resolve
from peers.model.kernels import accelerate, pool_for
from peers.model.loading import check_folder, load_client
from peers.model.progress import Progress
from peers.platform import require_platform
from peers.wire.messages import Urgency
from routing.errors import CallerError
from routing.precision import check_precision
from swarm.models.base import SwarmModel
from swarm.models.classification import with_class_head
from swarm.models.head import share_head
from swarm.models.layers import RemoteLayers, asked_of_model
from swarm.network import DEFAULT_NETWORK, Entrance
from swarm.session import driver
from swarm.session.live import RemoteModel
from swarm.session.remote import Embed, Remote, Resilience, check_resilience
from swarm.session.training import TrainingConfig

Adapt = Callable[[Any], Any]
HEAD_ROWS = 16
"""Sequences generated at once for which the head may be faster than torch's: more take seconds to find out about."""
IGNORED_LABEL = -100
"""What transformers' losses leave out."""


class SwarmModelForCausalLM(SwarmModel):
    """A causal language model run by a swarm; every instance is one of its architecture's own class as well."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Checkpoint,
        *,
        initial_peers: Sequence[str] = (),
        invite: str | None = None,
        network: str = DEFAULT_NETWORK,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        cache: Path | None = None,
        token: str | None = None,
        progress: Progress | None = None,
        remote: Remote | None = None,
        background: bool = False,
        min_precision: str | None = None,
        adapter: str | None = None,
        prefix_secret: bytes | None = None,
        resilience: Resilience = "replay",
        training: TrainingConfig | None = None,
    ) -> Any:
        """Load the ends of `model` (a folder, hub id, built-in name or Checkpoint) and enter a network for its layers.

        The network is entered by `invite`, or by `initial_peers` and its name; `remote` stands in for it. Only the
        client's own tensors are downloaded (`cache`: where to; `token`: for gated repositories). Layers run in each
        peer's dtype, and with `min_precision` (`routing.precision.PRECISIONS`) only at peers that are as precise as
        that; with `adapter` ("NAME", or "NAME@DIGEST") only at peers that host that adapter, which compute as if it
        were in them, and no gradients. `dtype` and `device` are those of the ends. A model in the `background` gives
        way to everybody who waits for an answer, as befits long evaluations. Models with the same `prefix_secret` (16
        to 64 bytes; by default one of their own), also of different users, may begin with what peers hold of each
        other's prompts, at peers that `--share-prefixes`. Where a peer is lost, what it held is computed again
        elsewhere, within about a second; with `resilience="standby"` a second peer for each hop holds it already, as
        far as the swarm has any to spare: twice the cache and the computation, and this client sends everything twice.
        The parameters are frozen; gradients of what is put in front of the layers (prompts) and behind them flow as
        locally, and `training` says how they travel. Raises SwarmError.
        """
        return _enter(
            cls,
            None,
            model,
            initial_peers=initial_peers,
            invite=invite,
            network=network,
            dtype=dtype,
            device=device,
            cache=cache,
            token=token,
            progress=progress,
            remote=remote,
            background=background,
            min_precision=min_precision,
            adapter=adapter,
            prefix_secret=prefix_secret,
            resilience=resilience,
            training=training,
        )


class SwarmModelForSequenceClassification(SwarmModel):
    """A classifier of whole sequences: the layers of a causal language model at peers, and a head at the client.

    It takes what the last token of each row says, wherever the row's padding is.
    """

    @classmethod
    def from_pretrained(cls, model: str | Checkpoint, *, num_labels: int = 2, **options: Any) -> Any:
        """As `SwarmModelForCausalLM.from_pretrained`; the head is random, and trainable. Raises SwarmError."""
        return _enter(cls, functools.partial(with_class_head, num_labels=num_labels), model, **options)


def _enter(
    kind: type[SwarmModel],
    adapt: Adapt | None,
    model: str | Checkpoint,
    *,
    initial_peers: Sequence[str] = (),
    invite: str | None = None,
    network: str = DEFAULT_NETWORK,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    remote: Remote | None = None,
    background: bool = False,
    min_precision: str | None = None,
    adapter: str | None = None,
    prefix_secret: bytes | None = None,
    resilience: Resilience = "replay",
    training: TrainingConfig | None = None,
) -> Any:
    own_dtype = _dtype(dtype)
    if min_precision is not None:
        check_precision(min_precision)
    check_resilience(resilience)
    if prefix_secret is not None and not 16 <= len(prefix_secret) <= 64:
        raise CallerError(
            f"a prefix secret has 16 to 64 bytes, not {len(prefix_secret)}",
            hint="make one with secrets.token_bytes(32), and give it only to those who may share prompts",
        )
    connect: Callable[[RemoteModel, Embed], Remote]
    if remote is None:
        require_platform()
        entrance = Entrance.of(initial_peers=initial_peers, invite=invite, network=network)
        connect = functools.partial(
            driver.connect,
            entrance,
            prefix_secret=prefix_secret,
            urgency=Urgency.BACKGROUND if background else Urgency.INTERACTIVE,
            resilience=resilience,
            training=training,
        )
    else:
        connect = functools.partial(_given, remote)
    if isinstance(model, str):
        model = resolve(model, cache=cache, token=token, progress=progress, accept=check_folder)
    return load_model(
        model,
        dtype=own_dtype,
        device=device,
        connect=connect,
        progress=progress,
        min_precision=min_precision,
        adapter=adapter,
        kind=kind,
        adapt=adapt,
    )


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str,
    connect: Callable[[RemoteModel, Embed], Remote],
    progress: Progress | None = None,
    min_precision: str | None = None,
    adapter: str | None = None,
    kind: type[SwarmModel] = SwarmModelForCausalLM,
    adapt: Adapt | None = None,
) -> Any:
    """A model of `kind` of `checkpoint`, changed by `adapt`, whose layers run at what `connect` returns; closing the
    model closes that.

    Raises what `load_client` and `connect` raise.
    """
    model: Any = load_client(checkpoint, dtype=dtype, device=device, progress=progress)
    model.eval().requires_grad_(False)  # without gradients to ask for, a plain forward needs no torch.no_grad()
    if (pool := pool_for(model.device, torch.get_num_threads())) is not None:
        accelerate(model, pool, rows=HEAD_ROWS)  # of all linear layers only the head is here
    if adapt is not None:
        model = adapt(model)
    layers = RemoteLayers(model)
    layers.hosted = adapter
    layers.pools_last = kind is SwarmModelForSequenceClassification
    model.__class__ = _swarm_class(model.__class__, cast(Any, kind))
    model._remote_layers = layers
    layers.remote = connect(
        RemoteModel(
            model=checkpoint.model_id,
            num_blocks=layers.num_blocks,
            hidden_size=layers.embed(torch.zeros(1, dtype=torch.long), 0).shape[-1],
            regime_key=layers.regime.key,
            min_precision=min_precision,
            adapter=adapter,
        ),
        layers.embed,
    )
    share_head(model, layers.remote.callers)
    return model


def _given(remote: Remote, model: RemoteModel, embed: Embed) -> Remote:
    return remote


@functools.cache
def _swarm_class(own: Any, kind: Any) -> Any:
    parameters = tuple(inspect.signature(own.forward).parameters)

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(parameters[1:], args, strict=False))
        labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
        if kind is SwarmModelForCausalLM and labels is not None and mask is not None and mask.ndim == 2:
            predicted_from_padding_BT = F.pad(mask[:, -labels.shape[1] : -1] == 0, (1, 0))
            kwargs["labels"] = labels.masked_fill(predicted_from_padding_BT, IGNORED_LABEL)
        with asked_of_model(kwargs):
            return own.forward(self, **kwargs)

    # The same name in the same place: pipelines and transformers' own registries look classes up by it.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (kind, own), {"forward": forward, **names})


def _dtype(name: torch.dtype | str) -> torch.dtype | Literal["auto"]:
    if name == "auto":
        return "auto"
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CallerError(f"{name!r} is no floating-point dtype", hint="auto, float32, bfloat16 or float16")
    return found

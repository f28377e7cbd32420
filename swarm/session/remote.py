"""What a model may ask of the network: sequences at remote layers, and steps through them.

Owns the protocol between `swarm.models` and the driver, nothing else; a whole local model behind it serves as well
(see the tests). Knows no route, peer or retry.

Tensor names: T new positions of one sequence, D the model's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import msgspec
from torch import Tensor

from peers.model.adapters import Adapter, Dropout
from peers.wire.messages import Jumps
from routing.errors import CallerError
from routing.routes import Route
from swarm.session.callers import Callers

Resilience = Literal["replay", "standby"]
"""How a session outlives a peer: what that held is computed again elsewhere, or another peer holds it already."""


def check_resilience(resilience: str) -> None:
    """Raises CallerError."""
    if resilience not in get_args(Resilience):
        raise CallerError(f"{resilience!r} is no resilience", hint=f"one of {', '.join(get_args(Resilience))}")


class RemoteSession:
    """One sequence at all hops of a route; made by `Remote.open` and opaque to models."""

    __slots__ = ("__weakref__", "length")

    def __init__(self, length: int = 0) -> None:
        self.length = length
        """Positions held. A step that starts below it truncates first."""


class RowStep(msgspec.Struct, frozen=True, kw_only=True):
    """New positions of one sequence: `hidden_TD` enters block 0 at positions `start, start + 1, …` of the session."""

    session: RemoteSession
    start: int
    hidden_TD: Tensor
    token_ids_T: Tensor | None
    """What `embed` needs to make `hidden_TD` again after a failure; None when ids alone would not reproduce it."""
    position_offset: int
    """The first new token's position id minus `start`, constant for a session; only the embedding sees position ids."""
    want_from: int
    """Outputs are wanted from this offset within the step on; T means none."""
    regime_length: int
    """Highest position id of the whole forward plus one, which some rotary embeddings choose their frequencies by."""
    expects: int = 0
    """Positions that the session may come to hold, where anybody knows: peers with room for them are preferred."""

    def __post_init__(self) -> None:
        count = self.hidden_TD.shape[0]
        assert self.start >= 0
        assert 0 <= self.want_from <= count
        assert self.token_ids_T is None or self.token_ids_T.shape[0] == count


class Embed(Protocol):
    """Makes a session's inputs again from its tokens; callable from any thread."""

    def __call__(self, token_ids_T: Tensor, first_position: int) -> Tensor:
        """`[T, D]` on the client's device, for tokens at position ids `first_position, first_position + 1, …`."""
        ...


class Gradients(Protocol):
    """Remote layers as a function of whole sequences, and its gradient. From any thread; blocks until it is done."""

    def forward(
        self,
        input_TH: Tensor,
        lengths: Sequence[int],
        *,
        regime_length: int,
        keep: bool,
        jumps: Jumps = (),
        adapter: Adapter | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, object]:
        """What all blocks make of sequences of these lengths, packed in `[T, D]`, each from position 0 on but for its
        jumps; with `adapter`, what they would make of them if it were in them, with `dropout` of its inputs.

        With `keep` also what `backward` needs of it, which is freed with its last reference.
        """
        ...

    def backward(self, tape: Any, gradient_TH: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of the input and of the adapter's values, from that of the output."""
        ...


class Remote(Protocol):
    """The remote layers. Every method may be called from any thread, `release` from a garbage collector too."""

    def open(
        self,
        parent: RemoteSession | None = None,
        position: int = 0,
        *,
        resilience: Resilience | None = None,
        adapter: Adapter | None = None,
    ) -> RemoteSession:
        """A new sequence, empty or sharing the first `position` positions of `parent`. Instant, without I/O.

        `resilience` None: as its parent, or as this remote was set up. With `adapter`, which a fork has of its parent,
        the layers compute in all of its steps as if it were in them. Raises CallerError for one that is not finite.

        The fork happens with the child's first step, which starts at `position`; until that step has returned, the
        caller neither releases the parent nor lets it truncate below `position`. The parent may grow in the same `run`.
        """
        ...

    def run(self, steps: Sequence[RowStep]) -> list[Tensor]:
        """Run the steps, of distinct sessions, and block until all outputs are there.

        The i-th result is `[T − want_from, D]` in the dtype and on the device of its input. When `run` raises, or is
        interrupted, no step is known to have happened: the caller may repeat it, start lower, or release.
        """
        ...

    def release(self, sessions: Sequence[RemoteSession]) -> None:
        """Forget sequences and free their pages. Instant and idempotent; never raises, also after `close`."""
        ...

    @property
    def callers(self) -> Callers | None:
        """Those who ask, where it pays that they meet; else None."""
        ...

    @property
    def training(self) -> Gradients | None:
        """Gradients through the layers; None where there are none."""
        ...

    @property
    def route(self) -> Route | None:
        """The peers that ran the last steps; None before the first one, or where there are no peers."""
        ...

    def close(self) -> None:
        """Release everything and end the connection. Idempotent."""
        ...

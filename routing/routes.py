"""What a route is, and what is asked for when one is planned."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from routing.ids import BlockSpan, ModelId, PeerId
from routing.records import HostedAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """The part of a route that one peer serves."""

    peer_id: PeerId
    span: BlockSpan
    addresses: tuple[str, ...]
    dtype: str = ""
    quantization: str = ""
    """In which the peer computes, as it says; like `addresses`, of the moment when the route was planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Hops that cover every block once and in order; a peer may serve several of them."""

    hops: tuple[Hop, ...]
    cost_s: float
    """What one step is expected to take from the first frame out to the last answer back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A route whose hops hold the first positions of what is to be sent: over all of it they need not be sent."""

    hops: tuple[Hop, ...]
    saves: float
    """Positions per step, of `RouteRequest.tokens`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """What a session wants to do."""

    model: ModelId
    num_blocks: int
    """From the client's own configuration: peers that claim another number are ignored."""
    avoid: frozenset[PeerId] = frozenset()
    tokens: int = 1
    """Positions per step."""
    back_tokens: int | None = None
    """And of these, so many come back from the last hop; None: all."""
    bytes_per_token: int
    """Of hidden state on the wire."""
    cache_tokens: int = 0
    """KV positions that the session needs at every hop now."""
    expected_tokens: int = 0
    """And may come to need: peers without room for so many are entered only where nobody has it."""
    protocol: int | None = None
    """The version that the asking node speaks; peers of another one cannot be understood."""
    min_precision: str | None = None
    """Peers that compute less precisely than this, one of `routing.precision.PRECISIONS`, are not entered."""
    adapter: HostedAdapter | None = None
    """Only peers that host it are entered."""
    previous: Route | None = None
    """The route in use: kept unless another one is clearly better, and where it lost a hop, so are its other peers."""
    keep: tuple[Hop, ...] = ()
    """Hops that hold the session, in order: where peers that may be used can serve the blocks between them, these stay
    as they are, and the answer is the cheapest bridge."""
    kept: Kept | None = None
    """What an earlier session left behind; without `previous`."""
    spread: float | None = None
    """A number in [0, 1), another one for each session (see `flow.GOLDEN`): of peers that are about as good, it decides
    which, so that they are used in proportion to what the swarm's maximum flow gives them. The route is counted as
    taken. None: always the best."""
    session: Hashable | None = None
    """Whose route it is, until `Router.on_ended`: with it the sessions of this node share peers in proportion once a
    swarm is in demand, each new one going where the fewest are."""


def machines(hops: Sequence[Hop]) -> int:
    """How many of these peers have cores of their own, by their addresses: those of one host gain nothing by pieces so
    small that each has one, and products of 128 rows take a fifth more CPU than those of 512."""
    return len({frozenset(filter(None, map(_host, hop.addresses))) or hop.peer_id for hop in hops})


def _host(address: str) -> str:
    """Of a multiaddr; none behind a relay, whose host it names."""
    return "" if "/p2p-circuit" in address else "/".join(address.split("/")[1:3])

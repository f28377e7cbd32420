"""How well each model is covered: holders of every block, gaps, replication.

Owns the summary that people and dashboards read. Decides nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from routing.directory import Snapshot
from routing.ids import BlockSpan, ModelId, PeerId
from routing.path import gaps
from routing.records import Announcement, HostedAdapter, PeerState

_T = TypeVar("_T", int, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHealth:
    """One model at the moment of a snapshot."""

    model: ModelId
    model_name: str
    """As most peers call it; names are claims."""
    num_blocks: int
    peers: tuple[Announcement, ...]
    """Every live peer of the model, by spans and peer id, whatever its state."""
    holders: tuple[tuple[PeerId, ...], ...]
    """Per block, the ONLINE peers that serve it and say where they are."""
    gaps: tuple[BlockSpan, ...]
    """Blocks that nobody holds."""

    @property
    def replication(self) -> int:
        """Holders of the rarest block: how many well-chosen failures it takes to stop the model."""
        return min(map(len, self.holders))

    @property
    def healthy(self) -> bool:
        return not self.gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterHealth:
    """One adapter of a model that peers host for everybody."""

    adapter: HostedAdapter
    hosts: int
    """ONLINE peers that host it."""
    gaps: tuple[BlockSpan, ...]
    """Blocks that none of them serves: nobody can generate with it then."""


def coverage(snapshot: Snapshot, model: ModelId, *, num_blocks: int | None = None) -> ModelHealth | None:
    """The health of one model, or None when no peer announces it.

    Peers that disagree about the number of blocks are left out: `num_blocks` decides, or without it the majority.
    """
    announcements = snapshot.of_model(model)
    if num_blocks is None and announcements:
        num_blocks = _most_common(a.num_blocks for a in announcements)
    peers = sorted((a for a in announcements if a.num_blocks == num_blocks), key=lambda a: (a.spans, a.peer_id))
    if num_blocks is None or not peers:
        return None
    holders: list[list[PeerId]] = [[] for _ in range(num_blocks)]
    online = [a for a in peers if a.state is PeerState.ONLINE and a.addresses]
    for announcement in online:
        for block in chain.from_iterable(announcement.spans):
            holders[block].append(announcement.peer_id)
    return ModelHealth(
        model=model,
        model_name=_most_common(a.model_name for a in peers),
        num_blocks=num_blocks,
        peers=tuple(peers),
        holders=tuple(map(tuple, holders)),
        gaps=gaps(chain.from_iterable(a.spans for a in online), num_blocks),
    )


def models(snapshot: Snapshot) -> tuple[ModelHealth, ...]:
    """The health of every model that somebody announces, by name and id."""
    found = [health for model in snapshot.by_model if (health := coverage(snapshot, model)) is not None]
    return tuple(sorted(found, key=lambda health: (health.model_name, health.model)))


def adapters(health: ModelHealth, *, most: int | None = None) -> tuple[AdapterHealth, ...]:
    """Those that peers of a model announce, by name and digest; of more than `most`, those with most hosts."""
    hosts: dict[HostedAdapter, list[Announcement]] = {}
    for peer in health.peers:
        for adapter in {*peer.adapters}:
            serving = hosts.setdefault(adapter, [])
            if peer.state is PeerState.ONLINE and peer.addresses:
                serving.append(peer)
    shown = sorted(hosts, key=lambda adapter: (-len(hosts[adapter]), adapter))[:most]
    return tuple(
        AdapterHealth(
            adapter=adapter,
            hosts=len(hosts[adapter]),
            gaps=gaps(chain.from_iterable(peer.spans for peer in hosts[adapter]), health.num_blocks),
        )
        for adapter in sorted(shown)
    )


def _most_common(values: Iterable[_T]) -> _T:
    counts = Counter(values)
    return max(sorted(counts), key=counts.__getitem__)

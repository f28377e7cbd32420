"""What all plans share while nobody's record changes: who may serve, and what they say.

Owns what follows from announcements alone. Knows no measurement, no failure and no session of this node: of peers about
which a node knows more than they say, the router decides for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Final

import numpy as np

from routing.directory import Snapshot
from routing.ids import BlockSpan, ModelId, PeerId
from routing.precision import is_at_least
from routing.records import Announcement, PeerState
from routing.routes import RouteRequest
from routing.strangers import Columns

MAX_CROWDS: Final = 8
"""Kinds of requests for which peers are sorted beforehand."""


class Crowd:
    """The peers of one model that a node can use at all, at one snapshot. Never changes but for what it remembers."""

    def __init__(
        self,
        announcements: Iterable[Announcement],
        num_blocks: int,
        protocol: int | None,
        min_precision: str | None,
        adapter: bytes | None = None,
    ) -> None:
        """Left out are peers of another number of blocks or another protocol, not online, without an address or the
        adapter of that digest, or less precise. `announcements` are of one model; None: any protocol, any precision,
        with any adapters."""
        online = PeerState.ONLINE
        self.able: Sequence[Announcement] = [
            a
            for a in announcements
            if a.num_blocks == num_blocks
            and a.state is online
            and a.addresses
            and (protocol is None or a.protocol == protocol)
            and (min_precision is None or is_at_least(a.dtype, a.quantization, min_precision))
            and (adapter is None or a.hosts(adapter))
        ]
        self.by_peer: dict[PeerId, Announcement] = {a.peer_id: a for a in self.able}

    @cached_property
    def columns(self) -> Columns:
        return Columns(self.able)

    def holders(self, span: BlockSpan, first: int) -> Iterator[Announcement]:
        """Everybody who holds these blocks, in the order of `able` from its place `first` on, and around."""
        columns = self.columns
        places = np.sort(columns.at[(columns.starts <= span.start) & (span.end <= columns.ends)])
        begin = int(np.searchsorted(places, first))
        return (self.able[at] for at in np.roll(places, -begin))


class Crowds:
    """Those of the snapshot that was looked at last, one for each kind of request."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None
        self._by_kind: dict[tuple[ModelId, int, int | None, str | None, bytes | None], Crowd] = {}

    def of(self, snapshot: Snapshot, request: RouteRequest) -> Crowd:
        if self._snapshot is not snapshot or len(self._by_kind) >= MAX_CROWDS:
            self._snapshot, self._by_kind = snapshot, {}
        adapter = None if request.adapter is None else request.adapter.digest
        kind = (request.model, request.num_blocks, request.protocol, request.min_precision, adapter)
        if (crowd := self._by_kind.get(kind)) is None:
            announcements = snapshot.of_model(request.model)
            crowd = Crowd(announcements, request.num_blocks, request.protocol, request.min_precision, adapter)
            self._by_kind[kind] = crowd
        return crowd

"""Adapters on their way to peers: each is sent over a link once, whoever needs it there.

Owns what each link's peer was sent. A peer may have dropped it since, and says so when it is asked to use it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from peers.errors import StreamClosed
from peers.model.adapters import Adapter, as_rows
from peers.transport.links import Link, Links
from peers.wire import parts
from peers.wire.messages import Adapter as AdapterMessage
from routing.ids import BlockSpan, ModelId

MAX_REMEMBERED = 64
"""For each link."""


class Uploads:
    """Of one client, for one model. Used in the network's loop."""

    def __init__(self, links: Links, model: ModelId) -> None:
        self.bytes_sent = 0
        self._model = model
        self._sent: dict[Link, OrderedDict[bytes, None]] = {}
        self._sending: dict[Link, asyncio.Lock] = {}
        links.on_lost(self._lost)

    async def send(
        self, link: Link, adapter: Adapter, span: BlockSpan, told: Callable[[], object] = lambda: None
    ) -> None:
        """An adapter of blocks `span`, unless the peer has it. What names it is to follow in the same lane, the bulk
        one. `told` is called after each part. Raises what `Link.send` raises."""
        if link.closed:  # nobody will say once more that it is lost
            raise StreamClosed(f"the link with {link.remote} is closed")
        known = self._sent.setdefault(link, OrderedDict())
        async with self._sending.setdefault(link, asyncio.Lock()):
            if adapter.name in known:
                return
            for first, count, payload in parts.cut(as_rows(adapter.values), "float32"):
                message = AdapterMessage(
                    adapter=adapter.name,
                    model=self._model.digest,
                    start=span.start,
                    end=span.end,
                    targets=adapter.targets,
                    first=first,
                    count=count,
                )
                await link.send(message, payload, bulk=True)
                self.bytes_sent += len(payload)
                told()
            known[adapter.name] = None
            while len(known) > MAX_REMEMBERED:
                known.popitem(last=False)

    def forget(self, link: Link) -> None:
        """Its peer may have dropped what it was sent."""
        self._sent.pop(link, None)

    def _lost(self, link: Link) -> None:
        self._sent.pop(link, None)
        self._sending.pop(link, None)

"""What every transport promises: authenticated peers, ordered frames, and nothing more.

Owns the two protocols and the bounds that all implementations share. Knows no message format (`peers.wire`), no
sharing of streams among sessions (`peers.transport.links`) and no implementation: `memory` and `hivemind_p2p` pass one
conformance suite.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol, TypeAlias

from routing.errors import CallerError
from routing.ids import PeerId

MAX_FRAME_BYTES: Final = 32 * 1024 * 1024
"""512 positions of hidden size 16,384 in bfloat16 take 16 MiB: a prefill chunk of any model known today fits."""

MAX_STREAMS_PER_PEER: Final = 32
"""Streams that one remote peer may hold open towards us. Links need a handful; each costs two descriptors and, at
worst, one frame in memory. One more is closed at once."""

Buffer = bytes | bytearray | memoryview
Rest: TypeAlias = Callable[[], Awaitable[None]]
"""What is left to be done, and waited for."""


class Stream(Protocol):
    """Two-way and ordered; frames arrive whole or not at all."""

    @property
    def remote(self) -> PeerId:
        """Who is at the other end: proven by the transport's handshake, not claimed."""
        ...

    async def send(self, *parts: Buffer) -> None:
        """Send one frame, the parts joined. Waits while the other side is slow; several tasks may send at once.

        The parts must stay unchanged until it returns. When cancelled, the frame is sent whole or not at all. Raises
        StreamClosed, and CallerError above MAX_FRAME_BYTES.
        """
        ...

    @property
    def ready(self) -> bool:
        """Whether a frame can be sent without waiting: neither while the other side is slow nor after the end."""
        ...

    def send_now(self, *parts: Buffer) -> None:
        """As `send`, while it is `ready`. Raises CallerError above MAX_FRAME_BYTES."""
        ...

    async def receive(self) -> bytearray | bytes:
        """The next frame, the caller's own. One task at a time may wait here.

        Raises StreamClosed at the end of the stream (once all frames that arrived were taken), and ProtocolError when
        the other side announces a frame above MAX_FRAME_BYTES, before anything of it is stored.
        """
        ...

    async def each(self, handle: Callable[[bytearray | bytes], Rest | None]) -> None:
        """Call `handle` for every frame, in order, and do what it leaves to be done before the next one.

        A frame before which nothing is waited for is handled where it arrives, without a task in between. Never
        returns; raises as `receive`, and what doing the rest raises.
        """
        ...

    async def close(self) -> None:
        """End the stream; what was sent before is still delivered as long as the other side reads. Idempotent."""
        ...


Handler = Callable[[Stream], Awaitable[None]]
"""Runs one incoming stream, which is closed when it returns. Cancelled when the transport closes."""


class Transport(Protocol):
    """One node's way to reach others by peer id."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Dialable multiaddrs, each ending in `/p2p/<peer_id>`; empty for a node that only dials. May change."""
        ...

    async def open_stream(self, peer: PeerId, addresses: Sequence[str], protocol: str, *, timeout_s: float) -> Stream:
        """Open a stream to `peer`, dialling `addresses` where there is no connection yet.

        Raises PeerUnreachable when this does not succeed in time or the peer does not serve `protocol`, and
        InvalidAddress for an address that is not this peer's.
        """
        ...

    async def serve(self, protocol: str, handler: Handler) -> None:
        """Run `handler` for each stream that others open under `protocol`. Raises CallerError when it is taken."""
        ...

    async def observed_addresses(self, peer: PeerId) -> tuple[str, ...]:
        """The remote ends of the live connections with `peer`, as multiaddrs; empty when there are none."""
        ...

    async def close(self) -> None:
        """End every stream and cancel every handler. Idempotent."""
        ...


def frame_bytes(parts: Sequence[Buffer]) -> int:
    """Bytes of the joined parts. Raises CallerError above MAX_FRAME_BYTES."""
    size = 0
    for part in parts:
        size += part.nbytes if isinstance(part, memoryview) else len(part)
    if size > MAX_FRAME_BYTES:
        raise CallerError(f"a frame of {size} bytes passes the limit of {MAX_FRAME_BYTES}", hint="send it in parts")
    return size

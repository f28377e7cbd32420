"""One step of training at one peer, from the question to an answer that can be believed.

Owns what is asked and not yet answered, sums of an adapter's gradients that peers owe, and how long an answer may take.
Stays out: who is asked, and what follows from a failure (`swarm.session.training`).
"""

from __future__ import annotations

import asyncio
import secrets
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from peers.errors import Busy, Paused, PeerUnreachable, ProtocolError, Refused
from peers.model.adapters import WIDTH, Adapter, Dropout, num_rows, of_rows
from peers.transport.links import Link
from peers.wire import parts, tensors
from peers.wire.messages import AdapterGradient, AdapterTarget, Code, Jumps, Train, Trained, Untrained
from routing.errors import PeerError
from routing.ids import BlockSpan, PeerId
from routing.routes import Hop
from swarm.network import ClientNode
from swarm.session.live import RemoteModel
from swarm.session.uploads import Uploads

LOOK_S = 2.0
"""While an answer is awaited, its peer is pinged so often."""
PING_TIMEOUT_S = 4.0
"""A peer that does not answer that is given up. However long steps take, its loop answers while they are computed; and
however short they are, that does not say how long a ping waits behind an adapter on a slow line."""
FIRST_PATIENCE_S = 120.0
"""For an answer, before any was heard; afterwards `PATIENCE` times as long as it should take, but not less than
`LEAST_PATIENCE_S`."""
PATIENCE = 20.0
LEAST_PATIENCE_S = 30.0

T = TypeVar("T")


@dataclass(slots=True)
class TrainingTraffic:
    """What was sent and heard; read by benchmarks and tests."""

    forwards: int = 0
    """Steps that were answered, each of a micro-batch at one hop."""
    backwards: int = 0
    resent: int = 0
    """Backwards for which the peer kept nothing."""
    rerouted: int = 0
    """Steps that went to others than planned."""
    bytes_sent: int = 0
    bytes_received: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """By code, `lost` for peers that failed."""


@dataclass(slots=True, eq=False)
class Stretch:
    """A micro-batch at one hop: what went in, and where."""

    hop: Hop
    span: BlockSpan
    work: bytes
    input_TH: torch.Tensor


@dataclass(slots=True, eq=False)
class MicroBatch:
    lengths: tuple[int, ...]
    regime_length: int
    adapter: Adapter | None
    dropout: Dropout | None
    sequence: int
    """Which one of the batch its first is."""
    jumps: Jumps
    stretches: list[Stretch] = field(default_factory=list)
    accusers: set[PeerId] = field(default_factory=set)
    """Peers that say that what they were sent of it is malformed."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(slots=True, eq=False)
class _Asked:
    """A step that waits for its answer."""

    link: Link
    gathering: parts.Gathering
    answer: asyncio.Future[torch.Tensor]


@dataclass(slots=True, eq=False)
class Owed:
    """A backward that was answered, but for the adapter's gradient."""

    batch: MicroBatch
    stretch: Stretch
    gradient_TH: torch.Tensor
    collect: bool
    """A sum ends with it."""
    limit: float
    """No believable gradient of the adapter is longer."""


@dataclass(slots=True, eq=False)
class Sum:
    """The adapter's gradient within some blocks, which one peer adds up over the micro-batches of a pass."""

    hop: Hop
    targets: tuple[AdapterTarget, ...]
    place: tuple[int, int]
    """Where they lie in the whole adapter."""
    id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    unasked: int = 0
    """Backwards of the pass that are still to be asked for there."""
    asked: int = 0
    owed: dict[bytes, Owed] = field(default_factory=dict)
    """By work."""
    gathering: parts.Gathering | None = None
    came: list[tuple[tuple[bytes, ...], torch.Tensor]] = field(default_factory=list)
    """Sums of these works."""
    error: PeerError | None = None
    """Why nothing more will come."""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def completed(self) -> None:
        """Returns when all has come that was to be collected. Raises PeerError."""
        while not {work for work, owed in self.owed.items() if owed.collect} <= {
            work for works, _ in self.came for work in works
        }:
            if self.error is not None:
                raise self.error
            self.news.clear()
            await self.news.wait()

    def end(self, error: PeerError) -> None:
        self.error = self.error or error
        self.news.set()


class Exchange:
    """With the peers of one model, for its one `TrainingRoute`. Used in the network's loop."""

    def __init__(self, client: ClientNode, model: RemoteModel, uploads: Uploads, *, max_growth: float) -> None:
        """`max_growth`: as in `TrainingConfig`."""
        self.traffic = TrainingTraffic()
        self.block_s: dict[PeerId, float] = {}
        """What an answer takes per position and block, lately."""
        self._client = client
        self._model = model
        self._uploads = uploads
        self._max_growth = max_growth
        self._asked: dict[tuple[bytes, bool], _Asked] = {}
        self._sums: dict[bytes, Sum] = {}
        """Of passes under way, by id."""
        self._sending = weakref.WeakKeyDictionary[Link, asyncio.Lock]()
        self._token_s = 0.0
        """What an answer takes per position, lately."""

    def install(self) -> None:
        """Receive the answers of peers."""
        links = self._client.links
        links.handle(Trained, self._trained)
        links.handle(AdapterGradient, self._adapter_gradient)
        links.handle(Untrained, self._untrained)
        links.on_lost(self._link_lost)

    def links(self) -> Iterator[Link]:
        """Over which an answer is awaited."""
        yield from (asked.link for asked in self._asked.values())

    def expect(self, sums: Iterable[Sum]) -> None:
        """What peers send of these is taken, until they are `done`."""
        self._sums |= {own.id: own for own in sums}

    def done(self, own: Sum) -> None:
        del self._sums[own.id]

    async def ask(
        self,
        batch: MicroBatch,
        stretch: Stretch,
        gradient_TH: torch.Tensor | None,
        *,
        keep: bool = False,
        again: bool = False,
        own: Sum | None = None,
        collect: bool = False,
    ) -> torch.Tensor:
        """The output, or with a gradient the input's, which is at most `max_growth` times as long. With `own`, the peer
        owes that of the adapter, as a part of the sum; with `collect` the sum ends here. Raises SwarmError."""
        peer, loop = stretch.hop, asyncio.get_running_loop()
        rows_TH = stretch.input_TH if gradient_TH is None else gradient_TH
        if again:
            rows_TH = torch.cat((stretch.input_TH, rows_TH))
        dtype, began_s = tensors.NAMES[rows_TH.dtype], loop.time()
        link = await self._client.links.to(peer.peer_id, peer.addresses)
        answer: asyncio.Future[torch.Tensor] = loop.create_future()
        key = (stretch.work, gradient_TH is not None)
        adapter = None if batch.adapter is None else batch.adapter.within(stretch.span)
        self._asked[key] = _Asked(link, parts.Gathering(batch.tokens, rows_TH.shape[1], dtype), answer)

        async def exchange() -> torch.Tensor:
            if adapter is not None:
                await self._uploads.send(link, adapter, stretch.span)
            # one after another: what is sent together shares a frame, and the first would come with the last
            async with self._sending.setdefault(link, asyncio.Lock()):
                for first, count, payload in parts.cut(rows_TH, dtype):
                    message = Train(
                        work=stretch.work,
                        model=self._model.model.digest,
                        start=stretch.span.start,
                        end=stretch.span.end,
                        lengths=batch.lengths,
                        jumps=batch.jumps,
                        regime_length=batch.regime_length,
                        backward=gradient_TH is not None,
                        again=again,
                        keep=keep,
                        adapter=None if adapter is None else adapter.name,
                        dropout=0.0 if batch.dropout is None else batch.dropout.share,
                        seed=0 if batch.dropout is None else batch.dropout.seed,
                        sequence=batch.sequence,
                        sum=None if own is None else own.id,
                        collect=collect,
                        first=first,
                        count=count,
                        dtype=dtype,
                        hidden=rows_TH.shape[1],
                    )
                    await link.send(message, payload, bulk=True)  # all in one lane, as order matters
                    self.traffic.bytes_sent += len(payload)
            return await answer

        exchanging = loop.create_task(exchange(), name=f"train at {peer.peer_id[-8:]}")
        try:
            result_TH = await self._watched(exchanging, peer, self._patience_s(batch.tokens))
        finally:
            del self._asked[key]
            exchanging.cancel()
            await asyncio.gather(exchanging, return_exceptions=True)
            if answer.done() and not answer.cancelled():
                answer.exception()  # of a link that ended while it was sent to: that has been raised already
        if gradient_TH is not None:
            limit = self._max_growth * _norm(gradient_TH)
            _believable(peer.peer_id, "input", result_TH, limit)
            if own is not None:
                limit *= max(1.0, _norm(stretch.input_TH))
                own.owed[stretch.work] = Owed(batch, stretch, gradient_TH, collect, limit)
        token_s = (loop.time() - began_s) / batch.tokens
        self._token_s += 0.3 * (token_s - self._token_s) if self._token_s else token_s
        block_s = token_s / len(stretch.span)
        known_s = self.block_s.get(peer.peer_id, block_s)
        self.block_s[peer.peer_id] = known_s + 0.3 * (block_s - known_s)
        self._client.router.on_success(peer.peer_id, self._client.discovery.now_s())
        return result_TH

    async def settle(self, own: Sum, added: torch.Tensor) -> None:
        """Add to the adapter's gradient what the peer summed up; what is owed afterwards will not come. Raises
        SwarmError."""
        waiting = asyncio.get_running_loop().create_task(own.completed(), name=f"sum of {own.hop.peer_id[-8:]}")
        try:
            tokens = sum(owed.batch.tokens for owed in own.owed.values())
            await self._watched(waiting, own.hop, self._patience_s(tokens))
            for works, rows in own.came:
                if all(work in own.owed for work in works):
                    limit = sum(own.owed[work].limit for work in works)
                    _believable(own.hop.peer_id, "adapter", rows, limit)
                    added[slice(*own.place)] += of_rows(own.targets, rows)
                    for work in works:
                        del own.owed[work]
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def _watched(self, exchanging: asyncio.Task[T], peer: Hop, patience_s: float) -> T:
        """Its result, as long as the peer shows signs of life and is not too late. Raises PeerUnreachable."""
        deadline_s = asyncio.get_running_loop().time() + patience_s
        while True:
            await asyncio.wait({exchanging}, timeout=LOOK_S)
            if exchanging.done():
                return exchanging.result()
            if asyncio.get_running_loop().time() > deadline_s:
                raise PeerUnreachable(f"{peer.peer_id} gave no answer within {patience_s:.0f} s")
            try:
                await self._client.links.ping(peer.peer_id, peer.addresses, timeout_s=PING_TIMEOUT_S)
            except PeerError:
                if not exchanging.done():
                    raise

    def _patience_s(self, tokens: int) -> float:
        if not self._token_s:
            return FIRST_PATIENCE_S
        return max(LEAST_PATIENCE_S, PATIENCE * self._token_s * tokens)

    # --- inside the loop: what peers send ---

    async def _trained(self, link: Link, message: Trained, payload: memoryview) -> None:
        asked = self._asked_of(link, message)
        if asked is None:
            return
        self.traffic.bytes_received += len(payload)
        try:
            if message.hidden != self._model.hidden_size:
                raise ProtocolError(f"rows of {message.hidden} instead of {self._model.hidden_size}")
            if asked.gathering.add(message.first, message.count, message.dtype, payload):
                asked.answer.set_result(asked.gathering.rows)
        except ProtocolError as error:
            asked.answer.set_exception(ProtocolError(f"{link.remote} sent {error}"))

    async def _adapter_gradient(self, link: Link, message: AdapterGradient, payload: memoryview) -> None:
        own = self._sums.get(message.sum)
        if own is None or own.hop.peer_id != link.remote or own.error is not None or len(own.came) >= own.asked:
            return
        self.traffic.bytes_received += len(payload)
        try:
            if message.first == 0:
                own.gathering = parts.Gathering(num_rows(own.targets), WIDTH, "float32")
            if own.gathering is not None and own.gathering.add(message.first, message.count, "float32", payload):
                own.came.append((message.works, own.gathering.rows))
                own.gathering = None
                own.news.set()
        except ProtocolError as error:
            own.end(ProtocolError(f"{link.remote} sent {error}"))

    async def _untrained(self, link: Link, message: Untrained, _: memoryview) -> None:
        asked = self._asked_of(link, message)
        if asked is None:
            return
        text = f"{link.remote}: {message.message}"
        match message.code:
            case Code.BUSY | Code.PREEMPTED:
                asked.answer.set_exception(Busy(text, retry_after_s=message.retry_after_s))
            case Code.PAUSED:
                asked.answer.set_exception(Paused(text, retry_after_s=message.retry_after_s))
            case _:
                asked.answer.set_exception(Refused(text, code=message.code))

    def _asked_of(self, link: Link, message: Trained | Untrained) -> _Asked | None:
        asked = self._asked.get((message.work, message.backward))
        return asked if asked is not None and asked.link is link and not asked.answer.done() else None

    def _link_lost(self, link: Link) -> None:
        for own in self._sums.values():
            if own.hop.peer_id == link.remote:
                own.end(PeerUnreachable(f"the connection to {link.remote} ended"))
        for asked in self._asked.values():
            if asked.link is link and not asked.answer.done():
                asked.answer.set_exception(PeerUnreachable(f"the connection to {link.remote} ended"))


def _believable(peer: PeerId, what: str, gradient: torch.Tensor, limit: float) -> None:
    """Raises ProtocolError for one that is longer than that."""
    if not _norm(gradient) <= limit:
        length = f"of length {_norm(gradient):.1e}, where {limit:.1e} is the most"
        raise ProtocolError(f"{peer} sent a gradient of the {what} {length}")


def _norm(rows: torch.Tensor) -> float:
    """L2, whatever the dtype's range."""
    return float(torch.linalg.vector_norm(rows, dtype=torch.float32))

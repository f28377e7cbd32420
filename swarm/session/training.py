"""Forward and backward of whole sequences through a route, for `torch.autograd` at the client.

Owns the client's side of training: micro-batches on their way, what a backward needs of their forward, and who takes
the place of a peer that fails. Knows neither models nor batches: packed rows go in, packed rows come out.

**Why through the client.** In generation each hop pushes to the next one, because a token's latency is everything and
the hops keep the session. In training nothing needs to be kept, and many micro-batches are on the way at once, so what
counts is throughput; and the input of every hop, which has passed through here, is all that is needed to ask somebody
else: the client is the journal. A hop is a pure function of what it is sent (forward: of the input; backward: of the
input and the gradient of the output), so any step may be repeated anywhere, without lost or doubled gradients. The
price is the client's own line, which carries every hop's rows; `dtype` halves that. Over a long line a step takes two
round trips for every hop more than over a short one, of one micro-batch's rows: so nothing else goes before rows.
Adapters leave for all hops when a forward begins, and their gradients, which each hop adds up over the micro-batches,
come once, behind its last rows.

    micro-batch 0   ─▶ hop 0 ─▶ hop 1 ─▶ hop 2 ─▶            ◀─ hop 2 ◀─ hop 1 ◀─ hop 0
    micro-batch 1        ─▶ hop 0 ─▶ hop 1 ─▶ hop 2 ─▶   ◀─ hop 2 ◀─ hop 1 ◀─ hop 0          IN_FLIGHT for each hop

What a peer does to a step, and what follows:

| it | the same step |
|---|---|
| says `busy` | waits as long as it asks; others are preferred meanwhile |
| says `forgotten` (backward) | is sent again to it, with the input |
| dies, is silent, fails, sends what is no answer (NaN, wrong shape) | goes to others; it is left alone for a while |
| owes an adapter's gradient that does not come, or comes with other steps' | goes to others once more, for that |
| refuses (`no_training`, `wrong_model`, …), pauses, leaves | goes to others, without blame |
| takes far longer than the others of its route | is waited for; the next batches go to others, where there are any |

Where others divide the blocks differently, a backward begins with the forward through them, from the kept input.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import weakref
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeVar

import torch

from peers.errors import Busy, Paused, PeerUnreachable, ProtocolError, Refused
from peers.model.adapters import WIDTH, Adapter, Dropout, num_rows, of_rows
from peers.transport.links import Link
from peers.transport.tasks import Tasks
from peers.wire import parts, tensors
from peers.wire.messages import (
    MAX_CLOSED_SESSIONS,
    MAX_SEQUENCES,
    MAX_SUMMED,
    PROTOCOL_VERSION,
    AdapterGradient,
    AdapterTarget,
    Code,
    Forget,
    Jumps,
    Train,
    Trained,
    Untrained,
)
from routing.errors import CallerError, NoRoute, PeerError, SwarmError, Unavailable
from routing.ids import BlockSpan, PeerId
from routing.router import Hop, Route, RouteRequest
from swarm.network import ClientNode, NetworkThread
from swarm.session.live import RemoteModel
from swarm.session.uploads import Uploads

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""While an answer is awaited, its peer is pinged so often."""
PING_TIMEOUT_S = 4.0
AVOID_S = 60.0
"""A peer that failed is asked again only after that, unless nobody else can be."""
REFUSED_S = 600.0
"""Likewise one that does not train."""
FIRST_PATIENCE_S = 120.0
"""For an answer, before any was heard; afterwards `PATIENCE` times as long as it should take, but not less than
`LEAST_PATIENCE_S`."""
PATIENCE = 20.0
LEAST_PATIENCE_S = 30.0
SLOW = 4.0
"""A peer that takes so many times as long for a block as the others is left, where somebody else serves its blocks."""
REVIEW_S = 10.0
"""Between two looks at that."""
NO_ROUTE_PAUSE_S = 0.5
RETRY_S = 0.05
MICRO_BATCH_TOKENS_MIN = 64
"""A batch is not cut into smaller ones for the sake of hops that would wait."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How batches travel. Raises ValueError."""

    micro_batch_tokens: int = 256
    """Positions of one micro-batch, at most; a longer sequence is one of its own."""
    in_flight: int = 3
    """Micro-batches on the way for each hop of a route, at most: memory at peers, and work while others travel."""
    dtype: str | None = None
    """Of activations and gradients on the wire; None: the client's own."""
    patience_s: float = 120.0
    """A step for which nobody is found for so long fails, and with it the whole pass."""
    max_growth: float = 1e6
    """A peer is not believed whose blocks make a gradient more than so many times as long (L2) as the one it was sent;
    of an adapter's gradient, times the length of the input too."""

    def __post_init__(self) -> None:
        if self.micro_batch_tokens < 1 or self.in_flight < 1 or self.patience_s <= 0 or self.max_growth <= 0:
            raise ValueError("micro_batch_tokens and in_flight are at least 1, patience_s and max_growth are positive")
        if self.dtype is not None and self.dtype not in tensors.DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; one of {', '.join(tensors.DTYPES)}")


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
class _Stretch:
    """A micro-batch at one hop: what went in, and where."""

    hop: Hop
    span: BlockSpan
    work: bytes
    input_TH: torch.Tensor


@dataclass(slots=True, eq=False)
class _MicroBatch:
    lengths: tuple[int, ...]
    regime_length: int
    adapter: Adapter | None
    dropout: Dropout | None
    sequence: int
    """Which one of the batch its first is."""
    jumps: Jumps
    stretches: list[_Stretch] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Tape:
    """What a backward needs of a forward; peers forget it with the last reference."""

    batches: list[_MicroBatch]
    adapter: Adapter | None


@dataclass(slots=True, eq=False)
class _Asked:
    """A step that waits for its answer."""

    link: Link
    gathering: parts.Gathering
    answer: asyncio.Future[torch.Tensor]


@dataclass(slots=True, eq=False)
class _Owed:
    """A backward that was answered, but for the adapter's gradient."""

    batch: _MicroBatch
    stretch: _Stretch
    gradient_TH: torch.Tensor
    collect: bool
    """A sum ends with it."""
    limit: float
    """No believable gradient of the adapter is longer."""


@dataclass(slots=True, eq=False)
class _Sum:
    """The adapter's gradient within some blocks, which one peer adds up over the micro-batches of a pass."""

    hop: Hop
    targets: tuple[AdapterTarget, ...]
    place: tuple[int, int]
    """Where they lie in the whole adapter."""
    id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    unasked: int = 0
    """Backwards of the pass that are still to be asked for there."""
    asked: int = 0
    owed: dict[bytes, _Owed] = field(default_factory=dict)
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


class TrainingRoute:
    """Gradients through the blocks of one model. `forward`, `backward` and `forget` may be called from any thread."""

    def __init__(
        self, network: NetworkThread, model: RemoteModel, uploads: Uploads, config: TrainingConfig | None = None
    ) -> None:
        self.config = config or TrainingConfig()
        self.traffic = TrainingTraffic()
        self._uploads = uploads
        self._network = network
        self._client: ClientNode = network.client
        self._model = model
        self._route: Route | None = None
        self._planning = asyncio.Lock()
        self._tasks = Tasks()
        self._lost: dict[PeerId, float] = {}
        """Peers that failed or are slow, and until when they are avoided, by the loop's clock."""
        self._lost_at_s = -math.inf
        self._refused: dict[PeerId, float] = {}
        """Likewise those that do not train, or not this."""
        self._asked: dict[tuple[bytes, bool], _Asked] = {}
        self._sums: dict[bytes, _Sum] = {}
        """Of passes under way, by id."""
        self._sending = weakref.WeakKeyDictionary[Link, asyncio.Lock]()
        self._token_s = 0.0
        """What an answer takes per position, lately."""
        self._block_s: dict[PeerId, float] = {}
        """Likewise per position and block, of each peer of the route."""
        self._review_at_s = 0.0

    # --- any thread ---

    def forward(
        self,
        input_TH: torch.Tensor,
        lengths: Sequence[int],
        *,
        regime_length: int,
        keep: bool,
        jumps: Jumps = (),
        adapter: Adapter | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[torch.Tensor, Tape | None]:
        """What all blocks make of the packed sequences; with `keep`, and what a backward needs. Raises SwarmError."""
        if len(jumps) > MAX_SEQUENCES:
            raise CallerError(f"{len(jumps)} gaps in one batch", hint=f"batches with at most {MAX_SEQUENCES} travel")
        if adapter is not None and not tensors.finite(adapter.values):
            raise CallerError("the adapter's weights are not finite (NaN or infinity)", hint="lower the learning rate")
        rows_TH = self._on_the_wire(input_TH, "the values given to the model")
        output_TH, batches = self._network.call(
            self._forward(lengths, regime_length, rows_TH, keep, jumps, adapter, dropout)
        )
        tape = None
        if keep:
            tape = Tape(batches, adapter)
            weakref.finalize(tape, self._forget, batches).atexit = False  # then the links go anyway
        return output_TH.to(input_TH.device, input_TH.dtype), tape

    def backward(self, tape: Tape, gradient_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradients of the forward's input and of its adapter's values, from that of its output. May be called
        again. Raises SwarmError."""
        rows_TH = self._on_the_wire(gradient_TH, "the gradients of the loss")
        given_TH, added = self._network.call(self._backward(tape, rows_TH))
        return given_TH.to(gradient_TH.device, gradient_TH.dtype), added

    @property
    def route(self) -> Route | None:
        """The route that was planned last."""
        return self._route

    def _on_the_wire(self, rows_TH: torch.Tensor, what: str) -> torch.Tensor:
        dtype = tensors.DTYPES[self.config.dtype] if self.config.dtype else rows_TH.dtype
        if dtype not in tensors.NAMES:
            dtype = torch.float32
        rows_TH = rows_TH.detach().to("cpu", dtype)
        if not tensors.finite(rows_TH):
            raise CallerError(
                f"{what} are not finite (NaN or infinity) in {tensors.NAMES[dtype]}",
                hint="lower the learning rate, clip gradients, or send them in another dtype",
            )
        return rows_TH

    def _forget(self, batches: Sequence[_MicroBatch]) -> None:
        """Tell peers, soon, that nobody will ask for these any more."""
        works: dict[PeerId, list[bytes]] = {}
        for batch in batches:
            for stretch in batch.stretches:
                works.setdefault(stretch.hop.peer_id, []).append(stretch.work)
        if works and not self._network.closed:
            self._network.post(self._send_forget, works)

    def _send_forget(self, works: dict[PeerId, list[bytes]]) -> None:
        for peer, mine in works.items():
            for first in range(0, len(mine), MAX_CLOSED_SESSIONS):
                message = Forget(works=tuple(mine[first : first + MAX_CLOSED_SESSIONS]))
                self._tasks.spawn(self._tell(peer, message), name="forget")

    async def _tell(self, peer: PeerId, message: Forget) -> None:
        if (link := self._client.links.known(peer)) is not None:
            with contextlib.suppress(PeerError):  # what it keeps goes with the link
                await link.send(message)

    # --- inside the loop: batches ---

    def install(self) -> None:
        """Receive the answers of peers."""
        links = self._client.links
        links.handle(Trained, self._trained)
        links.handle(AdapterGradient, self._adapter_gradient)
        links.handle(Untrained, self._untrained)
        links.on_lost(self._link_lost)
        links.keep(self._needed_links)

    async def close(self) -> None:
        await self._tasks.close()

    async def _forward(
        self,
        lengths: Sequence[int],
        regime_length: int,
        rows_TH: torch.Tensor,
        keep: bool,
        jumps: Jumps,
        adapter: Adapter | None,
        dropout: Dropout | None,
    ) -> tuple[torch.Tensor, list[_MicroBatch]]:
        self._leave_slow()
        hops = (await self._planned()).hops
        if adapter is not None:
            for hop in hops:  # to all at once, while the first of them computes
                self._tasks.spawn(self._send_ahead(hop, adapter), name=f"adapter to {hop.peer_id[-8:]}")
        # so many that every machine has one, where there is enough to be worth it
        pieces = machines(hops) + 1
        tokens = min(self.config.micro_batch_tokens, max(MICRO_BATCH_TOKENS_MIN, len(rows_TH) // pieces))
        batches, sequence, row = list[_MicroBatch](), 0, 0
        for part in micro_batches(lengths, tokens):
            own = tuple((at - row, count) for at, count in jumps if row <= at < row + sum(part))
            batches.append(_MicroBatch(part, regime_length, adapter, dropout, sequence, own))
            sequence, row = sequence + len(part), row + sum(part)
        slots = asyncio.Semaphore(self.in_flight)

        async def one(batch: _MicroBatch, input_TH: torch.Tensor) -> torch.Tensor:
            async with slots:
                whole = BlockSpan(0, self._model.num_blocks)
                output_TH, stretches = await self._through(batch, whole, input_TH, keep)
                if keep:
                    batch.stretches = stretches
                return output_TH

        inputs = torch.split(rows_TH, [batch.tokens for batch in batches])
        outputs = await _all([one(batch, given) for batch, given in zip(batches, inputs, strict=True)])
        return torch.cat(outputs), batches

    async def _send_ahead(self, hop: Hop, adapter: Adapter) -> None:
        if (part := adapter.within(hop.span)) is not None:
            with contextlib.suppress(PeerError, Unavailable):  # the step that needs it there meets the same
                await self._uploads.send(await self._client.links.to(hop.peer_id, hop.addresses), part, hop.span)

    async def _backward(self, tape: Tape, rows_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        added = None if tape.adapter is None else torch.zeros_like(tape.adapter.values)
        gradients = torch.split(rows_TH, [batch.tokens for batch in tape.batches])
        works = [(batch, batch.stretches, given) for batch, given in zip(tape.batches, gradients, strict=True)]
        parts_TH = await self._back(works, added)
        self._forget(tape.batches)
        return torch.cat(parts_TH), added

    @property
    def in_flight(self) -> int:
        """Micro-batches on the way, at most."""
        return self.config.in_flight * (1 if self._route is None else len(self._route.hops))

    # --- inside the loop: one micro-batch ---

    async def _through(
        self, batch: _MicroBatch, blocks: BlockSpan, rows_TH: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, list[_Stretch]]:
        """Forward through `blocks`, by whomever."""
        at, stretches, trouble = blocks.start, list[_Stretch](), _Trouble(self.config.patience_s)
        while at < blocks.end:
            hop, span = await self._hop(at, blocks.end, trouble)
            stretch = _Stretch(hop, span, secrets.token_bytes(16), rows_TH)
            try:
                output_TH = await self._ask(batch, stretch, None, keep=keep)
            except SwarmError as error:
                await self._failed(hop, error, trouble)
                continue
            self.traffic.forwards += 1
            stretches.append(stretch)
            rows_TH, at = output_TH, span.end
            trouble = _Trouble(self.config.patience_s)
        return rows_TH, stretches

    async def _back(
        self, works: Sequence[tuple[_MicroBatch, Sequence[_Stretch], torch.Tensor]], added: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """The inputs' gradients; the adapter's is added to `added`, of each step exactly once.

        Each peer adds its own up and sends the sum behind its last answer, so that what the next hop waits for waits
        for nothing. A sum is taken whole, if it is of steps that it was answered for, or not at all: what is owed then
        is asked for again.
        """
        sums: dict[tuple[PeerId, BlockSpan], _Sum] = {}
        for batch, stretches, _ in works:
            for stretch in stretches:
                part = None if batch.adapter is None else batch.adapter.within(stretch.span)
                if part is not None and batch.adapter is not None:
                    own = _Sum(stretch.hop, part.targets, batch.adapter.place(stretch.span))
                    sums.setdefault((stretch.hop.peer_id, stretch.span), own).unasked += 1
        slots = asyncio.Semaphore(self.in_flight)

        async def one(batch: _MicroBatch, stretches: Sequence[_Stretch], gradient_TH: torch.Tensor) -> torch.Tensor:
            async with slots:
                for stretch in reversed(stretches):
                    own = sums.get((stretch.hop.peer_id, stretch.span))
                    gradient_TH = await self._back_one(batch, stretch, gradient_TH, own, added)
                return gradient_TH

        async def again(owed: _Owed) -> None:
            async with slots:
                await self._elsewhere(owed.batch, owed.stretch, owed.gradient_TH, added)

        self._sums |= {own.id: own for own in sums.values()}
        try:
            gradients = await _all([one(*work) for work in works])
            for own in sums.values():
                assert added is not None
                await self._settle(own, added)
                await _all([again(owed) for owed in own.owed.values()])
        finally:
            for own in sums.values():
                del self._sums[own.id]
                if own.owed:  # there may be a sum of it that nobody will ask for
                    self._send_forget({own.hop.peer_id: [own.id]})
        return gradients

    async def _back_one(
        self,
        batch: _MicroBatch,
        stretch: _Stretch,
        gradient_TH: torch.Tensor,
        own: _Sum | None,
        added: torch.Tensor | None,
    ) -> torch.Tensor:
        trouble, again, collect = _Trouble(self.config.patience_s), False, False
        if own is not None:
            own.unasked, own.asked = own.unasked - 1, own.asked + 1
            collect = own.asked % MAX_SUMMED == 0
        while True:
            collect = collect or (own is not None and not own.unasked)
            try:
                given_TH = await self._ask(batch, stretch, gradient_TH, again=again, own=own, collect=collect)
            except SwarmError as error:
                if isinstance(error, Refused) and error.code == Code.FORGOTTEN and not again:
                    self.traffic.resent += 1
                    again = True
                elif not await self._failed(stretch.hop, error, trouble):
                    return await self._elsewhere(batch, stretch, gradient_TH, added)
            else:
                self.traffic.backwards += 1
                return given_TH

    async def _elsewhere(
        self, batch: _MicroBatch, stretch: _Stretch, gradient_TH: torch.Tensor, added: torch.Tensor | None
    ) -> torch.Tensor:
        """By somebody else, or several: what goes in there is known, what passes between them is not."""
        self.traffic.rerouted += 1
        _, others = await self._through(batch, stretch.span, stretch.input_TH, keep=True)
        try:
            (given_TH,) = await self._back([(batch, others, gradient_TH)], added)
            return given_TH
        finally:
            self._forget([replace(batch, stretches=others)])

    async def _settle(self, own: _Sum, added: torch.Tensor) -> None:
        """Take what the peer summed up; what is owed afterwards will not come."""
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
        except SwarmError as error:
            await self._failed(own.hop, error, _Trouble(self.config.patience_s))
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    # --- inside the loop: peers ---

    async def _planned(self) -> Route:
        """The present route; planned anew where one of its peers is to be avoided. Raises NoRoute, Unavailable."""
        async with self._planning:
            now_s = asyncio.get_running_loop().time()
            for shunned in (self._lost, self._refused):
                for peer in [peer for peer, until_s in shunned.items() if until_s <= now_s]:
                    del shunned[peer]
            avoid = frozenset((*self._lost, *self._refused))
            if self._route is None or any(hop.peer_id in avoid for hop in self._route.hops):
                self._route = None
                self._route = await self._client.discovery.route(self._request(avoid))
                self._block_s.clear()
                self._review_at_s = now_s + REVIEW_S
            return self._route

    def _request(self, avoid: frozenset[PeerId]) -> RouteRequest:
        return RouteRequest(
            model=self._model.model,
            num_blocks=self._model.num_blocks,
            avoid=avoid,
            tokens=self.config.micro_batch_tokens,
            bytes_per_token=self._model.hidden_size * 4,
            protocol=PROTOCOL_VERSION,
            min_precision=self._model.min_precision,
        )

    def _leave_slow(self) -> None:
        """Avoid a peer that takes far longer than the others of the route, if there is a way without it."""
        now_s = asyncio.get_running_loop().time()
        if self._route is None or now_s < self._review_at_s:
            return
        self._review_at_s = now_s + REVIEW_S
        on_route = {hop.peer_id for hop in self._route.hops}
        paces = sorted((pace_s, peer) for peer, pace_s in self._block_s.items() if peer in on_route)
        if len(paces) < 2 or paces[-1][0] < SLOW * median(pace_s for pace_s, _ in paces[:-1]):
            return
        slowest = paces[-1][1]
        with contextlib.suppress(NoRoute):
            avoid = frozenset((*self._lost, *self._refused, slowest))
            self._client.router.plan(self._request(avoid), self._client.discovery.now_s())
            logger.info("training: %s has become slow", slowest)
            self._lost[slowest] = now_s + AVOID_S

    async def _hop(self, at: int, end: int, trouble: _Trouble) -> tuple[Hop, BlockSpan]:
        """Who runs block `at` next, and how many more up to `end`. Raises NoRoute when patience ends."""
        while True:
            try:
                route = await self._planned()
            except NoRoute as error:
                if asyncio.get_running_loop().time() - self._lost_at_s > self.config.patience_s:
                    raise trouble.last or error from None  # nobody was lost who could be back: all refuse
                trouble.check(error)
                self._lost.clear()  # those who failed may be back before anybody else comes
                await asyncio.sleep(NO_ROUTE_PAUSE_S)
            else:
                hop = next(hop for hop in route.hops if at in hop.span)
                return hop, BlockSpan(at, min(end, hop.span.end))

    async def _failed(self, hop: Hop, error: SwarmError, trouble: _Trouble) -> bool:
        """What follows from a step that had no answer; whether the same peer may be asked again at once."""
        router, now_s = self._client.router, self._client.discovery.now_s()
        loop_s = asyncio.get_running_loop().time()
        trouble.check(error)
        trouble.last = error
        if isinstance(error, CallerError | NoRoute) or (isinstance(error, Unavailable) and not isinstance(error, Busy)):
            raise error  # of this client
        logger.info("training: %s: %s", hop.peer_id, error)
        match error:
            case Paused():
                self.traffic.failures[Code.PAUSED] += 1
                router.on_paused(hop.peer_id)
            case Busy():
                self.traffic.failures[Code.BUSY] += 1
                router.on_busy(hop.peer_id, error.retry_after_s, now_s)
                await asyncio.sleep(max(error.retry_after_s, 0.05))
                return True
            case Refused() if error.code == Code.DRAINING:
                self.traffic.failures[error.code] += 1
                router.on_draining(hop.peer_id)
            case Refused() if error.code == Code.UNKNOWN_ADAPTER:  # dropped since: it is sent again
                self.traffic.failures[error.code] += 1
                if (link := self._client.links.known(hop.peer_id)) is not None:
                    self._uploads.forget(link)
                await asyncio.sleep(RETRY_S)
                return True
            case Refused() if error.code == Code.MALFORMED:  # what it was sent, it says; others would say the same
                raise error
            case Refused() if error.code != Code.INTERNAL:
                self.traffic.failures[error.code] += 1
                self._refused[hop.peer_id] = loop_s + REFUSED_S
                return False
            case _:
                self.traffic.failures["lost"] += 1
                if hop.peer_id not in self._lost:  # else several micro-batches were there
                    logger.warning("training goes on without peer %s: %s", hop.peer_id, error)
                    router.on_failure(hop.peer_id, now_s, str(error))
        self._lost[hop.peer_id], self._lost_at_s = loop_s + AVOID_S, loop_s
        return False

    async def _ask(
        self,
        batch: _MicroBatch,
        stretch: _Stretch,
        gradient_TH: torch.Tensor | None,
        *,
        keep: bool = False,
        again: bool = False,
        own: _Sum | None = None,
        collect: bool = False,
    ) -> torch.Tensor:
        """One step at one peer: the output, or with a gradient the input's. Raises SwarmError."""
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
            limit = self.config.max_growth * _norm(gradient_TH)
            _believable(peer.peer_id, "input", result_TH, limit)
            if own is not None:
                limit *= max(1.0, _norm(stretch.input_TH))
                own.owed[stretch.work] = _Owed(batch, stretch, gradient_TH, collect, limit)
        token_s = (loop.time() - began_s) / batch.tokens
        self._token_s += 0.3 * (token_s - self._token_s) if self._token_s else token_s
        block_s = token_s / len(stretch.span)
        known_s = self._block_s.get(peer.peer_id, block_s)
        self._block_s[peer.peer_id] = known_s + 0.3 * (block_s - known_s)
        self._client.router.on_success(peer.peer_id, self._client.discovery.now_s())
        return result_TH

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

    def _needed_links(self) -> Iterator[Link]:
        yield from (asked.link for asked in self._asked.values())
        for hop in () if self._route is None else self._route.hops:  # they keep what backwards will need
            if (link := self._client.links.known(hop.peer_id)) is not None:
                yield link


class _Trouble:
    """How long one step may go without headway."""

    def __init__(self, patience_s: float) -> None:
        self.last: SwarmError | None = None
        self._deadline_s = asyncio.get_running_loop().time() + patience_s

    def check(self, error: SwarmError) -> None:
        """Raises `error` when it is too late to try again."""
        if asyncio.get_running_loop().time() > self._deadline_s:
            raise error


def _believable(peer: PeerId, what: str, gradient: torch.Tensor, limit: float) -> None:
    """Raises ProtocolError for one that is longer than that."""
    if not _norm(gradient) <= limit:
        length = f"of length {_norm(gradient):.1e}, where {limit:.1e} is the most"
        raise ProtocolError(f"{peer} sent a gradient of the {what} {length}")


def _norm(rows: torch.Tensor) -> float:
    """L2, whatever the dtype's range."""
    return float(torch.linalg.vector_norm(rows, dtype=torch.float32))


def machines(hops: Sequence[Hop]) -> int:
    """How many of these peers have cores of their own, by their addresses: those of one host gain nothing by pieces so
    small that each has one, and products of 128 rows take a fifth more CPU than those of 512."""
    return len({frozenset(filter(None, map(_host, hop.addresses))) or hop.peer_id for hop in hops})


def _host(address: str) -> str:
    """Of a multiaddr; none behind a relay, whose host it names."""
    return "" if "/p2p-circuit" in address else "/".join(address.split("/")[1:3])


def micro_batches(lengths: Sequence[int], tokens: int) -> list[tuple[int, ...]]:
    """Consecutive sequences of at most `tokens` positions together; a longer one stands alone."""
    batches: list[list[int]] = []
    room = 0
    for length in lengths:
        if not batches or length > room or len(batches[-1]) == MAX_SEQUENCES:
            batches.append([])
            room = tokens
        batches[-1].append(length)
        room -= length
    return [tuple(batch) for batch in batches]


async def _all(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; when one fails or this is cancelled, nothing goes on."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

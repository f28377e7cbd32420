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
| refuses (`no_training`, …), pauses, leaves | goes to others, without blame |
| says `malformed` | goes to others, and is believed once another peer says the same, or where there is none |
| has other blocks by now (`wrong_model`) | goes where new records say; to it again once it announces anew |
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
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypeVar

import torch

from peers.errors import Busy, Paused, Refused
from peers.model.adapters import Adapter, Dropout
from peers.transport.links import Link
from peers.transport.tasks import Tasks
from peers.wire import tensors
from peers.wire.messages import (
    MAX_CLOSED_SESSIONS,
    MAX_SEQUENCES,
    MAX_SUMMED,
    PROTOCOL_VERSION,
    Code,
    Forget,
    Jumps,
)
from routing.errors import CallerError, NoRoute, PeerError, SwarmError, Unavailable
from routing.ids import BlockSpan, PeerId
from routing.routes import Hop, Route, RouteRequest, machines
from swarm.network import ClientNode, NetworkThread
from swarm.session.exchange import Exchange, MicroBatch, Owed, Stretch, Sum, TrainingTraffic
from swarm.session.live import RemoteModel
from swarm.session.uploads import Uploads

logger = logging.getLogger(__name__)

AVOID_S = 60.0
"""A peer that failed is asked again only after that, unless nobody else can be."""
REFUSED_S = 600.0
"""Likewise one that does not train."""
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


@dataclass(slots=True, eq=False, weakref_slot=True)
class Tape:
    """What a backward needs of a forward; peers forget it with the last reference."""

    batches: list[MicroBatch]
    adapter: Adapter | None


class TrainingRoute:
    """Gradients through the blocks of one model. `forward`, `backward` and `forget` may be called from any thread."""

    def __init__(
        self, network: NetworkThread, model: RemoteModel, uploads: Uploads, config: TrainingConfig | None = None
    ) -> None:
        self.config = config or TrainingConfig()
        self._uploads = uploads
        self._network = network
        self._client: ClientNode = network.client
        self._model = model
        self._exchange = Exchange(network.client, model, uploads, max_growth=self.config.max_growth)
        self._route: Route | None = None
        self._planning = asyncio.Lock()
        self._tasks = Tasks()
        self._lost: dict[PeerId, float] = {}
        """Peers that failed or are slow, and until when they are avoided, by the loop's clock."""
        self._lost_at_s = -math.inf
        self._refused: dict[PeerId, float] = {}
        """Likewise those that do not train, or not this."""
        self._stale: dict[PeerId, int] = {}
        """Peers that do not serve what they announced, and the sequence of that record: the next one may be true."""
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
    def traffic(self) -> TrainingTraffic:
        """What was sent and heard."""
        return self._exchange.traffic

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

    def _forget(self, batches: Sequence[MicroBatch]) -> None:
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
        self._exchange.install()
        self._client.links.keep(self._needed_links)

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
    ) -> tuple[torch.Tensor, list[MicroBatch]]:
        self._leave_slow()
        hops = (await self._planned()).hops
        if adapter is not None:
            for hop in hops:  # to all at once, while the first of them computes
                self._tasks.spawn(self._send_ahead(hop, adapter), name=f"adapter to {hop.peer_id[-8:]}")
        # so many that every machine has one, where there is enough to be worth it
        pieces = machines(hops) + 1
        tokens = min(self.config.micro_batch_tokens, max(MICRO_BATCH_TOKENS_MIN, len(rows_TH) // pieces))
        batches, sequence, row = list[MicroBatch](), 0, 0
        for part in micro_batches(lengths, tokens):
            own = tuple((at - row, count) for at, count in jumps if row <= at < row + sum(part))
            batches.append(MicroBatch(part, regime_length, adapter, dropout, sequence, own))
            sequence, row = sequence + len(part), row + sum(part)
        slots = asyncio.Semaphore(self.in_flight)

        async def one(batch: MicroBatch, input_TH: torch.Tensor) -> torch.Tensor:
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
        self,
        batch: MicroBatch,
        blocks: BlockSpan,
        rows_TH: torch.Tensor,
        keep: bool,
        last: SwarmError | None = None,
    ) -> tuple[torch.Tensor, list[Stretch]]:
        """Forward through `blocks`, by whomever; `last`: why it is done again."""
        at, stretches, trouble = blocks.start, list[Stretch](), self._trouble(batch, last)
        while at < blocks.end:
            hop, span = await self._hop(at, blocks.end, trouble)
            stretch = Stretch(hop, span, secrets.token_bytes(16), rows_TH)
            try:
                output_TH = await self._exchange.ask(batch, stretch, None, keep=keep)
            except SwarmError as error:
                await self._failed(hop, error, trouble)
                continue
            self.traffic.forwards += 1
            stretches.append(stretch)
            rows_TH, at = output_TH, span.end
            trouble = self._trouble(batch)
        return rows_TH, stretches

    async def _back(
        self, works: Sequence[tuple[MicroBatch, Sequence[Stretch], torch.Tensor]], added: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """The inputs' gradients; the adapter's is added to `added`, of each step exactly once.

        Each peer adds its own up and sends the sum behind its last answer, so that what the next hop waits for waits
        for nothing. A sum is taken whole, if it is of steps that it was answered for, or not at all: what is owed then
        is asked for again.
        """
        sums: dict[tuple[PeerId, BlockSpan], Sum] = {}
        for batch, stretches, _ in works:
            for stretch in stretches:
                part = None if batch.adapter is None else batch.adapter.within(stretch.span)
                if part is not None and batch.adapter is not None:
                    own = Sum(stretch.hop, part.targets, batch.adapter.place(stretch.span))
                    sums.setdefault((stretch.hop.peer_id, stretch.span), own).unasked += 1
        slots = asyncio.Semaphore(self.in_flight)

        async def one(batch: MicroBatch, stretches: Sequence[Stretch], gradient_TH: torch.Tensor) -> torch.Tensor:
            async with slots:
                for stretch in reversed(stretches):
                    own = sums.get((stretch.hop.peer_id, stretch.span))
                    gradient_TH = await self._back_one(batch, stretch, gradient_TH, own, added)
                return gradient_TH

        async def again(owed: Owed) -> None:
            async with slots:
                await self._elsewhere(owed.batch, owed.stretch, owed.gradient_TH, added)

        self._exchange.expect(sums.values())
        try:
            gradients = await _all([one(*work) for work in works])
            for own in sums.values():
                assert added is not None
                try:
                    await self._exchange.settle(own, added)
                except SwarmError as error:
                    await self._failed(own.hop, error, _Trouble(self.config.patience_s, set()))
                await _all([again(owed) for owed in own.owed.values()])
        finally:
            for own in sums.values():
                self._exchange.done(own)
                if own.owed:  # there may be a sum of it that nobody will ask for
                    self._send_forget({own.hop.peer_id: [own.id]})
        return gradients

    async def _back_one(
        self,
        batch: MicroBatch,
        stretch: Stretch,
        gradient_TH: torch.Tensor,
        own: Sum | None,
        added: torch.Tensor | None,
    ) -> torch.Tensor:
        trouble, again, collect = self._trouble(batch), False, False
        if own is not None:
            own.unasked, own.asked = own.unasked - 1, own.asked + 1
            collect = own.asked % MAX_SUMMED == 0
        while True:
            collect = collect or (own is not None and not own.unasked)
            try:
                given_TH = await self._exchange.ask(batch, stretch, gradient_TH, again=again, own=own, collect=collect)
            except SwarmError as error:
                if isinstance(error, Refused) and error.code == Code.FORGOTTEN and not again:
                    self.traffic.resent += 1
                    again = True
                elif not await self._failed(stretch.hop, error, trouble):
                    return await self._elsewhere(batch, stretch, gradient_TH, added, trouble.last)
            else:
                self.traffic.backwards += 1
                return given_TH

    async def _elsewhere(
        self,
        batch: MicroBatch,
        stretch: Stretch,
        gradient_TH: torch.Tensor,
        added: torch.Tensor | None,
        last: SwarmError | None = None,
    ) -> torch.Tensor:
        """By somebody else, or several: what goes in there is known, what passes between them is not."""
        self.traffic.rerouted += 1
        _, others = await self._through(batch, stretch.span, stretch.input_TH, True, last)
        try:
            (given_TH,) = await self._back([(batch, others, gradient_TH)], added)
            return given_TH
        finally:
            self._forget([replace(batch, stretches=others)])

    # --- inside the loop: peers ---

    async def _planned(self) -> Route:
        """The present route; planned anew where one of its peers is to be avoided. Raises NoRoute, Unavailable."""
        async with self._planning:
            now_s = asyncio.get_running_loop().time()
            for shunned in (self._lost, self._refused):
                for peer in [peer for peer, until_s in shunned.items() if until_s <= now_s]:
                    del shunned[peer]
            for peer in [peer for peer, sequence in self._stale.items() if self._sequence(peer) != sequence]:
                del self._stale[peer]
            avoid = self._avoided
            if self._route is None or any(hop.peer_id in avoid or self._moved(hop) for hop in self._route.hops):
                self._route = None
                self._route = await self._client.discovery.route(self._request(avoid))
                self._exchange.block_s.clear()
                self._review_at_s = now_s + REVIEW_S
            return self._route

    @property
    def _avoided(self) -> frozenset[PeerId]:
        return frozenset((*self._lost, *self._refused, *self._stale))

    def _sequence(self, peer: PeerId) -> int | None:
        record = self._client.router.record_of(peer)
        return None if record is None else record.sequence

    def _moved(self, hop: Hop) -> bool:
        """Whether the peer announced since that it serves other blocks."""
        record = self._client.router.record_of(hop.peer_id)
        return record is not None and not (record.model == self._model.model and record.spans.covers(hop.span))

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
        paces = sorted((pace_s, peer) for peer, pace_s in self._exchange.block_s.items() if peer in on_route)
        if len(paces) < 2 or paces[-1][0] < SLOW * median(pace_s for pace_s, _ in paces[:-1]):
            return
        slowest = paces[-1][1]
        with contextlib.suppress(NoRoute):
            self._client.router.plan(self._request(self._avoided | {slowest}), self._client.discovery.now_s())
            logger.info("training: %s has become slow", slowest)
            self._lost[slowest] = now_s + AVOID_S

    async def _hop(self, at: int, end: int, trouble: _Trouble) -> tuple[Hop, BlockSpan]:
        """Who runs block `at` next, and how many more up to `end`. Raises NoRoute when patience ends."""
        while True:
            try:
                route = await self._planned()
            except NoRoute as error:
                if asyncio.get_running_loop().time() - self._lost_at_s > self.config.patience_s:
                    self._believe(trouble)
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
            case Refused() if error.code == Code.WRONG_MODEL:
                self.traffic.failures[error.code] += 1
                self._lost_at_s = loop_s  # with its next record there may be a route
                await self._look_again(hop)
                return False
            case Refused() if error.code == Code.MALFORMED:
                self.traffic.failures[error.code] += 1
                self._refused[hop.peer_id] = loop_s + AVOID_S
                trouble.accusers.add(hop.peer_id)
                if len(trouble.accusers) > 1:  # others would say the same
                    self._believe(trouble)
                    raise error
                return False
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

    async def _look_again(self, hop: Hop) -> None:
        """The peer says that it does not serve these blocks: plan by what is announced now."""
        if self._route is not None and hop in self._route.hops:
            self._route = None
        if not self._moved(hop) and (sequence := self._sequence(hop.peer_id)) is not None:
            self._stale[hop.peer_id] = sequence
        await self._client.discovery.refresh()

    def _believe(self, trouble: _Trouble) -> None:
        """What peers were sent is malformed: nothing is held against those who said so."""
        for peer in trouble.accusers:
            self._refused.pop(peer, None)

    def _trouble(self, batch: MicroBatch, last: SwarmError | None = None) -> _Trouble:
        return _Trouble(self.config.patience_s, batch.accusers, last)

    def _needed_links(self) -> Iterator[Link]:
        yield from self._exchange.links()
        for hop in () if self._route is None else self._route.hops:  # they keep what backwards will need
            if (link := self._client.links.known(hop.peer_id)) is not None:
                yield link


class _Trouble:
    """How long one step may go without headway."""

    def __init__(self, patience_s: float, accusers: set[PeerId], last: SwarmError | None = None) -> None:
        """`accusers`: who says that what they were sent is malformed; `last`: what the step met before."""
        self.last = last
        self.accusers = accusers
        self._deadline_s = asyncio.get_running_loop().time() + patience_s

    def check(self, error: SwarmError) -> None:
        """Raises `error` when it is too late to try again."""
        if asyncio.get_running_loop().time() > self._deadline_s:
            raise error


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

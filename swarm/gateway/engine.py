"""Many answers at once over one remote model: no thread per answer, one product of the head for all that are ready.

Owns the answers under way and what they hold at peers. Each answer has at most one step under way. When its result is
there it waits for the engine's thread, which takes all that wait, computes their logits together, chooses their tokens,
embeds those together and starts their next steps. Knows no HTTP: whoever asked has a `Feed`.

    reader's loop ── submit, cancel ──▶ engine's thread ── steps ──▶ network's loop ──▶ peers
          ▲                                 │      ▲                       │
          └──────────── pieces ─────────────┘      └────── results ────────┘

Legend: M answers that are ready, D hidden size, V vocabulary.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import queue
import random
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from peers.model.adapters import Adapter
from routing.errors import CallerError, NoRoute, SwarmError, Unavailable
from routing.health import ModelHealth
from swarm.errors import SessionClosed
from swarm.gateway.feed import Feed, Piece, TokenLogprob, Traversal, deliver_all
from swarm.gateway.kept import MIN_SHARED, Kept, KeptLimits, Strand
from swarm.gateway.sampling import Sampling, adjusted, choose
from swarm.gateway.text import Decode, TextStream
from swarm.session.driver import SwarmRemote
from swarm.session.live import HopTiming, Traffic
from swarm.session.remote import RemoteSession, RowStep

TOGETHER = 64
"""Answers in one product of the head: bounds its memory, V numbers each."""
SWEEP_S = 5.0
"""How often kept sequences are looked through for old ones."""


class Overloaded(Unavailable):
    """All places are taken."""

    default_hint = "try again in a few seconds"


Processors = Callable[[Tensor, Tensor], Tensor]
"""Token ids so far `[1, T]` and logits `[1, V]` to logits, as transformers' processors do it."""


class Grammar(Protocol):
    """What one constrained answer may say next (see `swarm.gateway.constraints`)."""

    def mask(self, logits_V: Tensor) -> Tensor:
        """The logits, with −∞ for all that may not follow."""
        ...

    def accept(self, token_id: int) -> None: ...
    @property
    def complete(self) -> bool:
        """Nothing may follow."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One prompt, and how to answer it."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    owner: str
    expects: int = 0
    """Tokens of answer that the reader asked for at most; 0: nobody said."""
    n: int = 1
    first_choice: int = 0
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many of the likeliest to name beside each token; None: no probabilities."""
    scores_prompt: bool = False
    """Whether probabilities of the prompt's own tokens are wanted, too. Then all of it is computed."""
    decode: Decode | None = None
    """Instead of the engine's."""
    processors: Processors | None = None
    """The checkpoint's own, for answers without a grammar."""
    grammar: Callable[[], Grammar] | None = None
    keep: bool = True
    """Whether what the answer holds at peers is kept for requests that go on from it."""
    traversals: bool = False
    """Whether to tell how each token went through the swarm."""

    @property
    def longest(self) -> int:
        """Positions that the session may come to hold; 0: nobody knows."""
        return len(self.prompt) + self.expects if self.expects else 0


@dataclass(slots=True, eq=False)
class _Request:
    ask: Ask
    feed: Feed
    answers: list[_Answer] = field(default_factory=list)
    cached: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Answer:
    """One of a request's choices."""

    request: _Request
    choice: int
    text: TextStream
    rng: random.Random
    grammar: Grammar | None
    strand: Strand | None = None
    parent: Strand | None = None
    """Pinned until the first step of this fork has returned."""
    sent: list[int] = field(default_factory=list)
    """The tokens of the step under way."""
    generated: Counter[int] = field(default_factory=Counter)
    count: int = 0
    parked: int | None = None
    """The next token, where it is not sent yet because the reader is behind."""
    unsaid: int = 0
    spoke: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of tokens whose text is not shown yet."""
    traversals: list[Traversal] = field(default_factory=list)
    """Those that were not told yet."""
    sent_at_s: float = 0.0
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What an engine does and did."""

    active: int
    waiting: int
    """Of those, for a reader who is behind."""
    kept_sessions: int
    kept_tokens: int
    generated_tokens: int
    cached_tokens: int
    products: int
    """Of the head, for one answer or several."""


class Engine:
    """Runs in a thread of its own from construction to `close`."""

    def __init__(
        self,
        model: Any,
        decode: Decode,
        *,
        max_answers: int = 256,
        kept: KeptLimits | None = None,
        adapter: Adapter | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`model`: a SwarmModel whose layers run through a SwarmRemote. `decode`: token ids to text. `adapter`: of all
        answers, inside the layers."""
        self._adapter = adapter
        self._model, self._decode, self._now_s = model, decode, now_s
        self._layers = model._remote_layers
        assert isinstance(self._layers.remote, SwarmRemote)
        self._remote: SwarmRemote = self._layers.remote
        self._eos_ids = eos_ids(model)
        self._max_answers = max_answers
        self._kept = Kept(kept or KeptLimits())
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._active = 0
        self._generated = self._cached = self._products = self._parked = 0
        self._failure: SwarmError | None = None
        self._feeds: dict[Feed, list[_Request]] = {}
        self._under_way: dict[RemoteSession, _Answer] = {}
        # an answer has at most a submission, a step, a wake-up and a cancellation in here: bounded by max_answers
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ready: list[tuple[_Answer, Tensor]] = []
        self._scoring: deque[tuple[_Answer, Tensor]] = deque()
        """Hidden states `[T, D]` of prompts, from the position on whose successor is to be scored next."""
        self._next: list[tuple[_Answer, list[int], int]] = []
        self._said: dict[asyncio.AbstractEventLoop, list[tuple[Feed, Piece | SwarmError]]] = {}
        self._thread = threading.Thread(target=self._run, name="gateway engine", daemon=True)
        self._thread.start()

    # --- any thread ---

    def submit(self, asks: Sequence[Ask]) -> Feed:
        """Begin the answers to one reader's `asks`; called in its event loop. Raises CallerError, Unavailable."""
        choices = sum(ask.n for ask in asks)
        if choices > self._max_answers:
            raise CallerError(
                f"{choices} answers at once are more than the {self._max_answers} that this gateway gives",
                hint="ask for fewer choices or prompts in one request",
            )
        feed = Feed(choices)
        with self._lock:
            if self.failure is not None:
                raise self.failure
            if self._active + choices > self._max_answers:
                raise Overloaded(f"{self._active} of at most {self._max_answers} answers are under way")
            self._active += choices
        self._work.put(lambda: self._begin(feed, asks))
        return feed

    def cancel(self, feed: Feed) -> None:
        """The reader has gone: free at once what its answers hold at peers. Idempotent, also after they have ended."""
        self._work.put(lambda: self._fail(feed, None))

    def interrupt(self, error: SwarmError) -> None:
        """End all answers that are under way with `error`."""
        self._work.put(lambda: self._fail_all(error))

    @property
    def failure(self) -> SwarmError | None:
        """Why nothing is answered any more."""
        return self._failure or self._remote.failure

    @property
    def traffic(self) -> Traffic:
        """What the sessions sent and heard."""
        return self._remote.traffic

    def coverage(self) -> ModelHealth | None:
        """Who serves the model now, as `SwarmRemote.coverage` says."""
        return self._remote.coverage()

    @property
    def waited_for(self) -> NoRoute | None:
        """As `SwarmRemote.waited_for`."""
        return self._remote.waited_for

    def counts(self) -> Counts:
        return Counts(
            active=self._active,
            waiting=self._parked,
            kept_sessions=len(self._kept),
            kept_tokens=self._kept.tokens,
            generated_tokens=self._generated,
            cached_tokens=self._cached,
            products=self._products,
        )

    def close(self) -> None:
        """End the thread, and answers under way with SessionClosed. Idempotent. The model stays open."""
        with self._lock:
            self._failure = self._failure or SessionClosed("the gateway was closed")
        self._work.put(None)
        self._thread.join()

    # --- the engine's thread ---

    def _run(self) -> None:
        try:
            while self._do_what_waits():
                while self._ready:
                    batch, self._ready = self._ready[:TOGETHER], self._ready[TOGETHER:]
                    self._advance(batch)
                if self._scoring:
                    self._score(*self._scoring.popleft())
                if self._next:
                    self._start_next()
                self._tell()
                for strand in self._kept.expire(self._now_s()):
                    self._drop(strand)
        except BaseException:
            with self._lock:
                self._failure = Unavailable("the gateway has failed, see its log", hint="start it again")
            raise  # a defect: it is logged as the end of this thread
        finally:
            while not self._work.empty():  # what was asked just before learns it, too
                if (work := self._work.get()) is not None:
                    work()
            self._fail_all(self._failure)
            for strand in self._kept.clear():
                self._drop(strand)
            self._tell()

    def _do_what_waits(self) -> bool:
        """Wait for work, do all that is there. False: the end."""
        try:
            work = self._work.get(timeout=0 if self._scoring or self._ready else SWEEP_S)
            while work is not None:
                work()
                work = self._work.get_nowait()
        except queue.Empty:
            return True
        return False

    def _begin(self, feed: Feed, asks: Sequence[Ask]) -> None:
        requests = self._feeds[feed] = []
        for ask in asks:
            request = _Request(ask, feed)
            requests.append(request)
            for choice in range(ask.first_choice, ask.first_choice + ask.n):
                # each choice of a seeded request has chances of its own, and the same ones every time
                seed = secrets.randbits(64) if ask.sampling.seed is None else f"{ask.sampling.seed}/{choice}"
                grammar = None if ask.grammar is None else ask.grammar()
                text = TextStream(ask.decode or self._decode, ask.stops)
                request.answers.append(_Answer(request, choice, text, random.Random(seed), grammar))
            self._prefill(request)
        if self._failure is not None:
            self._fail(feed, self._failure)

    def _prefill(self, request: _Request) -> None:
        """Send what is new in the prompt, for the first answer; the others fork behind it."""
        ask, lead = request.ask, request.answers[0]
        regime = self._regime(len(ask.prompt))
        known = None if ask.scores_prompt else self._kept.match(ask.owner, ask.prompt, regime, self._now_s())
        if known is None:
            lead.strand = Strand(owner=ask.owner, session=self._open(ask.owner))
        elif known.in_place:
            lead.strand = known.strand
        else:
            self._fork(lead, known.strand, known.length)
        request.cached = 0 if known is None else known.length
        self._cached += request.cached
        self._next.append((lead, ask.prompt[request.cached :], len(ask.prompt)))

    def _fork(self, answer: _Answer, parent: Strand, length: int) -> None:
        answer.strand = Strand(
            owner=parent.owner,
            session=self._open(parent.owner, parent.session, length),
            tokens=parent.tokens[:length],
            regimes=set(parent.regimes),
        )
        answer.parent = parent
        parent.pins += 1

    def _open(self, owner: str, parent: RemoteSession | None = None, length: int = 0) -> RemoteSession:
        """What peers hold of a prompt serves its owner only."""
        secret = hashlib.blake2b(owner.encode(), key=self._secret, digest_size=32).digest()
        adapter = self._adapter if parent is None else None  # a fork has its parent's
        return self._remote.open(parent, length, adapter=adapter, prefix_secret=secret)

    def _start_next(self) -> None:
        """Embed what is to be sent, single tokens together, and send it."""
        waiting, self._next = self._next, []
        live = [step for step in waiting if not step[0].done]
        single = [step for step in live if len(step[1]) == 1]
        embedded: dict[_Answer, Tensor] = {}
        if single:
            ids_M = torch.tensor([tokens[0] for _, tokens, _ in single])
            positions_M = torch.tensor([_length(answer) for answer, _, _ in single])
            rows_MD = self._layers.embed_at(ids_M, positions_M)
            embedded = {answer: row_1D for (answer, _, _), row_1D in zip(single, rows_MD.split(1), strict=True)}
        steps = []
        for answer, tokens, regime_length in live:
            assert answer.strand is not None
            ids_T, start = torch.tensor(tokens), _length(answer)
            hidden_TD = embedded.get(answer)
            answer.sent, answer.sent_at_s = tokens, self._now_s()
            answer.strand.regimes.add(self._regime(regime_length))
            self._under_way[answer.strand.session] = answer
            steps.append(
                RowStep(
                    session=answer.strand.session,
                    start=start,
                    hidden_TD=self._layers.embed(ids_T, start) if hidden_TD is None else hidden_TD,
                    token_ids_T=ids_T,
                    position_offset=0,
                    want_from=0 if answer.request.ask.scores_prompt and not answer.count else len(tokens) - 1,
                    regime_length=regime_length,
                    expects=answer.request.ask.longest,
                )
            )
        self._remote.start(steps, self._arrived)

    def _arrived(self, step: RowStep, outcome: Tensor | SwarmError) -> None:
        """In the network's loop."""
        hops, at_s = self._remote.timings_of(step.session), self._now_s()
        self._work.put(lambda: self._result(step.session, outcome, hops, at_s))

    def _result(
        self, session: RemoteSession, outcome: Tensor | SwarmError, hops: tuple[HopTiming, ...], at_s: float
    ) -> None:
        answer = self._under_way.pop(session)
        self._unpin(answer)
        if answer.done:
            return
        if isinstance(outcome, SwarmError):
            self._fail(answer.request.feed, outcome)
        else:
            assert answer.strand is not None
            answer.strand.tokens += answer.sent
            if answer.request.ask.traversals:
                total_s = at_s - answer.sent_at_s
                answer.traversals.append(Traversal(positions=len(answer.sent), total_s=total_s, hops=hops))
            (self._scoring if len(outcome) > 1 else self._ready).append((answer, outcome))

    def _score(self, answer: _Answer, hidden_TD: Tensor) -> None:
        """Some more probabilities of a prompt's tokens; others' answers go on between two such pieces."""
        if answer.done:
            return
        request = answer.request
        count = min(TOGETHER, len(hidden_TD) - 1)  # the last one's successor is the first token to be chosen
        rows_MD, rest_TD = hidden_TD[:count], hidden_TD[count:]
        first = len(request.ask.prompt) - len(hidden_TD) + 1
        logits_MV = self._logits(rows_MD)
        for token_id, logits_V in zip(request.ask.prompt[first:], logits_MV, strict=False):
            request.prompt_logprobs.append(_logprob(logits_V, token_id, request.ask.logprobs or 0))
        (self._scoring if len(rest_TD) > 1 else self._ready).append((answer, rest_TD))

    def _logits(self, hidden_MD: Tensor) -> Tensor:
        self._products += 1
        hidden_MD = hidden_MD.to(device=self._model.device, dtype=self._model.dtype)
        logits_MV: Tensor = self._layers.logits(self._model, hidden_MD).float()
        return logits_MV

    def _advance(self, batch: Sequence[tuple[_Answer, Tensor]]) -> None:
        """Choose the next token of all answers in `batch`, whose hidden states `[1, D]` have come."""
        batch = [(answer, row_1D) for answer, row_1D in batch if not answer.done]
        if not batch:
            return
        logits_MV = self._logits(torch.cat([row_1D for _, row_1D in batch]))
        likeliest_M = logits_MV.argmax(-1).tolist()
        for (answer, _), logits_V, likeliest in zip(batch, logits_MV, likeliest_M, strict=True):
            answers = answer.request.answers if not answer.count else [answer]
            strand = answer.strand
            for each in answers:
                if not each.done:
                    self._extend(each, logits_V, likeliest, strand)

    def _extend(self, answer: _Answer, logits_V: Tensor, likeliest: int, strand: Strand | None) -> None:
        """One more token. `strand`: what holds all before it, to be forked where the answer has none yet."""
        ask = answer.request.ask
        if not ask.max_tokens:
            self._say(answer, "", "length")
            self._end(answer, keep=ask.keep and answer is answer.request.answers[0])
            return
        try:
            token = self._choose(answer, logits_V, likeliest)
        except SwarmError as error:  # a grammar that turned out to be too hard
            self._fail(answer.request.feed, error)
            return
        answer.count += 1
        answer.unsaid += 1
        self._generated += 1
        text, finish = "", None
        if token in self._eos_ids and not ask.ignore_eos:
            text, finish = answer.text.end(), "stop"
        else:
            answer.generated[token] += 1
            if ask.logprobs is not None:
                answer.logprobs.append(_logprob(logits_V, token, ask.logprobs))
            text = answer.text.push(token)
            if answer.text.stopped:
                finish = "stop"
            elif answer.grammar is not None and answer.grammar.complete:
                text, finish = text + answer.text.end(), "stop"
            elif answer.count >= ask.max_tokens:
                text += answer.text.end()
                finish = "stop" if answer.text.stopped else "length"
        if text or finish:
            self._say(answer, text, finish)
        if finish is not None:
            self._end(answer, keep=ask.keep and answer is answer.request.answers[0])
            return
        if answer.strand is None:
            assert strand is not None
            self._fork(answer, strand, len(ask.prompt))
        if answer.request.feed.full:
            answer.parked = token
            self._parked += 1
            self._wait_for_reader(answer.request.feed)
        else:
            self._send(answer, token)

    def _choose(self, answer: _Answer, logits_V: Tensor, likeliest: int) -> int:
        ask = answer.request.ask
        processors = ask.processors if answer.grammar is None else None
        if answer.grammar is None and processors is None and ask.sampling.as_they_are:
            return likeliest
        logits_V = adjusted(logits_V, ask.sampling, ask.prompt, answer.generated)
        if processors is not None:
            ids = ask.prompt if answer.strand is None else answer.strand.tokens
            logits_V = processors(torch.tensor([ids], device=logits_V.device), logits_V[None])[0]
        if answer.grammar is not None:
            logits_V = answer.grammar.mask(logits_V)
        token = choose(logits_V, ask.sampling, answer.rng)
        if answer.grammar is not None:
            answer.grammar.accept(token)
        return token

    def _send(self, answer: _Answer, token: int) -> None:
        self._next.append((answer, [token], len(answer.request.ask.prompt) + answer.count))

    def _wait_for_reader(self, feed: Feed) -> None:
        feed.resume = lambda: self._work.put(lambda: self._resume(feed))
        if not feed.full:  # it caught up before it could see that somebody waits
            self._resume(feed)

    def _resume(self, feed: Feed) -> None:
        for request in self._feeds.get(feed, ()):
            for answer in request.answers:
                if answer.parked is not None and not answer.done:
                    token, answer.parked = answer.parked, None
                    self._parked -= 1
                    self._send(answer, token)

    def _say(self, answer: _Answer, text: str, finish: str | None) -> None:
        request = answer.request
        piece = Piece(
            choice=answer.choice,
            text=text,
            tokens=answer.unsaid,
            logprobs=tuple(answer.logprobs),
            finish=finish,
            cached=request.cached,
            traversals=tuple(answer.traversals),
            prompt_logprobs=() if answer.spoke else tuple(request.prompt_logprobs),
        )
        answer.unsaid, answer.spoke, request.cached = 0, True, 0
        answer.logprobs.clear()
        answer.traversals.clear()
        self._deliver(request.feed, piece)

    def _end(self, answer: _Answer, *, keep: bool = False) -> None:
        answer.done = True
        if answer.parked is not None:
            answer.parked = None
            self._parked -= 1
        with self._lock:
            self._active -= 1
        strand = answer.strand
        if strand is not None:
            if keep and len(strand.tokens) >= MIN_SHARED:
                for old in self._kept.put(strand, self._now_s()):
                    self._drop(old)
            else:
                self._drop(strand)
        if strand is None or strand.session not in self._under_way:
            self._unpin(answer)
        feed = answer.request.feed
        if all(other.done for request in self._feeds[feed] for other in request.answers):
            del self._feeds[feed]

    def _fail(self, feed: Feed, error: SwarmError | None) -> None:
        """End the answers of one reader, who is told the error if there is one."""
        requests = self._feeds.get(feed)
        if requests is None:
            return
        if error is not None:
            self._deliver(feed, error)
        for answer in [answer for request in requests for answer in request.answers if not answer.done]:
            self._end(answer)

    def _fail_all(self, error: SwarmError | None) -> None:
        for feed in list(self._feeds):
            self._fail(feed, error)

    def _drop(self, strand: Strand) -> None:
        if strand.pins:
            strand.unwanted = True
        else:
            self._remote.release([strand.session])

    def _unpin(self, answer: _Answer) -> None:
        parent, answer.parent = answer.parent, None
        if parent is not None:
            parent.pins -= 1
            if parent.unwanted and not parent.pins:
                self._remote.release([parent.session])

    def _deliver(self, feed: Feed, piece: Piece | SwarmError) -> None:
        feed.put += 1
        self._said.setdefault(feed.loop, []).append((feed, piece))

    def _tell(self) -> None:
        """Hand over all pieces, with one wake-up for each loop."""
        said, self._said = self._said, {}
        for loop, pieces in said.items():
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its readers with it
                loop.call_soon_threadsafe(deliver_all, pieces)

    def _regime(self, length: int) -> Hashable:
        return self._layers.regime.key(length)  # type: ignore[no-any-return]


def eos_ids(model: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def _length(answer: _Answer) -> int:
    assert answer.strand is not None
    return len(answer.strand.tokens)


def _logprob(logits_V: Tensor, token_id: int, top: int) -> TokenLogprob:
    logprobs_V = logits_V.log_softmax(-1)
    best = logprobs_V.topk(min(top, len(logprobs_V)))
    return TokenLogprob(
        token_id=token_id,
        logprob=float(logprobs_V[token_id]),
        top=tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
    )

"""Users of a simulated swarm: each answer is a session, and the session core of real clients decides about it.

Owns what a user asks for, and carries out the core's actions on simulated peers: opens are answered at once, and what
was sent waits in `works` until seconds of the peers' time have gone by. Journals reach back to the beginning. A step
of the core stands for PIECE decoded tokens, one after the other: so many are computed again when a hop dies.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from peers.discovery import NO_ROUTE_PATIENCE_S
from peers.serving.ledger import NO_ROOM_S
from routing.coordinates import Coordinate
from routing.errors import NoRoute, PeerError
from routing.flow import GOLDEN
from routing.ids import PeerId, SessionId
from routing.records import PeerState
from routing.router import Router
from routing.routes import RouteRequest
from swarm.session.actions import Action, Fail, NeedRoute, OpenHops, Release, SendStep, Skip, StepDone, Wait
from swarm.session.core import SessionConfig, SessionCore, State
from swarm.session.review import REVIEW_S_MIN, hop_to_leave, next_review_s, usual_tokens
from swarm.session.steps import PendingStep
from swarm.simulation.sharing import Sharing
from swarm.simulation.world import BYTES_PER_TOKEN, MODEL, Peer, SimulationConfig, round_trip_s

logger = logging.getLogger(__name__)

CHUNK: Final = 64
"""Tokens of a prompt, or of a replay, per forward."""
PIECE: Final = 8
"""Decoded tokens per step of the core."""
OPENING_S: Final = 0.4
"""From a hop's death, or from a question, until all hops are open: two round trips between regions."""
MIDST_S: Final = 60.0
"""Who comes first is in the midst of an answer: its prompt has one token."""
DONE: Final = 1e-9
"""Positions that are too few to be left."""
SESSION: Final = SessionConfig()


class Stage(Protocol):
    """What users see of a simulation."""

    config: SimulationConfig
    rng: random.Random
    peers: dict[PeerId, Peer]
    counts: Counter[str]
    failures: Counter[str]
    first_token_s: list[float]
    now_s: float
    sharing: Sharing


@dataclass(slots=True, eq=False)
class Client:
    """A node that users come through."""

    where: Coordinate
    bytes_per_s: float
    reads_at_s: float
    turn: float
    seen: dict[PeerId, int] = field(default_factory=dict)
    met: dict[Peer, None] = field(default_factory=dict)
    """Peers that it sent something to since it read last, in that order."""
    router: Router = field(init=False)

    def __post_init__(self) -> None:
        self.router = Router(self.turn)


@dataclass(slots=True)
class Work:
    """A step that was sent and is not answered."""

    step: PendingStep
    tokens: int
    """Per forward."""
    hops: tuple[tuple[Peer, int], ...]
    """Those that run it, with their blocks."""

    def follows(self, other: Work) -> bool:
        """It goes on where the other one went, in the same way."""
        return self.tokens == other.tokens and self.hops == other.hops


class User:
    """Asks, reads, and asks again."""

    def __init__(self, number: int, client: Client, resumes_at_s: float) -> None:
        self.number = number
        self.client = client
        self.core: SessionCore | None = None
        self.hops: tuple[tuple[Peer, int], ...] = ()
        """Of the route that was opened last: there its cache is."""
        self.works: deque[Work] = deque()
        self._shown: Work | None = None
        """What `Sharing` has of it."""
        self._need: NeedRoute | None = None
        self._needed_at_s = 0.0
        self._trips = Trips(0.0, 0.0, 0.0)
        self._resumes_at_s = resumes_at_s
        self._leaving: set[PeerId] = set()
        self._asked_at_s = 0.0
        self._opened_at_s = self._review_at_s = 0.0
        self._answers = 0
        self._prompt = self._sent = self._kept = 0
        self._left = 0.0

    @property
    def acts_at_s(self) -> float:
        """When it has to look at something, if nothing happens to its hops before."""
        if self.core is None or self.core.state in (State.WAITING, State.PAUSING):
            return self._resumes_at_s
        if self._need is not None:
            return 0.0
        return self._review_at_s if self.works and self.works[0].tokens == 1 else math.inf

    def act(self, stage: Stage) -> None:
        """What happened to its hops since, and what it waited for."""
        core, now_s = self.core, stage.now_s
        if core is None:
            if now_s >= self._resumes_at_s:
                self._ask(stage)
            return
        if self._need is not None:
            self._plan(stage)
        elif core.state in (State.WAITING, State.PAUSING):
            if now_s >= self._resumes_at_s:
                self._perform(stage, core.timer())
        else:
            for peer, _ in self.hops:
                if not core.alive:  # no other route was there
                    return
                if stage.peers.get(peer.peer_id) is not peer:
                    self._lose(stage, peer.peer_id)
                elif peer.state is not PeerState.ONLINE and peer.peer_id not in self._leaving:
                    self._leave(stage, peer.peer_id, answers=peer.state is PeerState.DRAINING)
            if core.alive and now_s >= self._review_at_s and self.works and self.works[0].tokens == 1:
                self._review(stage)

    def advance(self, stage: Stage, left: float, credit: float) -> int:
        """A second in which so many positions can be done, and `left` were of its first work; returns how many of those
        that it wants were answered. What is computed again, or not to its end, is none of them."""
        answered = 0
        while credit > 0 and self.works and self.core is not None:
            work = self.works[0]
            done = min(credit, left)
            left -= done
            credit -= done
            if left > DONE:
                stage.sharing.left_U[self.number] = left
                break
            self.works.popleft()
            if work.step.replay:
                stage.counts["again"] += work.step.count * sum(blocks for _, blocks in work.hops)
            else:  # all of it, also what hops held already because it was computed before a route was changed
                count = next(step.count for step in self.core.pending if step.step == work.step.step)
                stage.counts["written"] += count if work.tokens == 1 else 0
                answered += count
            self._tell(stage, work)
            self._perform(stage, self.core.result(work.step.step, self.core.epoch))
            self._go_on(stage)
            if not self.works or not self.works[0].follows(work):
                break
            self._shown = self.works[0]
            left = self._shown.step.count
        return answered

    def _tell(self, stage: Stage, work: Work) -> None:
        """Every answer tells what its hops took; and how wide the way to the first is, where much was sent over it."""
        router, client, step = self.client.router, self.client, work.step
        for peer, blocks in work.hops:
            took_s = peer.step_s(blocks, work.tokens)
            router.on_step(peer.peer_id, blocks, work.tokens, *took_s, stage.now_s)
        if work.tokens > 1 and not step.hop:
            (first, _), *_ = work.hops
            size = work.tokens * BYTES_PER_TOKEN
            sent_s = round_trip_s(client.where, first.where) + size / min(client.bytes_per_s, first.bytes_per_s)
            router.on_transfer(first.peer_id, size, sent_s, stage.now_s)
        stage.counts["replayed" if step.replay or step.hop else "hidden"] += self._sent_bytes(work)

    def _sent_bytes(self, work: Work) -> int:
        """Of a step that was answered, over all ways; a decode's positions come back one by one, of others the last."""
        step = work.step
        back = 0 if step.until is not None else step.count if work.tokens == 1 else step.count - step.want_from
        return BYTES_PER_TOKEN * (step.count * len(work.hops) + back)

    def show(self, stage: Stage) -> None:
        """Tell `Sharing` what is under way."""
        work = self.works[0] if self.works else None
        if work is self._shown:
            return
        self._shown = work
        if work is None:
            stage.sharing.left_U[self.number] = 0.0
        else:
            stage.sharing.begin(self.number, work.step.count, work.tokens, self._trips.of(work.tokens), work.hops)

    # --- an answer ---

    def _ask(self, stage: Stage) -> None:
        config, rng = stage.config, stage.rng
        self._prompt = self._sent = 1 + int(rng.expovariate(1 / config.prompt_tokens))
        if stage.now_s < MIDST_S:
            self._prompt = self._sent = 1
        self._left = 1.0 + rng.expovariate(1 / config.new_tokens)
        self._kept = self._prompt + int(self._left)
        self._asked_at_s = stage.now_s
        self._answers += 1
        name = f"{config.seed}/{self.number}/{self._answers}".encode()
        self.core = SessionCore(SessionId(name[:16].ljust(16, b".")), SESSION)
        chunk = SESSION.chunk(self._prompt)
        for first in range(0, self._prompt, chunk):
            if self.core is not None:  # it fails at once where every hop that is opened died
                self._submit(stage, first, min(chunk, self._prompt - first))

    def _go_on(self, stage: Stage) -> None:
        """Once everything is answered: the next piece, or the end."""
        core = self.core
        if core is None or core.pending:
            return
        if self._asked_at_s >= 0:
            stage.first_token_s.append(stage.now_s - self._asked_at_s)
            self._asked_at_s = -1.0
        if self._left <= 0:
            self._perform(stage, core.close())
            self._end(stage)
            return
        count = min(PIECE, -int(-self._left // 1))
        self._left -= count
        self._submit(stage, self._sent, count)
        self._sent += count

    def _submit(self, stage: Stage, first: int, count: int) -> None:
        assert self.core is not None
        _, actions = self.core.submit(first, count, count - 1)
        self._perform(stage, actions)

    def _end(self, stage: Stage) -> None:
        assert self.core is not None
        self.client.router.on_ended(self.core.session)
        self._hold(())
        self.works.clear()
        self._leaving.clear()
        self.core = self._need = None
        self._resumes_at_s = stage.now_s

    # --- what the core wants ---

    def _perform(self, stage: Stage, actions: Sequence[Action]) -> None:
        core = self.core
        assert core is not None
        for action in actions:
            match action:
                case SendStep(step=step):
                    tokens = 1 if step.first >= self._prompt and not step.replay else min(CHUNK, step.count)
                    self.works.append(Work(step, tokens, self.hops[step.hop : step.until]))
                case NeedRoute():
                    self.works.clear()
                    self._need, self._needed_at_s = action, stage.now_s
                    self._plan(stage)
                case OpenHops():
                    self._open(stage, action)
                case Wait(delay_s=delay_s):
                    self.works.clear()
                    self._resumes_at_s = stage.now_s + delay_s * stage.rng.uniform(1.0, 1.5)
                case Release(hops=hops):
                    gone = {hop.peer_id for hop in hops}
                    self._hold(tuple((peer, blocks) for peer, blocks in self.hops if peer.peer_id not in gone))
                case Fail(error=error):
                    stage.failures[str(error).partition(":")[0]] += 1
                    logger.info(
                        "user %d, answer %d, after %d attempts: %s", self.number, self._answers, core.attempts, error
                    )
                    self._end(stage)
                case StepDone() | Skip():
                    pass
                case _:
                    raise AssertionError(f"{action} needs a standby, and nobody has one")

    def _plan(self, stage: Stage) -> None:
        core, need, client = self.core, self._need, self.client
        assert core is not None
        assert need is not None
        client.turn = (client.turn + GOLDEN) % 1.0
        request = RouteRequest(
            model=MODEL,
            num_blocks=stage.config.blocks,
            avoid=need.avoid,
            tokens=usual_tokens([step.count for step in core.pending]) if self._asked_at_s >= 0 else 1,
            back_tokens=1,
            bytes_per_token=BYTES_PER_TOKEN,
            cache_tokens=self._kept,
            previous=core.route,
            keep=need.keep,
            spread=client.turn,
            session=core.session,
        )
        try:
            route = client.router.plan(request, stage.now_s)
        except NoRoute as error:
            patience_s = NO_ROUTE_PATIENCE_S if need.patience_s is None else need.patience_s
            if stage.now_s - self._needed_at_s >= patience_s:
                self._need = None
                self._perform(stage, core.no_route(error))
            return
        self._need = None
        self._perform(stage, core.route_ready(route))

    def _open(self, stage: Stage, action: OpenHops) -> None:
        core, route, router = self.core, action.route, self.client.router
        assert core is not None
        stage.counts["rebuilt"] += action.epoch > 1
        stage.sharing.opening_s_U[self.number] = OPENING_S
        self._leaving.clear()
        self._opened_at_s, self._review_at_s = stage.now_s, stage.now_s + REVIEW_S_MIN
        self.works.clear()
        found = [stage.peers.get(hop.peer_id) for hop in route.hops]
        self._hold(tuple((p, len(hop.span)) for p, hop in zip(found, route.hops, strict=True) if p is not None))
        self._trips = trips(self.client, [peer for peer, _ in self.hops])
        for hop, peer, keep in zip(route.hops, found, action.keep, strict=True):
            if core.epoch != action.epoch or core.state is not State.OPENING:
                return  # a hop was replaced meanwhile
            if peer is None:
                self._lose(stage, hop.peer_id)
            elif peer.state is not PeerState.ONLINE or not peer.spans.covers(hop.span):
                self._leave(stage, hop.peer_id, answers=False)
            elif not keep and peer.used_tokens > peer.cache_tokens:
                router.on_busy(hop.peer_id, NO_ROOM_S, stage.now_s)
                stage.counts["busy"] += 1
                error = PeerError("a peer has no room")
                self._perform(stage, core.busy(hop.peer_id, action.epoch, NO_ROOM_S, error, preempted=False))
            else:
                self.client.met[peer] = None
                router.on_step(hop.peer_id, len(hop.span), 1, *peer.step_s(len(hop.span)), stage.now_s)
                self._perform(stage, core.opened(hop.peer_id, hop.span.start, action.epoch, held=keep))

    def _lose(self, stage: Stage, peer: PeerId) -> None:
        assert self.core is not None
        self.client.router.on_failure(peer, stage.now_s, "died", unreachable=True)
        self._perform(stage, self.core.hop_lost(peer, PeerError("a peer died")))

    def _leave(self, stage: Stage, peer: PeerId, *, answers: bool) -> None:
        assert self.core is not None
        self._leaving.add(peer)
        self.client.router.on_draining(peer)
        error = PeerError("a peer leaves")
        self._perform(stage, self.core.hop_leaves(peer, self.core.epoch, error, answers=answers))

    def _review(self, stage: Stage) -> None:
        """As `swarm.session.planning` does between two steps."""
        core, now_s = self.core, stage.now_s
        assert core is not None
        self._review_at_s = now_s + next_review_s(now_s - self._opened_at_s)
        took_s = {peer.peer_id: sum(peer.step_s(blocks)) for peer, blocks in self.hops}
        request = RouteRequest(
            model=MODEL,
            num_blocks=stage.config.blocks,
            bytes_per_token=BYTES_PER_TOKEN,
            cache_tokens=self._kept,
            previous=core.route,
        )
        step_s = self._trips.of(1) + sum(took_s.values())
        if slowest := hop_to_leave(self.client.router, request, took_s, now_s, step_s=step_s, slowed=False):
            error = PeerError("a peer has become slow")
            self._perform(stage, core.hop_leaves(slowest, core.epoch, error, answers=True))

    def _hold(self, hops: tuple[tuple[Peer, int], ...]) -> None:
        for count, held in ((-1, self.hops), (1, hops)):
            for peer, _ in held:
                peer.used_tokens += count * self._kept
                peer.sessions += count
        self.hops = hops


@dataclass(frozen=True, slots=True)
class Trips:
    """From a client through all hops and back."""

    seconds: float
    """Of an empty frame."""
    position_s: float
    """That each position adds; on the way back too, of which only decodes are: a prompt's last row comes alone."""
    back_s: float
    """The part of the last way in that."""

    def of(self, tokens: int) -> float:
        return self.seconds + tokens * (self.position_s - self.back_s) + self.back_s


def trips(client: Client, peers: Sequence[Peer]) -> Trips:
    nodes: list[Client | Peer] = [client, *peers, client]
    byte_s = [1 / min(a.bytes_per_s, b.bytes_per_s) for a, b in itertools.pairwise(nodes)]
    return Trips(
        seconds=sum(round_trip_s(a.where, b.where) / 2 for a, b in itertools.pairwise(nodes)),
        position_s=BYTES_PER_TOKEN * sum(byte_s),
        back_s=BYTES_PER_TOKEN * byte_s[-1],
    )

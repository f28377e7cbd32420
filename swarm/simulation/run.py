"""Runs a simulated swarm second by second, with the decisions of real nodes.

Owns time, churn, queues and what is counted. Nodes renew records every RECORD_RENEW_S and read them every
READ_EVERY_S, as real ones do: everybody decides from what is some seconds old. What they measure of round trips they
take in as they read. Deterministic: same configuration, same report.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

import numpy as np

from peers.discovery import READ_EVERY_S
from routing.errors import NoRoute
from routing.flow import BATCH, by_span, max_flow
from routing.ids import BlockSpan, BlockSpans, PeerId
from routing.placement import (
    LOOK_S,
    REST_S,
    SETTLE_S,
    TURN_S,
    Arrivals,
    choose_move,
    choose_span,
    has_turn,
    stands,
)
from routing.records import RECORD_LIFETIME_S, RECORD_RENEW_S, Announcement, PeerState
from routing.router import Router
from routing.routes import RouteRequest
from swarm.simulation.report import Report, Sample
from swarm.simulation.sharing import Sharing
from swarm.simulation.users import CHUNK, DONE, Client, User, trips
from swarm.simulation.world import (
    BYTES_PER_TOKEN,
    MODEL,
    Peer,
    SimulationConfig,
    draw_bytes_per_s,
    draw_peer,
    draw_place,
    round_trip_s,
)

logger = logging.getLogger(__name__)

SAMPLE_S: Final = 10.0
USERS_BOUND_S: Final = 300.0
"""It takes long to compute, and changes little."""
WARM_UP_S: Final = 120.0
"""Users and queues settle before anything is counted."""
TOLD_S: Final = 60
"""Of virtual time, between two lines in the log."""


class Simulation:
    """Guards the state of one run. `run` may be called once."""

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        self.rng = random.Random(config.seed)
        self._numbers = itertools.count()
        self.peers: dict[PeerId, Peer] = {}
        self._dead: list[Peer] = []
        """Whose record has not expired yet."""
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        """Sessions that ended without their answer, by reason."""
        self.first_token_s: list[float] = []
        self._open_since_s: float | None = None
        self._arrivals = Arrivals()
        self._healed_s: list[float] = []
        self.now_s = 0.0
        self.sharing = Sharing(config.users, config.peers)
        self._rows = list(range(config.peers))
        """That no peer has."""
        self._disturbed = False
        """A peer died, left or moved in this second."""
        for _ in range(config.peers):
            self._join(ready=True)
        self._clients = [
            Client(
                draw_place(self.rng),
                draw_bytes_per_s(self.rng),
                self.rng.uniform(0, READ_EVERY_S),
                turn=self.rng.random(),
            )
            for _ in range(config.clients)
        ]
        self._users = [  # they do not come all at once
            User(number, self._clients[number % config.clients], self.rng.uniform(0, WARM_UP_S / 2))
            for number in range(config.users)
        ]
        self._acts_at_s_U = np.array([user.acts_at_s for user in self._users])
        self._tokens_U = np.zeros(config.users)
        """Through all blocks, since counting began."""

    def run(self) -> Report:
        samples: list[Sample] = []
        seconds = int(WARM_UP_S + self.config.minutes * 60)
        covered = counted = 0
        users_bound = 0.0
        joins = self.counts["joins"]
        done = Counter[str]()
        for second in range(seconds):
            self.now_s = float(second)
            self._live()
            self._read()
            answered = self._serve()
            if second < WARM_UP_S:
                joins, done = self.counts["joins"], Counter(self.counts)
                self.failures.clear()
                self.first_token_s.clear()
                self._tokens_U[:] = 0.0
                continue
            whole = self._whole(s for p in self.peers.values() if p.state is PeerState.ONLINE for s in p.spans)
            covered, counted = covered + whole, counted + 1
            self.counts["answered"] += answered
            if (second - WARM_UP_S) % USERS_BOUND_S == 0:
                users_bound = self._users_bound()
            if second % SAMPLE_S == 0:
                if second % TOLD_S == 0:
                    self._tell(second, counted)
                samples.append(
                    Sample(
                        at_s=second - WARM_UP_S,
                        tokens_per_s=answered,
                        bound_tokens_per_s=self._bound(),
                        users_bound_tokens_per_s=users_bound,
                        covered=whole,
                        peers=sum(peer.state is PeerState.ONLINE for peer in self.peers.values()),
                    )
                )
        counts = self.counts - done
        rates = (self._tokens_U / counted).tolist()
        return Report(
            config=self.config,
            samples=tuple(samples),
            tokens_per_s=counts["answered"] / counted,
            written_tokens_per_s=counts["written"] / counted,
            again_tokens_per_s=counts["again"] / self.config.blocks / counted,
            bound_tokens_per_s=statistics.fmean(sample.bound_tokens_per_s for sample in samples),
            users_bound_tokens_per_s=statistics.fmean(sample.users_bound_tokens_per_s for sample in samples),
            coverage=covered / counted,
            first_token_s=statistics.median(self.first_token_s) if self.first_token_s else math.nan,
            fairness=_jain(rates),
            slowest_to_mean=min(rates) / (statistics.fmean(rates) or 1.0),
            joins=self.counts["joins"] - joins,
            moves=counts["moves"],
            heals=counts["heals"],
            healed_s_max=max(self._healed_s, default=0.0),
            downloaded_bytes=counts["downloaded"],
            hidden_bytes=counts["hidden"],
            replayed_bytes=counts["replayed"],
            rebuilt_routes=counts["rebuilt"],
            failures=dict(self.failures),
            busy_answers=counts["busy"],
            hops=statistics.fmean([len(user.hops) for user in self._users if user.hops] or [0]),
        )

    def _tell(self, second: int, counted: int) -> None:
        logger.info(
            "minute %d of %g: %d tokens/s so far, %.1f %% of the maximum flow now",
            (second - WARM_UP_S) // 60,
            self.config.minutes,
            self.counts["answered"] / counted,
            100 * self.counts["answered"] / counted / (self._bound() or 1.0),
        )

    # --- peers ---

    def _join(self, *, ready: bool = False) -> None:
        peer = draw_peer(next(self._numbers), self.config, self.rng)
        span = choose_span(self._records(), self.config.blocks, peer.max_blocks, self.now_s, peer.decode_s)
        spans = BlockSpans.of(span)
        downloaded, fetched_at_s = peer.fetch(spans, self.now_s)
        peer.load(spans, fetched_at_s)
        peer.looks_at_s = self.now_s + self.rng.uniform(0, TURN_S)
        if ready:
            peer.state, peer.ready_at_s = PeerState.ONLINE, self.now_s
        else:
            self.counts["downloaded"] += downloaded
        self.counts["joins"] += 1
        rate = self.config.churn_per_hour / 3600
        if rate:
            end_s = self.now_s + self.rng.expovariate(rate)
            if self.rng.random() < 0.5:
                peer.dies_at_s = end_s
            else:
                peer.leaves_at_s = end_s
        self.peers[peer.peer_id] = peer
        peer.row = self._rows.pop()
        self.sharing.idle(peer.row)
        peer.announce(self.config.blocks, self.now_s)

    def _gone(self, peer: Peer) -> None:
        del self.peers[peer.peer_id]
        self._rows.append(peer.row)
        self._disturbed = True

    def _live(self) -> None:
        now_s = self.now_s
        for peer in list(self.peers.values()):
            if peer.dies_at_s is not None and now_s >= peer.dies_at_s:
                self._gone(peer)
                self._dead.append(peer)
                self._join()
            elif peer.leaves_at_s is not None and now_s >= peer.leaves_at_s:
                if peer.state is PeerState.DRAINING:
                    self._gone(peer)
                    self._join()
                else:
                    self._disturbed = True
                    peer.state, peer.leaves_at_s = PeerState.DRAINING, now_s + 2 * RECORD_RENEW_S
                    peer.announce(self.config.blocks, now_s)
            elif peer.state is PeerState.JOINING and now_s >= peer.ready_at_s:
                peer.state, peer.moved_at_s = PeerState.ONLINE, now_s
                peer.announce(self.config.blocks, now_s)
            elif peer.record is not None and now_s >= peer.record.expires_at_s - RECORD_LIFETIME_S + RECORD_RENEW_S:
                peer.announce(self.config.blocks, now_s)
        self._dead = [peer for peer in self._dead if peer.record and peer.record.expires_at_s > now_s]
        self._rebalance()

    def _records(self) -> list[Announcement]:
        """What can be read now: also of the dead, until it expires."""
        return [peer.record for peer in (*self.peers.values(), *self._dead) if peer.record is not None]

    def _rebalance(self) -> None:
        """What every peer's `peers.serving.rebalance` would do now. Without a gap they look once a turn: more often
        changes nothing, because who may move stays the same for a turn."""
        now_s, records = self.now_s, self._records()
        online = [a for a in records if a.state is PeerState.ONLINE]
        missing = not self._whole(span for a in online for span in a.spans)
        if not missing:
            if self._open_since_s is not None:
                self._healed_s.append(now_s - self._open_since_s)
            self._open_since_s = None
        elif self._open_since_s is None:
            self._open_since_s = now_s
        late = self._arrivals.late(records, now_s)
        open_for_s = self._arrivals.open_for_s(now_s)
        of_span = defaultdict[BlockSpans, list[Announcement]](list)
        if not missing:
            for a in online:
                of_span[a.spans].append(a)
        for peer in list(self.peers.values()):
            if peer.move is not None:
                if now_s >= peer.moves_at_s:
                    self._move(peer, self._records(), late)
            elif peer.state is PeerState.ONLINE and (now_s >= peer.looks_at_s or (missing and now_s % LOOK_S == 0)):
                peer.looks_at_s = now_s + TURN_S
                if (
                    not missing
                    and peer.record is not None
                    and not has_turn(of_span[peer.record.spans], peer.record, now_s)
                ):
                    continue  # what `choose_move` would find out after much else
                move = choose_move(records, peer.peer_id, now_s, open_for_s=open_for_s, late=late)
                if move is not None and (move.heals or now_s - peer.moved_at_s >= REST_S):
                    peer.move, peer.ready, peer.moves_at_s = move, False, now_s + SETTLE_S
                    peer.announce(self.config.blocks, now_s)
                    records = self._records()

    def _move(self, peer: Peer, records: list[Announcement], late: frozenset[PeerId]) -> None:
        move = peer.move
        assert move is not None
        answered = self.peers if peer.ready else None
        if not stands(move, records, peer.peer_id, late=late, ready=peer.ready, answered=answered):
            peer.move = None
            peer.announce(self.config.blocks, self.now_s)
            return
        if not peer.ready:
            downloaded, peer.moves_at_s = peer.fetch(move.spans, self.now_s)
            self.counts["downloaded"] += downloaded
            peer.ready = True
            return
        peer.load(move.spans, self.now_s)
        self._disturbed = True
        self.counts["moves"] += 1
        self.counts["heals"] += move.heals
        peer.announce(self.config.blocks, self.now_s)

    # --- users ---

    def _read(self) -> None:
        for client in self._clients:
            if self.now_s >= client.reads_at_s:
                client.reads_at_s += READ_EVERY_S
                for peer in client.met:
                    if self.peers.get(peer.peer_id) is peer:
                        client.router.on_rtt(peer.peer_id, round_trip_s(client.where, peer.where), self.now_s)
                client.met.clear()
                fresh = [a for a in self._records() if client.seen.get(a.peer_id, -1) < a.sequence]
                client.seen.update((a.peer_id, a.sequence) for a in fresh)
                client.router.on_announcements(fresh, self.now_s)

    def _serve(self) -> int:
        """One second of everybody; returns the tokens that were answered."""
        acting = self._users if self._disturbed else self._at(self._acts_at_s_U <= self.now_s)
        self._disturbed = False
        for user in acting:
            user.act(self)
            self._show(user)
        credit_U = self.sharing.second(self.peers.values())
        left_U = self.sharing.left_U
        goes_on_U = left_U - credit_U > DONE
        ends_U = (left_U > 0) & ~goes_on_U
        answered = 0
        left_U[goes_on_U] -= credit_U[goes_on_U]
        for user in self._at(ends_U):
            at = user.number
            tokens = user.advance(self, float(left_U[at]), float(credit_U[at]))
            answered += tokens
            self._tokens_U[at] += tokens
            self._show(user)
        return answered

    def _at(self, chosen_U: np.ndarray) -> list[User]:
        return [self._users[at] for at in np.nonzero(chosen_U)[0]]

    def _show(self, user: User) -> None:
        user.show(self)
        self._acts_at_s_U[user.number] = user.acts_at_s

    def _whole(self, spans: Iterable[BlockSpan]) -> bool:
        return len(set(itertools.chain.from_iterable(set(spans)))) == self.config.blocks

    def _users_bound(self) -> float:
        """What all users would get if everybody had the swarm for himself, by the routes that are planned then."""
        alive = (peer.record for peer in self.peers.values() if peer.record is not None)
        idle = [replace(a, queue_s=0.0, sessions=0) for a in alive if a.state is PeerState.ONLINE]
        total = 0.0
        for client in self._clients:
            router = Router()
            router.on_announcements(idle, self.now_s)
            for peer in client.seen:
                if peer in self.peers:
                    router.on_rtt(peer, round_trip_s(client.where, self.peers[peer].where), self.now_s)
            request = RouteRequest(model=MODEL, num_blocks=self.config.blocks, bytes_per_token=BYTES_PER_TOKEN)
            try:
                planned = router.plan(request, self.now_s).hops
            except NoRoute:
                return 0.0
            hops = [(self.peers[hop.peer_id], len(hop.span)) for hop in planned]
            way = trips(client, [peer for peer, _ in hops])
            compute_s = sum(blocks * peer.decode_s for peer, blocks in hops)
            prompt_s = (way.of(CHUNK) + compute_s * (1 + (CHUNK - 1) / BATCH)) / CHUNK
            prompt, new = self.config.prompt_tokens, self.config.new_tokens
            users = sum(user.client is client for user in self._users)
            total += users * (prompt + new) / (prompt * prompt_s + new * (way.of(1) + compute_s))
        return total

    def _bound(self) -> float:
        """The maximum flow through those who are there now."""
        parts: list[tuple[BlockSpan, float]] = []
        for peer in self.peers.values():
            if peer.state is PeerState.ONLINE:
                parts += [(span, len(span) / peer.spans.num_blocks / peer.token_s) for span in peer.spans]
        return max_flow(by_span(parts), self.config.blocks)


def simulate(config: SimulationConfig) -> Report:
    """Run it all."""
    return Simulation(config).run()


def _jain(rates: list[float]) -> float:
    """1 when everybody gets the same, 1/n when one gets all (Jain, Chiu, Hawe 1984)."""
    squares = sum(rate * rate for rate in rates)
    return sum(rates) ** 2 / (len(rates) * squares) if squares else 1.0

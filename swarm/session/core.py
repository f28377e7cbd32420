"""The state of one session at the client: events in, actions out. Sans-IO: no clock, no network, no tensors.

Owns the epoch, the route, the order of steps and the budget of attempts; decides what to do when a hop refuses, dies,
stalls or forgets. The driver performs the actions and reports what happened.

    state     event                              next      actions
    idle      submit                             routing   NeedRoute
    routing   route_ready                        opening   Release of what is left out; OpenHops (next epoch)
    routing   route_ready, nothing pending       idle
    routing   no_route                           failed    Release, Fail
    routing   result of the route before         routing   StepDone
    opening   opened by the last missing hop     ready     Skip what every hop holds already; SendStep: replay of what
                                                           some hop lacks before the pending steps, then these under
                                                           their own ids, each from where it is known furthest down
    ready     submit                             ready     SendStep
    ready     result                             ready     StepDone, SendStep (window moves)
    ready     busy                               pausing   Wait; what is not answered is sent again afterwards
    pausing   submit                             pausing
    pausing   result                             pausing   StepDone
    pausing   timer                              ready     SendStep
    on route  no room: preempted, or busy when   routing   Release of that hop, NeedRoute; idle when nothing is pending
              opened or once too often
    routing   route_ready, over that hop again   waiting   Wait, once and not for long: others hold what they hold
    on route  no room again, or too many hops    waiting   Release, Wait: nobody waits for long while it holds pages
    waiting   timer                              routing   NeedRoute
    ready     behind window                      opening   OpenHops (next epoch) of the same route
    ready     hop leaves, steps under way        ready     until the last of them is answered: no further one is sent
    on route  hop lost, refused, leaves          routing   Release of that hop, NeedRoute; idle when nothing is pending
    idle, routing  hop leaves                              Release of that hop
    on route  hop forgot, journal lost, stalled  routing   NeedRoute; idle when nothing is pending
    any live  too many attempts without progress failed    Release, Fail
    any       close                              closed    Release

On route are opening, ready and pausing. Standbys have a table of their own (`standby`). Every step is answered once:
results of an older epoch or of an unknown step are ignored. Attempts and waiting are counted between two results that
the caller asked for, so a session ends within its budget or makes progress.

*Repair.* A hop that fails is let go of, and only its blocks are planned anew. The others are opened again under the
next epoch and keep what they hold, as far as no pending step undoes it (`_sure_until`). Each says what it holds and how
far back its journal reaches; `repair` makes of this what must be sent again, and from where: a healthy hop hears
nothing twice, and the client sends positions only where the first hop lacks them. Once a hop was found to hold less
than it said, and for the second half of the attempts, nobody keeps anything and everything is sent again.

Steps of different entries may be under way together where no hop runs both, as only one sender keeps an order.

A pause keeps the session's pages, and nobody waits for them. "busy" to a step never means that pages are missing, that
is "preempted": it means a full queue of works, too many bytes in flight, or for a fork a full table of sessions. The
first two empty by themselves, because every work that is queued either runs or is preempted at once; the third is
done without after `max_busy_repeats`. Meanwhile a hop takes the pages of a paused session for an older one
without asking: the pause, or the step after it, then ends as "preempted".
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

import msgspec
from msgspec.structs import replace

from routing.errors import SwarmError
from routing.ids import PeerId, SessionId, StepId
from routing.router import Hop, Route
from swarm.session import repair
from swarm.session.standby import Standby, Standbys


class State(enum.Enum):
    IDLE = "idle"
    ROUTING = "routing"
    OPENING = "opening"
    READY = "ready"
    PAUSING = "pausing"
    WAITING = "waiting"
    FAILED = "failed"
    CLOSED = "closed"


PIECE_POSITIONS_MIN = 32
STANDBY_FED_EVERY_S = 20.0
"""At least, while the session goes on: well within a lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """Budgets of one session."""

    max_attempts: int = 12
    """Routes tried without one result in between, replays not counted, before the session fails."""
    busy_patience_s: float = 300.0
    """How long "busy" and "preempted" are waited out without one result in between, replays not counted. For so long
    are hops believed, too, that say they are computing a step."""
    max_hold_s: float = 2.0
    """Of a wait for one hop's room while others hold the session's pages."""
    max_full: int = 3
    """Hops without room that are replaced between two results, before the session lets go of everything and waits."""
    max_wait_s: float = 30.0
    """Of one wait, whatever the hop asked for: by then another may have room."""
    window: int = 4
    """Steps sent and not yet answered: enough to keep every hop of a short route at work during a long prompt."""
    chunk_positions: int = 256
    """Positions per step of a replay, and of a prompt, at most."""
    standby: bool = False
    """Keep a second peer filled for every hop."""
    standby_lag: int = 32
    """Positions that a standby may lack: one short forward at a switch, and as long a one for each so many steps."""
    standby_rest: int = 16
    """Steps before another standby is looked for where one was lost; twice as many each time."""
    max_busy_repeats: int = 4
    """How often a busy step is repeated in place, before its session lets go of its pages and starts over."""

    def chunk(self, count: int) -> int:
        """Positions per step where `count` are to be sent: pieces that are under way together, so that the hops of a
        route work at the same time, and none so small that a hop's time goes into reading its weights."""
        pieces = max(1, min(self.window, count // PIECE_POSITIONS_MIN))
        return max(1, min(self.chunk_positions, -(-count // pieces)))


class PendingStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step that is not answered yet."""

    step: StepId
    first: int
    count: int
    want_from: int
    replay: bool = False
    alone: bool = False
    """Nothing else of the session may be under way with it. So is the first step of a fork, and one that rolls back: if
    a hop missed it, the next step would seem to fit on what it should have removed."""
    parent: SessionId | None = None
    hop: int = 0
    """The first hop that runs it: the client sends it to hop 0; for any other, the hop before it has its journal."""
    until: int | None = None
    """No hop from this one on runs it, and the one before it answers; None: the last one."""

    def clashes(self, other: PendingStep) -> bool:
        """Some hop would run both, and they do not come to it by one way."""
        ends = [step.until for step in (self, other) if step.until is not None]
        return self.hop != other.hop and max(self.hop, other.hop) < min(ends, default=self.hop + other.hop + 1)


# --- actions ---


@dataclass(frozen=True, slots=True)
class NeedRoute:
    """Plan a route without `avoid` and answer with `route_ready` or `no_route`.

    `keep`: hops that hold the session. If others can serve what lies between them, these stay as they are.
    """

    avoid: frozenset[PeerId]
    keep: tuple[Hop, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenHops:
    """Install `route` under `epoch`; answer each hop with `opened`, `refused` or `hop_lost`.

    A hop may be asked what it holds of the first `offer` positions: they will be sent as they now stand in the history.
    One of an older route goes on with at most its number in `keep`, and need not be asked unless `forgot`.
    """

    route: Route
    epoch: int
    offer: int
    keep: tuple[int, ...]
    forgot: bool = False


@dataclass(frozen=True, slots=True)
class Skip:
    """Every hop holds the first `positions` of the session already. So much for `steps`: their outputs nobody wants."""

    positions: int
    steps: tuple[PendingStep, ...]


class SendStep(msgspec.Struct, frozen=True):
    """Send to the first hop; where `step.hop` is another one, have the hop before that send it from its journal."""

    step: PendingStep
    epoch: int


class StepDone(msgspec.Struct, frozen=True):
    """The result belongs to this step, which is now answered."""

    step: PendingStep


@dataclass(frozen=True, slots=True)
class Release:
    """Tell these hops to forget the session."""

    hops: tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Call `timer` after `delay_s`, spread by up to a half so that clients do not return together."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Fail:
    """The session is over; every pending step fails with `error`."""

    error: SwarmError


@dataclass(frozen=True, slots=True)
class NeedStandbys:
    """Find for each of `hops`, if possible, another peer with the same blocks that is none of the route nor in `avoid`,
    and answer with `standbys_found`."""

    hops: tuple[Hop, ...]
    avoid: frozenset[PeerId]


@dataclass(frozen=True, slots=True)
class OpenStandby:
    """Install `hop` under `epoch` between the neighbours of the hop with the same blocks; answer with `opened` or
    `standby_lost`. `offer` and `keep` as in `OpenHops`."""

    hop: Hop
    epoch: int
    offer: int
    keep: int


@dataclass(frozen=True, slots=True)
class Feed:
    """Have `step` sent to a standby, in the background: by the hop before it or, where `step.hop` is 0, from here."""

    to: Hop
    step: PendingStep
    epoch: int


Action = NeedRoute | OpenHops | Skip | SendStep | StepDone | Release | Wait | Fail | NeedStandbys | OpenStandby | Feed


class SessionCore:
    """See the module. Every method returns the actions to perform, in order."""

    def __init__(
        self, session: SessionId, config: SessionConfig, cuts: Callable[[int], Sequence[int]] = lambda end: ()
    ) -> None:
        """`cuts(end)`: positions below `end` at which a replay must begin a new step, in order."""
        self.session = session
        self.config = config
        self._cuts = cuts
        self.state = State.IDLE
        self.epoch = 0
        self.route: Route | None = None
        """The one that was installed last, also while another one is looked for."""
        self.attempts = 0
        self._pending: deque[PendingStep] = deque()
        self._sent: dict[StepId, PendingStep] = {}
        self._unsent: deque[PendingStep] = deque()
        self._installed: tuple[Hop, ...] = ()
        """Hops that were opened and not released."""
        self._lost: set[PeerId] = set()
        """Peers that failed, or said that they leave, since the last route was ready."""
        self._farewell: SwarmError | None = None
        """What the last one to leave said."""
        self._unjournalled: set[PeerId] = set()
        """Peers whose journal had less than they said."""
        self._missing: set[tuple[PeerId, int]] = set()
        """Hops that are not open yet, each by its peer and first block."""
        self._holds: list[int] = []
        """Positions that each hop of the route held when it was opened."""
        self._journals: list[int] = []
        """The lowest position from which each hop could then send again what it sent."""
        self._offer = 0
        self._keep: tuple[int, ...] = ()
        """What the hops of the route were asked for and told to keep when it was opened."""
        self._held = 0
        """Positions that every hop of the route held when it was opened."""
        self._offers = True
        self._trusts = True
        """Whether hops may go on with what they hold."""
        self._forgot = False
        self._avoid: set[PeerId] = set()
        self._next_step = 0
        self._end = 0
        """Where the last submitted step ends."""
        self._waited_s = 0.0
        self._full: dict[PeerId, float] = {}
        """Peers that had no room since the last result, and how long they asked to be left alone; 0: that is over."""
        self._busy_repeats = 0
        self._behind_busy: set[StepId | None] = set()
        """Steps that may have met a gap once, because a hop had no room for one before them. They are sent again."""
        self._parent: SessionId | None = None
        self._standbys = Standbys(config.standby_rest)
        self._standby_lag = config.standby_lag
        self._reaches: dict[tuple[PeerId, int], int] = {}
        """Of hops that were standbys and are opened on the route for the first time: up to where to believe them."""

    # --- questions ---

    @property
    def alive(self) -> bool:
        return self.state not in (State.FAILED, State.CLOSED)

    @property
    def outstanding(self) -> bool:
        """True while the driver should be hearing from somebody."""
        return self.state is State.OPENING or (self.state is State.READY and bool(self._sent))

    @property
    def crowded(self) -> bool:
        """True while several steps are to arrive in order, and so must travel in one lane."""
        return len(self._sent) + len(self._unsent) > 1

    @property
    def unborn(self) -> bool:
        """True for a fork whose first step is not answered: its parent must not be released yet."""
        return self._parent is not None

    def uses(self, peer: PeerId) -> bool:
        """Whether `peer` was opened for this session and not released."""
        return any(hop.peer_id == peer for hop in self._installed)

    def standby_at(self, peer: PeerId, start: int | None = None) -> bool:
        """Whether `peer` stands by, for the hop that begins with `start` or for any."""
        return self._standbys.uses(peer) if start is None else self._standbys.at(peer, start) is not None

    @property
    def standby_hops(self) -> tuple[Hop, ...]:
        return tuple(standby.hop for standby in self._standbys)

    @property
    def owing(self) -> set[PeerId]:
        """Standbys that were asked for something and have not answered."""
        return {s.hop.peer_id for s in self._standbys if s.feed is not None or not s.open}

    def feeds(self, step: StepId, epoch: int) -> bool:
        """Whether a step of this epoch only fills a standby, and is not answered yet."""
        return epoch == self.epoch and self._standbys.fed_by(step) is not None

    @property
    def pending(self) -> tuple[PendingStep, ...]:
        return tuple(self._pending)

    def sent(self, step: StepId, epoch: int) -> PendingStep | None:
        """The unanswered step that a result of this epoch would answer."""
        return self._sent.get(step) if epoch == self.epoch else None

    def due(self, step: StepId, epoch: int) -> bool:
        """Whether a step that was to be sent still is."""
        return self.state is State.READY and self.sent(step, epoch) is not None

    # --- events from the owner ---

    def fork(self, child: SessionId, cuts: Callable[[int], Sequence[int]] = lambda end: ()) -> SessionCore:
        """A session that shares this one's route and forks from it at every hop with its first step.

        Where this session has no route at present, the child finds its own and replays.
        """
        core = SessionCore(child, self.config, cuts)
        core._avoid = set(self._avoid)
        if self.state is State.READY and not self._sent and not self.unborn:
            core.state, core.route, core.epoch = State.READY, self.route, self.epoch
            core._installed = self._installed
            core._parent = self.session
        return core

    def submit(self, first: int, count: int, want_from: int) -> tuple[StepId, list[Action]]:
        """A new step over positions [first, first + count). Steps are answered in the order of submission, but
        for one that was lost on its way between hops which hold its positions all the same."""
        assert self.alive, f"submit in state {self.state}"
        assert 0 <= want_from <= count
        assert count > 0
        rolls_back, self._end = first < self._end, first + count
        if rolls_back:
            self._standbys.rolled_back(first)
        step = PendingStep(step=self._new_id(), first=first, count=count, want_from=want_from, alone=rolls_back)
        self._pending.append(step)
        if self.state is State.IDLE:
            return step.step, self._need_route()
        if self.state in (State.READY, State.PAUSING):
            self._unsent.append(step)
        return step.step, self._go_on() if self.state is State.READY else []

    def close(self) -> list[Action]:
        """Idempotent."""
        if self.state is State.CLOSED:
            return []
        actions = self._release()
        self.state = State.CLOSED
        self._pending.clear()
        return actions

    # --- events from the network ---

    def route_ready(self, route: Route) -> list[Action]:
        if self.state is not State.ROUTING:
            return []
        if not self._pending:
            return self._idle()
        if delay_s := max((self._full.get(hop.peer_id, 0.0) for hop in route.hops), default=0.0):
            self._full = dict.fromkeys(self._full, 0.0)
            self.state = State.WAITING
            return [Wait(delay_s)]
        self.epoch += 1
        self.route = route
        self.state = State.OPENING
        self._sent.clear()
        peers = {hop.peer_id for hop in route.hops}
        known = {(hop.peer_id, hop.span) for hop in self._installed}
        spans = {hop.span for hop in route.hops}
        for hop in route.hops:
            if (standby := self._standbys.take(hop)) is not None:
                known.add((hop.peer_id, hop.span))
                self._reaches[hop.peer_id, hop.span.start] = standby.reach
        unused = [standby.hop for standby in self._standbys if standby.hop.span not in spans]
        actions = self._let_go(hop for hop in (*self._installed, *unused) if hop.peer_id not in peers)
        for hop in unused:
            self._standbys.forget(hop)
        self._installed = route.hops
        self._missing = {(hop.peer_id, hop.span.start) for hop in route.hops}
        self._offer, sure = self._settled_until() if self._offers else 0, self._sure_until()
        self._keep = tuple(
            min(sure, self._reaches.get((hop.peer_id, hop.span.start), sure)) if (hop.peer_id, hop.span) in known else 0
            for hop in route.hops
        )
        self._holds, self._journals = [0] * len(route.hops), [0] * len(route.hops)
        actions.append(OpenHops(route, self.epoch, self._offer, self._keep, self._forgot))
        return actions + [self._open_standby(standby, min(sure, standby.reach)) for standby in self._standbys]

    def no_route(self, error: SwarmError) -> list[Action]:
        return self._fail(error) if self.state is State.ROUTING else []

    def opened(self, peer: PeerId, start: int, epoch: int, held: int = 0, journal: int = 0) -> list[Action]:
        """The hop at `peer` that begins with block `start` holds the first `held` positions of what it was offered or
        told to keep, and can send again what it sent from `journal` on."""
        if epoch == self.epoch and (standby := self._standbys.at(peer, start)) is not None:
            self._standbys.opened(standby, held)
            return self._tend()
        if self.state is not State.OPENING or epoch != self.epoch or (peer, start) not in self._missing:
            return []
        assert self.route is not None
        self._missing.discard((peer, start))
        index = next(i for i, hop in enumerate(self.route.hops) if (hop.peer_id, hop.span.start) == (peer, start))
        self._holds[index] = min(held, max(self._offer, self._keep[index]))
        self._journals[index] = self._holds[index] if peer in self._unjournalled else journal
        if self._missing:
            return []
        self.state = State.READY
        self._lost.clear()
        self._reaches.clear()
        self._forgot = False
        self._held = min(self._holds)
        actions = self._skip()
        self._unsent = deque(self._steps_beyond_held())
        return actions + self._send()

    def result(self, step: StepId, epoch: int) -> list[Action]:
        """The last hop answered `step`."""
        answered = self._sent.pop(step, None) if epoch == self.epoch else None
        if answered is None or self.state not in (State.READY, State.PAUSING, State.ROUTING):
            return []
        self._busy_repeats = 0
        self._behind_busy.discard(step)
        self._parent = None
        actions: list[Action] = []
        if not answered.replay:
            self.attempts = 0
            self._trusts = True
            self._waited_s = 0.0
            self._full.clear()
            self._pending.remove(next(p for p in self._pending if p.step == step))
            actions.append(StepDone(answered))
            self._standbys.answered()
        return actions + ([*self._go_on(), *self._tend()] if self.state is State.READY else [])

    def paced(self, step_s: float) -> None:
        """Steps of one position usually take so long. Where that is long, standbys lag behind by fewer of them: one
        that hears nothing forgets the session."""
        if step_s > 0:
            self._standby_lag = max(1, min(self.config.standby_lag, int(STANDBY_FED_EVERY_S / step_s)))

    def hop_lost(self, peer: PeerId, error: SwarmError) -> list[Action]:
        """The connection to `peer` ended, could not be made, or the peer is silent."""
        if self.uses(peer):
            self._lost.add(peer)
        return self._lose_standbys(peer) + (self._rebuild(error) if self._on_route(peer) else [])

    def hop_leaves(self, peer: PeerId, epoch: int, error: SwarmError, *, answers: bool = False) -> list[Action]:
        """A healthy hop gives the session up, for its owner or because it drains: others take its blocks.

        Where it `answers` what is under way, that is waited for, so that nothing is sent twice.
        """
        if epoch != self.epoch:
            return []
        actions = self._lose_standbys(peer)
        if not self.uses(peer):
            return actions
        self._lost.add(peer)
        self._farewell = error
        if self.state is State.READY and answers:
            return actions + self._go_on()
        if self._on_route(peer):
            return actions + self._rebuild(error)
        return actions + self._let_go(hop for hop in self._installed if hop.peer_id == peer)

    def forgotten(self, epoch: int, error: SwarmError, *, gap_at: StepId | None = None) -> list[Action]:
        """A healthy hop does not hold what the session thinks (lease over, restart), or found a gap before a step."""
        if epoch != self.epoch or not self._on_route(None):
            return []
        if gap_at in self._behind_busy:
            self._behind_busy.discard(gap_at)
            return []
        if gap_at is None:
            self._forgot = True
        elif any(self._holds):  # some hop does not hold what it said it holds: everything is sent again,
            self._trusts = False
            self._offers = self._offers and any(self._keep)  # and if that was a prefix, none is believed any more
        return self._rebuild(error)

    def journal_lost(self, peer: PeerId, epoch: int, error: SwarmError) -> list[Action]:
        """`peer` does not keep what it was to send again: it computes it once more, from what comes from before it."""
        if epoch != self.epoch or not self._on_route(peer):
            return []
        self._unjournalled.add(peer)
        return self._rebuild(error)

    def behind_window(self, epoch: int, error: SwarmError) -> list[Action]:
        """A step goes back to where a healthy hop's layers with a window hold too little: the same hops hear everything
        again. What they have kept as a prefix they begin with."""
        return self._rebuild(error, self.route) if epoch == self.epoch and self._on_route(None) else []

    def stalled(self, error: SwarmError) -> list[Action]:
        """Nobody answers, though everybody is alive."""
        return self._rebuild(error) if self._on_route(None) else []

    def give_up(self, error: SwarmError) -> list[Action]:
        """No other route could help: what the caller gave is wrong, or the network is closing."""
        return self._fail(error) if self.alive else []

    def refused(self, peer: PeerId, epoch: int, error: SwarmError) -> list[Action]:
        """`peer` declines for a reason that waiting does not cure: the session goes elsewhere."""
        if epoch != self.epoch or not self._on_route(peer):
            return []
        self._avoid.add(peer)
        return self._lose_standbys(peer) + self._rebuild(error)

    def busy(
        self, peer: PeerId, epoch: int, retry_after_s: float, error: SwarmError, *, preempted: bool
    ) -> list[Action]:
        """A healthy hop has no room now."""
        if epoch != self.epoch or not self._on_route(peer):
            return []
        if self.state is State.PAUSING and not preempted:
            return []
        delay_s = min(max(0.05, retry_after_s) * 2 ** min(5, self._busy_repeats), self.config.max_wait_s)
        self._busy_repeats += 1
        self._behind_busy.update(self._sent)
        self._waited_s += delay_s
        if self._waited_s > self.config.busy_patience_s:
            return self._fail(error)
        if self.state is State.READY and not preempted and self._busy_repeats <= self.config.max_busy_repeats:
            self.state = State.PAUSING
            return [Wait(delay_s)]
        if not self._pending or (
            self._sure_until()
            and delay_s <= self.config.max_hold_s
            and peer not in self._full
            and len(self._full) < self.config.max_full
        ):
            if self._pending:
                self._full[peer] = delay_s
            return self._do_without({peer})
        self._full.clear()
        actions = self._release()
        self.state = State.WAITING
        return [*actions, Wait(delay_s)]

    def timer(self) -> list[Action]:
        """The wait is over."""
        if self.state is State.PAUSING:
            self.state = State.READY
            self._unsent.extendleft(reversed(self._sent.values()))
            self._sent.clear()
            return self._go_on()
        if self.state is State.WAITING:
            return self._need_route() if self._pending else self._idle()
        return []

    def standbys_found(self, epoch: int, hops: Sequence[Hop]) -> list[Action]:
        """Of those that were asked for; the others have none for now."""
        if epoch != self.epoch or self.route is None or self.state not in (State.READY, State.PAUSING):
            hops = ()
        route = () if self.route is None else self.route.hops
        spans, peers = {hop.span for hop in route}, {hop.peer_id for hop in route}
        new = self._standbys.found(hop for hop in hops if hop.span in spans and hop.peer_id not in peers)
        return [self._open_standby(standby, 0) for standby in new]

    def standby_lost(self, peer: PeerId, epoch: int) -> list[Action]:
        """A standby at `peer` failed, refused or has no room: the session goes on without it."""
        return self._lose_standbys(peer) if epoch == self.epoch else []

    def fed(self, peer: PeerId, step: StepId, epoch: int) -> list[Action]:
        """The standby at `peer` answered `step`."""
        standby = self._standbys.fed_by(step) if epoch == self.epoch else None
        if standby is None or standby.hop.peer_id != peer:
            return []
        self._standbys.fed(standby)
        return self._tend()

    def feed_failed(self, step: StepId, epoch: int, *, busy: bool) -> list[Action]:
        """The hop before a standby did not send it `step`. Where it was only `busy`, or the session rolled back
        meanwhile, it will send what is right then."""
        standby = self._standbys.fed_by(step) if epoch == self.epoch else None
        if standby is None:
            return []
        if not busy and standby.reach >= standby.feed_end:
            return self._lose_standbys(standby.hop.peer_id)
        standby.feed = None
        return []

    # --- inside ---

    def _new_id(self) -> StepId:
        self._next_step += 1
        return StepId(self._next_step)

    def _on_route(self, peer: PeerId | None) -> bool:
        if self.route is None or self.state not in (State.OPENING, State.READY, State.PAUSING):
            return False
        return peer is None or any(hop.peer_id == peer for hop in self.route.hops)

    def _settled_until(self) -> int:
        """Up to here the history holds what the pending steps send, and no later one of them undoes it."""
        end = self._pending[0].first
        for step in self._pending:
            if step.first < end:
                return min(step.first for step in self._pending)
            end = step.first + step.count
        return end

    def _sure_until(self) -> int:
        """Up to here whatever a hop holds of the session is what the history says: what a pending step undoes, some hop
        may not have undone."""
        if not self._trusts or self.attempts > self.config.max_attempts // 2:
            return 0
        return min([self._settled_until(), *(step.first for step in self._pending if step.alone)])

    def _skip(self) -> list[Action]:
        """Take off the pending steps what every hop holds and nobody wants to hear."""
        wanted = (step.first + step.want_from for step in self._pending if step.want_from < step.count)
        self._held = min(self._held, self._settled_until(), *wanted)
        if not self._held:
            return []
        steps = tuple(step for step in self._pending if step.first + step.count <= self._held)
        self._pending = deque(step for step in self._pending if step not in steps)
        return [Skip(self._held, steps)]

    def _steps_beyond_held(self) -> Iterable[PendingStep]:
        """The pending steps, and before each of them a replay of what some hop lacks by then."""
        steps = [_beyond(step, self._held) for step in self._pending]
        begin = repair.begin_at(self._holds, self._journals, [(step.first, step.first + step.count) for step in steps])
        held = self._held
        for step in steps:
            # a later step may have been answered before an earlier one: there the pending steps leave a hole
            bounds = [held, *(cut for cut in self._cuts(step.first) if cut > held), step.first]
            for start, end in pairwise(bounds):
                for leg in repair.legs(begin, start, end):
                    yield from self._replay_chunks(leg)
            alone = self._held <= step.first < held
            for leg in repair.legs(begin, step.first, step.first + step.count):
                if leg.until == len(begin):
                    yield replace(step, alone=alone, hop=leg.hop)
                else:
                    yield from self._replay_chunks(leg)
            held = step.first + step.count

    def _replay_chunks(self, leg: repair.Leg) -> Iterable[PendingStep]:
        chunk = self.config.chunk(leg.end - leg.first)
        until = None if leg.until == len(self._holds) else leg.until
        for first in range(leg.first, leg.end, chunk):
            count = min(chunk, leg.end - first)
            yield PendingStep(
                step=self._new_id(), first=first, count=count, want_from=count, replay=True, hop=leg.hop, until=until
            )

    def _go_on(self) -> list[Action]:
        """Send on, or part with the hops that leave as soon as nothing is under way."""
        if not self._lost:
            return self._send()
        assert self._farewell is not None
        return [] if self._sent else self._rebuild(self._farewell)

    def _send(self) -> list[Action]:
        actions: list[Action] = []
        while self._unsent and len(self._sent) < self.config.window:
            step = self._unsent[0]
            if self._parent is not None:
                step = replace(step, parent=self._parent, alone=True)
            if any(step.alone or other.alone or step.clashes(other) for other in self._sent.values()):
                break
            self._unsent.popleft()
            self._sent[step.step] = step
            actions.append(SendStep(step, self.epoch))
        return actions

    def _release(self) -> list[Action]:
        """Let go of everything."""
        self.route = None
        self._end_route()
        self._sent.clear()
        return self._let_go((*self._installed, *self.standby_hops))

    def _let_go(self, hops: Iterable[Hop]) -> list[Action]:
        gone = tuple(hops)
        self._installed = tuple(hop for hop in self._installed if hop not in gone)
        self._standbys.drop({hop.peer_id for hop in gone})  # whoever is told to forget the session forgets all of it
        return [Release(gone)] if gone else []

    # --- standbys ---

    def _answered_until(self) -> int:
        """Every hop has run these positions, and no pending step undoes them."""
        return min((step.first for step in self._pending), default=self._end)

    def _tend(self) -> list[Action]:
        """Look for standbys and fill them, where the route works."""
        if not self.config.standby or self.state is not State.READY or self._lost or self.unborn:
            return []
        assert self.route is not None
        actions: list[Action] = []
        if lacking := self._standbys.lacking(self.route.hops):
            actions.append(NeedStandbys(lacking, frozenset(self._avoid)))
        answered = self._answered_until()
        lagging = [s for s in self._standbys if s.open and s.feed is None and answered - s.held >= self._standby_lag]
        return actions + [self._feed(standby, answered) for standby in lagging]

    def _feed(self, standby: Standby, answered: int) -> Feed:
        assert self.route is not None
        first = standby.held
        ends = [cut for cut in self._cuts(answered) if cut > first]
        end = min(answered, first + self.config.chunk_positions, *ends)
        hop = next(at for at, hop in enumerate(self.route.hops) if hop.span == standby.hop.span)
        count = end - first
        step = PendingStep(
            step=self._new_id(), first=first, count=count, want_from=count, replay=True, hop=hop, until=hop + 1
        )
        self._standbys.feeds(standby, step.step, end)
        return Feed(standby.hop, step, self.epoch)

    def _open_standby(self, standby: Standby, keep: int) -> OpenStandby:
        standby.open, standby.feed = False, None
        offer = 0 if keep or not self._offers else self._answered_until()
        standby.offered = max(keep, offer)
        return OpenStandby(standby.hop, self.epoch, offer, keep)

    def _lose_standbys(self, peer: PeerId) -> list[Action]:
        gone = [standby.hop for standby in self._standbys if standby.hop.peer_id == peer]
        if not gone:
            return []
        self._standbys.rest()
        self._standbys.drop({peer})
        return [] if self.uses(peer) else [Release(tuple(gone))]

    def _end_route(self) -> None:
        """Nothing more is sent over it. Its last answers may still come."""
        self._unsent.clear()
        self._behind_busy.clear()
        self._missing.clear()
        self._parent = None

    def _idle(self) -> list[Action]:
        self.state = State.IDLE
        return []

    def _need_route(self) -> list[Action]:
        self.state = State.ROUTING
        gone = self._lost | self._avoid
        kept = [hop for hop in self._installed if hop.peer_id not in gone]
        taken = {hop.span.start for hop in kept}
        kept += [hop for hop in self.standby_hops if hop.span.start not in taken]
        return [NeedRoute(frozenset(self._avoid), tuple(sorted(kept, key=lambda hop: hop.span.start)))]

    def _rebuild(self, error: SwarmError, route: Route | None = None) -> list[Action]:
        """With `route`, over the same hops, which forget the session when it is opened there again."""
        self.attempts += 1
        if self.attempts > self.config.max_attempts:
            return self._fail(error)
        if route is not None and self._pending:
            self._end_route()
            self._installed = ()  # so that nothing is kept
            actions = self._let_go(self.standby_hops)
            self.state = State.ROUTING
            return actions + self.route_ready(route)
        if self._pending and not self._sure_until():
            return self._release() + self._need_route()
        return self._do_without(self._lost | self._avoid)

    def _do_without(self, gone: Set[PeerId]) -> list[Action]:
        """The other hops keep what they hold, and others take the place of these."""
        self._end_route()
        actions = self._let_go(hop for hop in self._installed if hop.peer_id in gone)
        return actions + (self._need_route() if self._pending else self._idle())

    def _fail(self, error: SwarmError) -> list[Action]:
        actions = self._release()
        self.state = State.FAILED
        self._pending.clear()
        return [*actions, Fail(error)]


def _beyond(step: PendingStep, held: int) -> PendingStep:
    """The step without the positions below `held`, of which no output is wanted."""
    cut = max(0, held - step.first)
    return replace(step, first=step.first + cut, count=step.count - cut, want_from=step.want_from - cut)

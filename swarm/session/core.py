"""The state of one session at the client: events in, actions out. Sans-IO: no clock, no network, no tensors.

Owns the epoch, the route, the order of steps and the budget of attempts; decides what to do when a hop refuses, dies,
stalls or forgets. The driver performs the actions and reports what happened.

    state     event                              next      actions
    idle      submit                             routing   NeedRoute
    routing   route_ready                        opening   Release of what is left out; OpenHops (next epoch)
    routing   route_ready, nothing pending       idle
    routing   no_route                           failed    Release, Fail
    routing   no_route, some had refused         routing   NeedRoute: they may be asked again
    routing, waiting  result of the route before           StepDone
    opening   opened by the last missing hop     ready     Skip what every hop holds already; SendStep: replay of what
                                                           some hop lacks before the pending steps, then these under
                                                           their own ids, each from where it is known furthest down
    ready     submit                             ready     SendStep
    ready     result                             ready     StepDone, SendStep (window moves)
    ready     busy                               pausing   Wait; what is not answered is sent again afterwards, and
                                                           over this route no more than `window` at a time
    pausing   submit                             pausing
    pausing   result                             pausing   StepDone
    pausing   timer                              ready     SendStep
    on route  no room: preempted, or busy when   routing   Release of that hop, NeedRoute; idle when nothing is pending
              opened or once too often
    routing   route_ready, over that hop again   waiting   Wait, once and not for long: others hold what they hold
    on route  no room again, or too many hops    waiting   Release, Wait: nobody waits for long while it holds pages
    waiting   timer                              routing   NeedRoute; idle when nothing is pending
    on route  behind window                      opening   OpenHops (next epoch) of the same route; idle when nothing is
                                                           pending
    ready     hop leaves, steps under way        ready     until the last of them is answered: no further one is sent
    ready     result, the last of those          routing   Release of that hop, NeedRoute; idle when nothing is pending
    pausing   timer, when a hop leaves           routing   Release of that hop, NeedRoute; idle when nothing is pending
    on route  hop lost, refused, leaves          routing   Release of that hop, NeedRoute; idle when nothing is pending
    idle, routing  hop leaves                              Release of that hop
    on route  hop forgot, journal lost, stalled  routing   NeedRoute; idle when nothing is pending
    on route  no progress for too long           failed    Release, Fail
    on route  unusable to one hop                routing   Release of that hop, NeedRoute; idle when nothing is pending
    on route  unusable to another, from client   failed    Release, Fail
    any live  given up                           failed    Release, Fail
    any       close                              closed    Release

On route are opening, ready and pausing. Whatever else comes changes no state, and a test holds sessions to this table.
No progress is too many attempts, or too long a wait for room. Standbys have a table of their own (`standby`). Every
step is answered once: results of an older epoch or of an unknown step are ignored. Attempts and waiting are counted
between two results that the caller asked for, so a session ends within its budget or makes progress.

*Refusals.* Who refused is avoided, but not for ever: it may have moved, and be the only one that has other blocks by
now. Where there is no route without those who refused, or a session lets go of everything for want of room, they may
be asked again; once between two results, as most reasons stay. A hop to which what it was sent is unusable may be wrong
itself: it is done without, and believed once another one says the same of the same sender, or there is no other.

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
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import partial

from peers.wire.messages import MAX_UNDER_WAY, UNDER_WAY_BYTES
from routing.errors import SwarmError
from routing.ids import PeerId, SessionId, StepId
from routing.routes import Hop, Route, machines
from swarm.session.actions import (
    Action,
    Fail,
    Feed,
    NeedRoute,
    NeedStandbys,
    OpenHops,
    OpenStandby,
    Release,
    SendStep,
    Skip,
    StepDone,
    Wait,
)
from swarm.session.opening import Opening
from swarm.session.standby import Standby, Standbys
from swarm.session.steps import PendingStep, Steps


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
    are hops believed, too, that say they are computing a step, where nobody could take their place."""
    hung_s_min: float = 10.0
    """How long elsewhere, at least: see `pace.hung_after_s`."""
    gap_patience_s: float = 90.0
    """How long blocks that nobody offers are waited for once the caller has had outputs, which would be lost: peers
    that refused come back meanwhile, and placement heals a gap within a minute. Who has had none is told soon."""
    max_hold_s: float = 2.0
    """Of a wait for one hop's room while others hold the session's pages."""
    max_full: int = 3
    """Hops without room that are replaced between two results, before the session lets go of everything and waits."""
    max_wait_s: float = 30.0
    """Of one wait, whatever the hop asked for: by then another may have room."""
    window: int = 4
    """Steps sent and not yet answered that may always be, however short the route is and whoever else sends."""
    chunk_positions: int = 256
    """Positions per step of a replay, and of a prompt, at most."""
    position_bytes: int = 1
    """Of the hidden state of one position, as it travels."""
    standby: bool = False
    """Keep a second peer filled for every hop."""
    standby_lag: int = 32
    """Positions that a standby may lack: one short forward at a switch, and as long a one for each so many steps."""
    standby_rest: int = 16
    """Steps before another standby is looked for where one was lost; twice as many each time."""
    max_busy_repeats: int = 4
    """How often a busy step is repeated in place, before its session lets go of its pages and starts over."""

    def under_way(self, hops: Sequence[Hop], crowd: int = 1) -> int:
        """Steps sent and not yet answered, at most, where `crowd` sessions send much at the same time: all together two
        for each machine, one that it computes and one that is on its way there."""
        return max(self.window, min(2 * machines(hops), MAX_UNDER_WAY) // crowd)

    def under_way_positions(self, crowd: int = 1) -> int:
        """In these steps, where they are more than `window`; all sessions of the crowd have the bytes together."""
        return UNDER_WAY_BYTES // (self.position_bytes * crowd)

    def chunk(self, count: int, hops: Callable[[], Sequence[Hop]] = tuple, crowd: int = 1) -> int:
        """Positions per step where `count` are to be sent over `hops`, which are asked for where they matter: pieces
        that are under way together, so that the hops work at the same time, and none so small that a hop's time goes
        into reading its weights."""
        size, pieces = self.chunk_positions, count // PIECE_POSITIONS_MIN
        if pieces > self.window:
            under_way = self.under_way(hops(), crowd)
            pieces = min(pieces, under_way)
            size = min(size, max(PIECE_POSITIONS_MIN, self.under_way_positions(crowd) // under_way))
        return max(1, min(size, -(-count // max(1, pieces))))


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
        self.crowd = 1
        """Sessions of the same client that send much, this one with them: others keep the hops at work, too."""
        self._window = config.window
        """Steps that may be under way on the present route, were this session alone."""
        self._steps = Steps()
        self._installed: tuple[Hop, ...] = ()
        """Hops that were opened and not released."""
        self._lost: set[PeerId] = set()
        """Peers that failed, or said that they leave, since the last route was ready."""
        self._farewell: SwarmError | None = None
        """What the last one to leave said."""
        self._unjournalled: set[PeerId] = set()
        """Peers whose journal had less than they said."""
        self._opening = Opening()
        """Of the route."""
        self._offers = True
        self._trusts = True
        """Whether hops may go on with what they hold."""
        self._forgot = False
        self._avoid: set[PeerId] = set()
        """Peers that refused."""
        self._pardoned = False
        """Whether such were asked again since the last result."""
        self._doubted: dict[PeerId | None, PeerId | None] = {}
        """Senders, None for this client, of whom a hop said since then that what they send is unusable, and who did;
        None where there was no route without it."""
        self._given = False
        """Whether the caller has had outputs."""
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
        return self.state is State.OPENING or (self.state is State.READY and bool(self._steps.sent))

    @property
    def positions(self) -> int:
        """Of the longest step under way; 1 where there is none."""
        return max((step.count for step in self._steps.sent.values()), default=1)

    @property
    def wanted(self) -> int:
        """Positions that come back of the step under way of which most do; 1 where there is none."""
        return max((step.count - step.want_from for step in self._steps.sent.values()), default=1)

    @property
    def crowded(self) -> bool:
        """True while several steps are to arrive in order, and so must travel in one lane."""
        return self._steps.crowded

    @property
    def sends_much(self) -> bool:
        """Several steps are not answered, or may have to be sent again."""
        return self.crowded or len(self._steps.pending) > 1 or self.state in (State.ROUTING, State.OPENING)

    @property
    def unborn(self) -> bool:
        """True for a fork whose first step is not answered: its parent must not be released yet."""
        return self._parent is not None

    def believes(self, peer: PeerId, sender: PeerId | None) -> bool:
        """Whether `peer` is believed, should it say that what `sender` sent it is unusable."""
        return self._on_route(peer) and self._doubted.get(sender, peer) != peer

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
        return tuple(self._steps.pending)

    def sent(self, step: StepId, epoch: int) -> PendingStep | None:
        """The unanswered step that a result of this epoch would answer."""
        return self._steps.sent.get(step) if epoch == self.epoch else None

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
        if self.state is State.READY and not self._steps.sent and not self.unborn:
            core.state, core.route, core.epoch = State.READY, self.route, self.epoch
            core._window = self._window
            core._installed = self._installed
            core._parent = self.session
        return core

    def submit(self, first: int, count: int, want_from: int) -> tuple[StepId, list[Action]]:
        """A new step over positions [first, first + count). Steps are answered in the order of submission, but
        for one that was lost on its way between hops which hold its positions all the same."""
        assert self.alive, f"submit in state {self.state}"
        assert 0 <= want_from <= count
        assert count > 0
        step = self._steps.ask(first, count, want_from)
        if step.alone:
            self._standbys.rolled_back(first)
        if self.state is State.IDLE:
            return step.step, self._need_route()
        if self.state in (State.READY, State.PAUSING):
            self._steps.to_send(step)
        return step.step, self._go_on() if self.state is State.READY else []

    def close(self) -> list[Action]:
        """Idempotent."""
        if self.state is State.CLOSED:
            return []
        actions = self._release()
        self.state = State.CLOSED
        self._steps.pending.clear()
        return actions

    # --- events from the network ---

    def route_ready(self, route: Route) -> list[Action]:
        if self.state is not State.ROUTING:
            return []
        if not self._steps.pending:
            return self._idle()
        if delay_s := max((self._full.get(hop.peer_id, 0.0) for hop in route.hops), default=0.0):
            self._full = dict.fromkeys(self._full, 0.0)
            self.state = State.WAITING
            return [Wait(delay_s)]
        self.epoch += 1
        self.route = route
        self._window = self.config.under_way(route.hops)
        self.state = State.OPENING
        self._steps.sent.clear()
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
        offer, sure = self._steps.settled_until() if self._offers else 0, self._sure_until()
        keep = tuple(
            min(sure, self._reaches.get((hop.peer_id, hop.span.start), sure)) if (hop.peer_id, hop.span) in known else 0
            for hop in route.hops
        )
        self._opening = Opening(route.hops, offer, keep)
        actions.append(OpenHops(route, self.epoch, offer, keep, self._forgot))
        return actions + [self._open_standby(standby, min(sure, standby.reach)) for standby in self._standbys]

    def no_route(self, error: SwarmError) -> list[Action]:
        if self.state is not State.ROUTING:
            return []
        if not self._pardon():
            return self._fail(error)
        self._doubted = dict.fromkeys(self._doubted)
        return self._need_route()

    def opened(self, peer: PeerId, start: int, epoch: int, held: int = 0, journal: int = 0) -> list[Action]:
        """The hop at `peer` that begins with block `start` holds the first `held` positions of what it was offered or
        told to keep, and can send again what it sent from `journal` on."""
        if epoch == self.epoch and (standby := self._standbys.at(peer, start)) is not None:
            self._standbys.opened(standby, held)
            return self._tend()
        if self.state is not State.OPENING or epoch != self.epoch:
            return []
        believed = None if peer in self._unjournalled else journal
        if not self._opening.opened(peer, start, held, believed) or not self._opening.complete:
            return []
        self.state = State.READY
        self._lost.clear()
        self._reaches.clear()
        self._forgot = False
        held, steps = self._steps.skip(self._opening.held)
        self._opening.held = held
        chunk = partial(self.config.chunk, crowd=self.crowd)
        again = self._opening.steps(self._steps.pending, self._cuts, chunk, self._steps.new_id)
        self._steps.to_send(*again)
        return ([Skip(held, steps)] if held else []) + self._send()

    def result(self, step: StepId, epoch: int) -> list[Action]:
        """The last hop answered `step`."""
        answered = self._steps.sent.pop(step, None) if epoch == self.epoch else None
        if answered is None or self.state not in (State.READY, State.PAUSING, State.ROUTING, State.WAITING):
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
            self._pardoned = False
            self._doubted.clear()
            self._steps.answered(step)
            self._given = self._given or answered.want_from < answered.count
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
        elif self._opening.held_any:  # some hop does not hold what it said it holds: everything is sent again,
            self._trusts = False  # and if that was a prefix, none is believed any more
            self._offers = self._offers and any(self._opening.keep)
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
        """`peer` declines for a reason that waiting does not cure soon: the session goes elsewhere, if it can."""
        if epoch != self.epoch or not self._on_route(peer):
            return []
        self._avoid.add(peer)
        return self._lose_standbys(peer) + self._rebuild(error)

    def unusable(self, peer: PeerId, sender: PeerId | None, epoch: int, error: SwarmError) -> list[Action]:
        """`peer` cannot use what the hop `sender` sent it, or where that is None this client."""
        if epoch != self.epoch or not self._on_route(peer):
            return []
        if not self.believes(peer, sender):
            self._doubted[sender] = peer
            return self.refused(peer, epoch, error)
        return self._fail(error) if sender is None else self.hop_lost(sender, error)

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
        self._window = self.config.window  # on this route, the others want to be computed as well
        self._behind_busy.update(self._steps.sent)
        self._waited_s += delay_s
        if self._waited_s > self.config.busy_patience_s:
            return self._fail(error)
        if self.state is State.READY and not preempted and self._busy_repeats <= self.config.max_busy_repeats:
            self.state = State.PAUSING
            return [Wait(delay_s)]
        if not self._steps.pending or (
            self._sure_until()
            and delay_s <= self.config.max_hold_s
            and peer not in self._full
            and len(self._full) < self.config.max_full
        ):
            if self._steps.pending:
                self._full[peer] = delay_s
            return self._do_without({peer})
        self._full.clear()
        self._pardon()
        actions = self._release()
        self.state = State.WAITING
        return [*actions, Wait(delay_s)]

    def timer(self) -> list[Action]:
        """The wait is over."""
        if self.state is State.PAUSING:
            self.state = State.READY
            self._steps.send_again()
            return self._go_on()
        if self.state is State.WAITING:
            return self._need_route() if self._steps.pending else self._idle()
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
        if not busy and standby.steady:
            return self._lose_standbys(standby.hop.peer_id)
        standby.feed = None
        return []

    # --- inside ---

    def _on_route(self, peer: PeerId | None) -> bool:
        if self.route is None or self.state not in (State.OPENING, State.READY, State.PAUSING):
            return False
        return peer is None or any(hop.peer_id == peer for hop in self.route.hops)

    def _sure_until(self) -> int:
        """Up to here whatever a hop holds of the session is what the history says: what a pending step undoes, some hop
        may not have undone."""
        if not self._trusts or self.attempts > self.config.max_attempts // 2:
            return 0
        return self._steps.sure_until()

    def _go_on(self) -> list[Action]:
        """Send on, or part with the hops that leave as soon as nothing is under way."""
        if not self._lost:
            return self._send()
        assert self._farewell is not None
        return [] if self._steps.sent else self._rebuild(self._farewell)

    def _send(self) -> list[Action]:
        return [SendStep(step, self.epoch) for step in self._steps.send(self._most, self._parent)]

    def _most(self, step: PendingStep) -> int:
        """With how many steps, itself included, this one may be under way."""
        assert self.route is not None
        window = self._window
        if step.hop or step.until is not None:
            window = min(window, self.config.under_way(self.route.hops[step.hop : step.until]))
        positions = step.count + sum(other.count for other in self._steps.sent.values())
        if positions > self.config.under_way_positions(self.crowd):
            return self.config.window
        return max(self.config.window, window // self.crowd)

    def _release(self) -> list[Action]:
        """Let go of everything."""
        self.route = None
        self._end_route()
        self._steps.sent.clear()
        return self._let_go((*self._installed, *self.standby_hops))

    def _let_go(self, hops: Iterable[Hop]) -> list[Action]:
        gone = tuple(hops)
        self._installed = tuple(hop for hop in self._installed if hop not in gone)
        self._standbys.drop({hop.peer_id for hop in gone})  # whoever is told to forget the session forgets all of it
        return [Release(gone)] if gone else []

    # --- standbys ---

    def _tend(self) -> list[Action]:
        """Look for standbys and fill them, where the route works."""
        if not self.config.standby or self.state is not State.READY or self._lost or self.unborn:
            return []
        assert self.route is not None
        actions: list[Action] = []
        if lacking := self._standbys.lacking(self.route.hops):
            actions.append(NeedStandbys(lacking, frozenset(self._avoid)))
        answered = self._steps.answered_until()
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
            step=self._steps.new_id(), first=first, count=count, want_from=count, replay=True, hop=hop, until=hop + 1
        )
        self._standbys.feeds(standby, step.step, end)
        return Feed(standby.hop, step, self.epoch)

    def _open_standby(self, standby: Standby, keep: int) -> OpenStandby:
        self._standbys.opens(standby, keep)
        return OpenStandby(standby.hop, self.epoch, keep)

    def _lose_standbys(self, peer: PeerId) -> list[Action]:
        gone = [standby.hop for standby in self._standbys if standby.hop.peer_id == peer]
        if not gone:
            return []
        self._standbys.rest()
        self._standbys.drop({peer})
        return [] if self.uses(peer) else [Release(tuple(gone))]

    def _end_route(self) -> None:
        """Nothing more is sent over it. Its last answers may still come."""
        self._steps.withdraw()
        self._behind_busy.clear()
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
        lasting = self._pardoned or not self._avoid  # else there may be a route with those who refused
        patience_s = self.config.gap_patience_s if lasting and (self._given or self.unborn) else None
        return [NeedRoute(frozenset(self._avoid), tuple(sorted(kept, key=lambda hop: hop.span.start)), patience_s)]

    def _pardon(self) -> bool:
        """Whether peers that refused are no longer avoided, so that there may be a route now."""
        if self._pardoned or not self._avoid:
            return False
        self._pardoned = True
        self._avoid.clear()
        return True

    def _rebuild(self, error: SwarmError, route: Route | None = None) -> list[Action]:
        """With `route`, over the same hops, which forget the session when it is opened there again."""
        self.attempts += 1
        if self.attempts > self.config.max_attempts:
            return self._fail(error)
        if route is not None and self._steps.pending:
            self._end_route()
            self._installed = ()  # so that nothing is kept
            actions = self._let_go(self.standby_hops)
            self.state = State.ROUTING
            return actions + self.route_ready(route)
        if self._steps.pending and not self._sure_until():
            return self._release() + self._need_route()
        return self._do_without(self._lost | self._avoid)

    def _do_without(self, gone: Set[PeerId]) -> list[Action]:
        """The other hops keep what they hold, and others take the place of these."""
        self._end_route()
        actions = self._let_go(hop for hop in self._installed if hop.peer_id in gone)
        return actions + (self._need_route() if self._steps.pending else self._idle())

    def _fail(self, error: SwarmError) -> list[Action]:
        actions = self._release()
        self.state = State.FAILED
        self._steps.pending.clear()
        return [*actions, Fail(error)]

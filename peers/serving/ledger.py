"""The session table of one peer: who may do what to which session, and what was answered already.

A session has a place of its own for each hop that this peer is to it; below, "session" means one such place.

Sans-IO: messages and the time go in, verdicts come out. Knows sessions, epochs, positions and step ids; knows no
tensors (an answer is an opaque object with a size), no pages (the engine's), no network.

A session that is opened is promised room for as long as it is expected to become (`promises`). Who is not alone here
gets such a promise only where it can be kept: in what is free, less what was promised and is not held yet, and in the
owner's share. A promise takes no page. It is over while no step comes for `promise_s`, so that nobody keeps room
that is not used, and sessions that wait for each other do not wait for long.

A session passes through these states; every other event in a state is refused with the code in the last column.

    state     event                                      next      otherwise
    (none)    Open                                       installed unknown_session
    (none)    Step with a parent that is installed       installed unknown_session
    installed Open, higher epoch, same owner             installed stale_epoch / forbidden
    installed the same with `keep`, for the same blocks  installed, and goes on with the positions that it keeps
    installed Replay by its owner, this epoch            installed stale_epoch / forbidden
    installed Step, this epoch, allowed sender, no gap   installed stale_epoch / forbidden / gap
    installed Step sent once more that others overtook    installed nothing is done
    installed its first step fails, where it was a fork  (none): the repeated step forks again
    installed Close by its owner, lease expiry, owner's link lost → (none)

A step that starts below the positions held undoes what reached further: repeated, those steps run again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec

from peers.errors import Busy, Refused
from peers.serving.promises import Expectations
from peers.wire.messages import MAX_UNDER_WAY, Code, Open, Replay, Step
from routing.ids import BlockSpan, PeerId, Place, SessionId, StepId

MAX_TURNED_AWAY = 64
"""Who is remembered as waiting."""
NO_ROOM_S = 0.5
"""After which one asks again who found no room."""

Answer = TypeVar("Answer")
OwnerLink = TypeVar("OwnerLink")


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLimits:
    """Bounds of the table; every one protects the peer from one greedy or broken client."""

    lease_s: float = 60.0
    """A session that takes no step for this long is released."""
    max_positions: int
    """The most positions one session may hold: the model's context, and no more than the whole pool."""
    pool_positions: int | None = None
    """What all sessions together may hold; None where nothing counts them."""
    weight: Callable[[int], int] = int
    """What a session that holds so many positions takes of the pool: fewer, where layers of the model slide."""
    owner_share: float = 0.75
    """Of the pool: who holds as much, or was promised it, opens no further session while others have some, or were
    turned away lately; what there is goes on."""
    free_positions: Callable[[], int] | None = None
    """Of the pool: those that no session holds. None where nothing counts them."""
    expected_positions: int = 512
    """How long a session is expected to become before any was seen."""
    promise_s: float = 10.0
    """What was promised to a session is kept for it between two steps."""
    turned_away_s: float = 30.0
    """For so long who found no room counts as waiting for it: as long as clients wait between two attempts."""
    max_sessions: int = 4096
    max_sessions_per_owner: int = 512
    answers_per_session: int = MAX_UNDER_WAY
    """Of at most `max_answer_bytes` each. As many steps as a client has outstanding, at most: after a pause it repeats
    them all."""
    max_answer_bytes: int = 1 << 20
    """Larger answers are recomputed when asked for again: positions are absolute, so that is exact."""
    max_answers_bytes: int = 64 << 20
    """Of all sessions together; beyond it answers are recomputed too."""

    def __post_init__(self) -> None:
        if min(self.lease_s, self.max_positions, self.max_sessions, self.max_sessions_per_owner) <= 0:
            raise ValueError("ledger limits are positive")


class Run(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Compute this step, over positions `[first, end)`, and say by `completed` or `failed` how it went."""

    step: StepId
    epoch: int
    first: int
    end: int
    forks: bool
    """The session begins with it, as a fork of the step's parent."""


class Kept(msgspec.Struct, Generic[Answer], frozen=True):
    """The answer of a step that reached to position `end`."""

    answer: Answer
    answer_bytes: int
    end: int


@dataclass(slots=True, kw_only=True)
class Entry(Generic[Answer, OwnerLink]):
    """One installed session as this hop sees it."""

    place: Place
    owner: PeerId
    owner_link: OwnerLink
    epoch: int
    span: BlockSpan
    previous: PeerId | None
    next: PeerId | None
    next_addresses: tuple[str, ...]
    lease_expires_at_s: float
    newest: int = 0
    """Of the ids of steps that were accepted."""
    once_more: StepId | None = None
    """The last output that was sent to `next` again, as the link to it had ended."""
    relay_until_s: float = 0.0
    """Until then outputs go through the client without trying `next` again."""
    adapter: bytes | None = None
    """Of its owner's, by name."""
    standby: bool = False
    """It is held ready only, and the first to go."""
    told: int
    """So many positions it may come to hold by its client's word."""
    expected: int = 0
    """And was promised; 0 for standbys and forks, which have what there is."""
    feeds: PeerId | None = None
    """The standby for `next` that was sent something last."""
    positions: int = 0
    """Positions held once every accepted step has run; to begin with, those of a prefix that was kept."""
    born: bool = True
    """False for a fork whose first step has not run yet."""
    running: dict[StepId, Run] = field(default_factory=dict)
    """Accepted, neither answered nor undone."""
    answers: OrderedDict[StepId, Kept[Answer]] = field(default_factory=OrderedDict)


class Repeat(msgspec.Struct, Generic[Answer], frozen=True):
    """The step was answered before: deliver `answer` again."""

    answer: Answer


class AlreadyRunning(msgspec.Struct, frozen=True):
    """The same step is being computed; its answer will come."""


class Overtaken(msgspec.Struct, frozen=True):
    """The step came again, behind others that may have undone it: nothing is to be done. If it lacks what was lost
    before it, its client finds that out by itself."""


class Ledger(Generic[Answer, OwnerLink]):
    """See the module. All times are seconds of one monotonic clock."""

    def __init__(self, limits: LedgerLimits) -> None:
        self.limits = limits
        self._entries: dict[Place, Entry[Answer, OwnerLink]] = {}
        self._places_of: dict[PeerId, set[Place]] = {}
        self._answers_bytes = 0
        self.standbys: set[Place] = set()
        """Sessions that are only held ready."""
        self._expectations = Expectations(limits.expected_positions)
        self._turned_away: OrderedDict[PeerId, float] = OrderedDict()
        """Who found no room, and when, the latest last."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, place: Place) -> Entry[Answer, OwnerLink] | None:
        return self._entries.get(place)

    def before(self, place: Place) -> Entry[Answer, OwnerLink] | None:
        """The entry whose outputs go to `place` at another peer."""
        same = (entry for entry in self._entries.values() if entry.place.session == place.session)
        return next((entry for entry in same if entry.span.end == place.block), None)

    def last_answers(self, to: PeerId, since_s: float) -> list[tuple[Entry[Answer, OwnerLink], Answer]]:
        """What went to `to` since then and is the end of its session, as far as it was not too large to be kept; but
        for sessions of which something runs, that finds out by itself whether `to` is there."""
        found = []
        for entry in self._entries.values():
            if entry.next == to and entry.answers and not entry.running:
                last = next(reversed(entry.answers.values()))
                if last.end == entry.positions and entry.lease_expires_at_s - self.limits.lease_s >= since_s:
                    found.append((entry, last.answer))
        return found

    def entries(self) -> tuple[Entry[Answer, OwnerLink], ...]:
        return tuple(self._entries.values())

    def drop(self, place: Place) -> Entry[Answer, OwnerLink]:
        """Forget an installed session for the sake of others; returns it."""
        entry = self._entries[place]
        self._remove(place)
        return entry

    def owner_links(self) -> set[OwnerLink]:
        """The links whose end would end a session."""
        return {entry.owner_link for entry in self._entries.values()}

    def open(self, owner: PeerId, link: OwnerLink, message: Open, now_s: float) -> Entry[Answer, OwnerLink]:
        """Install a session or give it a new route; a new route holds no positions until its first step, or
        until the caller says how many it begins with.

        Raises Busy when the table or the owner's share is full, Refused (stale_epoch, forbidden) otherwise.
        """
        place = Place(SessionId(message.session), message.start)
        known = self._entries.get(place)
        told, expected = min(message.expects or self.limits.max_positions, self.limits.max_positions), 0
        if known is not None:
            if known.owner != owner:
                raise Refused("this session belongs to another client", code=Code.FORBIDDEN)
            if message.epoch <= known.epoch:
                raise Refused(f"epoch {message.epoch} after epoch {known.epoch}", code=Code.STALE_EPOCH)
        else:
            self._room_for(owner)
            if not message.standby:
                expected = self._admitted(owner, told, now_s)
        entry = Entry[Answer, OwnerLink](
            place=place,
            owner=owner,
            owner_link=link,
            epoch=message.epoch,
            span=BlockSpan(message.start, message.end),
            previous=None if message.previous is None else PeerId(message.previous),
            next=None if message.next is None else PeerId(message.next),
            next_addresses=message.next_addresses,
            lease_expires_at_s=now_s + self.limits.lease_s,
            adapter=message.adapter,
            standby=message.standby,
            told=told if known is None else known.told,
            expected=expected if known is None else known.expected,
        )
        self._install(entry)
        self._tell(entry, told, now_s)
        return entry

    def resume(self, owner: PeerId, link: OwnerLink, message: Open, now_s: float) -> Entry[Answer, OwnerLink] | None:
        """Give a session a new route on which it goes on with at most `message.keep` positions.

        None where there is nothing to go on with: then `open` is to be asked. Answers of the older route are forgotten,
        as their epoch is over; what runs goes on.
        """
        entry = self._entries.get(Place(SessionId(message.session), message.start))
        span = BlockSpan(message.start, message.end)
        if entry is None or entry.owner != owner or message.epoch <= entry.epoch or not message.keep:
            return None
        if entry.span != span or entry.adapter != message.adapter or not entry.born:
            return None
        self._undo(entry, beyond=message.keep)
        for step in list(entry.answers):
            self._discard(entry, step)
        entry.positions = min(entry.positions, message.keep)
        entry.epoch, entry.owner_link = message.epoch, link
        entry.previous = None if message.previous is None else PeerId(message.previous)
        following = None if message.next is None else PeerId(message.next)
        if entry.next != following:
            entry.next, entry.relay_until_s = following, 0.0
        entry.next_addresses, entry.standby = message.next_addresses, message.standby
        self._mark(entry)
        self._tell(entry, message.expects, now_s)
        entry.lease_expires_at_s = now_s + self.limits.lease_s
        return entry

    def replay(self, sender: PeerId, message: Replay, now_s: float) -> Entry[Answer, OwnerLink]:
        """Judge a request to send positions downstream again, and renew the lease. Raises Refused."""
        place = Place(SessionId(message.session), message.block)
        entry = self._entries.get(place)
        if entry is None:
            raise Refused(f"session {place} is not installed here", code=Code.UNKNOWN_SESSION)
        if sender != entry.owner:
            raise Refused("only a session's client asks for a replay", code=Code.FORBIDDEN)
        if message.epoch != entry.epoch:
            raise Refused(f"epoch {message.epoch}, this route is epoch {entry.epoch}", code=Code.STALE_EPOCH)
        end = message.first + message.count
        if message.to is not None and (not message.stop or message.to == sender):
            raise Refused("what is sent to a standby ends there", code=Code.MALFORMED)
        if entry.next is None or not message.count or message.want_from > message.count or end > entry.positions:
            raise Refused(f"positions {message.first} to {end} were not sent from here", code=Code.NOT_JOURNALLED)
        if message.to is not None:
            entry.feeds = PeerId(message.to)
        entry.lease_expires_at_s = now_s + self.limits.lease_s
        return entry

    def answerable(self, sender: PeerId, step: Step) -> PeerId:
        """Who answers for a step that `sender` brings: its session's owner where it may bring it, else itself."""
        entry = self._entries.get(Place(SessionId(step.session), step.block))
        if entry is None and step.parent is not None:
            entry = self._entries.get(Place(SessionId(step.parent), step.block))
        return sender if entry is None or sender != entry.previous else entry.owner

    def step(self, sender: PeerId, step: Step, now_s: float) -> tuple[Entry[Answer, OwnerLink], Verdict[Answer]]:
        """Judge a step and, if it is to run, count its positions. Renews the lease.

        Raises Refused with the code that the table above names, or Busy (fork into a full table).
        """
        place = Place(SessionId(step.session), step.block)
        step_id = StepId(step.step)
        entry = self._entries.get(place)
        parent = None if step.parent is None or step.again else Place(SessionId(step.parent), step.block)
        forked = entry is None and parent is not None
        if entry is None:
            entry = None if parent is None else self._fork(parent, place)
        if entry is None:
            raise Refused(f"session {place} is not installed here", code=Code.UNKNOWN_SESSION)
        if sender not in (entry.owner, entry.previous):
            raise Refused(f"{sender} is not the predecessor named for this route", code=Code.FORBIDDEN)
        if step.epoch != entry.epoch:
            raise Refused(f"epoch {step.epoch}, this route is epoch {entry.epoch}", code=Code.STALE_EPOCH)
        if step.count == 0 or step.want_from > step.count:
            raise Refused("a step of no positions, or that wants more than it has", code=Code.MALFORMED)
        if step.first + step.count > self.limits.max_positions:
            raise Refused(
                f"{step.first + step.count} positions, this peer holds at most {self.limits.max_positions} a session",
                code=Code.TOO_LONG,
            )
        if step_id in entry.running:
            return entry, AlreadyRunning()
        if step_id in entry.answers:
            entry.lease_expires_at_s = now_s + self.limits.lease_s
            return entry, Repeat(entry.answers[step_id].answer)
        if step.again and step.first != entry.positions and step_id <= entry.newest:
            return entry, Overtaken()
        if step.first > entry.positions:
            raise Refused(f"step at {step.first}, this hop holds {entry.positions} positions", code=Code.GAP)
        if forked:
            self._room_for(entry.owner)
            self._install(entry)
        self._undo(entry, beyond=step.first)
        self._tell(entry, step.expects, now_s)
        entry.lease_expires_at_s = now_s + self.limits.lease_s
        entry.positions = step.first + step.count
        entry.newest = max(entry.newest, step_id)
        run = Run(step=step_id, epoch=entry.epoch, first=step.first, end=entry.positions, forks=forked)
        entry.running[step_id] = run
        return entry, run

    def completed(
        self, entry: Entry[Answer, OwnerLink], run: Run, answer: Answer, answer_bytes: int, now_s: float
    ) -> bool:
        """Keep the answer of a step that ran, and renew the lease: a long step is no idle time.

        False when the session has ended or moved on, so that nobody wants the answer.
        """
        wanted = self._ended(entry, run)
        if self._entries.get(entry.place) is not entry:
            return False
        entry.born = True
        entry.lease_expires_at_s = now_s + self.limits.lease_s
        if wanted and run.epoch == entry.epoch and answer_bytes <= self.limits.max_answer_bytes:
            entry.answers[run.step] = Kept(answer, answer_bytes, run.end)
            self._answers_bytes += answer_bytes
            while len(entry.answers) > self.limits.answers_per_session:
                self._discard(entry, next(iter(entry.answers)))
            if self._answers_bytes > self.limits.max_answers_bytes:
                self._discard(entry, run.step)
        return True

    def failed(self, entry: Entry[Answer, OwnerLink], run: Run) -> bool:
        """A step did not run, so the session ends before it; False when nobody wants to know any more.

        Its promise is over, and how long it is tells nothing of how long sessions become: it may go on elsewhere.
        """
        if self._ended(entry, run):
            entry.positions = min(entry.positions, run.first)
            entry.expected = 0
        if self._entries.get(entry.place) is not entry or run.step in entry.running:
            return False  # moved on, or the same step is running again
        return entry.born or self._remove(entry.place)

    def close(self, owner: PeerId, sessions: Iterable[SessionId]) -> list[Place]:
        """Forget those of `sessions` that belong to `owner`, at all their places; returns these."""
        closed = set(sessions)
        gone = [place for place in self._places_of.get(owner, ()) if place.session in closed]
        return [place for place in gone if self._remove(place)]

    def link_lost(self, link: OwnerLink) -> list[Place]:
        """Forget every session opened over `link`; returns them."""
        gone = [place for place, entry in self._entries.items() if entry.owner_link is link]
        return [place for place in gone if self._remove(place)]

    def expire(self, now_s: float) -> list[Place]:
        """Forget sessions whose lease is over and that have no step running; returns them."""
        gone = [
            place for place, entry in self._entries.items() if entry.lease_expires_at_s <= now_s and not entry.running
        ]
        return [place for place in gone if self._remove(place)]

    # --- bookkeeping ---

    def _fork(self, parent: Place, child: Place) -> Entry[Answer, OwnerLink] | None:
        """What the child of an installed parent would be; installed only once its first step has been accepted."""
        known = self._entries.get(parent)
        if known is None:
            return None
        return Entry[Answer, OwnerLink](
            place=child,
            owner=known.owner,
            owner_link=known.owner_link,
            epoch=known.epoch,
            span=known.span,
            previous=known.previous,
            next=known.next,
            next_addresses=known.next_addresses,
            lease_expires_at_s=known.lease_expires_at_s,
            relay_until_s=known.relay_until_s,
            adapter=known.adapter,
            told=known.told,
            positions=known.positions,
            born=False,
        )

    def _room_for(self, owner: PeerId) -> None:
        mine = len(self._places_of.get(owner, ()))
        if len(self._entries) >= self.limits.max_sessions or mine >= self.limits.max_sessions_per_owner:
            raise Busy(f"{len(self._entries)} sessions here, {mine} of them yours", retry_after_s=1.0)

    def owed(self, now_s: float) -> int:
        """What owners were promised and do not hold yet, each within its share of the pool."""
        taken = (self._taken(owner, now_s) for owner in self._places_of)
        return sum(min(owed, max(0, self._share - held)) for held, owed in taken)

    def _promise(self, owner: PeerId, told: int, now_s: float, known: Entry[Answer, OwnerLink] | None = None) -> int:
        """How long a session that may become `told`, a new one or a `known` one, is expected to become.

        Raises Busy where that cannot be promised; to who is alone here everything can.
        """
        limits = self.limits
        expected = min(self._expectations.of(owner, told), limits.max_positions)
        if limits.pool_positions is None or self._alone(owner, now_s):
            return expected
        more = min(limits.weight(expected), self._share)
        if known is not None:
            more = max(0, more - limits.weight(known.positions) - self._owed(known, now_s))
        mine = sum(self._taken(owner, now_s))
        if mine + more > self._share:
            raise Busy(
                f"your sessions hold, or were promised, {mine} of this peer's {limits.pool_positions} positions",
                retry_after_s=NO_ROOM_S,
            )
        if limits.free_positions is not None and more > limits.free_positions() - self.owed(now_s):
            raise Busy(f"no {more} positions are free here that nobody was promised", retry_after_s=NO_ROOM_S)
        return expected

    def _admitted(self, owner: PeerId, told: int, now_s: float) -> int:
        """What is promised to a new session. Raises Busy, and remembers for whom."""
        self._turned_away.pop(owner, None)
        try:
            return self._promise(owner, told, now_s)
        except Busy:
            self._turned_away[owner] = now_s
            if len(self._turned_away) > MAX_TURNED_AWAY:
                self._turned_away.popitem(last=False)
            raise

    def _tell(self, entry: Entry[Answer, OwnerLink], told: int, now_s: float) -> None:
        """Where it may become longer than its client said before, that is promised like a new session, if there is
        room. Else its word stays what it was, and it goes on beyond it."""
        told = min(told, self.limits.max_positions)
        if told <= entry.told:
            return
        with suppress(Busy):
            expected = self._promise(entry.owner, told, now_s, entry)
            entry.told = told
            if entry.expected:
                entry.expected = expected

    @property
    def _share(self) -> int:
        """Of the pool, that one owner may have beside others."""
        return int(self.limits.owner_share * (self.limits.pool_positions or 0))

    def _alone(self, owner: PeerId, now_s: float) -> bool:
        """Whether nobody else has a session here or waits for one."""
        since_s = now_s - self.limits.turned_away_s
        waiting = any(other != owner and at_s > since_s for other, at_s in self._turned_away.items())
        return not waiting and self._places_of.keys() <= {owner}

    def _taken(self, owner: PeerId, now_s: float) -> tuple[int, int]:
        """Of the pool, what its sessions hold, and what they were promised beyond that."""
        entries = [self._entries[place] for place in self._places_of.get(owner, ())]
        held = sum(self.limits.weight(entry.positions) for entry in entries)
        return held, sum(self._owed(entry, now_s) for entry in entries)

    def _owed(self, entry: Entry[Answer, OwnerLink], now_s: float) -> int:
        if not entry.running and now_s >= entry.lease_expires_at_s - self.limits.lease_s + self.limits.promise_s:
            return 0
        # what runs may not have its pages yet
        held = min((run.first for run in entry.running.values()), default=entry.positions)
        return max(0, self.limits.weight(entry.expected) - self.limits.weight(held))

    def _undo(self, entry: Entry[Answer, OwnerLink], *, beyond: int) -> None:
        """Forget the steps that reached further than `beyond`."""
        for step in [step for step, kept in entry.answers.items() if kept.end > beyond]:
            self._discard(entry, step)
        for step in [step for step, run in entry.running.items() if run.end > beyond]:
            del entry.running[step]

    def _ended(self, entry: Entry[Answer, OwnerLink], run: Run) -> bool:
        """Whether the step still counts: it may have been undone, and run again, meanwhile."""
        if counts := entry.running.get(run.step) is run:
            del entry.running[run.step]
        return counts

    def _discard(self, entry: Entry[Answer, OwnerLink], step: StepId) -> None:
        self._answers_bytes -= entry.answers.pop(step).answer_bytes

    def _install(self, entry: Entry[Answer, OwnerLink]) -> None:
        if (replaced := self._entries.get(entry.place)) is not None:
            self._undo(replaced, beyond=0)
        self._entries[entry.place] = entry
        self._places_of.setdefault(entry.owner, set()).add(entry.place)
        self._mark(entry)

    def _mark(self, entry: Entry[Answer, OwnerLink]) -> None:
        (self.standbys.add if entry.standby else self.standbys.discard)(entry.place)

    def _remove(self, place: Place) -> bool:
        entry = self._entries.pop(place)
        if entry.expected:
            self._expectations.ended(entry.owner, entry.told, entry.positions)
        self.standbys.discard(place)
        self._undo(entry, beyond=0)
        owned = self._places_of[entry.owner]
        owned.discard(place)
        if not owned:
            del self._places_of[entry.owner]
        return True


Verdict = Run | Repeat[Answer] | AlreadyRunning | Overtaken

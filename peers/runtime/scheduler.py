"""Which queued works share the next forward. Pure: works in, batches out.

Owns the order of works and the shape of a batch; knows neither pages nor tensors nor time (it counts its own batches,
and is told what fits into a moment as a number of positions).

- Works of one session run in the order in which they were submitted, one at a time.
- A batch holds works of one `group` (same blocks, same rotary regime) and at most `token_budget` positions.
- Steps, of up to `STEP_TOKENS` positions (a decoded token, a few drafted ones), are never cut and go first. All other
  works fill what is left of a batch in pieces, prefills before the background; who has been passed over for
  `AGEING_BATCHES` counts as one class better, and again as long after that. Training is not among them: see `errands`.
- While a longer work waits, a quarter of the budget is kept for it. Where it cannot be beside steps, being of another
  group or getting no room there, it has forwards of its own, of which no two follow each other while steps wait.
- Steps that arrive while a long forward runs may be taken out of turn, beside it (`steps_beside`).
- Owners take turns within a forward: everybody's first work goes before anybody's second; equals go by who has waited
  longest. They take turns at forwards, too, each with its steps and with its longer works: who chose one least lately
  chooses the next, for what has waited longest of its own, however many sessions others have; what else that forward
  takes along counts for nobody's turn. So among n such claims each has every n-th forward, or every other one, and none
  of its sessions is forgotten. The background has one for each round of all steps, until it has waited for long.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass

from peers.wire.messages import Urgency

STEP_TOKENS = 16
MIN_TOKEN_BUDGET = 4 * STEP_TOKENS
"""So that a whole step fits beside the quarter that is kept for longer works."""
AGEING_BATCHES = 32
PIECE_TOKENS = 2 * STEP_TOKENS
"""A piece beside steps has at least so many positions, whatever was measured."""
OWN_SHARE = 0.02
"""Of its part of a forward, what a position takes at least beyond what the forward does anyway."""
REMEMBERED = 0.9
"""What the last forward but one counts for, of what the last one does, where forwards' times are laid on a line."""
TOLD_FOR = 32
"""Forwards of one size after which sizes are varied again: machines change, and what was told first may mislead."""
SPREAD = 0.25
"""How much the sizes of pieces must vary, as a share of their mean's square, to tell what a position takes from what
every forward does."""
EXTRA = 0.35
"""How much longer a token may take lately than at its quickest before works that can wait do, such that it stays below
half as long again with what no peer sees; a peer keeps to the part of it that is its own by the blocks it runs."""
CLAIMS_KEPT = 1024
"""Whose last turns are remembered while nothing of theirs is queued; who is forgotten waits a round longer, once."""
FORGETTING = 1.002
"""What was quickest counts for so much more with every step that follows: contexts grow, and machines change."""


Claim = tuple[str, bool]
"""An owner, with its steps or with its longer works."""


def claim_of(owner: str, tokens: int, urgency: Urgency) -> Claim:
    """Of a work of so many positions."""
    return owner, tokens <= STEP_TOKENS and urgency == Urgency.INTERACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A work as the scheduler sees it. `work` identifies it, and grows with every submission."""

    work: int
    session: int
    owner: str
    tokens: int
    group: Hashable
    urgency: Urgency = Urgency.INTERACTIVE

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError("a work has at least one position")

    @property
    def claim(self) -> Claim:
        return claim_of(self.owner, self.tokens, self.urgency)

    @property
    def is_step(self) -> bool:
        return self.claim[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """Positions `[offset, offset + tokens)` of a work, counted from the work's own first position."""

    work: int
    offset: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How many positions of longer works one forward may take now, so that nobody's next token is late."""

    beside_steps: int
    """In a forward that steps wait for. 0: none, longer works have forwards of their own."""
    alone: int


class Tempo:
    """How long forwards take here lately, and what that allows."""

    def __init__(self, slices: int, share: float = 1.0) -> None:
        """`slices`: into how many parts a long forward falls, between which steps are let in; `share`: of a model's
        blocks, those that run here."""
        self.step_s = 0.0
        """A forward of steps alone."""
        self.token_s = 0.0
        """One position of a longer work, beyond what every forward with one takes."""
        self._line = _Line()
        self._slices = slices
        self._share = share
        self._quick_s = self._lately_s = self._gap_s = 0.0

    def measured(self, seconds: float, *, steps: int, longer: int) -> None:
        """A forward took so long, with so many positions of steps and of longer works."""
        if not longer:
            self.step_s = _smoothed(self.step_s, seconds)
            return
        own_s = max(seconds - self.step_s if steps else seconds, 0.1 * seconds)
        if self._slices == 1:
            self.token_s = self._line.through(longer, own_s)
        else:
            self.token_s = _smoothed(self.token_s, own_s / longer)

    def answered(self, seconds: float, gap_s: float | None) -> None:
        """Steps were done so long after they had come, and so long after those before them of the same session."""
        self._quick_s = _quickest(self._quick_s, seconds)
        self._lately_s = _smoothed(self._lately_s, seconds)
        if gap_s is not None:
            self._gap_s = _quickest(self._gap_s, gap_s)

    @property
    def late(self) -> bool:
        """Whether steps take clearly longer than they could: they wait here, or somebody else is on the same cores."""
        return self._gap_s > 0 and self._lately_s - self._quick_s > EXTRA * self._share * self._gap_s

    def pace(self, budget: int, *, decoding: bool) -> Pace:
        """Such that steps wait about as long as they take themselves for a piece beside them, half as long for a slice;
        and for what every forward with such a piece takes, however small, which only fewer of them would spare.

        Where a forward falls into slices there are no pieces beside steps: reading a long context takes its time
        however few positions attend to it, and a slice ends soon. `decoding`: steps are to be expected.
        """
        fit = int(min(budget, self.step_s / self.token_s)) if self.token_s else budget
        if self._slices == 1:
            beside_steps = self._line.varied(max(PIECE_TOKENS, fit), budget)
            return Pace(beside_steps=beside_steps, alone=max(MIN_TOKEN_BUDGET, fit) if decoding else budget)
        piece = min(budget, fit * self._slices // 2) if decoding and self.token_s else budget
        return Pace(beside_steps=0, alone=max(PIECE_TOKENS, piece))

    def is_long(self, tokens: int) -> bool:
        """Whether a forward of so many positions takes so long that steps should be let in."""
        return tokens > MIN_TOKEN_BUDGET or tokens * self.token_s > 2 * self.step_s


class _Line:
    """What each position takes, of forwards that take something whatever is in them: the slope of the line of least
    squares through the last ones. Where they were too much of one size to show that, it is what it was."""

    def __init__(self) -> None:
        self._slope_s = 0.0
        self._told = False
        """Whether sizes showed it lately."""
        self._alike = 0
        """Forwards since they did."""
        self._odd = False
        self._moments = [0.0] * 5

    def through(self, positions: int, seconds: float) -> float:
        self._odd = not self._odd
        new = 1.0, positions, seconds, positions * positions, positions * seconds
        self._moments = [REMEMBERED * old + more for old, more in zip(self._moments, new, strict=True)]
        count, x, y, xx, xy = self._moments
        spread = count * xx - x * x
        if spread > SPREAD * x * x:
            self._told, self._alike = True, 0
            self._slope_s = max((count * xy - x * y) / spread, OWN_SHARE * y / x)
        else:
            self._alike += 1
            self._told = self._told and self._alike < TOLD_FOR
        self._slope_s = min(self._slope_s or y / x, y / x)  # every forward takes something, and not less than nothing
        return self._slope_s

    def varied(self, positions: int, budget: int) -> int:
        """As many, or every other time so few or so many that their forwards tell, until they have."""
        if self._told or not self._odd:
            return positions
        return positions // 4 if positions >= 4 * STEP_TOKENS else min(budget, 4 * positions)


def _quickest(known_s: float, new_s: float) -> float:
    return min(new_s, FORGETTING * known_s) if known_s else new_s


def _smoothed(known_s: float, new_s: float) -> float:
    return known_s + 0.3 * (new_s - known_s) if known_s else new_s


@dataclass(slots=True, eq=False)
class _Entry:
    item: Item
    claim: Claim
    waiting_since: int
    done: int = 0


class Scheduler:
    """Lines of works, one per session, and the choice among their heads."""

    def __init__(self, token_budget: int) -> None:
        if token_budget < MIN_TOKEN_BUDGET:
            raise ValueError(f"a batch needs room for at least {MIN_TOKEN_BUDGET} positions, not {token_budget}")
        self.token_budget = token_budget
        self.queued_tokens = 0
        self._queued: dict[Claim, int] = {}
        """Of these, whose they are; nobody with none."""
        self._entries: dict[int, _Entry] = {}
        self._lines: dict[int, deque[_Entry]] = {}
        self._batches = 0
        self._turns: dict[Claim, int] = {}
        """When each chose last; who is new comes behind those who wait already."""
        self._turn = 0
        self._longer_alone = -1
        """The last batch of longer works alone."""

    def has_room(self, claim: Claim, tokens: int, most: int) -> bool:
        """Whether a claim may have so many positions more queued: `most` while it is the only one, and never more than
        are then left of twice as many, of which n claims have the same part at most and leave that to the next.

        As Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches" (1998), with α = 1.
        """
        left = 2 * most - self.queued_tokens - tokens
        return not self.queued_tokens or self._queued.get(claim, 0) + tokens <= left

    def ahead(self, claim: Claim, tokens: int) -> int:
        """Positions that run before a claim, in turns with others, is done with what it has queued, or with so many."""
        turns = max(self._queued.get(claim, 0), tokens)
        return sum(min(queued, turns) for queued in self._queued.values())

    def submit(self, item: Item) -> None:
        entry = self._entries[item.work] = _Entry(item, item.claim, self._batches)
        self._lines.setdefault(item.session, deque()).append(entry)
        self._count(entry.claim, item.tokens)
        self._turns.setdefault(entry.claim, self._turn)
        if len(self._turns) > CLAIMS_KEPT + len(self._entries):
            queued = {entry.claim for entry in self._entries.values()}
            self._turns = {claim: turn for claim, turn in self._turns.items() if claim in queued}

    def advance(self, work: int, tokens: int) -> bool:
        """`tokens` more positions of the work are done. Returns whether it is complete, and then forgets it."""
        entry = self._entries[work]
        entry.done += tokens
        entry.waiting_since = self._batches
        self._count(entry.claim, -tokens)
        assert entry.done <= entry.item.tokens
        if entry.done < entry.item.tokens:
            return False
        self.remove(work)
        return True

    def remove(self, work: int) -> None:
        """Forget a work that failed, was cancelled or is complete."""
        entry = self._entries.pop(work)
        self._count(entry.claim, entry.done - entry.item.tokens)
        line = self._lines[entry.item.session]
        line.remove(entry)
        if not line:
            del self._lines[entry.item.session]

    def _count(self, claim: Claim, tokens: int) -> None:
        """So many positions more, or fewer, are queued."""
        self.queued_tokens += tokens
        self._queued[claim] = self._queued.get(claim, 0) + tokens
        if not self._queued[claim]:
            del self._queued[claim]

    def works_of(self, session: int) -> list[int]:
        """The session's works in order."""
        return [entry.item.work for entry in self._lines.get(session, ())]

    def next_batch(self, pace: Pace | None = None) -> list[Pick]:
        """The works for the next forward, empty when none is ready. Changes nothing but whose turn is next."""
        groups = self._heads()
        if not groups:
            return []
        if pace is not None and not pace.beside_steps:
            groups = [(steps, []) for steps, _ in groups if steps] + [([], longer) for _, longer in groups if longer]
        self._batches += 1
        steps, longer = self._choose(groups)
        if not steps:
            self._longer_alone = self._batches
        claim = self._whose_turn(steps + longer)
        self._count_turn(claim)
        room = self.token_budget
        limit = room if pace is None else pace.beside_steps if steps else pace.alone
        picks = self._whole(steps, claim, room - min(room // 4, limit) if longer else room)
        room = min(limit, room - sum(pick.tokens for pick in picks))
        for entry in self._in_order(longer, claim):
            if room:
                tokens = min(room, entry.item.tokens - entry.done)
                picks.append(Pick(work=entry.item.work, offset=entry.done, tokens=tokens))
                room -= tokens
        return picks

    def steps_beside(self, running: Collection[int], fits: Callable[[int], bool] = lambda work: True) -> list[Pick]:
        """Steps, none of a session in `running`, for a forward of their own while another one pauses, among the works
        that find room. Changes nothing: `ran_beside` tells which of them ran."""
        heads = [[entry for entry in steps if fits(entry.item.work)] for steps, _ in self._heads(running)]
        if not (groups := [steps for steps in heads if steps]):
            return []
        steps = min(groups, key=self._next_turn)
        return self._whole(steps, self._whose_turn(steps), self.token_budget)

    def ran_beside(self, works: Iterable[int]) -> None:
        """These are in a forward, at least one: whoever of them was next has had a turn."""
        self._count_turn(self._whose_turn(self._entries[work] for work in works))

    @property
    def only_background(self) -> bool:
        """Whether works wait, and all that could run now are of the background."""
        heads = [line[0].item.urgency for line in self._lines.values()]
        return bool(heads) and all(urgency == Urgency.BACKGROUND for urgency in heads)

    def _heads(self, without: Collection[int] = ()) -> list[tuple[list[_Entry], list[_Entry]]]:
        """What is first in each session's line, by groups, as their steps and their longer works."""
        groups: dict[Hashable, tuple[list[_Entry], list[_Entry]]] = {}
        for session, line in self._lines.items():
            if session not in without:
                steps, longer = groups.setdefault(line[0].item.group, ([], []))
                (steps if line[0].claim[1] else longer).append(line[0])
        return list(groups.values())

    def _choose(self, groups: list[tuple[list[_Entry], list[_Entry]]]) -> tuple[list[_Entry], list[_Entry]]:
        """The group to run."""
        if len(groups) == 1:
            return groups[0]
        ready, alone = [group for group in groups if group[0]], [group for group in groups if not group[0]]
        with_steps = min(ready, key=lambda group: self._next_turn(group[0] + group[1]), default=None)
        without = min(alone, key=lambda group: self._next_turn(group[1]), default=None)
        if with_steps is None or without is None:
            chosen = with_steps or without
            assert chosen is not None
            return chosen
        next_turn = self._next_turn(without[1])
        if next_turn[0]:  # who can wait does, until no step that waits has been passed over by such a forward
            longer_first = all(entry.waiting_since >= self._longer_alone for steps, _ in ready for entry in steps)
        else:
            longer_first = next_turn < self._next_turn(with_steps[0] + with_steps[1])
        return without if longer_first and self._longer_alone < self._batches - 1 else with_steps

    def _whole(self, steps: Iterable[_Entry], first: Claim, room: int) -> list[Pick]:
        picks = []
        for entry in self._in_order(steps, first):
            if entry.item.tokens <= room:
                picks.append(Pick(work=entry.item.work, offset=0, tokens=entry.item.tokens))
                room -= entry.item.tokens
        return picks

    def _in_order(self, entries: Iterable[_Entry], first: Claim) -> list[_Entry]:
        """By class; within each everybody's oldest work, then everybody's second; of equals those of `first`, and then
        whichever has waited longest."""
        ranks: Counter[tuple[int, str]] = Counter()
        order: list[tuple[tuple[int, int, bool, int, int], _Entry]] = []
        for entry in sorted(entries, key=lambda entry: entry.item.work):
            line = self._class(entry), entry.item.owner
            order.append(((line[0], ranks[line], entry.claim != first, entry.waiting_since, entry.item.work), entry))
            ranks[line] += 1
        return [entry for _, entry in sorted(order, key=lambda ranked: ranked[0])]

    def _whose_turn(self, entries: Iterable[_Entry]) -> Claim:
        """Who chooses the forward that takes from these works."""
        return min(entries, key=self._turn_of).claim

    def _count_turn(self, claim: Claim) -> None:
        self._turn += 1
        self._turns[claim] = self._turn

    def _next_turn(self, entries: Iterable[_Entry]) -> tuple[int, int, int, int]:
        return min(map(self._turn_of, entries))

    def _turn_of(self, entry: _Entry) -> tuple[int, int, int, int]:
        """By class; within each by who chose least lately, and then what of theirs has waited longest."""
        return self._class(entry), self._turns[entry.claim], entry.waiting_since, entry.item.work

    def _class(self, entry: _Entry) -> int:
        return max(0, entry.item.urgency - (self._batches - entry.waiting_since) // AGEING_BATCHES)

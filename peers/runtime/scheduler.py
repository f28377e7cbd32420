"""Which queued works share the next forward. Pure: works in, batches out.

Owns the order of works and the shape of a batch; knows neither pages nor tensors nor time (it counts its own batches,
and is told what fits into a moment as a number of positions).

- Works of one session run in the order in which they were submitted, one at a time.
- A batch holds works of one `group` (same blocks, same rotary regime) and at most `token_budget` positions.
- Steps, of up to `STEP_TOKENS` positions (a decoded token, a few drafted ones), are never cut and go first. All other
  works fill what is left of a batch in pieces, prefills before training before background; who has been passed over for
  `AGEING_BATCHES` counts as one class better.
- While a longer work waits, a quarter of the budget is kept for it, and among several groups, or where longer works get
  no room beside steps, one forward of longer works alone follows each round of steps: so it does not starve.
- Steps that arrive while a long forward runs may be taken out of turn, beside it (`steps_beside`).
- Owners take turns: everybody's first work goes before anybody's second; equals go by who has waited longest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass

from peers.wire.messages import Urgency

STEP_TOKENS = 16
MIN_TOKEN_BUDGET = 4 * STEP_TOKENS
"""So that a whole step fits beside the quarter that is kept for longer works."""
AGEING_BATCHES = 32
EXTRA = 0.35
"""How much longer a token may take lately than at its quickest before works that can wait do, such that it stays below
half as long again with what no peer sees; a peer keeps to the part of it that is its own by the blocks it runs."""
FORGETTING = 1.002
"""What was quickest counts for so much more with every step that follows: contexts grow, and machines change."""


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
    def is_step(self) -> bool:
        return self.tokens <= STEP_TOKENS and self.urgency == Urgency.INTERACTIVE


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
        """One position of a longer work."""
        self._slices = slices
        self._share = share
        self._quick_s = self._lately_s = self._gap_s = 0.0

    def measured(self, seconds: float, *, steps: int, longer: int) -> None:
        """A forward took so long, with so many positions of steps and of longer works."""
        if not longer:
            self.step_s = _smoothed(self.step_s, seconds)
        else:
            own_s = seconds - self.step_s if steps else seconds
            self.token_s = _smoothed(self.token_s, max(own_s, 0.1 * seconds) / longer)

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
        """Such that steps wait about as long as they take themselves for a piece beside them, half as long for a slice.

        Where a forward falls into slices there are no pieces beside steps: reading a long context takes its time
        however few positions attend to it, and a slice ends soon. `decoding`: steps are to be expected.
        """
        fit = int(min(budget, self.step_s / self.token_s)) if self.token_s else budget
        if self._slices == 1:
            return Pace(beside_steps=max(STEP_TOKENS, fit), alone=max(MIN_TOKEN_BUDGET, fit) if decoding else budget)
        piece = min(budget, fit * self._slices // 2) if decoding and self.token_s else budget
        return Pace(beside_steps=0, alone=max(2 * STEP_TOKENS, piece))

    def is_long(self, tokens: int) -> bool:
        """Whether a forward of so many positions takes so long that steps should be let in."""
        return tokens > MIN_TOKEN_BUDGET or tokens * self.token_s > 2 * self.step_s


def _quickest(known_s: float, new_s: float) -> float:
    return min(new_s, FORGETTING * known_s) if known_s else new_s


def _smoothed(known_s: float, new_s: float) -> float:
    return known_s + 0.3 * (new_s - known_s) if known_s else new_s


@dataclass(slots=True, eq=False)
class _Entry:
    item: Item
    waiting_since: int
    done: int = 0


class Scheduler:
    """Lines of works, one per session, and the choice among their heads."""

    def __init__(self, token_budget: int) -> None:
        if token_budget < MIN_TOKEN_BUDGET:
            raise ValueError(f"a batch needs room for at least {MIN_TOKEN_BUDGET} positions, not {token_budget}")
        self.token_budget = token_budget
        self.queued_tokens = 0
        self._entries: dict[int, _Entry] = {}
        self._lines: dict[int, deque[_Entry]] = {}
        self._batches = 0
        self._last_without_steps = 0

    def submit(self, item: Item) -> None:
        entry = self._entries[item.work] = _Entry(item, self._batches)
        self._lines.setdefault(item.session, deque()).append(entry)
        self.queued_tokens += item.tokens

    def advance(self, work: int, tokens: int) -> bool:
        """`tokens` more positions of the work are done. Returns whether it is complete, and then forgets it."""
        entry = self._entries[work]
        entry.done += tokens
        entry.waiting_since = self._batches
        self.queued_tokens -= tokens
        assert entry.done <= entry.item.tokens
        if entry.done < entry.item.tokens:
            return False
        self.remove(work)
        return True

    def remove(self, work: int) -> None:
        """Forget a work that failed, was cancelled or is complete."""
        entry = self._entries.pop(work)
        self.queued_tokens -= entry.item.tokens - entry.done
        line = self._lines[entry.item.session]
        line.remove(entry)
        if not line:
            del self._lines[entry.item.session]

    def works_of(self, session: int) -> list[int]:
        """The session's works in order."""
        return [entry.item.work for entry in self._lines.get(session, ())]

    def next_batch(self, pace: Pace | None = None) -> list[Pick]:
        """The works for the next forward, empty when none is ready. Changes nothing but the count of batches."""
        groups = self._heads()
        if not groups:
            return []
        if pace is not None and not pace.beside_steps:
            groups = [(steps, []) for steps, _ in groups if steps] + [([], longer) for _, longer in groups if longer]
        self._batches += 1
        steps, longer = self._choose(groups)
        room = self.token_budget
        limit = room if pace is None else pace.beside_steps if steps else pace.alone
        picks = _whole(steps, room - min(room // 4, limit) if longer else room)
        room = min(limit, room - sum(pick.tokens for pick in picks))
        for entry in self._in_order(longer):
            if room:
                tokens = min(room, entry.item.tokens - entry.done)
                picks.append(Pick(work=entry.item.work, offset=entry.done, tokens=tokens))
                room -= tokens
        return picks

    def steps_beside(self, running: Collection[int]) -> list[Pick]:
        """Steps, none of a session in `running`, for a forward of their own while another one pauses."""
        groups = [steps for steps, _ in self._heads(running) if steps]
        return _whole(min(groups, key=_longest_wait), self.token_budget) if groups else []

    def _heads(self, without: Collection[int] = ()) -> list[tuple[list[_Entry], list[_Entry]]]:
        """What is first in each session's line, by groups, as their steps and their longer works."""
        groups: dict[Hashable, tuple[list[_Entry], list[_Entry]]] = {}
        for session, line in self._lines.items():
            if session not in without:
                steps, longer = groups.setdefault(line[0].item.group, ([], []))
                (steps if line[0].item.is_step else longer).append(line[0])
        return list(groups.values())

    def _choose(self, groups: list[tuple[list[_Entry], list[_Entry]]]) -> tuple[list[_Entry], list[_Entry]]:
        """The group to run."""
        with_steps = [group for group in groups if group[0]]
        without = [group for group in groups if not group[0]]
        if without and all(
            entry.waiting_since >= self._last_without_steps for steps, _ in with_steps for entry in steps
        ):  # no step that waits now has been passed over by a forward without steps
            self._last_without_steps = self._batches
            return min(without, key=lambda group: min(self._rank(entry) for entry in group[1]))
        return min(with_steps, key=lambda group: _longest_wait(group[0]))

    def _in_order(self, entries: Iterable[_Entry]) -> list[_Entry]:
        """By class, and in turns within each."""
        return sorted(_in_turns(entries), key=self._class)

    def _rank(self, entry: _Entry) -> tuple[int, int, int]:
        return self._class(entry), entry.waiting_since, entry.item.work

    def _class(self, entry: _Entry) -> int:
        return max(0, entry.item.urgency - (self._batches - entry.waiting_since) // AGEING_BATCHES)


def _whole(steps: Iterable[_Entry], room: int) -> list[Pick]:
    picks = []
    for entry in _in_turns(steps):
        if entry.item.tokens <= room:
            picks.append(Pick(work=entry.item.work, offset=0, tokens=entry.item.tokens))
            room -= entry.item.tokens
    return picks


def _longest_wait(entries: Iterable[_Entry]) -> tuple[int, int]:
    return min((entry.waiting_since, entry.item.work) for entry in entries)


def _in_turns(entries: Iterable[_Entry]) -> list[_Entry]:
    """Everybody's oldest work, then everybody's second; equals by how long they have waited."""
    ranks: dict[str, int] = {}
    order: list[tuple[int, int, int, _Entry]] = []
    for entry in sorted(entries, key=lambda entry: entry.item.work):
        rank = ranks[entry.item.owner] = ranks.get(entry.item.owner, -1) + 1
        order.append((rank, entry.waiting_since, entry.item.work, entry))
    return [entry for *_, entry in sorted(order, key=lambda ranked: ranked[:3])]

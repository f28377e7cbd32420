"""Which queued works share the next forward. Pure: works in, batches out.

Owns the order of works and the shape of a batch; knows neither pages nor tensors nor time (it counts its own batches).

- Works of one session run in the order in which they were submitted, one at a time.
- A batch holds works of one `group` (same blocks, same rotary regime) and at most `token_budget` positions.
- Steps of up to `STEP_TOKENS` positions (a decoded token, a few drafted ones) are never cut and go first; longer works
  are prefills and fill what is left in pieces, so that a long prompt delays nobody by more than one such forward. While
  a prefill waits, a quarter of the budget is kept for it, and among several groups one forward of prefills alone
  follows each round of steps: so it does not starve either.
- Owners take turns: everybody's first work goes before anybody's second; equals go by who has waited longest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

STEP_TOKENS = 16
MIN_TOKEN_BUDGET = 4 * STEP_TOKENS
"""So that a whole step fits beside the quarter that is kept for prefills."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A work as the scheduler sees it. `work` identifies it, and grows with every submission."""

    work: int
    session: int
    owner: str
    tokens: int
    group: Hashable

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError("a work has at least one position")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """Positions `[offset, offset + tokens)` of a work, counted from the work's own first position."""

    work: int
    offset: int
    tokens: int


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
        self._last_prefill_only = 0

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

    def next_batch(self) -> list[Pick]:
        """The works for the next forward, empty when none is ready. Changes nothing but the count of batches."""
        groups: dict[Hashable, list[_Entry]] = {}
        for line in self._lines.values():
            groups.setdefault(line[0].item.group, []).append(line[0])
        if not groups:
            return []
        self._batches += 1
        steps, prefills = self._choose(groups.values())
        picks, room = [], self.token_budget
        kept = room // 4 if prefills else 0
        for entry in _in_turns(steps):
            if entry.item.tokens <= room - kept:
                picks.append(Pick(work=entry.item.work, offset=0, tokens=entry.item.tokens))
                room -= entry.item.tokens
        for entry in _in_turns(prefills):
            if room:
                tokens = min(room, entry.item.tokens - entry.done)
                picks.append(Pick(work=entry.item.work, offset=entry.done, tokens=tokens))
                room -= tokens
        return picks

    def _choose(self, groups: Iterable[list[_Entry]]) -> tuple[list[_Entry], list[_Entry]]:
        """The group to run, as its steps and its prefills."""
        with_steps: list[tuple[list[_Entry], list[_Entry]]] = []
        without: list[tuple[list[_Entry], list[_Entry]]] = []
        for group in groups:
            steps = [entry for entry in group if entry.item.tokens <= STEP_TOKENS]
            prefills = [entry for entry in group if entry.item.tokens > STEP_TOKENS]
            (with_steps if steps else without).append((steps, prefills))
        if without and all(
            entry.waiting_since >= self._last_prefill_only for steps, _ in with_steps for entry in steps
        ):  # no step that waits now has been passed over by a forward of prefills alone
            self._last_prefill_only = self._batches
            return min(without, key=lambda group: _longest_wait(group[1]))
        return min(with_steps, key=lambda group: _longest_wait(group[0]))


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

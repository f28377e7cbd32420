"""A session's history against a plain list of rows."""

from __future__ import annotations

import tracemalloc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from swarm.session.history import History, Segment

REGIME = 8


def regime_key(length: int) -> bool:
    """As Phi-3's: short and long forwards have different frequencies."""
    return length > REGIME


def embed(token_ids: torch.Tensor, first_position: int) -> torch.Tensor:
    """One number a row that tells the token and the position id it was embedded with."""
    return torch.stack([token_ids, torch.arange(first_position, first_position + len(token_ids))], dim=1).float()


def segment(first: int, ids: list[int], *, offset: int = 0, by_ids: bool = True, regime_length: int = 0) -> Segment:
    token_ids = torch.tensor(ids)
    return Segment(
        first=first,
        count=len(ids),
        token_ids=token_ids if by_ids else None,
        hidden=None if by_ids else embed(token_ids, first + offset),
        position_offset=offset,
        regime_length=regime_length,
    )


def rows(history: History, first: int, end: int) -> list[tuple[int, int]]:
    parts = [part.rows(embed) for part in history.between(first, end, regime_key)]
    return [(int(token), int(position)) for token, position in torch.cat(parts)] if parts else []


class HistoryMachine(RuleBasedStateMachine):
    """Several histories that fork from each other; each must behave as if it were alone."""

    def __init__(self) -> None:
        super().__init__()
        self.histories = [History()]
        self.models: list[list[tuple[int, int, int]]] = [[]]
        """(token, position id, regime length) of each row."""
        self.next_token = 0
        self.offset = 0

    @initialize(offset=st.sampled_from([0, 0, -3, 5]))
    def offsets(self, offset: int) -> None:
        self.offset = offset

    @rule(data=st.data(), count=st.integers(1, 5), back=st.integers(0, 6), by_ids=st.booleans(), long=st.booleans())
    def append(self, data: st.DataObject, count: int, back: int, by_ids: bool, long: bool) -> None:
        which = data.draw(st.integers(0, len(self.histories) - 1))
        model = self.models[which]
        first = max(0, len(model) - back)
        ids = list(range(self.next_token, self.next_token + count))
        self.next_token += count
        length = REGIME + long
        self.histories[which].append(segment(first, ids, offset=self.offset, by_ids=by_ids, regime_length=length))
        model[first:] = [(token, first + i + self.offset, length) for i, token in enumerate(ids)]

    @rule(data=st.data(), back=st.integers(0, 9))
    def truncate(self, data: st.DataObject, back: int) -> None:
        which = data.draw(st.integers(0, len(self.histories) - 1))
        end = max(0, len(self.models[which]) - back)
        self.histories[which].truncate(end)
        del self.models[which][end:]

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        if len(self.histories) < 4:
            which = data.draw(st.integers(0, len(self.histories) - 1))
            end = data.draw(st.integers(0, len(self.models[which])))
            self.histories.append(self.histories[which].fork(end))
            self.models.append(self.models[which][:end])

    @rule(data=st.data())
    def between(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.histories) - 1))
        model = self.models[which]
        first = data.draw(st.integers(0, len(model)))
        end = data.draw(st.integers(first, len(model)))
        parts = self.histories[which].between(first, end, regime_key)
        assert all(part.count > 0 for part in parts)
        assert [(part.first, part.end) for part in parts] == [
            (max(first, part.first), min(end, part.end)) for part in parts
        ]
        assert rows(self.histories[which], first, end) == [row[:2] for row in model[first:end]]
        for part in parts:
            lengths = [length for _, _, length in model[part.first : part.end]]
            assert {regime_key(length) for length in lengths} == {regime_key(part.regime_length)}
            assert max(lengths) == part.regime_length

    @invariant()
    def every_history_is_its_list(self) -> None:
        for history, model in zip(self.histories, self.models, strict=True):
            assert len(history) == len(model)
            assert rows(history, 0, len(model)) == [row[:2] for row in model]

    @invariant()
    def cuts_are_where_the_regime_changes(self) -> None:
        for history, model in zip(self.histories, self.models, strict=True):
            for end in {0, len(model) // 2, len(model)}:
                keys = [regime_key(length) for _, _, length in model[:end]]
                changes = [at for at in range(1, end) if keys[at] != keys[at - 1]]
                assert history.cuts(end, regime_key) == changes


TestHistoryMachine = HistoryMachine.TestCase
TestHistoryMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


@given(st.integers(1, 20), st.data())
@settings(max_examples=30, deadline=None)
def test_a_cut_segment_embeds_to_the_same_rows(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(first + 1, count))
    for by_ids in (True, False):
        whole = segment(7, list(range(count)), offset=2, by_ids=by_ids)
        assert torch.equal(whole.cut(7 + first, 7 + end).rows(embed), whole.rows(embed)[first:end])


def test_nothing_lies_between_a_position_and_itself() -> None:
    history = History()
    history.append(segment(0, [1, 2, 3]))
    assert [history.between(at, at, regime_key) for at in range(4)] == [[]] * 4


def test_a_position_by_its_token_takes_eight_bytes() -> None:
    """Also where each came in a step of its own."""
    history, positions = History(), 10_000
    tracemalloc.start()
    try:
        for at in range(positions):
            history.append(segment(at, [1000 + at], regime_length=1000 + at))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 10 * positions  # an array grows ahead of what it holds
    assert rows(history, 9_998, 10_000) == [(10_998, 9_998), (10_999, 9_999)]


def test_a_fork_shares_its_parents_rows() -> None:
    history = History()
    history.append(segment(0, [1, 2, 3], by_ids=False))
    (mine,), (child,) = history.between(0, 3, regime_key), history.fork(2).between(0, 2, regime_key)
    assert mine.hidden is not None
    assert child.hidden is not None
    assert mine.hidden.data_ptr() == child.hidden.data_ptr()

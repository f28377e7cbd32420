"""Rows, remote sessions and their lives, explored with a remote that computes a running sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from peers.model.adapters import Adapter
from swarm.errors import SessionClosed, UnsupportedCache
from swarm.models.cache import SwarmCache
from swarm.models.layout import PositionRules, lay_out
from swarm.models.rows import Strand
from swarm.session.remote import RemoteSession, Resilience, RowStep

RULES = PositionRules(takes_position_ids=True, counts_kept=True, max_positions=None, window=None)


class SummingSession(RemoteSession):
    __slots__ = ("parent", "values")

    def __init__(self, parent: tuple[SummingSession, int] | None) -> None:
        super().__init__()
        self.parent = parent
        self.values: list[float] = []


class SummingRemote:
    """Its output at a position depends on every input up to there, in order."""

    def __init__(self) -> None:
        self.open_sessions: set[RemoteSession] = set()
        self.tokens_sent = 0
        self.fails: str | None = None
        self.backwards = True
        """Children before their parents, or after them: both must be right."""
        self.route = None

    def open(
        self,
        parent: RemoteSession | None = None,
        position: int = 0,
        *,
        resilience: Resilience | None = None,
        adapter: Adapter | None = None,
    ) -> RemoteSession:
        assert parent is None or parent in self.open_sessions
        session = SummingSession(None if parent is None else (parent, position))  # type: ignore[arg-type]
        self.open_sessions.add(session)
        return session

    def run(self, steps: Sequence[RowStep]) -> list[Tensor]:
        assert len({step.session for step in steps}) == len(steps)
        outputs = {}
        self.backwards = not self.backwards
        for step in reversed(steps) if self.backwards else steps:
            session = step.session
            assert isinstance(session, SummingSession)
            assert session in self.open_sessions
            if session.parent is not None:
                parent, position = session.parent
                assert parent in self.open_sessions
                assert len(parent.values) >= position == step.start
                session.values, session.parent = parent.values[:position], None
            assert step.start <= len(session.values)
            del session.values[step.start :]
            if self.fails == "early":
                continue
            out = []
            for value in step.hidden_TD[:, 0].tolist():
                session.values.append(value)
                out.append([digest(session.values)])
            self.tokens_sent += len(out)
            outputs[session] = torch.tensor(out, dtype=torch.float64)[step.want_from :]
        if self.fails:
            raise KeyboardInterrupt
        return [outputs[step.session] for step in steps]

    def release(self, sessions: Sequence[RemoteSession]) -> None:
        self.open_sessions -= set(sessions)

    def close(self) -> None:
        self.release(list(self.open_sessions))


def digest(values: Sequence[float]) -> float:
    result = 0.0
    for value in values:
        result = (result * 31 + value) % 1_000_003
    return result


class CacheMachine(RuleBasedStateMachine):
    """A cache in any order of forwards, failures, crops and reorderings; each row must stay its own sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.remote = SummingRemote()
        self.held: list[Strand] = []
        self.cache: SwarmCache | None = None
        self.rows: list[list[int | None]] = []
        """Per row and column the token, or None for padding."""

    @initialize(batch=st.integers(1, 3))
    def start(self, batch: int) -> None:
        self.cache = SwarmCache(self.remote, 2, self.held)
        self.rows = [[] for _ in range(batch)]

    @rule(
        data=st.data(),
        width=st.integers(1, 3),
        padded=st.booleans(),
        fails=st.sampled_from([None, None, "early", "late"]),
    )
    def forward(self, data: st.DataObject, width: int, padded: bool, fails: str | None) -> None:
        assert self.cache is not None
        tokens = st.sampled_from([1, 2, None]) if padded else st.integers(1, 2)
        new = [data.draw(st.lists(tokens, min_size=width, max_size=width)) for _ in self.rows]
        want_from = data.draw(st.integers(0, width))
        rows = [row + more for row, more in zip(self.rows, new, strict=True)]
        mask_BC = torch.tensor([[token is not None for token in row] for row in rows])
        ids_BT = torch.tensor([[token or 0 for token in more] for more in new])
        self.cache.prepare(self.remote, len(rows))
        layout = lay_out(
            RULES,
            batch=len(rows),
            width=width,
            past=self.cache.get_seq_length(),
            cached_BC=self.cache.kept_BC,
            lengths=[row.length for row in self.cache.rows],
            offsets=[row.offset for row in self.cache.rows],
            mask=mask_BC,
            position_ids=None,
        )
        self.remote.fails = fails
        try:
            out_BTD = self.cache.advance(
                ids_BT.double()[..., None],
                layout,
                token_ids_BT=ids_BT,
                want_from=want_from,
                repeat_last=False,
                regime=0,
            )
        except KeyboardInterrupt:
            return
        finally:
            self.remote.fails = None
        self.rows = rows
        for row, out_T in zip(rows, out_BTD[..., 0].tolist(), strict=True):
            for column, (token, out) in enumerate(zip(row[-width:], out_T, strict=True)):
                end = len(row) - width + column + 1
                expected = digest([float(t) for t in row[:end] if t is not None])
                assert out == (expected if token is not None and column >= want_from else 0.0)

    @rule(count=st.integers(0, 4))
    def crop(self, count: int) -> None:
        assert self.cache is not None
        count = min(count, len(self.rows[0]))
        self.cache.crop(-count)
        self.rows = [row[: len(row) - count] for row in self.rows]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        assert self.cache is not None
        if self.cache.rows:
            chosen = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
            self.cache.reorder_cache(torch.tensor(chosen))
            self.rows = [self.rows[index] for index in chosen]

    @rule(batch=st.integers(1, 3))
    def next_call_of_a_session(self, batch: int) -> None:
        assert self.cache is not None
        taken = self.cache.take_strands()
        self.remote.release([strand.session for strand in self.held])
        self.held[:] = taken
        self.start(batch)

    @invariant()
    def sessions_live_exactly_as_long_as_something_names_them(self) -> None:
        if self.cache is not None:
            named = {row.strand.session for row in self.cache.rows if row.strand is not None}
            assert self.remote.open_sessions == named | {strand.session for strand in self.held}
            assert all(self.cache.get_seq_length() == len(row) for row in self.rows)
            assert self.cache.kept_BC is None or not self.cache.kept_BC.all()

    def teardown(self) -> None:
        if self.cache is not None:
            self.cache.close()
            self.remote.release([strand.session for strand in self.held])
            assert not self.remote.open_sessions


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestCache = CacheMachine.TestCase


def forward(cache: SwarmCache, remote: Any, ids: Sequence[Sequence[int]], *, want_from: int = 0) -> Tensor:
    ids_BT = torch.tensor(ids)
    cache.prepare(remote, len(ids_BT))
    layout = lay_out(
        RULES,
        batch=len(ids_BT),
        width=ids_BT.shape[1],
        past=cache.get_seq_length(),
        cached_BC=cache.kept_BC,
        lengths=[row.length for row in cache.rows],
        offsets=[row.offset for row in cache.rows],
        mask=None,
        position_ids=None,
    )
    return cache.advance(
        ids_BT.double()[..., None], layout, token_ids_BT=ids_BT, want_from=want_from, repeat_last=False, regime=0
    )


def test_rows_that_do_the_same_share_a_session_until_they_part() -> None:
    remote = SummingRemote()
    cache = SwarmCache(remote, 2)
    forward(cache, remote, [[1, 2, 3]] * 3)
    forward(cache, remote, [[4]] * 3)
    assert remote.tokens_sent == 4
    assert len(remote.open_sessions) == 1
    forward(cache, remote, [[5], [6], [5]])
    assert remote.tokens_sent == 6
    assert len(remote.open_sessions) == 2
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert len(remote.open_sessions) == 1
    forward(cache, remote, [[7], [8]])
    cache.close()
    assert not remote.open_sessions


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_of_two_rows_that_share_a_session_only_the_longer_one_goes_on_in_it(order: list[int], backwards: bool) -> None:
    remote = SummingRemote()
    first, held = SwarmCache(remote, 2), []
    forward(first, remote, [[1, 2, 3, 4, 5]])
    held += first.take_strands()
    remote.backwards = not backwards
    prompts = [[1, 2, 3, 9, 9], [1, 2, 3, 4, 8]]
    cache = SwarmCache(remote, 2, held)
    out_BTD = forward(cache, remote, [prompts[index] for index in order], want_from=4)
    assert not held
    assert remote.tokens_sent == 5 + 2 + 1
    assert len(remote.open_sessions) == 2
    assert out_BTD[:, -1, 0].tolist() == [digest(prompts[index]) for index in order]
    cache.close()


def test_a_crop_takes_negative_counts_and_lengths() -> None:
    remote = SummingRemote()
    cache = SwarmCache(remote, 2)
    forward(cache, remote, [[1, 2, 3, 4]])
    for argument, left in ((0, 4), (-1, 3), (5, 3), (2, 2), (-9, 0)):
        cache.crop(argument)
        assert cache.get_seq_length() == left
    forward(cache, remote, [[1, 2]])
    assert len(remote.open_sessions) == 1
    cache.reset()
    assert not remote.open_sessions
    forward(cache, remote, [[1], [2]])
    del cache
    assert not remote.open_sessions


def test_what_generation_asks_of_a_cache_is_answered() -> None:
    remote = SummingRemote()
    cache = SwarmCache(remote, 3)
    assert (len(cache), bool(cache), cache.batch_size, cache.is_initialized) == (3, True, -1, False)
    forward(cache, remote, [[1, 2]])
    assert cache.get_query_offset() == cache.get_seq_length() == 2
    assert cache.get_mask_sizes(query_length=3, layer_idx=1) == (5, 0)
    assert cache.get_max_length() == cache.get_max_cache_shape() == -1
    assert cache.is_sliding == cache.is_linear == cache.is_dummy == [False] * 3
    assert cache.is_croppable
    assert cache.is_initialized
    assert not cache.is_compileable
    cache.activate_past_recording()
    with pytest.raises(UnsupportedCache):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    assert repr(cache) == "SwarmCache(rows=1, columns=2)"
    cache.close()
    cache.close()
    with pytest.raises(SessionClosed):
        forward(cache, remote, [[1]])

"""Steps that were asked for together are answered together, or not at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swarm.session.calls import Call, Piece
from swarm.session.remote import RemoteSession, RowStep

HIDDEN = 2


def step(count: int, start: int = 0) -> RowStep:
    return RowStep(
        session=RemoteSession(start),
        start=start,
        hidden_TD=torch.zeros(count, HIDDEN),
        token_ids_T=None,
        position_offset=0,
        want_from=0,
        regime_length=start + count,
    )


class Told:
    """A call, and what whoever asked for it was told."""

    def __init__(self, *steps: RowStep) -> None:
        self.outputs: list[list[Tensor]] = []
        self.errors: list[BaseException] = []
        self.call = Call(steps, self.outputs.append, self.errors.append)

    @property
    def nothing(self) -> bool:
        return not (self.outputs or self.errors or self.call.over)


@given(st.data())
def test_whatever_the_pieces_and_their_order_each_row_gets_its_own_once_all_are_there(data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4))
    starts = [data.draw(st.integers(0, 9)) for _ in cuts]
    steps = [step(sum(counts), start) for counts, start in zip(cuts, starts, strict=True)]
    told, expected = Told(*steps), [torch.rand(sum(counts), HIDDEN) for counts in cuts]
    open_pieces: list[tuple[Piece, Tensor]] = []
    for row, counts in enumerate(cuts):
        open_pieces += [(told.call.expect(row), part) for part in torch.split(expected[row], counts)]
        if data.draw(st.booleans()):  # as where a session holds a prompt already
            piece, part = open_pieces.pop()
            piece.answer(part)
    assert told.nothing
    told.call.begun()
    for piece, part in data.draw(st.permutations(open_pieces)):
        assert told.nothing
        piece.answer(part)
    (outputs,) = told.outputs
    assert not told.errors
    assert all(map(torch.equal, outputs, expected))
    assert [each.session.length for each in steps] == [each.start + len(each.hidden_TD) for each in steps]


@pytest.mark.parametrize("begun", [False, True])
def test_a_call_of_which_a_piece_failed_is_over_and_nobody_hears_of_it_again(begun: bool) -> None:
    told = Told(step(2), step(1))
    pieces = [told.call.expect(0), told.call.expect(0), told.call.expect(1)]
    if begun:
        told.call.begun()
    pieces[0].answer(torch.zeros(1, HIDDEN))
    error = ValueError("first")
    pieces[2].fail(error)
    pieces[1].fail(ValueError("second"))
    pieces[1].answer(torch.zeros(1, HIDDEN))
    pieces[2].answer(torch.zeros(1, HIDDEN))
    if not begun:
        told.call.begun()
    assert told.errors == [error]
    assert not told.outputs
    assert [each.session.length for each in told.call.steps] == [0, 0]


def test_what_was_answered_fails_no_more() -> None:
    told = Told(step(1))
    piece = told.call.expect(0)
    told.call.begun()
    piece.answer(torch.ones(1, HIDDEN))
    piece.fail(ValueError("late"))
    assert len(told.outputs) == 1
    assert not told.errors

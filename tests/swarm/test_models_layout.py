"""Where the columns of padded batches stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swarm.errors import ContextTooLong, UnsupportedMask
from swarm.models.layout import Layout, PositionRules, lay_out

BY_COLUMN = PositionRules(takes_position_ids=True, counts_kept=False, max_positions=None, window=None)
BY_KEPT = PositionRules(takes_position_ids=True, counts_kept=True, max_positions=None, window=None)
WITHOUT = PositionRules(takes_position_ids=False, counts_kept=False, max_positions=None, window=None)
WINDOWED = PositionRules(takes_position_ids=True, counts_kept=False, max_positions=None, window=4)
BOUNDED = PositionRules(takes_position_ids=True, counts_kept=False, max_positions=4, window=None)


def lay(rules: PositionRules, mask: list[list[int]] | None, *, width: int, **kwargs: Any) -> Layout:
    """A first forward unless `kwargs` say otherwise."""
    batch = 1 if mask is None else len(mask)
    state = {"past": 0, "cached_BC": None, "lengths": [0] * batch, "offsets": [None] * batch, "position_ids": None}
    return lay_out(
        rules, batch=batch, width=width, mask=None if mask is None else torch.tensor(mask), **{**state, **kwargs}
    )


def columns_of(layout: Layout) -> list[list[int]]:
    everything = list(range(layout.width))
    return [everything if columns is None else columns.tolist() for columns in layout.columns]


def test_an_unpadded_batch_is_its_columns() -> None:
    for mask in (None, [[1, 1, 1]]):
        layout = lay(BY_COLUMN, mask, width=3)
        assert layout.kept_BC is None
        assert layout.columns == (None,)
        assert layout.first_positions == (0,)
        assert layout.regime_length == 3


@pytest.mark.parametrize(
    ("rules", "first_positions"), [(BY_COLUMN, (2, 0, 0)), (BY_KEPT, (0, 0, 0)), (WITHOUT, (0, 0, 0))]
)
def test_padding_is_left_out_and_the_first_position_is_the_models_own(
    rules: PositionRules, first_positions: tuple[int, ...]
) -> None:
    layout = lay(rules, [[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], width=4)
    assert columns_of(layout) == [[2, 3], [0, 1], []]
    assert layout.first_positions == first_positions


def test_where_gaps_may_be_they_are_told_and_elsewhere_refused() -> None:
    mask = [[1, 1, 0, 0, 1, 0, 1], [0, 1, 1, 1, 0, 0, 0], [0] * 7]
    layout = lay(BY_COLUMN, mask, width=7, gaps=True)
    assert columns_of(layout) == [[0, 1, 4, 6], [1, 2, 3], []]
    assert layout.jumps == (((2, 2), (3, 1)), (), ())
    assert layout.first_positions == (0, 1, 0)
    with pytest.raises(UnsupportedMask, match="one by one"):
        lay(BY_COLUMN, mask, width=7)
    with pytest.raises(UnsupportedMask, match="one by one"):  # backwards
        lay(BY_COLUMN, None, width=3, gaps=True, position_ids=torch.tensor([[0, 1, 1]]))
    with pytest.raises(ContextTooLong, match="reaches 5 positions"):
        lay(BOUNDED, [[1, 0, 0, 0, 1]], width=5, gaps=True)
    assert lay(BY_KEPT, mask, width=7, gaps=True).jumps == ((), (), ())


def test_rows_that_count_alone_have_no_gaps_where_no_layer_embeds_positions() -> None:
    relative = PositionRules(
        takes_position_ids=True, counts_kept=False, embeds_positions=False, max_positions=None, window=None
    )
    mask = [[1, 0, 0, 1, 1], [1, 1, 1, 0, 0]]
    layout = lay(relative, mask, width=5, alone=True)
    assert columns_of(layout) == [[0, 3, 4], [0, 1, 2]]
    assert (layout.first_positions, layout.jumps) == ((0, 0), ((), ()))
    further = [[*row, 1] for row in mask]
    state = {"past": 5, "cached_BC": layout.kept_BC, "lengths": [3, 3], "offsets": [0, 0]}
    assert lay(relative, further, width=1, alone=True, **state).first_positions == (3, 3)
    with pytest.raises(UnsupportedMask, match="one by one"):
        lay(BY_COLUMN, mask, width=5, alone=True)


def test_a_mask_may_be_of_any_number_type_and_of_one_row() -> None:
    for dtype in (torch.bool, torch.int32, torch.float16):
        layout = lay_out(
            BY_COLUMN,
            batch=2,
            width=2,
            past=0,
            cached_BC=None,
            lengths=[0, 0],
            offsets=[None, None],
            mask=torch.tensor([[0, 1]], dtype=dtype),
            position_ids=None,
        )
        assert columns_of(layout) == [[1], [1]]


def test_a_hole_is_closed_when_position_ids_close_it() -> None:
    mask = [[1, 0, 0, 1, 1]]
    layout = lay(BY_COLUMN, mask, width=5, position_ids=torch.tensor([[4, 0, 0, 5, 6]]))
    assert columns_of(layout) == [[0, 3, 4]]
    assert layout.first_positions == (4,)
    assert layout.regime_length == 7
    assert columns_of(lay(BY_KEPT, mask, width=5)) == [[0, 3, 4]]
    for rules in (BY_COLUMN, WITHOUT):
        with pytest.raises(UnsupportedMask):
            lay(rules, mask, width=5)


def test_a_hole_within_reach_of_a_window_is_refused() -> None:
    positions = torch.tensor([[0, 0, 1, 2]])
    lay(WINDOWED, [[1, 0, 1, 1]], width=4, position_ids=positions)
    with pytest.raises(UnsupportedMask, match="window"):
        lay(WINDOWED, [[1, 0, 1, 1, 1]], width=5, position_ids=torch.tensor([[0, 0, 1, 2, 3]]))
    lay(WINDOWED, [[0, 1, 1, 1, 1, 0]], width=6, position_ids=torch.tensor([[0, 0, 1, 2, 3, 3]]))


def test_padding_between_two_forwards_is_a_hole_as_well() -> None:
    cached: dict[str, Any] = {"past": 3, "lengths": [2], "offsets": [0], "cached_BC": torch.tensor([[1, 1, 0]]).bool()}
    mask = [[1, 1, 0, 1]]
    assert lay(BY_KEPT, mask, width=1, **cached).first_positions == (2,)
    assert lay(BY_COLUMN, mask, width=1, position_ids=torch.tensor([[2]]), **cached).first_positions == (2,)
    for rules in (BY_COLUMN, WITHOUT):
        with pytest.raises(UnsupportedMask):
            lay(rules, mask, width=1, **cached)


def test_rows_go_on_where_they_stopped_or_are_refused() -> None:
    cached: dict[str, Any] = {"past": 3, "lengths": [3], "offsets": [5]}
    assert lay(BY_COLUMN, None, width=2, position_ids=torch.tensor([[8, 9]]), **cached).first_positions == (8,)
    for positions in (None, torch.tensor([[3, 4]]), torch.tensor([[8, 10]])):
        with pytest.raises(UnsupportedMask):
            lay(BY_COLUMN, None, width=2, position_ids=positions, **cached)


@pytest.mark.parametrize("bad", [torch.zeros(1, 3), torch.zeros(3, 1, 4), torch.zeros(2, 4), "mask", {"full": None}])
def test_masks_of_another_shape_are_refused(bad: object) -> None:
    with pytest.raises(UnsupportedMask):
        lay_out(
            BY_COLUMN,
            batch=1,
            width=4,
            past=0,
            cached_BC=None,
            lengths=[0],
            offsets=[None],
            mask=bad,
            position_ids=None,
        )


def test_position_ids_of_another_shape_are_refused() -> None:
    for shape in ((1, 3), (2, 4), (3, 1, 4)):
        with pytest.raises(UnsupportedMask, match="position ids"):
            lay(BY_COLUMN, None, width=4, position_ids=torch.zeros(shape, dtype=torch.long))


def test_what_is_cached_can_be_neither_masked_nor_unmasked() -> None:
    for cached_BC, mask in ((None, [[0, 1, 1]]), (torch.tensor([[0, 1]]).bool(), [[1, 1, 1]])):
        with pytest.raises(UnsupportedMask, match="cached"):
            lay(BY_COLUMN, mask, width=1, past=2, lengths=[2], offsets=[0], cached_BC=cached_BC)
    with pytest.raises(UnsupportedMask, match="whole sequence"):
        lay(BY_COLUMN, None, width=1, past=2, lengths=[1], offsets=[1], cached_BC=torch.tensor([[0, 1]]).bool())


def test_the_context_bounds_positions_and_not_padding() -> None:
    lay(BOUNDED, [[1, 1, 1, 1, 0, 0]], width=6)
    with pytest.raises(ContextTooLong, match="5 positions"):
        lay(BOUNDED, None, width=5)
    with pytest.raises(ContextTooLong):
        lay(BOUNDED, None, width=1, past=4, lengths=[4], offsets=[0])


@given(st.data())
def test_any_padding_fed_in_any_pieces_gives_each_row_its_tokens_in_order(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    total = data.draw(st.integers(1, 9))
    kept = torch.zeros(rows, total, dtype=torch.bool)
    for row in range(rows):
        first = data.draw(st.integers(0, total))
        kept[row, first : data.draw(st.integers(first, total))] = True
    pieces = sorted(data.draw(st.sets(st.integers(1, total))) | {total})
    explicit = data.draw(st.booleans())
    positions = (kept.long().cumsum(1) - 1).clamp(min=0)

    past, lengths, cached = 0, [0] * rows, None
    offsets: list[int | None] = [None] * rows
    seen: list[list[int]] = [[] for _ in range(rows)]
    for end in pieces:
        layout = lay_out(
            BY_COLUMN,
            batch=rows,
            width=end - past,
            past=past,
            cached_BC=cached,
            lengths=lengths,
            offsets=offsets,
            mask=kept[:, :end],
            position_ids=positions[:, past:end] if explicit else None,
        )
        for row, columns in enumerate(columns_of(layout)):
            seen[row] += [past + column for column in columns]
            if columns:
                offsets[row] = layout.first_positions[row] - lengths[row]
                lengths[row] += len(columns)
        past, cached = end, layout.kept_BC
    assert seen == [_kept_columns(row) for row in kept]


def _kept_columns(kept_C: Tensor) -> list[int]:
    return [int(column) for column in kept_C.nonzero().flatten()]

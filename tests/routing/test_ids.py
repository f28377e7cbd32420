from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import InvalidSpan
from routing.ids import MAX_SPANS, BlockSpan, BlockSpans


@pytest.mark.parametrize(
    ("text", "meant"), [("0:4", "0:4"), ("8:12, 0:4", "0:4,8:12"), ("4:8,0:4", "0:8"), ("0:1,2:3,1:2", "0:3")]
)
def test_spans_are_read_in_any_order_and_neighbours_become_one(text: str, meant: str) -> None:
    assert str(BlockSpans.parse(text)) == meant


@pytest.mark.parametrize(
    "text", ["", "0:4,", "0:4;8:12", "0:4,3:8", "4:4", "0:4,0:4", ",".join(f"{2 * n}:{2 * n + 1}" for n in range(9))]
)
def test_spans_that_cannot_be_served_are_refused(text: str) -> None:
    with pytest.raises(InvalidSpan):
        BlockSpans.parse(text)


@given(st.sets(st.integers(0, 30), min_size=1))
def test_spans_hold_the_blocks_they_were_made_of(blocks: set[int]) -> None:
    runs = sum(block - 1 not in blocks for block in blocks)
    singles = [BlockSpan(block, block + 1) for block in blocks]
    if runs > MAX_SPANS:
        with pytest.raises(InvalidSpan):
            BlockSpans.of(*singles)
        return
    spans = BlockSpans.of(*singles)
    assert [block for span in spans for block in span] == sorted(blocks)
    assert len(spans.parts) == runs
    assert spans.num_blocks == len(blocks)
    assert spans.covers(spans.parts[-1])
    assert not spans.covers(BlockSpan(0, spans.end + 1))
    assert BlockSpans.parse(str(spans)) == spans

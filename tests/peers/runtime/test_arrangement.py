from __future__ import annotations

from collections import Counter
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from peers.runtime.arrangement import CONVERSATION_TOKENS, SPARED, Arrangement, Place, Shape, arrange
from peers.runtime.pages import PagePool
from peers.runtime.sizing import BEHIND_WINDOW_TOKENS

WIDTHS = st.sampled_from([64, 128, 192, 512])
SHAPES = st.builds(Shape, st.integers(1, 16), WIDTHS, WIDTHS)
KINDS = st.lists(st.tuples(st.sampled_from([None, 4, 128, 4096]), SHAPES), min_size=1, max_size=4)
LAYERS = KINDS.flatmap(lambda kinds: st.lists(st.sampled_from(kinds), min_size=1, max_size=40))
WIDE, NARROW = Shape(4, 512, 512), Shape(16, 256, 256)
"""Of layers of Gemma 4 (31B) that see everything, and of those that slide."""


def arranged(layers: list[tuple[int | None, Shape]]) -> Arrangement:
    return arrange([window for window, _ in layers], [shape for _, shape in layers])


def sides(start: int, length: int) -> set[int]:
    return set(range(start, start + length))


@given(LAYERS)
def test_every_layer_has_a_part_of_its_table_for_itself(layers: list[tuple[int | None, Shape]]) -> None:
    arrangement = arranged(layers)
    assert arrangement.shapes == tuple(shape for _, shape in layers)
    windows = [arrangement.windows[place.table] for place in arrangement.places]
    assert windows in ([window for window, _ in layers], [None] * len(layers))
    parts = []
    for shape, place in zip(arrangement.shapes, arrangement.places, strict=True):
        frame = arrangement.frames[place.frame]
        assert place.row + shape.rows <= frame.rows
        assert place.key_column + shape.key_width <= frame.key_width
        assert place.value_column + shape.value_width <= frame.value_width
        rows = sides(place.row, shape.rows)
        columns = (sides(place.key_column, shape.key_width), sides(place.value_column, shape.value_width))
        parts.append((place.table, place.frame, rows, columns))
    for (*slots, rows, columns), (*others, other_rows, other_columns) in combinations(parts, 2):
        if slots == others and rows & other_rows:
            assert not any(mine & theirs for mine, theirs in zip(columns, other_columns, strict=True))


@given(LAYERS, st.integers(1, 1000))
def test_no_more_memory_is_taken_than_was_given(layers: list[tuple[int | None, Shape]], count: int) -> None:
    arrangement = arranged(layers)
    pages, tables = arrangement.pages(count), len(arrangement.windows)
    given_elements = count * sum(shape.elements for _, shape in layers)
    page_elements = sum(frame.elements for frame in arrangement.frames)
    assert pages * page_elements <= given_elements or pages == tables
    assert (pages + 1) * page_elements > given_elements
    PagePool(pages, 16, arrangement.windows)


@given(LAYERS)
def test_tables_never_make_a_conversation_take_more(layers: list[tuple[int | None, Shape]]) -> None:
    arrangement = arranged(layers)
    tokens = max(CONVERSATION_TOKENS, *(2 * (window or 0) for window, _ in layers))
    kept = sum(tokens if w is None else min(tokens, w + BEHIND_WINDOW_TOKENS) for w in arrangement.windows)
    taken = kept * sum(frame.elements for frame in arrangement.frames)
    assert taken <= SPARED * tokens * sum(shape.elements for _, shape in layers)


@given(st.lists(st.sampled_from([None, 4, 4096]), min_size=1, max_size=40), SHAPES)
def test_layers_that_store_alike_fill_their_frames_but_for_a_few(windows: list[int | None], shape: Shape) -> None:
    arrangement = arrange(windows, [shape] * len(windows))
    assert [arrangement.windows[place.table] for place in arrangement.places] == windows
    assert set(arrangement.frames) == {shape}
    assert len(windows) <= len(arrangement.frames) * len(arrangement.windows) <= SPARED * len(windows)
    assert len(set(windows)) > 1 or len(arrangement.windows) == 1


def test_where_all_see_alike_every_layer_has_a_frame_of_its_own() -> None:
    for window in (None, 1024):
        arrangement = arranged([(window, NARROW), (window, WIDE), (window, NARROW)])
        assert arrangement.windows == (window,)
        assert arrangement.frames == (NARROW, WIDE, NARROW)
        assert arrangement.places == (Place(0, 0), Place(0, 1), Place(0, 2))


def test_a_frame_holds_several_layers_that_are_smaller() -> None:
    arrangement = arranged(([(1024, NARROW)] * 5 + [(None, WIDE)]) * 4)
    assert Counter(arrangement.windows) == {1024: 10, None: 1}
    assert arrangement.frames == (Shape(16, 512, 512),)
    assert arrangement.places[:2] == (Place(0, 0), Place(0, 0, 0, 256, 256))
    full = [place for place in arrangement.places if arrangement.windows[place.table] is None]
    assert full == [Place(10, 0, row) for row in (0, 4, 8, 12)]
    assert arrangement.pages(100) == 1100, "they fill it"


def test_a_few_frames_are_left_empty_for_fewer_tables() -> None:
    assert len(arrange([1024] * 52 + [None] * 10, [NARROW] * 62).windows) == 5
    assert len(arrange([1024] * 2 + [None], [NARROW] * 3).windows) == 3


def test_where_frames_would_stay_nearly_empty_windows_are_given_up() -> None:
    assert arranged([(1024, NARROW), (None, Shape(1, 512, 512))]).windows == (None,)

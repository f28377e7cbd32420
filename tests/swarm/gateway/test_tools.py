from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from swarm.gateway.tools import Call, CallReader

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def read(text: str, cuts: list[int], *, only: bool = False) -> tuple[str, list[Call]]:
    reader, said, calls = CallReader(["f"], only=only), "", list[Call]()
    ends = sorted(min(cut, len(text)) for cut in cuts)
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        more, found = reader.push(text[start:end])
        said, calls = said + more, calls + found
    more, found = reader.end()
    return said + more, calls + found


@given(st.text(alphabet="<tol_ca>é ", max_size=30), st.lists(st.integers(0, 120), max_size=6))
def test_a_call_is_found_however_the_text_arrives(before: str, cuts: list[int]) -> None:
    said, calls = read(f"{before}\n{CALL}", cuts)
    if "<tool_call>" not in before:
        assert (said.strip(), calls) == (before.strip(), [Call("f", '{"x": 1}')])


@given(st.lists(st.integers(0, 200), max_size=6))
def test_several_calls_leave_no_text_between(cuts: list[int]) -> None:
    said, calls = read(f"{CALL}\n{CALL}", cuts)
    assert said.strip() == ""
    assert len(calls) == 2


def test_what_is_no_valid_call_stays_text() -> None:
    for text in (
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        "<tool_call>[" * 3,
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ):
        assert read(text, [5]) == (text, [])


def test_a_call_whose_end_is_missing_is_read_at_the_end() -> None:
    assert read(CALL.removesuffix("</tool_call>"), [20])[1] == [Call("f", '{"x": 1}')]


def test_an_answer_that_must_be_a_call_is_nothing_else() -> None:
    text = json.dumps({"name": "f", "arguments": {"é": "</tool_call>"}}, ensure_ascii=False)
    assert read(text, [3, 9], only=True) == ("", [Call("f", '{"é": "</tool_call>"}')])

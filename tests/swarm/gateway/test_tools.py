from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.gateway.answers import new_call_id
from swarm.gateway.served import _call_style, _marks
from swarm.gateway.tools import Call, Style, keeping, make_reader
from tests.helpers.gateway import byte_tokenizer

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def read(text: str, cuts: list[int], style: Style = Style.HERMES, *, only: bool = False) -> tuple[str, list[Call]]:
    reader, said, calls = make_reader(style, ["f", "g-2"], only=only), "", list[Call]()
    ends = sorted(min(cut, len(text)) for cut in cuts)
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        more, found = reader.push(text[start:end])
        said, calls = said + more, calls + found
    more, found = reader.end()
    assert reader.calls == len(calls + found)
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
        '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
        "<tool_call>[" * 3,
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ):
        assert read(text, [5]) == (text, [])


def test_a_call_whose_end_is_missing_is_read_at_the_end() -> None:
    assert read(CALL.removesuffix("</tool_call>"), [20])[1] == [Call("f", '{"x": 1}')]


def test_an_answer_that_must_be_a_call_is_nothing_else() -> None:
    text = json.dumps({"name": "f", "arguments": {"é": "</tool_call>"}}, ensure_ascii=False)
    assert read(text, [3, 9], only=True) == ("", [Call("f", '{"é": "</tool_call>"}')])


F, G = Call("f", '{"x": 1}'), Call("g-2", "{}")
ARRAY = '[{"name": "f", "arguments": {"x": 1}}, {"name": "g-2", "arguments": {}, "id": "abcdefghi"}]'


@pytest.mark.parametrize(
    ("style", "text", "said", "calls"),
    [
        (Style.LLAMA, '{"name": "f", "parameters": {"x": 1}}', "", [F]),
        (Style.LLAMA, '\n\n{"name": "f", "parameters": {"x": 1}}; {"name": "g-2", "parameters": {}}', "", [F, G]),
        (Style.LLAMA, '<|python_tag|>{"name": "f", "parameters": {"x": 1}}', "", [F]),
        (Style.LLAMA, 'Well: <|python_tag|>{"name": "f", "arguments": {"x": 1}}', "Well: ", [F]),
        (Style.MISTRAL, f"[TOOL_CALLS] {ARRAY}", "", [F, G]),
        (Style.MISTRAL, f"Well: [TOOL_CALLS]{ARRAY}", "Well: ", [F, G]),
        (Style.MISTRAL, '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g-2[ARGS]{}', "", [F, G]),
        (Style.MISTRAL, '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"x": 1}', "", [F]),
        (Style.MISTRAL, '[TOOL_CALLS]f{"x": 1}', "", [F]),
    ],
)
@given(cuts=st.lists(st.integers(0, 120), max_size=6))
def test_calls_are_read_in_the_style_of_each_family(
    style: Style, text: str, said: str, calls: list[Call], cuts: list[int]
) -> None:
    assert read(text, cuts, style) == (said, calls)
    for broken in (
        text[:-1],
        f"{text} and so on",
        text.replace("x", '"'),
        text.replace('"f"', "7").replace("f[", "h["),
    ):
        if broken not in (text, said) and not broken.startswith("[TOOL_CALLS]f{"):
            assert read(broken, cuts, style) == (broken, [])


@pytest.mark.parametrize("style", [Style.LLAMA, Style.MISTRAL])
@given(st.text(alphabet='{[<|TOOL_CALLS]>python_tag "', max_size=40), st.lists(st.integers(0, 60), max_size=5))
def test_other_text_stays_as_it_is(style: Style, text: str, cuts: list[int]) -> None:
    assert read(text, cuts, style) == (text, [])
    for deep in ("[" * 100_000, '{"a":' * 100_000):
        assert read(style.value[0] + deep, [], style) == (style.value[0] + deep, [])


def test_the_style_is_the_templates_or_that_of_the_special_tokens() -> None:
    tokenizer = byte_tokenizer()
    for template, special, style in (
        ("{{ tools }}<tool_call>", "<|python_tag|>", Style.HERMES),
        ("{{ tools }}<|python_tag|>", "", Style.LLAMA),
        ("{{ tools }}", "<|python_tag|>", Style.LLAMA),
        ({"default": "", "tool_use": "{{ tools }}[TOOL_CALLS]"}, "", Style.MISTRAL),
        ("{{ tools }}", "", Style.HERMES),
    ):
        tokenizer = byte_tokenizer()
        if special:
            tokenizer.add_special_tokens({"additional_special_tokens": [special]})
        tokenizer.chat_template = template
        assert _call_style(tokenizer) is style


def test_marks_that_are_special_tokens_are_decoded() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]"]})
    ids = tokenizer("é[TOOL_CALLS]f[ARGS]{}<|im_end|>").input_ids

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    assert decode(ids) == "éf{}"
    assert keeping(decode, _marks(tokenizer, Style.MISTRAL))(ids) == "é[TOOL_CALLS]f[ARGS]{}"
    assert re.fullmatch("[a-z0-9]{9}", new_call_id(Style.MISTRAL))

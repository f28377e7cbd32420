"""Training files: what is learned of each form, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from swarm.testing import model_folder
from swarm.training.data import (
    IGNORED,
    MAX_LINE_BYTES,
    PAIRS,
    BadData,
    Encoded,
    Example,
    encode,
    encode_all,
    read_examples,
    read_preferences,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder("smollm2-135m-instruct"))


def learned(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    return str(tokenizer.decode([label for label in encoded.labels if label != IGNORED]))


def test_the_three_forms_may_stand_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(
        '{"text": "a b"}\n\n{"prompt": "", "completion": "c", "id": 7}\n'
        '{"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "f"}]}'
    )
    assert read_examples(file) == [
        Example(completion="a b", line=1),
        Example(completion="c", line=3),
        Example(messages=({"role": "user", "content": "é"}, {"role": "assistant", "content": "f"}), line=4),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b'"a"', "expected an object, found str"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": ""}', "neither text, nor prompt and completion, nor messages, but 'text': str"),
        (b'{"prompt": "a"}', ".*but 'prompt': str"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "a message of 'robot'"),
        (b'{"messages": ["a"]}', "a message is"),
        (b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}', "longer than 16 MiB"),
    ],
    ids=["half", "string", "deep", "bytes", "empty", "no completion", "role", "no message", "long"],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: bytes, says: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(BadData, match=f"line 2: {says}") as caught:
        read_examples(file)
    assert caught.value.hint


def test_preferences_are_text_or_messages_as_trl_takes_them(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "id": 7}\n\n')
    assert read_preferences(file) == [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    question, answers = {"role": "user", "content": "a"}, [{"role": "assistant", "content": text} for text in "bc"]
    pair = {"prompt": [question], "chosen": answers[:1], "rejected": answers[1:]}
    file.write_text(json.dumps(pair))
    assert read_preferences(file) == [pair]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object, found list"),
        ('{"prompt": "a", "chosen": "b"}', "no prompt with a chosen and a rejected answer, but 'prompt': str"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "the answers differ"),
        ('{"prompt": [], "chosen": [], "rejected": []}', "none of them empty"),
        ('{"prompt": [1], "chosen": [], "rejected": []}', "a message is"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}], '
            '"rejected": [{"role": "assistant", "content": "c"}]}',
            "text and messages do not go together",
        ),
    ],
    ids=["half", "list", "no rejected", "equal", "empty", "no message", "mixed"],
)
def test_a_preference_that_cannot_be_used_is_named_with_what_is_expected(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line)
    with pytest.raises(BadData, match=f"line 2: .*{says}") as caught:
        read_preferences(file)
    assert caught.value.hint == PAIRS


def test_a_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="cannot be read: No such file"):
        read_examples(tmp_path / "nothing")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(BadData, match="is empty"):
        read_examples(tmp_path / "empty")


def test_only_what_the_assistant_says_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "See you")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    encoded = encode(tokenizer, Example(messages=messages))
    assert learned(tokenizer, encoded) == "Hello!<|im_end|>\nSee you<|im_end|>\n"
    assert encoded.input_ids == tokenizer.apply_chat_template(list(messages), return_dict=True).input_ids


def test_only_completions_are_learned_and_their_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assert learned(tokenizer, encode(tokenizer, Example("2 + 2 =", " 4"))) == " 4<|im_end|>"
    assert learned(tokenizer, encode(tokenizer, Example(completion="All."))) == "All.<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused_by_line(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    kept = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[-1].content }}"
    try:
        with pytest.raises(BadData, match="line 7: the chat template changes earlier turns"):
            encode_all(tokenizer, [Example(messages=tuple(messages), line=7)], max_tokens=9)
    finally:
        tokenizer.chat_template = kept


def test_long_examples_are_cut_and_those_with_nothing_left_to_learn_left_out(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    long = Example("one two three four five six", " seven")
    kept, shortened = encode_all(tokenizer, [long, Example(completion="one two"), long], max_tokens=4)
    assert (len(kept), shortened) == (1, 2)
    with pytest.raises(BadData, match="none of 1 examples has anything to learn within 4 tokens"):
        encode_all(tokenizer, [long], max_tokens=4)

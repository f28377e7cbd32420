"""`swarm chat` as a person meets it: at a terminal, with Ctrl-C and Ctrl-D."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerBase

from swarm.answers import encode_chat
from swarm.testing import LocalSwarm
from tests.helpers.terminal import DEADLINE_S, Terminal
from tests.integration.conftest import MODEL, Greedy


@pytest.fixture
def terminal(swarm: LocalSwarm, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    limit = str(getattr(request, "param", 400))
    options = ("--invite", swarm.invite, "--dtype", "float32", "--max-new-tokens", limit)
    terminal = Terminal("chat", MODEL, *options)
    yield terminal
    terminal.close()


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(terminal: Terminal) -> None:
    at = terminal.wait_for("> ")
    assert "/reset begins a new conversation" in terminal.screen
    terminal.type("Write a very long story about a dragon.\n")
    at = terminal.wait_for_more(100, since=terminal.wait_for("dragon.", since=at))
    terminal.type("\x03")
    at = terminal.wait_for("> ", since=at)
    terminal.type("/reset\n")
    at = terminal.wait_for("a new conversation", since=at)
    at = terminal.wait_for("> ", since=at)
    terminal.type("What is the capital of France? One word.\n")
    at = terminal.wait_for("Paris", since=at)
    terminal.wait_for("\r\n> ", since=at)
    terminal.type("\x04")
    assert terminal.process.wait(DEADLINE_S) == 0
    assert "Traceback" not in terminal.screen


@pytest.mark.parametrize("terminal", [8], indirect=True)
def test_after_a_reset_nothing_of_the_conversation_is_left(
    terminal: Terminal, tokenizer: PreTrainedTokenizerBase, greedy: Greedy
) -> None:
    """The same question is answered after a reset as at first, and before it otherwise."""
    question = "What is my name?"
    at = terminal.wait_for("> ")
    answers = []
    for line in ("My name is Ada.", question, "/reset", question):
        terminal.type(f"{line}\n")
        start = terminal.wait_for(line, since=at)
        at = terminal.wait_for("\r\n> ", since=start)
        answers.append(terminal.screen[start : at - len("\r\n> ")].strip())
    terminal.type("\x04")
    assert terminal.process.wait(DEADLINE_S) == 0
    told, asked = ({"role": "user", "content": text} for text in ("My name is Ada.", question))
    reply = {"role": "assistant", "content": answers[0]}
    expected = [
        tokenizer.decode(greedy(tuple(encode_chat(tokenizer, chat)), 8, ending=True), skip_special_tokens=True).strip()
        for chat in ([told], [told, reply, asked], [asked])
    ]
    assert [*answers[:2], answers[3]] == expected
    assert expected[1] != expected[2]

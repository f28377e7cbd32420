"""`swarm chat` as a person meets it: at a terminal, with Ctrl-C and Ctrl-D."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from transformers import PreTrainedTokenizerBase

from swarm.answers import encode_chat
from swarm.testing import LocalSwarm
from tests.integration.conftest import MODEL, Greedy

DEADLINE_S = 90.0


class Terminal:
    """A process at the other end of a pseudo-terminal, read until something is on the screen."""

    def __init__(self, *command: str) -> None:
        self.end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "swarm", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_own_the_terminal,
            env=os.environ | {"TERM": "xterm"},
        )
        os.close(theirs)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def wait_for(self, text: str, *, since: int = 0) -> int:
        """The place behind `text`, once it stands on the screen behind `since`."""
        self._wait(lambda: text in self.screen[since:], repr(text))
        return self.screen.index(text, since) + len(text)

    def wait_for_more(self, count: int, *, since: int) -> int:
        """That place, once the screen has so many characters behind `since`."""
        self._wait(lambda: len(self.screen) >= since + count, f"{count} characters behind {since}")
        return since + count

    def _wait(self, met: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not met():
            assert time.monotonic() < deadline_s, f"no {what} in {self.screen!r}"
            if select.select([self.end], [], [], 1.0)[0]:
                try:
                    self.screen += os.read(self.end, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    raise AssertionError(f"it ended: {self.screen!r}") from None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)


def _own_the_terminal() -> None:
    """So that Ctrl-C reaches the process as a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


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

"""One swarm of real processes for all tests that kill nothing; a local model to compare with.

Tests that share processes belong to one worker of pytest-xdist: run with `--dist loadgroup`. Those that share the swarm
are many, and so are two groups: the second has those that run commands, in a swarm that looks the same.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peers.wire.messages import Pong
from swarm import SwarmModelForCausalLM
from swarm.network import Entrance, NetworkThread, enter
from swarm.nursery import PRELOADED, Nursery
from swarm.session.driver import SwarmRemote
from swarm.testing import LocalPeer, LocalSwarm, model_folder
from tests.helpers.processes import Family

MODEL = "smollm2-135m-instruct"
SPANS = [(0, 10), (10, 20), (20, 30)]
LONGEST = ("a swarm for models", "a swarm for commands", "test_healing")
"""Groups with which to begin: two that work, and one that waits."""

Greedy = Callable[..., list[int]]


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
            item.add_marker(pytest.mark.timeout(600))
    items.sort(key=lambda item: LONGEST.index(group) if (group := group_of(item)) in LONGEST else len(LONGEST))


def group_of(item: pytest.Item) -> str:
    fixtures = getattr(item, "fixturenames", ())
    if "command" in fixtures:  # which has a price of its own in each worker
        return "a swarm for commands"
    return "a swarm for models" if "swarm" in fixtures else item.path.stem


@pytest.fixture(scope="session")
def swarm() -> Iterator[LocalSwarm]:
    """Three peers of ten blocks; leave it as you found it."""
    with LocalSwarm(MODEL, SPANS, dtype="float32") as swarm:
        yield swarm


@pytest.fixture(scope="session")
def model(swarm: LocalSwarm) -> Iterator[Any]:
    with SwarmModelForCausalLM.from_pretrained(MODEL, initial_peers=swarm.initial_peers, dtype=torch.float32) as model:
        yield model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder(MODEL))


@pytest.fixture(scope="session")
def local() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def greedy(local: Any) -> Greedy:
    return greedily(local)


def greedily(model: Any) -> Greedy:
    """What a local model says to a prompt, greedily; `ending`: until it sets an end, at most so many tokens."""

    @functools.cache
    def continuation(prompt_ids: tuple[int, ...], count: int, *, ending: bool = False) -> list[int]:
        return generate(model, prompt_ids, count, **({"min_new_tokens": 0} if ending else {}))

    return continuation


def generate(model: Any, prompt_ids: tuple[int, ...], count: int, **options: Any) -> list[int]:
    """`count` new ids, greedily unless `options` say otherwise."""
    prompt_1T = torch.tensor([prompt_ids])
    arguments = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False} | options
    output_1T = model.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), **arguments)
    return list(output_1T[0, len(prompt_ids) :].tolist())


def driver(model: Any) -> SwarmRemote:
    """What carries a model's steps, and counts them."""
    remote = model._remote_layers.remote
    assert isinstance(remote, SwarmRemote)
    return remote


class Observer:
    """A client of its own, to ask peers how they are."""

    def __init__(self, initial_peers: list[str]) -> None:
        entrance = Entrance.of(initial_peers=initial_peers)
        self._network = NetworkThread(lambda: enter(entrance))

    def load(self, peer: LocalPeer) -> Pong:
        links = self._network.client.links
        return self._network.call(links.ping(peer.peer_id, peer.addresses, timeout_s=10))[1]

    def holds_nothing(self, peer: LocalPeer) -> bool:
        """Long before a lease would end: `Close` may be on its way, a peer be tried by a client, or measure itself."""
        deadline_s = time.monotonic() + 30.0
        nothing = 0, peer.wait_for("ready")["cache_tokens"]
        while ((load := self.load(peer)).sessions, load.free_tokens) != nothing and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return (load.sessions, load.free_tokens) == nothing

    def announced(self) -> set[str]:
        """Everybody whose record this client can read now."""
        return {record.peer_id for record in self._network.call(self._network.client.discovery.read_index())}

    def close(self) -> None:
        self._network.close()


@pytest.fixture(scope="session")
def observer(swarm: LocalSwarm) -> Iterator[Observer]:
    observer = Observer(swarm.initial_peers)
    yield observer
    observer.close()


class Commands:
    """`swarm …` in processes that start in a moment. With all that they start they are one family."""

    def __init__(self, folder: Path) -> None:
        self._family = Family()
        self._forking = Nursery(self._family.environment, preload=[*PRELOADED, "swarm.models"])
        self._folder = folder
        self._running = 0

    def __call__(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run one to its end, which is also the end of everything that it started."""
        given, said, noted = (self._folder / name for name in ("stdin", "stdout", "stderr"))
        given.write_text(stdin)
        with given.open() as reading, said.open("w") as stdout, noted.open("w") as stderr:
            child = self._forking.start(
                arguments, stdin=reading.fileno(), stdout=stdout.fileno(), stderr=stderr.fileno()
            )
        code = child.wait(timeout=300)
        self._nobody_is_left()
        return subprocess.CompletedProcess(child.args, code, said.read_text(), noted.read_text())

    @contextmanager
    def until_interrupted(self, *arguments: str, code: int = 0) -> Iterator[Running]:
        """One that goes on until Ctrl-C, which comes at the end; then it leaves with `code`, and nothing behind."""
        self._running += 1
        said, stdout = os.pipe()
        with (
            open(said) as lines,
            (self._folder / f"stderr-{self._running}").open("w+") as noted,
            open(os.devnull) as nothing,
        ):
            try:
                child = self._forking.start(arguments, stdin=nothing.fileno(), stdout=stdout, stderr=noted.fileno())
            finally:
                os.close(stdout)
            running = Running(lines)
            try:
                yield running
            finally:
                child.send_signal(signal.SIGINT)
                ended = child.wait(timeout=100)
                running.rest = lines.readlines()
                noted.seek(0)
                running.errors = noted.read()
                self._running -= 1
            assert ended == code, running.errors
        if not self._running:
            self._nobody_is_left()

    def close(self) -> None:
        self._forking.close()
        self._family.survivors(timeout_s=0.0)  # of tests that failed

    def _nobody_is_left(self) -> None:
        assert self._family.survivors(besides=[self._forking.pid]) == []


@dataclass(eq=False)
class Running:
    """A command that runs."""

    stdout: TextIO
    errors: str = ""
    """What it wrote to stderr, once it has ended."""
    rest: Sequence[str] = ()
    """The lines that it then still had to say."""


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("command"))
    yield commands
    commands.close()

"""Failures drawn per hop and step, against starting over and against having no cache, in the same run."""

from __future__ import annotations

import itertools
import random
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from routing.errors import SwarmError
from tests.lab.network import Network
from tests.lab.notebook import MODEL, SPANS, Experiment, Notebook, ends, median
from tests.lab.swarms import LabSwarm, User

PROMPT: Final = 32
PROBABILITIES: Final = (0.0, 1e-4, 1e-3, 1e-2)
REFUSING_S: Final = 10.0
"""A failed host resets its connections, so that its sessions are dropped, and takes no new ones for so long."""
COPIES, COPIES_SHORT = 4, 3
"""Peers per third of the model: at p = 1e-2 and 25 tokens/s, two or three of twelve hosts refuse at any time. With two,
both would often refuse at once: an answer then waits, as long as they do, and its speed tells of nothing else."""
BASELINE_S: Final = 120.0
"""A baseline is ended then; its speed is that of what it had kept. Starting over may never come to an end."""
RETRY_S: Final = 0.2
PUBLISHED: Final = {1e-3: 0.73, 1e-2: 0.20}
"""Share of fault-free speed with caches kept at servers and a client that replays, at 1,024 tokens."""


class StartOver(Exception):
    """A hop failed under a client that can only start over."""


@dataclass(slots=True)
class Failures:
    """Draws, for every step, which hops of the user's route fail, and lets them refuse for a while."""

    swarm: LabSwarm
    user: User
    probability: float
    rng: random.Random
    drawn: int = 0
    _timers: list[threading.Timer] = field(default_factory=list)

    def step(self) -> bool:
        """Whether any hop fails now."""
        failing = [peer.label for peer in self.swarm.serving(self.user) if self.rng.random() < self.probability]
        for host in failing:
            self.drawn += 1
            self.swarm.network.refuse(host, on=True)
            timer = threading.Timer(REFUSING_S, self.swarm.network.refuse, (host,), {"on": False})
            timer.start()
            self._timers.append(timer)
        return bool(failing)

    def end(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for host in self.swarm.peers:
            self.swarm.network.refuse(host, on=False)


Way = Callable[[User, list[int], int, Failures], list[int]]
"""Generates, and returns the ids it had when it ended."""


def swarm_way(user: User, prompt: list[int], count: int, failures: Failures) -> list[int]:
    def on_token(_: int) -> None:
        failures.step()

    try:
        return ends(lambda: user.generate(prompt, count, on_token=on_token), within_s=BASELINE_S + count).ids
    except SwarmError:
        return []


def start_over(user: User, prompt: list[int], count: int, failures: Failures) -> list[int]:
    """A client whose session is lost with any hop."""

    def on_token(_: int) -> None:
        if failures.step() or time.monotonic() > deadline_s:
            raise StartOver

    deadline_s = time.monotonic() + BASELINE_S
    while time.monotonic() < deadline_s:
        try:
            return user.generate(prompt, count, on_token=on_token).ids
        except StartOver:
            continue
        except SwarmError:
            time.sleep(RETRY_S)
    return []


def no_cache(user: User, prompt: list[int], count: int, failures: Failures) -> list[int]:
    """A client that sends everything for every token: a failure costs it one step."""
    ids: list[int] = []
    deadline_s = time.monotonic() + BASELINE_S
    while len(ids) < count and time.monotonic() < deadline_s:
        forget(user)
        try:
            ids += user.generate([*prompt, *ids], 1).ids
        except SwarmError:
            time.sleep(RETRY_S)
        failures.step()
    return ids


WAYS: Final[dict[str, Way]] = {"swarm": swarm_way, "start over": start_over, "no cache": no_cache}


def run(notebook: Notebook) -> None:
    lengths = (64,) if notebook.short else (128, 1024)
    copies = COPIES_SHORT if notebook.short else COPIES
    probabilities = (0.0, 1e-2) if notebook.short else PROBABILITIES
    peers = {f"{'abc'[hop]}{copy}": span for copy in range(copies) for hop, span in enumerate(SPANS)}
    with Network(["entry", *peers, "user"], seed=notebook.seed) as network, LabSwarm(network, MODEL, peers) as swarm:
        user = swarm.add_user("user")
        for _ in range(2):
            user.generate(notebook.prompt(PROMPT), 8)
        for number in notebook.numbers():
            for length in lengths:
                prompt = notebook.prompt(PROMPT)
                expected = notebook.local(prompt, length)
                for probability, name in itertools.product(probabilities, WAYS):
                    # the same draws for every way
                    rng = random.Random(f"{notebook.seed} {number} {length} {probability}")
                    failures = Failures(swarm, user, probability, rng)
                    ids, seconds = one_run(user, name, prompt, length, failures)
                    notebook.row(run=number, way=name, tokens=length, p=probability, failures=failures.drawn,
                                 finished=len(ids) == length, identical=ids == expected[: len(ids)],
                                 tokens_per_s=len(ids) / seconds)  # fmt: skip
        notebook.saw(network)


def report(notebook: Notebook) -> None:
    lengths = sorted({row["tokens"] for row in notebook.rows})
    probabilities = sorted({row["p"] for row in notebook.rows})
    notebook.all_identical()
    ours = [row for row in notebook.rows if row["way"] == "swarm"]
    notebook.at_least("share of our answers that finish", sum(row["finished"] for row in ours) / len(ours), 1)
    for length in lengths:
        for probability in probabilities[1:]:
            share = speed(notebook, "swarm", length, probability) / speed(notebook, "swarm", length, 0.0)
            limit = {1e-4: 0.9, 1e-3: 0.9, 1e-2: 0.5}[probability]
            published = f" (published at 1,024: {PUBLISHED[probability]})" if probability in PUBLISHED else ""
            notebook.at_least(f"p = {probability:g}, {length} tokens: speed / fault-free{published}", share, limit)
            if not any(r["failures"] for r in ours if (r["tokens"], r["p"]) == (length, probability)):
                continue  # then starting over is the same answer over the same route
            best = max(speed(notebook, name, length, probability) for name in ("start over", "no cache"))
            ratio = speed(notebook, "swarm", length, probability) / best
            notebook.at_least(f"p = {probability:g}, {length} tokens: speed / the better baseline's", ratio, 1)


def one_run(user: User, name: str, prompt: list[int], count: int, failures: Failures) -> tuple[list[int], float]:
    """What a way gave, and in how many seconds, prompt included."""
    forget(user)
    began_s = time.monotonic()
    try:
        ids = WAYS[name](user, prompt, count, failures)
        return ids, time.monotonic() - began_s
    finally:
        failures.end()


def forget(user: User) -> None:
    """Let no peer know the beginning of a prompt from before."""
    user.remote._prefix_secret = secrets.token_bytes(32)


def speed(notebook: Notebook, way: str, tokens: int, probability: float) -> float:
    asked = (way, tokens, probability)
    return median(r["tokens_per_s"] for r in notebook.rows if (r["way"], r["tokens"], r["p"]) == asked)


EXPERIMENTS: Final = (Experiment("drawn", __doc__, run, report, runs=3),)

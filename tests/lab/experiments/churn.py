"""Peers join and leave every 20 seconds, half of the leaves by SIGKILL; two of three bootstraps are killed."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

from routing.errors import NoRoute, SwarmError
from swarm.testing import NodeFailed
from tests.lab.network import Network
from tests.lab.notebook import MODEL, SPANS, Experiment, Notebook, ends
from tests.lab.swarms import LabSwarm, User

ENTRIES: Final = ("entry1", "entry2", "entry3")
HOSTS: Final = tuple(f"p{number}" for number in range(12))
COPIES_AT_START: Final = 3
PERIOD_S: Final = 20.0
LENGTH_S: Final = 600.0
SHORT_S: Final = 80.0
PROMPT: Final = 40
COUNT: Final = 64
WITHOUT_ROUTE_S: Final = 0.5
"""Between two tries while there is a gap."""


@dataclass(slots=True)
class Reader:
    """A user who asks again and again until told to stop."""

    notebook: Notebook
    user: User
    prompts: list[list[int]]
    expected: list[list[int]]

    def read(self, over: threading.Event) -> None:
        for prompt, expected in itertools.cycle(zip(self.prompts, self.expected, strict=True)):
            if over.is_set():
                return
            if self.notebook.row(**self._ask(prompt, expected))["error"]:
                over.wait(WITHOUT_ROUTE_S)

    def _ask(self, prompt: list[int], expected: list[int]) -> dict[str, Any]:
        """`waited_s`: since the last token, when it failed."""
        traffic = self.user.remote.traffic
        before, began_s = traffic.rebuilds, time.monotonic()
        last, error, gap, same = (0, began_s), "", False, True

        def on_token(count: int) -> None:
            nonlocal last
            last = count, time.monotonic()

        try:
            same = ends(lambda: self.user.generate(prompt, COUNT, on_token=on_token)).ids == expected
        except NoRoute as failed:
            error, gap = str(failed), True
        except (SwarmError, TimeoutError) as failed:
            error = f"{type(failed).__name__}: {failed}"
        now_s = time.monotonic()
        return {
            "user": self.user.host.name, "at_s": began_s - self.notebook.started_s, "seconds": now_s - began_s,
            "tokens": last[0], "waited_s": now_s - last[1], "identical": same,
            "retries": traffic.rebuilds - before, "gap": gap, "error": error,
        }  # fmt: skip


def run(notebook: Notebook) -> None:
    """`runs` says how many readers there are: the length is what the experiment is about."""
    length_s = SHORT_S if notebook.short else LENGTH_S
    names = [f"user{number}" for number in range(notebook.runs)]
    start = {HOSTS[3 * copy + hop]: span for copy in range(COPIES_AT_START) for hop, span in enumerate(SPANS)}
    hosts = [*ENTRIES, *HOSTS, *names]
    with Network(hosts, seed=notebook.seed) as network, LabSwarm(network, MODEL, start, entries=ENTRIES) as swarm:
        readers = []
        for name in names:
            prompts = [notebook.prompt(PROMPT) for _ in range(4)]
            expected = [notebook.local(prompt, COUNT) for prompt in prompts]
            readers.append(Reader(notebook, swarm.add_user(name), prompts, expected))
        over = threading.Event()
        threads = [threading.Thread(target=reader.read, args=(over,)) for reader in readers]
        for thread in threads:
            thread.start()
        try:
            moves = churn(notebook, swarm, length_s)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        notebook.saw(network)
        notebook.network["moves"] = moves


def churn(notebook: Notebook, swarm: LabSwarm, length_s: float) -> list[dict[str, Any]]:
    """Every period one joins and one leaves, with each of the first two a bootstrap as well; returns who and when."""
    rng, moves = notebook.rng, []
    began_s = time.monotonic()
    while (next_s := PERIOD_S * (1 + len(moves))) < length_s:
        time.sleep(max(0.0, began_s + next_s - time.monotonic()))
        leaving = rng.choice(sorted(host for host, peer in swarm.peers.items() if peer.running))
        free = next(host for host in HOSTS if host not in swarm.peers)
        hard = len(moves) % 2 == 0
        peer = swarm.peers.pop(leaving)
        at_s = round(time.monotonic() - notebook.started_s, 1)
        move = {"at_s": at_s, "joins": free, "leaves": leaving, "killed": hard}
        swarm.add_peer(free, None, "--num-blocks", str(len(range(*SPANS[0]))), wait=False)
        if not hard:
            with contextlib.suppress(NodeFailed):  # it drains for too long
                peer.terminate()
        peer.kill()
        if len(moves) in (0, 1):
            swarm.entries[len(moves)].kill()
        notebook.say("  ".join(f"{name} {value}" for name, value in move.items()))
        moves.append(move)
    return moves


def report(notebook: Notebook) -> None:
    """A request that is told of a gap before its first token is no failed session; one that was under way is."""
    gaps = [row for row in notebook.rows if row["gap"]]
    failed = [row for row in notebook.rows if row["error"] and (row["tokens"] or not row["gap"])]
    notebook.all_identical()
    notebook.at_most("sessions that failed", len(failed), 0)
    steps = sum(row["tokens"] for row in notebook.rows)
    notebook.at_least(
        "share of steps without a retry", 1 - sum(r["retries"] for r in notebook.rows) / max(1, steps), 0.99
    )
    notebook.at_most("until a gap was named, worst, s", max((row["waited_s"] for row in gaps), default=0.0), 5)
    notebook.at_most("until a gap was healed, worst, s", longest_gap_s(notebook.rows), 60)


def longest_gap_s(rows: list[dict[str, Any]]) -> float:
    """From the end of the first answer that named a gap to the beginning of the next that came through, per user."""
    worst_s = 0.0
    for user in {row["user"] for row in rows}:
        named_s: float | None = None
        for row in (row for row in rows if row["user"] == user):
            if row["gap"]:
                named_s = row["at_s"] + row["seconds"] if named_s is None else named_s
                worst_s = max(worst_s, row["at_s"] + row["seconds"] - named_s)
            elif not row["error"]:
                worst_s = worst_s if named_s is None else max(worst_s, row["at_s"] - named_s)
                named_s = None
    return worst_s


EXPERIMENTS: Final = (Experiment("churn", __doc__, run, report, runs=2, runs_short=1),)

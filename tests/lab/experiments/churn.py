"""Peers join and leave every 20 s, half by SIGKILL; two of three bootstraps, and all holders of a span, are killed."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

from peers.host.run import DRAIN_TIMEOUT_S
from routing.errors import NoRoute, SwarmError
from routing.ids import BlockSpan, BlockSpans
from routing.path import gaps
from swarm.session.core import SessionConfig
from swarm.testing import NodeFailed
from tests.lab.network import Network
from tests.lab.notebook import MODEL, SPANS, Experiment, Notebook, ends
from tests.lab.swarms import LabPeer, LabSwarm, User

ENTRIES: Final = ("entry1", "entry2", "entry3")
HOSTS: Final = tuple(f"p{number}" for number in range(12))
PEERS_AT_START: Final = 9
PERIOD_S: Final = 20.0
LENGTH_S: Final = 600.0
SHORT_S: Final = 120.0
STRIKES_S: Final = (130.0, 370.0)
"""When all holders of a span are killed, between two joins."""
STRIKES_SHORT_S: Final = (50.0,)
REFILL_S: Final = 80.0
"""After a strike as many join as it killed: later than those who are left must have healed the gap."""
PROMPT: Final = 40
COUNT: Final = 64
PROBE_PROMPT: Final = 4
PROBER: Final = "prober"
"""Asks for one token a second. One who reads is not told of a gap: his session waits."""
PROBE_S: Final = 1.0
WITHOUT_ROUTE_S: Final = 0.5
"""Between two tries while there is a gap."""
NAMED_S: Final = 5.0
HEALED_S: Final = 60.0
READING_S: Final = 30.0
"""So long somebody's next token is waited for before a strike."""


@dataclass(slots=True)
class Reader:
    """A user who asks again and again until told to stop."""

    notebook: Notebook
    user: User
    prompts: list[list[int]]
    expected: list[list[int]]
    rest_s: float
    """After an answer."""
    reading: threading.Event = field(default_factory=threading.Event)
    """Set during the first half of an answer, from its first token on."""

    @classmethod
    def of(cls, notebook: Notebook, user: User, *, prompt: int, count: int, rest_s: float = 0.0) -> Reader:
        prompts = [notebook.prompt(prompt) for _ in range(4)]
        return cls(notebook, user, prompts, [notebook.local(prompt, count) for prompt in prompts], rest_s)

    def read(self, over: threading.Event) -> None:
        for prompt, expected in itertools.cycle(zip(self.prompts, self.expected, strict=True)):
            if over.is_set():
                return
            row = self.notebook.row(**self._ask(prompt, expected))
            over.wait(WITHOUT_ROUTE_S if row["error"] else self.rest_s)

    def _ask(self, prompt: list[int], expected: list[int]) -> dict[str, Any]:
        """`longest_wait_s`: between two tokens, before the first one, or between the last one and a failure."""
        traffic = self.user.remote.traffic
        before, began_s = traffic.rebuilds, time.monotonic()
        times_s, error, gap, same = [began_s], "", False, True

        def on_token(count: int) -> None:
            times_s.append(time.monotonic())
            (self.reading.set if count <= len(expected) // 2 else self.reading.clear)()

        try:
            same = ends(lambda: self.user.generate(prompt, len(expected), on_token=on_token)).ids == expected
        except NoRoute as failed:
            error, gap = str(failed), True
        except (SwarmError, TimeoutError) as failed:
            error = f"{type(failed).__name__}: {failed}"
        self.reading.clear()
        now_s = time.monotonic()
        waits = itertools.pairwise([*times_s, now_s])
        return {
            "kind": "answer", "user": self.user.host.name, "at_s": began_s - self.notebook.started_s,
            "seconds": now_s - began_s, "tokens": len(times_s) - 1,
            "first_s": times_s[1] - began_s if len(times_s) > 1 else math.inf,
            "longest_wait_s": max(later - earlier for earlier, later in waits), "identical": same,
            "retries": traffic.rebuilds - before, "gap": gap, "error": error,
        }  # fmt: skip


def run(notebook: Notebook) -> None:
    """`runs` says how many readers there are: the length is what the experiment is about.

    Peers choose their blocks themselves, so that they may move: only such peers can close a gap.
    """
    names = [f"user{number}" for number in range(notebook.runs)]
    start = dict.fromkeys(HOSTS[:PEERS_AT_START])
    options = ("--num-blocks", str(len(range(*SPANS[0]))))
    hosts = [*ENTRIES, *HOSTS, *names, PROBER]
    with (
        Network(hosts, seed=notebook.seed) as network,
        LabSwarm(network, MODEL, start, entries=ENTRIES, options=options) as swarm,
    ):
        readers = [Reader.of(notebook, swarm.add_user(name), prompt=PROMPT, count=COUNT) for name in names]
        prober = Reader.of(notebook, swarm.add_user(PROBER), prompt=PROBE_PROMPT, count=1, rest_s=PROBE_S)
        over = threading.Event()
        threads = [threading.Thread(target=reader.read, args=(over,)) for reader in (*readers, prober)]
        for thread in threads:
            thread.start()
        try:
            strikes = churn(notebook, swarm, readers)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        for row in outcomes(notebook.rows, strikes):
            notebook.row(**row)
        notebook.saw(network)


def churn(notebook: Notebook, swarm: LabSwarm, readers: Sequence[Reader]) -> list[dict[str, Any]]:
    """Every period one joins and one leaves, with each of the first two a bootstrap as well. Halfway between two of
    these, when it is time, all holders of a span are killed. Returns these strikes."""
    length_s, times_s = (SHORT_S, STRIKES_SHORT_S) if notebook.short else (LENGTH_S, STRIKES_S)
    strikes: list[dict[str, Any]] = []
    moves, refill_s, began_s = 0, math.inf, time.monotonic()
    for turn in range(1, math.ceil(length_s / PERIOD_S * 2)):
        at_s = turn * PERIOD_S / 2
        time.sleep(max(0.0, began_s + at_s - time.monotonic()))
        if turn % 2 == 0:
            move(notebook, swarm, moves)
            moves += 1
        elif at_s >= refill_s:
            refill_s = math.inf
            while len(swarm.peers) < PEERS_AT_START:
                join(swarm)
        elif (
            len(strikes) < len(times_s)
            and at_s >= times_s[len(strikes)]
            and (struck := strike(notebook, swarm, readers))
        ):
            strikes.append(struck)
            refill_s = at_s + REFILL_S
    missed = {"kind": "strike", "at_s": math.inf, "victims": [], "missing": ""}
    return strikes + [missed] * (len(times_s) - len(strikes))


def move(notebook: Notebook, swarm: LabSwarm, number: int) -> None:
    leaving = notebook.rng.choice(sorted(host for host, peer in swarm.peers.items() if peer.running))
    peer = swarm.peers.pop(leaving)
    row = {"kind": "leave", "at_s": time.monotonic() - notebook.started_s, "leaves": leaving, "served": peer.is_ready}
    row |= {"joins": join(swarm, besides=leaving), "killed": number % 2 == 0}
    if not row["killed"]:
        began_s = time.monotonic()
        try:
            row["ended"] = f"exit code {peer.terminate()}"
        except NodeFailed as failed:  # it drains for too long
            row["ended"] = str(failed)
        row["took_s"] = time.monotonic() - began_s
    peer.kill()
    if number < len(ENTRIES) - 1:
        swarm.entries[number].kill()
    notebook.row(**row)


def join(swarm: LabSwarm, *, besides: str = "") -> str:
    free = next(host for host in HOSTS if host not in swarm.peers and host != besides)
    swarm.add_peer(free, None, wait=False)
    return free


def strike(notebook: Notebook, swarm: LabSwarm, readers: Sequence[Reader]) -> dict[str, Any] | None:
    """Kill all holders of a span at once, while somebody reads. None where nobody who is left could close the gap."""
    held = {host: peer.serves for host, peer in swarm.peers.items() if peer.running and peer.is_ready}
    choices = sorted(ways_to_strike(held, SPANS[-1][1]).items())
    if not choices or not any(reader.reading.wait(READING_S) for reader in readers):
        return None
    missing, hosts = notebook.rng.choice(choices)
    victims = [swarm.peers.pop(host) for host in hosts]
    at_s = time.monotonic() - notebook.started_s
    with ThreadPoolExecutor(len(victims)) as pool:
        list(pool.map(LabPeer.kill, victims))
    notebook.say(f"killed all holders of {missing}: {', '.join(hosts)}")
    return {"kind": "strike", "at_s": at_s, "victims": hosts, "missing": str(missing)}


def ways_to_strike(held: Mapping[str, BlockSpans], num_blocks: int) -> dict[BlockSpan, list[str]]:
    """The gaps that the deaths of all holders of a block make, with these; only those for all of which somebody has
    room who is left: for as many blocks, and others have those that he serves."""
    ways = {}
    for block in range(num_blocks):
        victims = sorted(host for host, spans in held.items() if any(block in span for span in spans))
        left = [spans for host, spans in held.items() if host not in victims]
        missing = gaps(chain.from_iterable(left), num_blocks)
        copies = Counter(chain.from_iterable(chain.from_iterable(left)))
        if len(missing) == 1 and any(
            spans.num_blocks >= len(missing[0]) and all(copies[block] > 1 for block in chain.from_iterable(spans))
            for spans in left
        ):
            ways[missing[0]] = victims
    return ways


def outcomes(rows: Sequence[dict[str, Any]], strikes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each gap that each user was told of, and one for each strike: whether a request that began in it was
    told, and how long the sessions waited that were under way."""
    answers = [row for row in rows if row["kind"] == "answer"]
    strikes_s = [strike["at_s"] for strike in strikes]
    told = told_of_gaps(answers, strikes_s)
    ended = []
    for strike, until_s in zip(strikes, [*strikes_s[1:], math.inf], strict=False):
        at_s = strike["at_s"]
        seen = [gap for gap in told if gap["user"] == PROBER and at_s < gap["at_s"] < until_s]
        waits_s = [
            row["longest_wait_s"] for row in answers
            if row["user"] != PROBER and row["at_s"] + row["first_s"] < at_s < row["at_s"] + row["seconds"]
        ]  # fmt: skip
        ended.append({**strike, "told": bool(seen), "under_way": len(waits_s), "waited_s": max(waits_s, default=0.0)})
    return [*told, *ended]


def told_of_gaps(answers: Sequence[dict[str, Any]], strikes_s: Iterable[float] = ()) -> list[dict[str, Any]]:
    """Per user and gap: when it was first named (`at_s`), for how long the worst request waited for that since it
    began, or since a strike after that (`named_s`), and how long it then took to the next token (`healed_s`)."""
    told: dict[str, dict[str, Any]] = {}
    found = []
    for row in sorted(answers, key=lambda row: row["at_s"]):
        user, end_s = row["user"], row["at_s"] + row["seconds"]
        if row["gap"] and not row["tokens"]:
            if user not in told:
                told[user] = {"kind": "gap", "user": user, "at_s": end_s, "named_s": 0.0, "healed_s": math.inf}
                found.append(told[user])
            since_s = max([row["at_s"], *(at_s for at_s in strikes_s if at_s < end_s)])
            told[user]["named_s"] = max(told[user]["named_s"], end_s - since_s)
        elif row["tokens"] and user in told:
            gap = told.pop(user)
            gap["healed_s"] = row["at_s"] + row["first_s"] - gap["at_s"]
    return found


def report(notebook: Notebook) -> None:
    """A request that is told of a gap before its first token is no failed session; one that was under way is."""
    of_kind = {
        kind: [row for row in notebook.rows if row["kind"] == kind] for kind in ("answer", "leave", "strike", "gap")
    }
    answers, strikes, named = of_kind["answer"], of_kind["strike"], of_kind["gap"]
    left = [row for row in of_kind["leave"] if row["served"] and not row["killed"]]
    notebook.all_identical()
    failed = [row for row in answers if row["error"] and (row["tokens"] or not row["gap"])]
    notebook.at_most("sessions that failed", len(failed), 0)
    read = [row for row in answers if row["user"] != PROBER]
    retries, steps = sum(row["retries"] for row in read), sum(row["tokens"] for row in read)
    notebook.at_least("share of steps without a retry", 1 - retries / max(1, steps), 0.99)
    notebook.at_least("gaps made of which a new request was told", sum(r["told"] for r in strikes), 1)
    known = sum(r["told"] or 0 < r["waited_s"] <= NAMED_S for r in strikes)  # else it closed before anybody had to be
    notebook.at_least(f"… or that closed within {NAMED_S:g} s, of all gaps made", known, max(1, len(strikes)))
    notebook.at_most("until a gap was named, worst, s", max((r["named_s"] for r in named), default=math.inf), NAMED_S)
    notebook.at_most(
        "until a gap was healed, worst, s", max((r["healed_s"] for r in named), default=math.inf), HEALED_S
    )
    under_way = min((row["under_way"] for row in strikes), default=0)
    notebook.at_least("sessions under way when a gap opened, least", under_way, 1)
    waited_s = max((row["waited_s"] for row in strikes), default=math.inf)
    notebook.at_most("… and their longest wait, s", waited_s, SessionConfig().gap_patience_s)
    notebook.at_most(
        "from SIGTERM to the end, worst, s", max((r["took_s"] for r in left), default=math.inf), DRAIN_TIMEOUT_S
    )
    notebook.at_most("peers that ended otherwise than in order", sum(r["ended"] != "exit code 0" for r in left), 0)


EXPERIMENTS: Final = (Experiment("churn", __doc__, run, report, runs=2, runs_short=1),)

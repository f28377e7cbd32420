"""SIGKILL at a random token, at every position of a route, during the prompt, and two peers at once."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from routing.errors import SwarmError
from routing.records import RECORD_RENEW_S
from tests.lab.experiments.pairs import PEERS, pairs_network
from tests.lab.fabric import bytes_into, bytes_out_of
from tests.lab.network import Network
from tests.lab.notebook import HIDDEN_BYTES, MODEL, Experiment, Notebook, ends, median
from tests.lab.swarms import LabPeer, LabSwarm, User

PROMPT: Final = 480
COUNT: Final = 40
CALM_S: Final = 2 * RECORD_RENEW_S
CASES: Final = (
    *(("token", (hop,)) for hop in range(3)),
    *(("prompt", (hop,)) for hop in range(3)),
    *(("two at once", hops) for hops in ((0, 1), (1, 2), (0, 2))),
)


@dataclass(slots=True)
class Look:
    """What had been carried at a moment."""

    at_s: float
    sent: int
    """By the user's model, in frames."""
    counts: dict[str, Any]


@dataclass(slots=True)
class Kill:
    """Kills the peers of some hops once, and looks at the counters from then on at every token."""

    swarm: LabSwarm
    user: User
    hops: tuple[int, ...]
    looks: list[Look] = field(default_factory=list)
    survivors: list[LabPeer] = field(default_factory=list)
    strikes: list[threading.Thread] = field(default_factory=list)
    """Killing ends when the victim is gone, and nobody who reads an answer waits for that."""

    def strike(self) -> None:
        route = self.swarm.serving(self.user)
        self.survivors = [peer for hop, peer in enumerate(route) if hop not in self.hops]
        self.look()
        for hop in self.hops:
            self.strikes.append(threading.Thread(target=route[hop].kill))
            self.strikes[-1].start()

    def look(self) -> None:
        counts = self.swarm.network.counts()
        self.looks.append(Look(time.monotonic(), self.user.remote.traffic.bytes_sent, counts))

    @property
    def stall(self) -> tuple[Look, Look]:
        """Before and after the longest wait."""
        return max(itertools.pairwise(self.looks), key=lambda pair: pair[1].at_s - pair[0].at_s)


@dataclass(frozen=True, slots=True)
class Calm:
    """What hosts hear anyway, of records, round trips and the DHT, while no session is open."""

    before: dict[str, Any]
    after: dict[str, Any]

    @classmethod
    def of(cls, network: Network) -> Calm:
        before = network.counts()
        time.sleep(CALM_S)
        return cls(before, network.counts())

    def into(self, hosts: Iterable[str], sources: Container[str], seconds: float) -> int:
        """Bytes, in so many of them."""
        return round(into(self.before, self.after, hosts, sources) * seconds / CALM_S)


def into(before: dict[str, Any], after: dict[str, Any], hosts: Iterable[str], sources: Container[str]) -> int:
    """Bytes that the links from some hosts to some hosts carried between two looks."""
    return sum(bytes_into(after, host, sources) - bytes_into(before, host, sources) for host in hosts)


def run(notebook: Notebook) -> None:
    with pairs_network(notebook) as network, LabSwarm(network, MODEL, PEERS) as swarm:
        user = swarm.add_user("user", resilience=notebook.resilience)
        prompt_s = warm_up(notebook, user)
        calm = Calm.of(network)
        with ThreadPoolExecutor(1) as pool:
            revived = pool.submit(swarm.revive)
            for number in notebook.numbers():
                prompt = notebook.prompt(PROMPT)
                expected = notebook.local(prompt, COUNT)  # while those that were killed come back
                revived.result()
                one_run(notebook, swarm, user, number, prompt, expected, prompt_s, calm)
                revived = pool.submit(swarm.revive)
        notebook.saw(network)


def report(notebook: Notebook) -> None:
    stalls = [row["stall_s"] for row in notebook.rows]
    notebook.all_identical()
    notebook.at_most("median stall, s", median(stalls), 1.5)
    notebook.at_most("worst stall, s", max(stalls), 5.0)
    during = [row for row in notebook.rows if "uplink" in row]
    fed = notebook.resilience == "standby"  # then the client goes on feeding the first hop's
    if uplinks := [row["uplink"] for row in during if 0 not in row["hops"] and not fed]:
        notebook.at_most("client's uplink beyond the pending step, worst, bytes", max(uplinks), 2048)
    if during and not fed:
        resent = max(row["into_healthy"] - row["anyway"] for row in during) / (PROMPT * HIDDEN_BYTES)
        notebook.at_most("sent to healthy hops for a stall's sake / the whole prompt, worst", resent, 0.1)


def warm_up(notebook: Notebook, user: User) -> float:
    """Seconds to a first token here, undisturbed."""
    answers = [user.generate(notebook.prompt(PROMPT), 8) for _ in range(3)]
    return median(answer.times_s[0] - answer.started_s for answer in answers)


def one_run(
    notebook: Notebook,
    swarm: LabSwarm,
    user: User,
    number: int,
    prompt: list[int],
    expected: list[int],
    prompt_s: float,
    calm: Calm,
) -> None:
    when, hops = CASES[number % len(CASES)]
    at_token, at_s = notebook.rng.randrange(2, COUNT - 5), notebook.rng.uniform(0.1, 0.9) * prompt_s
    kill = Kill(swarm, user, hops)
    timer = threading.Timer(at_s, kill.strike) if when == "prompt" else None

    def on_token(count: int) -> None:
        if kill.looks:
            kill.look()
        elif timer is None and count == at_token:
            kill.strike()

    rebuilds, switches = user.remote.traffic.rebuilds, user.remote.traffic.switches
    if timer is not None:
        timer.start()
    error = ""
    ids: list[int] = []
    try:
        ids = ends(lambda: user.generate(prompt, COUNT, on_token=on_token)).ids
    except SwarmError as failed:
        error = f"{type(failed).__name__}: {failed}"
    if timer is not None:
        timer.join()
    for strike in kill.strikes:
        strike.join()
    traffic = user.remote.traffic
    about: dict[str, Any] = {"run": number, "when": when, "hops": hops, "rebuilds": traffic.rebuilds - rebuilds}
    about["switches"] = traffic.switches - switches
    if error:
        notebook.row(**about, identical=False, stall_s=math.inf, error=error)
        return
    before, after = kill.stall
    carried = {}
    if when != "prompt":
        step_bytes = kill.looks[-1].sent - kill.looks[-2].sent
        healthy = [peer.label for peer in kill.survivors]
        # all who hold anything of the session; others have their own to say, records above all, often in one burst
        session = {"user", *healthy, *(peer.label for peer in swarm.serving(user))}
        seconds = after.at_s - before.at_s
        carried["uplink"] = after.sent - before.sent - step_bytes
        carried["uplink_packets"] = bytes_out_of(after.counts, "user") - bytes_out_of(before.counts, "user")
        carried["into_healthy"] = into(before.counts, after.counts, healthy, session)
        carried["anyway"] = calm.into(healthy, session, seconds)
        carried["from_others"] = into(before.counts, after.counts, healthy, swarm.network.hosts.keys() - session)
    notebook.row(**about, identical=ids == expected, stall_s=after.at_s - before.at_s, **carried)


EXPERIMENTS: Final = (Experiment("kill", __doc__, run, report, runs=100, runs_short=9),)

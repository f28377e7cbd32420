"""SIGKILL at a random token, at every position of a route, during the prompt, two peers at once, and a replacement."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from routing.errors import SwarmError
from routing.ids import PeerId, SessionId
from routing.records import RECORD_RENEW_S
from routing.routes import Hop
from swarm.session.actions import Action, OpenHops, SendStep
from swarm.session.steps import PendingStep
from tests.lab.experiments.grey import Seen
from tests.lab.experiments.pairs import PEERS, pairs_network
from tests.lab.fabric import bytes_into, bytes_out_of
from tests.lab.network import Network
from tests.lab.notebook import HIDDEN_BYTES, MODEL, SPANS, Experiment, Notebook, ends, median
from tests.lab.swarms import METRICS, LabPeer, LabSwarm, User

PROMPT: Final = 480
COUNT: Final = 40
POSITIONS: Final = PROMPT + COUNT - 1
"""That each hop must compute: the last token is nobody's input."""
CALM_S: Final = 2 * RECORD_RENEW_S
LAST: Final = len(SPANS) - 1
AGAIN_EVERY: Final = 10
"""In the last of so many runs, one that takes a dead hop's place dies as well, while it is rebuilt."""
PIECES: Final = 4
"""In which such a replay is sent."""
SPARE: Final = "spare"
"""A host for the third peer that such a run needs."""
KNOWN_TIMEOUT_S: Final = 60.0
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
    """By the user, in frames."""
    counts: dict[str, Any]


@dataclass(slots=True)
class Kill:
    """Kills the peers of some hops once, and looks at the counters from then on at every token. Observes the user."""

    swarm: LabSwarm
    user: User
    hops: tuple[int, ...]
    again_after: int | None
    """Kill the first that takes the place of the first of them, too, once so many steps were answered over the route
    with it; None: no."""
    looks: list[Look] = field(default_factory=list)
    survivors: dict[int, LabPeer] = field(default_factory=dict)
    """By hop."""
    strikes: list[threading.Thread] = field(default_factory=list)
    """Killing ends when the victim is gone, and nobody who reads an answer waits for that."""
    seen: Seen = field(default_factory=Seen)
    struck_s: float = 0.0
    again: int | None = None
    """Tokens that had come since the first strike when that one was killed."""
    _route: list[str] = field(default_factory=list)
    _next: str | None = None
    _answered: int = 0
    _opened: int = 0
    """Looks that had been taken when the last route was."""

    def strike(self) -> None:
        route = self.swarm.serving(self.user)
        self.survivors = {hop: peer for hop, peer in enumerate(route) if hop not in self.hops}
        self._route = [peer.peer_id for peer in route]
        self.look()
        self.struck_s = time.monotonic()
        for hop in self.hops:
            self._kill(route[hop])

    def look(self) -> None:
        self.looks.append(Look(time.monotonic(), self.user.frames_sent, self.swarm.network.counts()))

    @property
    def stall(self) -> tuple[Look, Look]:
        """Before and after the longest wait."""
        return max(itertools.pairwise(self.looks), key=lambda pair: pair[1].at_s - pair[0].at_s)

    @property
    def uplink(self) -> int:
        """What the user sent from the strike until two tokens after the last route was opened, beyond steps of its own,
        each of which is as long as most are."""
        usual = median(after.sent - before.sent for before, after in itertools.pairwise(self.looks))
        until = min(self._opened + 1, len(self.looks) - 1)
        return round(self.looks[until].sent - self.looks[0].sent - until * usual)

    def acted(self, session: SessionId, action: Action) -> None:
        self.seen.acted(session, action)
        if isinstance(action, OpenHops):
            self._opened = len(self.looks)
            if self._route and self._next is None:
                start = SPANS[self.hops[0]][0]
                new = (hop for hop in action.route.hops if hop.peer_id not in self._route and hop.span.start == start)
                self._next = next((hop.peer_id for hop in new), None)
        elif isinstance(action, SendStep):
            self._chase()

    def answered(
        self, session: SessionId, step: PendingStep, hops: Sequence[Hop], timings: Sequence[tuple[float, float]]
    ) -> None:
        if self._next is not None:
            self._answered += 1
            self._chase()

    def lost(self, peer: PeerId) -> None:
        pass

    def _chase(self) -> None:
        if self._next is not None and self.again is None and self._answered == self.again_after:
            self.again = len(self.looks) - 1
            self._kill(self.swarm.of(self._next))

    def _kill(self, peer: LabPeer) -> None:
        self.strikes.append(threading.Thread(target=peer.kill))
        self.strikes[-1].start()


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

    def out_of(self, host: str, seconds: float) -> int:
        """Bytes, in so many of them."""
        return round((bytes_out_of(self.after, host) - bytes_out_of(self.before, host)) * seconds / CALM_S)


def into(before: dict[str, Any], after: dict[str, Any], hosts: Iterable[str], sources: Container[str]) -> int:
    """Bytes that the links from some hosts to some hosts carried between two looks."""
    return sum(bytes_into(after, host, sources) - bytes_into(before, host, sources) for host in hosts)


def run(notebook: Notebook) -> None:
    with pairs_network(notebook, SPARE) as network, LabSwarm(network, MODEL, PEERS, options=METRICS) as swarm:
        user = swarm.add_user("user", resilience=notebook.resilience)
        prompt_s = warm_up(notebook, user)
        calm = Calm.of(network)
        with ThreadPoolExecutor(1) as pool:
            for number in notebook.numbers():
                revived = pool.submit(swarm.revive)
                prompt = notebook.prompt(PROMPT)
                expected = notebook.local(prompt, COUNT)  # while those that were killed come back
                revived.result()
                one_run(notebook, swarm, user, number, prompt, expected, prompt_s, calm)
        notebook.saw(network)


def report(notebook: Notebook) -> None:
    stalls = [row["stall_s"] for row in notebook.rows]
    notebook.all_identical()
    notebook.at_most("median stall, s", median(stalls), 1.5)
    notebook.at_most("worst stall, s", max(stalls), 5.0)
    during = [row for row in notebook.rows if "uplink" in row]
    fed = notebook.resilience == "standby"  # then the client goes on feeding the first hop's
    if uplinks := [row["uplink"] / row["rebuilds"] for row in during if 0 not in row["hops"] and not fed]:
        notebook.at_most("client's uplink for a rebuild, beyond the steps themselves, worst, bytes", max(uplinks), 2048)
    if during and not fed:
        resent = max(row["into_healthy"] - row["anyway"] for row in during) / (PROMPT * HIDDEN_BYTES)
        notebook.at_most("sent to healthy hops for a stall's sake / the whole prompt, worst", resent, 0.1)
    recomputed = [(row, hop, count) for row in notebook.rows for hop, count in row.get("recomputed", ())]
    if again := [count for _, hop, count in recomputed if hop < LAST]:
        notebook.at_most("positions computed again by healthy hops, the last aside, worst", max(again), 0)
    if again := [count - row["rebuilds"] for row, hop, count in recomputed if hop == LAST and row["when"] != "prompt"]:
        notebook.at_most("... by a last hop, beyond the step whose answer was given up, worst", max(again), 0)
    if fed and (rows := [row for row in during if "step_s" in row and row["when"] == "token" and "again" not in row]):
        taken = sum(row["switches"] for row in rows) / len(rows)
        notebook.at_least("hops killed at a token whose standby took over", taken, 1)
        notebook.at_most(
            "a token after a switch / a usual step, median", median(r["stall_s"] / r["step_s"] for r in rows), 2
        )


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
    again_after = notebook.rng.randrange(PIECES) if number % AGAIN_EVERY == AGAIN_EVERY - 1 else None
    if again_after is not None:
        known(user, swarm.add_peer(SPARE, SPANS[hops[0]]))
    kill = Kill(swarm, user, hops, again_after)
    timer = threading.Timer(at_s, kill.strike) if when == "prompt" else None

    def on_token(count: int) -> None:
        if kill.looks:
            kill.look()
        elif timer is None and count == at_token:
            kill.strike()

    rebuilds, switches = user.remote.traffic.rebuilds, user.remote.traffic.switches
    computed = {peer: peer.computed_positions for peer in swarm.peers.values()}
    user.remote.observe(kill)
    if timer is not None:
        timer.start()
    error = ""
    answer = None
    try:
        answer = ends(lambda: user.generate(prompt, COUNT, on_token=on_token))
    except SwarmError as failed:
        error = f"{type(failed).__name__}: {failed}"
    user.remote.observe(None)
    if timer is not None:
        timer.join()
    for strike in kill.strikes:
        strike.join()
    traffic = user.remote.traffic
    about: dict[str, Any] = {"run": number, "when": when, "hops": hops, "rebuilds": traffic.rebuilds - rebuilds}
    about["switches"] = traffic.switches - switches
    if again_after is not None:
        about["again"] = kill.again
    recomputed = [(hop, peer.computed_positions - computed[peer] - POSITIONS) for hop, peer in kill.survivors.items()]
    serving = {peer.label for peer in swarm.serving(user)} if answer is not None else set()
    if again_after is not None:
        swarm.peers.pop(SPARE).close()
    if answer is None:
        notebook.row(**about, identical=False, stall_s=math.inf, error=error)
        return
    before, after = kill.stall
    stall_s, step_s = after.at_s - before.at_s, median(answer.gaps_s)
    carried = {}
    if when != "prompt":
        healthy = [peer.label for peer in kill.survivors.values()]
        # all who hold anything of the session; others have their own to say, records above all, often in one burst
        session = {"user", *healthy, *serving}
        carried["at_token"] = at_token
        carried["uplink"] = kill.uplink
        carried["uplink_packets"] = bytes_out_of(after.counts, "user") - bytes_out_of(before.counts, "user")
        carried["packets_anyway"] = calm.out_of("user", stall_s)
        carried["into_healthy"] = into(before.counts, after.counts, healthy, session)
        carried["anyway"] = calm.into(healthy, session, stall_s)
        carried["from_others"] = into(before.counts, after.counts, healthy, swarm.network.hosts.keys() - session)
    notebook.row(
        **about,
        identical=answer.ids == expected,
        stall_s=stall_s,
        step_s=step_s,
        recomputed=recomputed,
        **carried,
        **kill.seen.after(kill.struck_s),
    )


def known(user: User, peer: LabPeer) -> None:
    """Wait until a user could use a peer. Raises TimeoutError."""
    until_s = time.monotonic() + KNOWN_TIMEOUT_S
    while (covered := user.remote.coverage()) is None or all(one.peer_id != peer.peer_id for one in covered.peers):
        if time.monotonic() > until_s:
            raise TimeoutError(f"{peer} is not known to the user within {KNOWN_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


EXPERIMENTS: Final = (Experiment("kill", __doc__, run, report, runs=100, runs_short=10),)

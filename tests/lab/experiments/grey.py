"""Peers that are not dead but of no use: stopped, half-open, ten times slower, on links that come and go or flap."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Final

from routing.errors import SwarmError
from routing.ids import PeerId, SessionId
from routing.routes import Hop
from swarm.session.actions import Action, NeedRoute, OpenHops, SendStep
from swarm.session.steps import PendingStep
from tests.lab.experiments.pairs import PEERS, pairs_network, twin
from tests.lab.network import Network
from tests.lab.notebook import MODEL, SPANS, Experiment, Notebook, ends, median
from tests.lab.swarms import LabPeer, LabSwarm, User

PROMPT: Final = 40
AT_TOKEN: Final = 24
COUNT: Final = 120
SWIZZLED_COUNT: Final = 400
SWIZZLE_S: Final = 5.0
SILENCE_S: Final = 2.0
"""A silent peer is given up after max(3 × usual step, this)."""
RECOVERY_S: Final = 1.5
SLOW: Final = 0.1
SLOWED: Final = "10 × slow"
FLAPS: Final = "flapping"
FLAP_S: Final = (1.0, 3.0)
CHOSEN_AGAIN_S: Final = 120.0
"""Within which a peer that was slow is chosen again although others serve its blocks."""
RETURN_TIMEOUT_S: Final = 90.0
CHOSEN_TIMEOUT_S: Final = 240.0

Trouble = Callable[[LabSwarm, LabPeer], AbstractContextManager[None]]


@dataclass(slots=True)
class Seen:
    """When the user's sessions decided what: where the seconds of a stall go."""

    acts: list[tuple[float, str]] = field(default_factory=list)

    def acted(self, session: SessionId, action: Action) -> None:
        self.acts.append((time.monotonic(), type(action).__name__))

    def answered(
        self, session: SessionId, step: PendingStep, hops: Sequence[Hop], timings: Sequence[tuple[float, float]]
    ) -> None:
        pass

    def lost(self, peer: PeerId) -> None:
        pass

    def after(self, since_s: float) -> dict[str, float]:
        """Seconds until the hop was given up, others were opened, and the first step was sent over them."""
        found = {}
        at_s = since_s
        for name, kind in (("declared_s", NeedRoute), ("planned_s", OpenHops), ("opened_s", SendStep)):
            at_s = next((then_s for then_s, act in self.acts if then_s >= at_s and act == kind.__name__), math.nan)
            found[name] = at_s - since_s
        return found


@contextmanager
def stopped(swarm: LabSwarm, peer: LabPeer) -> Iterator[None]:
    """Its daemon keeps the connections open."""
    peer.pause()
    try:
        yield
    finally:
        peer.resume()


@contextmanager
def frozen(swarm: LabSwarm, peer: LabPeer) -> Iterator[None]:
    """The whole node; its kernel still acknowledges."""
    peer.freeze()
    try:
        yield
    finally:
        peer.thaw()


@contextmanager
def half_open(swarm: LabSwarm, peer: LabPeer) -> Iterator[None]:
    """It is gone, and nobody was told."""
    with cut(swarm.network, swarm.network.around(peer.label)):
        yield


@contextmanager
def deaf(swarm: LabSwarm, peer: LabPeer) -> Iterator[None]:
    """It speaks and hears nothing."""
    with cut(swarm.network, [pair for pair in swarm.network.around(peer.label) if pair[1] == peer.label]):
        yield


@contextmanager
def slow(swarm: LabSwarm, peer: LabPeer) -> Iterator[None]:
    with peer.slowed(SLOW):
        yield


@contextmanager
def flapping(swarm: LabSwarm, peer: LabPeer) -> Iterator[None]:
    """Its links are cut and heal again, each after 1 to 3 s."""
    rng, over, pairs = random.Random(peer.label), threading.Event(), swarm.network.around(peer.label)

    def flap() -> None:
        while not over.is_set():
            with cut(swarm.network, pairs):
                over.wait(rng.uniform(*FLAP_S))
            over.wait(rng.uniform(*FLAP_S))

    flapper = threading.Thread(target=flap, name="flap")
    flapper.start()
    try:
        yield
    finally:
        over.set()
        flapper.join()


@contextmanager
def cut(network: Network, pairs: list[tuple[str, str]]) -> Iterator[None]:
    network.cut(pairs)
    try:
        yield
    finally:
        network.heal(pairs)


TROUBLES: Final[dict[str, Trouble]] = {
    "stopped": stopped,
    "frozen": frozen,
    "half-open": half_open,
    "deaf": deaf,
    SLOWED: slow,
    FLAPS: flapping,
}


def run(notebook: Notebook) -> None:
    hold_s = 5.0 if notebook.short else 30.0
    with pairs_network(notebook) as network, LabSwarm(network, MODEL, PEERS) as swarm:
        user = swarm.add_user("user")
        for _ in range(2):
            user.generate(notebook.prompt(PROMPT), 8)
        for number in notebook.numbers():
            for name, trouble in TROUBLES.items():
                one_run(notebook, swarm, user, number, name, trouble, hold_s)
            swizzle(notebook, swarm, user, number)
        notebook.saw(network)


def report(notebook: Notebook) -> None:
    notebook.all_identical()
    for name in (*TROUBLES, "swizzled"):
        rows = [row for row in notebook.rows if row["trouble"] == name]
        # where one of those that serve is cut off after the other, each is given up after its own time
        excess_s = max(row["stall_s"] - row.get("hits", 1) * max(3 * row["step_s"], SILENCE_S) for row in rows)
        notebook.at_most(f"{name}: stall beyond max(3 × step, 2 s), worst, s", excess_s, RECOVERY_S)
        if name != "swizzled":
            if name not in (SLOWED, FLAPS):
                given_up_s = max(row["declared_s"] - max(3 * row["step_s"], SILENCE_S) for row in rows)
                notebook.at_most(f"{name}: given up beyond max(3 × step, 2 s), worst, s", given_up_s, 0.1)
            limit_s = CHOSEN_AGAIN_S if name == SLOWED else 60
            notebook.at_most(f"{name}: until used again, worst, s", max(r["used_again_s"] for r in rows), limit_s)
    slowed = [row["step_after_s"] / row["step_s"] for row in notebook.rows if row["trouble"] == SLOWED]
    notebook.at_most(f"{SLOWED}: a late token / a usual one, median", median(slowed), 1.5)


def one_run(
    notebook: Notebook, swarm: LabSwarm, user: User, number: int, name: str, trouble: Trouble, hold_s: float
) -> None:
    prompt, hop = notebook.prompt(PROMPT), notebook.rng.randrange(len(SPANS))
    expected = notebook.local(prompt, COUNT)
    struck_s = 0.0
    victims: list[LabPeer] = []
    seen = Seen()
    user.remote.observe(seen)
    with contextlib.ExitStack() as troubles:

        def on_token(count: int) -> None:
            nonlocal struck_s
            if count == AT_TOKEN:
                victims.append(swarm.serving(user)[hop])
                struck_s = time.monotonic()
                troubles.enter_context(trouble(swarm, victims[0]))

        answer = ends(lambda: user.generate(prompt, COUNT, on_token=on_token))
        user.remote.observe(None)
        time.sleep(max(0.0, struck_s + hold_s - time.monotonic()))
    (victim,) = victims
    notebook.row(
        run=number,
        trouble=name,
        hop=hop,
        identical=answer.ids == expected,
        step_s=median(answer.gaps_s[: AT_TOKEN - 1]),
        stall_s=answer.longest_gap_s(struck_s),
        step_after_s=median(answer.gaps_s[-16:]),
        **seen.after(struck_s),
        used_again_s=(until_chosen_again if name == SLOWED else until_used_again)(notebook, swarm, user, victim),
    )


def until_used_again(notebook: Notebook, swarm: LabSwarm, user: User, peer: LabPeer) -> float:
    """Seconds from its recovery until a peer whose twin refuses serves the user."""
    began_s = time.monotonic()
    swarm.network.refuse(twin(peer.label), on=True)
    try:
        while time.monotonic() < began_s + RETURN_TIMEOUT_S:
            with contextlib.suppress(SwarmError):
                ends(lambda: user.generate(notebook.prompt(4), 2))
                if peer in swarm.serving(user):
                    return time.monotonic() - began_s
            time.sleep(0.2)
        return float("inf")
    finally:
        swarm.network.refuse(twin(peer.label), on=False)


def until_chosen_again(notebook: Notebook, swarm: LabSwarm, user: User, peer: LabPeer) -> float:
    """Seconds from its recovery until a peer serves a new session although its twin would, too."""
    began_s = time.monotonic()
    while time.monotonic() < began_s + CHOSEN_TIMEOUT_S:
        ends(lambda: user.generate(notebook.prompt(4), 2))
        if peer in swarm.serving(user):
            return time.monotonic() - began_s
        time.sleep(1.0)
    return float("inf")


def swizzle(notebook: Notebook, swarm: LabSwarm, user: User, number: int) -> None:
    """Cut a random half of the network off host by host, then bring it back in another order (FoundationDB's name).

    One peer of each pair keeps its links, so that the swarm stays whole.
    """
    rng, network = notebook.rng, swarm.network
    prompt = notebook.prompt(PROMPT)
    expected = notebook.local(prompt, SWIZZLED_COUNT)
    hosts = ["entry", *(rng.choice([host, twin(host)]) for host in PEERS if host.endswith("1"))]
    events = [(rng.uniform(0, SWIZZLE_S), host, True) for host in hosts]
    events += [(rng.uniform(SWIZZLE_S, 2 * SWIZZLE_S), host, False) for host in hosts]
    began: list[float] = []
    hits_s: list[float] = []
    """When one was cut off that served the user."""
    over = threading.Event()

    def play() -> None:
        began.append(time.monotonic())
        for at_s, host, away in sorted(events):
            over.wait(began[0] + at_s - time.monotonic())
            if away and any(peer.label == host for peer in swarm.serving(user)):
                hits_s.append(time.monotonic())
            (network.cut if away else network.heal)(network.around(host))
        network.heal()

    player = threading.Thread(target=play, name="swizzle")

    def on_token(count: int) -> None:
        if count == AT_TOKEN:
            player.start()

    answer = ends(lambda: user.generate(prompt, SWIZZLED_COUNT, on_token=on_token))
    over.set()
    player.join()
    step_s = median(answer.gaps_s[: AT_TOKEN - 1])
    from_s, until_s = answer.longest_gap(began[0])
    notebook.row(
        run=number,
        trouble="swizzled",
        identical=answer.ids == expected,
        step_s=step_s,
        stall_s=until_s - from_s,
        hits=max(1, sum(from_s - step_s < hit_s < until_s for hit_s in hits_s)),
        seconds=answer.times_s[-1] - began[0],
    )


EXPERIMENTS: Final = (Experiment("grey", __doc__.splitlines()[0], run, report, runs=3),)

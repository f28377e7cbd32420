"""How long a peer that left is listed, after SIGTERM and after SIGKILL: by a user who knew it, and by later ones."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeAlias

from routing.health import coverage
from routing.ids import ModelId, PeerId
from routing.records import RECORD_LIFETIME_S, PeerState
from swarm.network import Entrance, NetworkThread, enter
from tests.lab import namespaces
from tests.lab.experiments.links import THREE
from tests.lab.network import Network
from tests.lab.notebook import MODEL, Experiment, Notebook
from tests.lab.swarms import LabSwarm

LATER_S: Final = {"later1": 0.0, "later2": 7.0, "later3": 13.0}
"""When users come after the signal: a record that was not renewed any more lives for 14 to 20 s then."""
WATCH_S: Final = 35.0
LOOK_S: Final = 0.1
ALL_TIMEOUT_S: Final = 60.0
GOODBYE_S: Final = 5.0

States: TypeAlias = dict[PeerId, PeerState]


def run(notebook: Notebook) -> None:
    hosts = ["entry", *THREE, "user", *LATER_S]
    with Network(hosts, seed=notebook.seed) as network, LabSwarm(network, MODEL, THREE) as swarm:
        user = swarm.add_user("user")
        model = user.remote.model.model

        def known() -> States:
            health = user.remote.coverage()
            return {} if health is None else {peer.peer_id: peer.state for peer in health.peers}

        for number in notebook.numbers():
            for signal in ("SIGTERM", "SIGKILL"):
                swarm.revive()
                all_known(swarm, known)
                user.generate(notebook.prompt(40), 8)
                leave(notebook, swarm, known, model, number, signal)
        notebook.saw(network)


def report(notebook: Notebook) -> None:
    for signal, what, limit_s in (("SIGTERM", "online", GOODBYE_S), ("SIGKILL", "any", RECORD_LIFETIME_S)):
        rows = [row for row in notebook.rows if row["signal"] == signal]
        for who, of in (("the user", [r for r in rows if r["who"] == "user"]),
                        ("who came later", [r for r in rows if r["who"] != "user"])):  # fmt: skip
            worst_s = max((row[what] - row["ended"] for row in of), default=math.inf)
            notebook.at_most(
                f"{signal}: until {who} lists it no more{' as online' * (what == 'online')}, worst, s", worst_s, limit_s
            )
    late = [row for row in notebook.rows if row["signal"] == "SIGKILL" and row["who"] != "user"]
    seen = sum(row["any"] > row["ended"] for row in late)
    notebook.at_least("users who came later and saw one that was killed", seen, 1)


def all_known(swarm: LabSwarm, known: Callable[[], States]) -> None:
    """Wait until everybody is listed as online, also those who came back. Raises TimeoutError."""
    deadline_s = time.monotonic() + ALL_TIMEOUT_S
    while not all(known().get(peer.peer_id) is PeerState.ONLINE for peer in swarm.peers.values()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not everybody is listed after {ALL_TIMEOUT_S:.0f} s")
        time.sleep(LOOK_S)


def leave(
    notebook: Notebook, swarm: LabSwarm, known: Callable[[], States], model: ModelId, number: int, signal: str
) -> None:
    """One row for each who looks; all times are seconds since the signal, `ended` that of the peer's end."""
    victim = swarm.peers[notebook.rng.choice(sorted(THREE))]
    peer_id, began_s = victim.peer_id, time.monotonic()

    def later(host: str) -> dict[str, float]:
        time.sleep(LATER_S[host])
        with newcomer(swarm, host, model) as listed:
            return {"came": time.monotonic() - began_s} | watched(listed, peer_id, began_s)

    with ThreadPoolExecutor(1 + len(LATER_S)) as pool:
        looks = {"user": pool.submit(watched, known, peer_id, began_s)}
        looks |= {host: pool.submit(later, host) for host in LATER_S}
        if signal == "SIGTERM":
            victim.terminate()
        victim.kill()
        ended_s = time.monotonic() - began_s
    for who, look in looks.items():
        about = {"run": number, "signal": signal, "victim": victim.label, "who": who, "ended": ended_s, "came": 0.0}
        notebook.row(**about | look.result())


def watched(listed: Callable[[], States], peer: PeerId, since_s: float) -> dict[str, float]:
    """Until when a peer was listed, as online and in any state: seconds since then, on the monotonic clock, to the
    first look that did not show it after the last one that did; 0 where none did."""
    until_s, there = {"online": 0.0, "any": 0.0}, list[str]()
    while time.monotonic() - since_s < WATCH_S:
        state = listed().get(peer)
        until_s |= dict.fromkeys(there, time.monotonic() - since_s)
        there = ["online"] * (state is PeerState.ONLINE) + ["any"] * (state is not None)
        time.sleep(LOOK_S)
    return until_s | dict.fromkeys(there, math.inf)


@contextlib.contextmanager
def newcomer(swarm: LabSwarm, host: str, model: ModelId) -> Iterator[Callable[[], States]]:
    """What a fresh client lists that comes to the network now, once it has looked."""
    entrance = Entrance.of(initial_peers=swarm.initial_peers)
    with swarm.network[host].entered():
        network = NetworkThread(lambda: enter(entrance))
    client = network.client

    async def first() -> None:
        client.discovery.watch(model)
        await client.discovery.refresh()

    async def listed() -> States:
        health = coverage(client.router.snapshot(client.discovery.now_s()), model)
        return {} if health is None else {peer.peer_id: peer.state for peer in health.peers}

    try:
        namespaces.note_sockets(swarm.network[host].namespace, swarm.network.folder)
        network.call(first())
        yield lambda: network.call(listed())
    finally:
        network.close()


EXPERIMENTS: Final = (Experiment("leave", __doc__, run, report, runs=3),)

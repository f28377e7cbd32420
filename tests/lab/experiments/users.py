"""Eight users on six peers of uneven speeds, against what the peers' two chains give alone, and with fixed routes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from peers.model.storage import cache_folder
from routing.ids import PeerId
from routing.routes import Route, RouteRequest
from tests.lab.experiments.pairs import PEERS
from tests.lab.network import Network
from tests.lab.notebook import MODEL, Experiment, Notebook, ends, mean, median
from tests.lab.swarms import Answer, LabSwarm, User

USERS: Final = 8
SHARES: Final = {"1": 0.24, "2": 0.12}
"""Of a core, for the first peer of each pair and the second: 1.08 cores in all, so that users and peers together need
less than 1.5 of the machine's two (`cores`): where they need all, two chains are no faster than one."""
PROMPT: Final = 16
PROBES: Final = "probes"
"""Of the folders in a cache."""


@dataclass(frozen=True, slots=True)
class Together:
    """What all users got at once, until the first of them had his answer."""

    each: list[float]
    """Tokens per second."""
    identical: bool
    cores: float
    """That everything on this machine kept busy meanwhile, but for what has a lower priority (`nice`)."""

    @property
    def tokens_per_s(self) -> float:
        return sum(self.each)


def run(notebook: Notebook) -> None:
    """The bound: what the three faster peers give all users without the slower ones, plus the reverse.

    Both chains are alike in shape, so a maximum flow through every mixture of them is the sum of the two. Each is
    measured with all users, whose steps share forwards, and no user can be on both: `tests/simulation/test_few_users`
    finds that no routes whatever reach 0.72 of this bound. So there is a second one: the better of the faster chain for
    all, and routes that are fixed in proportion to the chains' speeds, as by somebody who knows all of it.

    Peers are slow from their start, so that they find out by themselves how fast they are, as slow machines do.
    """
    count = 16 if notebook.short else 64
    names = [f"user{number}" for number in range(USERS)]
    slower = round(USERS * SHARES["2"] / sum(SHARES.values()))
    with (
        Network(["entry", *PEERS, *names], seed=notebook.seed) as network,
        LabSwarm(network, MODEL, {}, environment=lambda host: own_probes(network.folder / f"{host}-cache")) as swarm,
        contextlib.ExitStack() as paces,
    ):
        for host, span in PEERS.items():
            paces.enter_context(swarm.add_peer(host, span, wait=False).slowed(SHARES[host[1]]))
        for peer in swarm.peers.values():
            peer.wait_for("ready")
        users = [swarm.add_user(name) for name in names]
        chains = {end: frozenset(p.peer_id for host, p in swarm.peers.items() if host.endswith(end)) for end in SHARES}
        dealt = [chains["1"]] * slower + [chains["2"]] * (USERS - slower)
        together(notebook, users, count)  # everybody has measured everybody
        for number in notebook.numbers():
            alone = [together(notebook, users, count, avoid=[chains[end]] * USERS) for end in ("2", "1")]
            fixed = together(notebook, users, count, avoid=dealt)
            free = together(notebook, users, count)
            notebook.row(run=number, identical=free.identical, tokens_per_s=free.tokens_per_s,
                         fast_alone=alone[0].tokens_per_s, slow_alone=alone[1].tokens_per_s,
                         fixed=fixed.tokens_per_s, cores=max(free.cores, fixed.cores, *(a.cores for a in alone)),
                         slowest_of_mean=min(free.each) / mean(free.each),
                         fastest_of_mean=max(free.each) / mean(free.each))  # fmt: skip
        notebook.saw(network)


def own_probes(folder: Path) -> dict[str, str]:
    """The environment of a peer that shares the machine's cache, but for what others measured on it."""
    folder.mkdir()
    for shared in cache_folder().iterdir():
        if shared.name != PROBES:
            (folder / shared.name).symlink_to(shared)
    return {"HIVESWARM_CACHE": str(folder)}


def report(notebook: Notebook) -> None:
    rows = notebook.rows
    notebook.all_identical()
    notebook.at_most("cores that are busy, worst", max(row["cores"] for row in rows), 1.5)
    of_bound = median(row["tokens_per_s"] / (row["fast_alone"] + row["slow_alone"]) for row in rows)
    notebook.at_least("total / max-flow bound, median", of_bound, 0.85)
    of_fixed = median(row["tokens_per_s"] / max(row["fixed"], row["fast_alone"]) for row in rows)
    notebook.at_least("total / with the better of two ways to fix routes, median", of_fixed, 0.85)
    notebook.at_least("slowest user / mean, median", median(row["slowest_of_mean"] for row in rows), 0.6)


@contextlib.contextmanager
def kept_from(user: User, peers: frozenset[PeerId]) -> Iterator[None]:
    """Let a user plan no route through these peers."""
    router = user.remote._client.router
    plan = router.plan

    def without(request: RouteRequest, now_s: float) -> Route:
        return plan(replace(request, avoid=request.avoid | peers), now_s)

    router.plan = without  # type: ignore[method-assign]
    try:
        yield
    finally:
        router.plan = plan  # type: ignore[method-assign]


def together(
    notebook: Notebook, users: Sequence[User], count: int, *, avoid: Iterable[frozenset[PeerId]] = ()
) -> Together:
    """All users at once, each kept from some peers, if any are named."""
    prompts = [notebook.prompt(PROMPT) for _ in users]
    expected = [notebook.local(prompt, count) for prompt in prompts]

    def one(user: User, prompt: list[int]) -> Answer:
        return ends(lambda: user.generate(prompt, count))

    with contextlib.ExitStack() as keeps, ThreadPoolExecutor(len(users)) as pool:
        for user, peers in zip(users, avoid, strict=False):
            keeps.enter_context(kept_from(user, peers))
        began_s, busy_s = time.monotonic(), _busy_s()
        answers = list(pool.map(one, users, prompts))
        cores = (_busy_s() - busy_s) / (time.monotonic() - began_s)
    until_s = min(answer.times_s[-1] for answer in answers)
    return Together(
        each=[sum(at_s <= until_s for at_s in answer.times_s) / (until_s - began_s) for answer in answers],
        identical=[answer.ids for answer in answers] == expected,
        cores=cores,
    )


def _busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.irq + times.softirq


EXPERIMENTS: Final = (Experiment("users", __doc__, run, report, runs=3),)

"""Eight users on six peers of uneven speeds, against what the peers' two chains give alone, and with fixed routes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from routing.ids import PeerId
from routing.routes import Route, RouteRequest
from tests.lab.experiments.pairs import PEERS
from tests.lab.network import Network
from tests.lab.notebook import MODEL, Experiment, Notebook, ends, mean, median
from tests.lab.swarms import Answer, LabSwarm, User

USERS: Final = 8
SHARES: Final = {"1": 0.3, "2": 0.15}
"""Of a core, for the first peer of each pair and the second: 1.35 cores in all, so that the machine's two suffice."""
PROMPT: Final = 16


def run(notebook: Notebook) -> None:
    """The bound: what the three faster peers give all users without the slower ones, plus the reverse.

    Both chains are alike in shape, so a maximum flow through every mixture of them is the sum of the two. Each is
    measured with all users, whose steps share forwards, and no user can be on both: `tests/simulation/test_few_users`
    finds that no routes whatever reach 0.7 of this bound. So there is a second one: what the users get that are kept to
    the chains in proportion to their speed, as by somebody who knows all of it.
    """
    count = 16 if notebook.short else 64
    names = [f"user{number}" for number in range(USERS)]
    with Network(["entry", *PEERS, *names], seed=notebook.seed) as network, LabSwarm(network, MODEL, PEERS) as swarm:
        users = [swarm.add_user(name) for name in names]
        with contextlib.ExitStack() as paces:
            for host, peer in swarm.peers.items():
                paces.enter_context(peer.slowed(SHARES[host[1]]))
            together(notebook, users, count)  # everybody has measured everybody
            for number in notebook.numbers():
                parts = {}
                for left_out in SHARES:
                    others = [host for host in PEERS if host[1] == left_out]
                    for host in others:
                        network.refuse(host, on=True)
                    parts[left_out] = together(notebook, users, count)[0]
                    for host in others:
                        network.refuse(host, on=False)
                returned(swarm, users)
                with contextlib.ExitStack() as fixed:
                    for position, user in enumerate(users):
                        other = "2" if position < round(USERS * SHARES["1"] / sum(SHARES.values())) else "1"
                        avoid = frozenset(peer.peer_id for host, peer in swarm.peers.items() if host[1] == other)
                        fixed.enter_context(kept_from(user, avoid))
                    dealt = together(notebook, users, count)[0]
                total, each, same = together(notebook, users, count)
                notebook.row(run=number, identical=same, tokens_per_s=total, bound=sum(parts.values()),
                             fixed=dealt, fast_alone=parts["2"], slow_alone=parts["1"],
                             slowest_of_mean=min(each) / mean(each),
                             fastest_of_mean=max(each) / mean(each))  # fmt: skip
        notebook.saw(network)


def report(notebook: Notebook) -> None:
    notebook.all_identical()
    of_bound = median(row["tokens_per_s"] / row["bound"] for row in notebook.rows)
    notebook.at_least("total / max-flow bound, median", of_bound, 0.85)
    of_fixed = median(row["tokens_per_s"] / row["fixed"] for row in notebook.rows)
    notebook.at_least("total / with fixed routes in proportion, median", of_fixed, 0.85)
    notebook.at_least("slowest user / mean, median", median(r["slowest_of_mean"] for r in notebook.rows), 0.6)


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


def together(notebook: Notebook, users: Sequence[User], count: int) -> tuple[float, list[float], bool]:
    """All users at once: tokens per second in all, of each, and whether the ids are right."""
    prompts = [notebook.prompt(PROMPT) for _ in users]
    expected = [notebook.local(prompt, count) for prompt in prompts]

    def one(user: User, prompt: list[int]) -> Answer:
        return ends(lambda: user.generate(prompt, count))

    began_s = time.monotonic()
    with ThreadPoolExecutor(len(users)) as pool:
        answers = list(pool.map(one, users, prompts))
    seconds = max(answer.times_s[-1] for answer in answers) - began_s
    each = [count / (answer.times_s[-1] - answer.started_s) for answer in answers]
    return len(users) * count / seconds, each, [answer.ids for answer in answers] == expected


def returned(swarm: LabSwarm, users: Sequence[User]) -> None:
    """Wait until every peer serves again: those that refused are avoided for a while."""
    deadline_s = time.monotonic() + 60
    missing = set(swarm.peers)
    while missing and time.monotonic() < deadline_s:
        for user in users:
            ends(lambda user=user: user.generate([1, 2, 3], 2))
            missing -= {peer.label for peer in swarm.serving(user)}


EXPERIMENTS: Final = (Experiment("users", __doc__, run, report, runs=3),)

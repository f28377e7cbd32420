"""What links cost: a long one-way delay against the law of direct returns, every profile, NATs, and a partition."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from routing.errors import SwarmError
from swarm.testing import NodeFailed
from tests.lab.experiments.pairs import PEERS
from tests.lab.links import PROFILES
from tests.lab.network import Network
from tests.lab.notebook import MODEL, SPANS, Experiment, Notebook, ends, mean, median
from tests.lab.swarms import LabSwarm, User

TRIPS: Final = len(SPANS) + 1
"""One-way trips of a token: hops push to each other, and the last one answers the user."""
THREE: Final = dict(zip("abc", SPANS, strict=True))
COUNT: Final = 48
MERGE_TIMEOUT_S: Final = 60.0


def delay(notebook: Notebook) -> None:
    profile = PROFILES["wan"]
    with Network(["entry", *THREE, "user"], seed=notebook.seed) as network, LabSwarm(network, MODEL, THREE) as swarm:
        user = swarm.add_user("user")
        user.generate(notebook.prompt(40), 8)
        network.shape(profile)
        for number in notebook.numbers():
            link_run(notebook, user, TRIPS * profile.delay_s, run=number)
        notebook.saw(network)
    notebook.all_identical()
    notebook.at_least("tokens/s / the law's, median", median(r["of_law"] for r in notebook.rows), 0.9)
    notebook.at_least("tokens/s, median", median(r["tokens_per_s"] for r in notebook.rows), 3.8)


def profiles(notebook: Notebook) -> None:
    with Network(["entry", *THREE, "user"], seed=notebook.seed) as network, LabSwarm(network, MODEL, THREE) as swarm:
        user = swarm.add_user("user")
        user.generate(notebook.prompt(40), 8)
        for number in notebook.numbers():
            for name, profile in PROFILES.items():
                network.shape(profile)
                link_run(notebook, user, TRIPS * profile.delay_s, run=number, profile=name)
        notebook.saw(network)
    notebook.all_identical()


def link_run(notebook: Notebook, user: User, travel_s: float, **about: object) -> None:
    """One answer, its speed, and the speed that the links and the peers' own computing allow."""
    computing_s: list[float] = []

    def on_token(count: int) -> None:
        computing_s.append(sum(hop.compute_s for hop in user.remote.hop_timings))

    prompt, count = notebook.prompt(40), 16 if notebook.short else COUNT
    answer = ends(lambda: user.generate(prompt, count, on_token=on_token))
    law = 1 / (travel_s + mean(computing_s[1:]))
    notebook.row(
        **about,
        identical=answer.ids == notebook.local(prompt, count),
        tokens_per_s=answer.tokens_per_s,
        of_law=answer.tokens_per_s / law,
        first_token_s=answer.times_s[0] - answer.started_s,
    )


def nat(notebook: Notebook) -> None:
    hosts = ["entry", *THREE, "user", "hidden"]
    with Network(hosts, seed=notebook.seed, profile=PROFILES["wifi"]) as network:
        for host in ("user", "hidden"):
            network.put_behind_nat(host)
        with LabSwarm(network, MODEL, THREE) as swarm:
            user = swarm.add_user("user")
            for number in notebook.numbers():
                prompt = notebook.prompt(40)
                answer = ends(lambda prompt=prompt: user.generate(prompt, COUNT))
                notebook.row(run=number, identical=answer.ids == notebook.local(prompt, COUNT),
                             relays=user.remote.traffic.relays)  # fmt: skip
            hidden = swarm.add_peer("hidden", SPANS[0])
            try:
                hidden.wait_for("unreachable", timeout_s=60)
                named = 1
            except NodeFailed:
                named = 0
            notebook.say(f"a peer behind a NAT is told so: {bool(named)}")
            notebook.saw(network)
    notebook.all_identical()
    notebook.at_most("steps relayed through the user", notebook.rows[-1]["relays"], 0)
    notebook.at_least("a peer behind a NAT is told that nobody reaches it", named, 1)


def partition(notebook: Notebook) -> None:
    """Both halves can serve; each must, and they must find each other again."""
    hosts = ["entry", *PEERS, "west", "east"]
    western = ["entry", *(host for host in PEERS if host.endswith("1")), "west"]
    eastern = [host for host in hosts if host not in western]
    with Network(hosts, seed=notebook.seed) as network, LabSwarm(network, MODEL, PEERS) as swarm:
        users = [swarm.add_user("west"), swarm.add_user("east")]
        for user in users:
            user.generate(notebook.prompt(40), 8)
        for number in notebook.numbers():
            prompt = notebook.prompt(40)
            expected = notebook.local(prompt, COUNT)
            network.cut(network.between(western, eastern))
            with ThreadPoolExecutor(2) as pool:
                answers = list(pool.map(lambda user, prompt=prompt: user.generate(prompt, COUNT), users))
            network.heal()
            healed_s = time.monotonic()
            merged = meets_again(users[0], swarm, healed_s)
            for name, answer in zip(("west", "east"), answers, strict=True):
                notebook.row(run=number, side=name, identical=answer.ids == expected,
                             longest_gap_s=answer.longest_gap_s(answer.started_s), merged_s=merged)  # fmt: skip
        notebook.saw(network)
    notebook.all_identical()
    notebook.at_most("until both halves are one, s", max(r["merged_s"] for r in notebook.rows), 20)


def meets_again(user: User, swarm: LabSwarm, healed_s: float) -> float:
    """Seconds until the western user can be served by the eastern peers alone."""
    for host in PEERS:
        if host.endswith("1"):
            swarm.network.refuse(host, on=True)
    try:
        while time.monotonic() < healed_s + MERGE_TIMEOUT_S:
            if answers(user) and all(peer.label.endswith("2") for peer in swarm.serving(user)):
                return time.monotonic() - healed_s
        return float("inf")
    finally:
        for host in PEERS:
            swarm.network.refuse(host, on=False)


def answers(user: User) -> bool:
    """Whether a user gets a short answer now."""
    try:
        ends(lambda: user.generate([1, 2, 3], 2))
    except SwarmError:
        time.sleep(0.2)
        return False
    return True


EXPERIMENTS: Final = (
    Experiment("delay", "One-way delay of 50 ms, three hops, 100 Mbit/s, no speculation.", delay, runs=5),
    Experiment("links", "The same answer over every link profile.", profiles, runs=3),
    Experiment("nat", "A user behind a NAT is served; a peer behind one is told so.", nat, runs=3),
    Experiment("partition", "The network falls apart into two halves and is joined again.", partition, runs=3),
)

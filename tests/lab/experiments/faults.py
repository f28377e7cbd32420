"""Peers whose disk is full, and peers whose clock is wrong."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from peers.model.storage import cache_folder
from routing.errors import SwarmError
from tests.lab.experiments.grey import until_used_again
from tests.lab.experiments.pairs import PEERS, pairs_network
from tests.lab.notebook import HIDDEN_BYTES, MODEL, Experiment, Notebook, ends
from tests.lab.swarms import LabPeer, LabSwarm, User, hooked

PROMPT: Final = 200
COUNT: Final = 40
AT_TOKEN: Final = 16
DISK_BYTES: Final = 16 << 20
JOURNAL_BYTES: Final = PROMPT * HIDDEN_BYTES
"""Of memory, half of it for one client: so that a session does not stay in it."""
STALL_S: Final = 5.0
SKEWS_S: Final = (300.0, -300.0)
NAMED_S: Final = 60.0


def disk(notebook: Notebook) -> None:
    """The last hop dies while the journals of the hops before it are on disk, and while nothing is left of the disk."""
    with pairs_network(notebook) as network:
        small = hooked(
            LAB_SMALL_DISK=f"{DISK_BYTES}:{network.folder / 'disk'}:{cache_folder()}",
            LAB_JOURNAL_BYTES=str(JOURNAL_BYTES),
            HIVESWARM_CACHE=str(network.folder / "disk"),
        )
        options = ("--journal-disk", f"{DISK_BYTES >> 20}MiB")
        with LabSwarm(network, MODEL, PEERS, environment=lambda host: small, options=options) as swarm:
            user = swarm.add_user("user")
            user.generate(notebook.prompt(PROMPT), 8)
            for number in notebook.numbers():
                for full in (False, True):
                    disk_run(notebook, swarm, user, number, full=full)
                    swarm.revive()
            notebook.saw(network)
    notebook.all_identical()
    notebook.at_most("stall, worst, s", max(row["stall_s"] for row in notebook.rows), STALL_S)
    notebook.at_least("peers that run on", min(row["running"] for row in notebook.rows), len(PEERS) - 1)
    full = [row for row in notebook.rows if row["full"]]
    notebook.at_least("runs on a full disk in which a peer named it", sum(r["named"] > 0 for r in full), len(full))
    emptied = [row for row in notebook.rows if not row["full"]]
    notebook.at_least("positions from a journal on disk, worst", min(r["replayed"] for r in emptied), PROMPT)


def disk_run(notebook: Notebook, swarm: LabSwarm, user: User, number: int, *, full: bool) -> None:
    prompt = notebook.prompt(PROMPT)
    expected = notebook.local(prompt, COUNT)
    struck_s = 0.0
    killing: list[threading.Thread] = []
    before = user.remote.traffic.replayed_positions
    logged = {peer.label: peer.log.stat().st_size for peer in swarm.peers.values()}

    def on_token(count: int) -> None:
        nonlocal struck_s
        if count == AT_TOKEN:
            struck_s = time.monotonic()
            killing.append(threading.Thread(target=swarm.serving(user)[-1].kill))
            killing[0].start()

    with contextlib.ExitStack() as fillings:
        if full:
            for peer in swarm.peers.values():
                fillings.enter_context(filled(peer, swarm.network.folder / "disk"))
        answer = ends(lambda: user.generate(prompt, COUNT, on_token=on_token))
    killing[0].join()
    named = [
        peer.label for peer in swarm.peers.values()
        if b"a journal stays out of" in peer.log.read_bytes()[logged[peer.label] :]
    ]  # fmt: skip
    notebook.row(
        run=number, full=full, identical=answer.ids == expected, stall_s=answer.longest_gap_s(struck_s),
        running=sum(peer.running for peer in swarm.peers.values()), named=len(named),
        replayed=user.remote.traffic.replayed_positions - before,
    )  # fmt: skip


@contextmanager
def filled(peer: LabPeer, folder: Path) -> Iterator[None]:
    """Nothing is left of a peer's small disk, which only it sees; what is freed there is taken, too."""
    file, over = Path(f"/proc/{peer.pid}/root{folder}/filling"), threading.Event()

    def fill() -> None:
        with file.open("wb", buffering=0) as filling:
            while not over.wait(0.02):
                with contextlib.suppress(OSError):
                    while filling.tell() < DISK_BYTES and filling.write(b"\0" * (1 << 16)):
                        pass

    filler = threading.Thread(target=fill, name=f"fill {peer.label}")
    filler.start()
    try:
        yield
    finally:
        over.set()
        filler.join()
        with contextlib.suppress(FileNotFoundError):  # its disk went with it
            file.unlink()


def clock(notebook: Notebook) -> None:
    """The clock of a peer on the route is set wrong in the middle of a session, and right again."""
    with pairs_network(notebook) as network:
        clocks = {host: network.folder / f"{host}.clock" for host in PEERS}
        for file in clocks.values():
            file.write_text("0")
        with LabSwarm(network, MODEL, PEERS, environment=lambda host: hooked(LAB_CLOCK=str(clocks[host]))) as swarm:
            user = swarm.add_user("user")
            user.generate(notebook.prompt(40), 8)
            for number in notebook.numbers():
                for skew_s in SKEWS_S:
                    clock_run(notebook, swarm, user, clocks, number, skew_s)
            notebook.saw(network)
    notebook.all_identical()
    rows = notebook.rows
    notebook.at_most("longest wait for a token, s", max(row["stall_s"] for row in rows), STALL_S)
    notebook.at_most("until the peer named its clock, worst, s", max(row["named_s"] for row in rows), NAMED_S)
    notebook.at_least("its clock named by others, runs", sum(row["named_by_others"] > 0 for row in rows), len(rows))
    notebook.at_least("served meanwhile, share of requests", min(row["served"] for row in rows), 1)
    notebook.at_most("until used again, worst, s", max(row["used_again_s"] for row in rows), 60)


def clock_run(
    notebook: Notebook, swarm: LabSwarm, user: User, clocks: dict[str, Path], number: int, skew_s: float
) -> None:
    prompt, hop = notebook.prompt(40), notebook.rng.randrange(3)
    expected = notebook.local(prompt, COUNT)
    victims: list[LabPeer] = []
    struck_s = 0.0
    heard = 0
    logged: dict[str, int] = {}

    def on_token(count: int) -> None:
        nonlocal struck_s, heard
        if count == AT_TOKEN:
            victims.append(swarm.serving(user)[hop])
            heard = len(victims[0].events)
            logged.update({peer.label: peer.log.stat().st_size for peer in swarm.peers.values()})
            struck_s = time.monotonic()
            clocks[victims[0].label].write_text(str(skew_s))

    answer = ends(lambda: user.generate(prompt, COUNT, on_token=on_token))
    (victim,) = victims
    asked = served = 0
    named_s = float("inf")
    others: list[str] = []
    try:
        while time.monotonic() < struck_s + NAMED_S and (named_s == float("inf") or not others):
            asked += 1
            with contextlib.suppress(SwarmError):
                served += len(ends(lambda: user.generate(notebook.prompt(4), 2)).ids) == 2
            if named_s == float("inf") and any(event["event"] == "clock_wrong" for event in victim.events[heard:]):
                named_s = time.monotonic() - struck_s
            others = [
                peer.label for peer in swarm.peers.values()
                if any(
                    victim.peer_id.encode() in line and b"clock" in line
                    for line in peer.log.read_bytes()[logged[peer.label] :].splitlines()
                )
            ]  # fmt: skip
            time.sleep(0.5)
    finally:
        clocks[victim.label].write_text("0")
    notebook.row(
        run=number, skew_s=skew_s, hop=hop, identical=answer.ids == expected, stall_s=answer.longest_gap_s(struck_s),
        named_s=named_s, named_by_others=len(others), asked=asked, served=served / asked,
        used_again_s=until_used_again(notebook, swarm, user, victim),
    )  # fmt: skip


EXPERIMENTS: Final = (
    Experiment("disk", "A hop dies while journals lie on small disks, and while these are full.", disk, runs=3),
    Experiment("clock", "The clock of a peer is set five minutes wrong in the middle of a session.", clock, runs=2),
)

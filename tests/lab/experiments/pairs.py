"""The swarm that most experiments use: two peers for each third of the model, an entry node and a user."""

from __future__ import annotations

from typing import Final

from tests.lab.links import PROFILES, LinkProfile
from tests.lab.network import Network
from tests.lab.notebook import SPANS, Notebook

PEERS: Final = {f"{'abc'[hop]}{copy}": span for copy in (1, 2) for hop, span in enumerate(SPANS)}


def pairs_network(notebook: Notebook, *more: str, profile: LinkProfile = PROFILES["loopback"]) -> Network:
    """`more`: hosts."""
    return Network(["entry", *PEERS, "user", *more], seed=notebook.seed, profile=profile)


def twin(host: str) -> str:
    """The host that serves the same blocks."""
    return host[0] + ("2" if host[1] == "1" else "1")

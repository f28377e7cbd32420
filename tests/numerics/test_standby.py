"""A second peer is kept filled for every hop, and takes its place without a replay worth the name.

Virtual wires, real engines and drivers, as in `test_repair`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peers.wire.messages import Urgency
from routing.ids import PeerId
from swarm.session.core import SessionConfig
from tests.numerics.test_repair import LENGTH, PROMPT, Scene
from tests.numerics.test_trouble import AtToken, generate

pytestmark = pytest.mark.usefixtures("plain_forwards")

LAG = 8


@pytest.fixture
def scene(folder: Path, local: Any, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(folder, tmp_path, config=SessionConfig(chunk_positions=32, standby=True, standby_lag=LAG))
    scene.swarm.thread.call(scene.swarm.thread.client.discovery.refresh())
    yield scene
    scene.swarm.close()


class Standing:
    """Waits until every hop's standby holds the prompt, and lets some hops die."""

    def __init__(self, scene: Scene, dies: tuple[int, ...]) -> None:
        self.scene, self.dies = scene, dies
        self.used: list[PeerId] = []
        self.standbys: list[PeerId] = []
        self.urgencies: set[Urgency] = set()
        """Of all that standbys computed while they stood by."""
        self._works: list[tuple[PeerId, Urgency]] = []
        scene.on_work = lambda peer, work: self._works.append((peer, work.urgency))

    def __call__(self) -> None:
        scene, self.used = self.scene, self.scene.route
        pairs = [{peer._key.peer_id for peer in scene.swarm.peers[hop::3]} for hop in range(3)]
        self.standbys = [(pair - {peer}).pop() for pair, peer in zip(pairs, self.used, strict=True)]
        scene.swarm.eventually(lambda: all(scene.positions(peer) >= PROMPT.shape[1] for peer in self.standbys))
        self.urgencies = {urgency for peer, urgency in self._works if peer in self.standbys}
        scene.kill(*self.dies)


@pytest.mark.parametrize("dies", [(0,), (1, 2), (0, 1, 2)])
def test_a_standby_holds_all_but_the_last_positions_and_goes_on(
    scene: Scene, local: Any, dies: tuple[int, ...]
) -> None:
    standing = Standing(scene, dies)
    assert torch.equal(generate(scene.model, PROMPT, stopping_criteria=[AtToken(8, standing)]), generate(local, PROMPT))
    assert scene.route == [standing.standbys[hop] if hop in dies else standing.used[hop] for hop in range(3)]
    assert standing.urgencies == {Urgency.BACKGROUND}
    assert scene.remote.traffic.switches == len(dies)
    assert scene.remote.traffic.replayed_positions <= len(dies) * (LAG + 1)
    assert [scene.positions(peer) for peer in scene.route] == [LENGTH] * 3, "nobody computed anything twice"
    assert scene.swarm.eventually_settled()

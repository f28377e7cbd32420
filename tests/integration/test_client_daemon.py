"""A client whose own libp2p daemon dies says so; it never waits for answers that cannot come."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

from routing.errors import Unavailable
from swarm import SwarmModelForCausalLM
from swarm.testing import LocalSwarm
from tests.integration.conftest import MODEL, driver, generate


class KillAt(StoppingCriteria):
    def __init__(self, token: int, pid: int) -> None:
        self.left, self.pid = token, pid

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            os.kill(self.pid, signal.SIGKILL)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_client_whose_daemon_is_killed_while_it_generates_says_so(swarm: LocalSwarm) -> None:
    with SwarmModelForCausalLM.from_pretrained(MODEL, initial_peers=swarm.initial_peers) as model:
        node: Any = driver(model)._network.client.node
        with pytest.raises(Unavailable, match="daemon") as raised:
            generate(model, (5, 6, 7), 64, stopping_criteria=[KillAt(4, node.daemon_pid)])
        assert raised.value.hint
        with pytest.raises(Unavailable, match="daemon"):
            generate(model, (5, 6, 7), 4)
    with SwarmModelForCausalLM.from_pretrained(MODEL, initial_peers=swarm.initial_peers) as model:
        assert len(generate(model, (5, 6, 7), 4)) == 4  # nobody else noticed

"""Opening a model for `generate` and `chat`: what is refused before anything is read, and what is done only once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, MambaConfig

import swarm.models.loading
from peers.errors import PeerUnreachable, UnsupportedModel
from peers.model import catalog
from routing.errors import CallerError
from routing.identity import SigningKey
from swarm import SwarmModelForCausalLM
from swarm.answers import Sampling
from swarm.cli import conversation
from swarm.cli.conversation import Connection
from swarm.network import Entrance
from tests.helpers.families import FAMILIES, save_checkpoint

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/" + SigningKey.from_seed(bytes(32)).peer_id


def connection(folder: Path) -> Connection:
    entrance = Entrance(network="hive", addresses=(NOBODY,))
    return Connection(model=str(folder), entrance=entrance, dtype="auto", token=None, min_precision=None)


@pytest.mark.parametrize(
    "open_model",
    [
        lambda folder: connection(folder).open(),
        lambda folder: SwarmModelForCausalLM.from_pretrained(str(folder), initial_peers=[NOBODY]),
    ],
    ids=["command line", "Python"],
)
def test_a_model_that_cannot_be_cut_is_refused_before_its_weights_are_read(
    open_model: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MambaConfig(num_hidden_layers=2, hidden_size=16).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(catalog, "sha256_of", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UnsupportedModel):
        open_model(tmp_path)


def test_a_command_resolves_its_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object, **__: object) -> None:
        raise PeerUnreachable("nobody is there")

    monkeypatch.setenv("HIVESWARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(swarm.models.loading, "resolve", lambda *_, **__: pytest.fail("resolved again"))
    monkeypatch.setattr(swarm.models.loading.driver, "connect", nobody)
    monkeypatch.setattr(swarm.models.loading, "pool_for", lambda *_: None)  # nothing is compiled for this cache
    save_checkpoint(FAMILIES["llama"], tmp_path / "model")
    with pytest.raises(PeerUnreachable, match="nobody is there"):
        connection(tmp_path / "model").open()


def test_a_bad_network_name_is_refused_before_the_model_is_looked_for() -> None:
    with pytest.raises(CallerError, match="not a network name"):
        SwarmModelForCausalLM.from_pretrained("./nowhere", initial_peers=[NOBODY], network="My Network")


def test_a_conversation_that_fills_the_context_points_to_reset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hello", None])
    monkeypatch.setattr(conversation, "_read_line", lambda: next(lines))
    monkeypatch.setattr(conversation, "encode_chat", lambda tokenizer, messages: [1] * 32)
    model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=32))
    conversation._converse(model, SimpleNamespace(), [], sampling=Sampling(), max_new_tokens=1)
    error, hint = capsys.readouterr().err.splitlines()
    assert "context has 32" in error
    assert "/reset" in hint

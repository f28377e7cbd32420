"""Mistakes at the doors that people use: one line, a hint, no traceback, no process left, nobody else disturbed."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig

from swarm.testing import LocalSwarm
from tests.helpers.checkpoints import save_llama
from tests.integration.conftest import Commands, Greedy, generate

Spoil = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_llama(folder)
    return folder


def recurrent(folder: Path) -> list[str]:
    MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64).save_pretrained(folder / "model")
    return []


def torn(folder: Path) -> list[str]:
    shard = folder / "model" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    return []


def flipped(folder: Path) -> list[str]:
    """One bit of the header: flipped values are just another model, with another id."""
    shard = folder / "model" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[8] ^= 1  # the brace that opens the header
    shard.write_bytes(content)
    return []


def readable_by_all(folder: Path) -> list[str]:
    (folder / "peer.key").write_bytes(b"secret")
    (folder / "peer.key").chmod(0o644)
    return []


def port_in_use(folder: Path) -> list[str]:
    taken = socket.create_server(("127.0.0.1", 0))
    _taken.append(taken)
    return ["--listen", f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"]


_taken: list[socket.socket] = []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (recurrent, "mamba models cannot be cut into blocks"),
        (torn, "model.safetensors"),
        (flipped, "model.safetensors"),
        (readable_by_all, "chmod 600"),
        (port_in_use, "in use"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_peer_that_cannot_join_says_why_and_what_to_do(
    command: Commands, swarm: LocalSwarm, tiny: Path, tmp_path: Path, spoil: Spoil, said: str
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    options = spoil(tmp_path)
    listen = [] if "--listen" in options else ["--listen", "/ip4/127.0.0.1/tcp/0"]
    entry = ["--invite", swarm.invite, "--identity", str(tmp_path / "peer.key")]
    done = command("join", str(tmp_path / "model"), *entry, *listen, *options)
    assert done.returncode == 1, done.stderr
    assert said in done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-2].startswith("error: "), done.stderr
    assert lines[-1].startswith("hint: "), done.stderr
    assert "Traceback" not in done.stderr
    for taken in _taken:
        taken.close()


def test_a_tokenizer_that_is_broken_is_named(command: Commands, swarm: LocalSwarm, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "tokenizer.json").write_text(json.dumps(_WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    done = command("generate", str(folder), "--invite", swarm.invite, "--raw", "--prompt", "a b")
    assert done.returncode == 1
    assert "has no tokenizer that can be loaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_nobody_serves_is_refused_with_its_blocks(
    command: Commands, swarm: LocalSwarm, tiny: Path
) -> None:
    (tiny / "tokenizer.json").write_text(json.dumps(_WORDS | {"added_tokens": []}))
    (tiny / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    started_s = time.monotonic()
    done = command("generate", str(tiny), "--invite", swarm.invite, "--raw", "--prompt", "a b")
    assert done.returncode == 1
    assert "no peer serves model" in done.stderr
    assert "swarm join" in done.stderr
    assert time.monotonic() - started_s < 60


@pytest.mark.usefixtures("command")  # so that it is asked of the same swarm
def test_nobody_else_was_disturbed(model: Any, greedy: Greedy) -> None:
    assert generate(model, (5, 6, 7), 8) == greedy((5, 6, 7), 8)


_WORDS = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"a": 3, "b": 4, "<unk>": 0}, "unk_token": "<unk>"},
    "pre_tokenizer": {"type": "Whitespace"},
}

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from peers.errors import CorruptCheckpoint
from peers.model.catalog import Checkpoint, resolve
from peers.model.loading import client_tensors, load_client, load_config, load_span, span_tensors
from peers.model.skeleton import install_route
from routing.errors import InvalidSpan
from routing.ids import BlockSpan
from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, save_checkpoint

SPAN = BlockSpan(1, 3)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Checkpoint]:
    def make(name: str) -> Checkpoint:
        save_checkpoint(FAMILIES[name], tmp_path / name)
        return resolve(str(tmp_path / name), cache=tmp_path / "cache")

    return make


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that transformers read of each tensor: a safetensors slice is read when it is indexed."""
    bytes_read: dict[str, int] = {}

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor = self.inner[index]
            bytes_read[self.name] = bytes_read.get(self.name, 0) + tensor.nbytes
            return tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = safe_open(*args, **kwargs)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

        def get_tensor(self, name: str) -> torch.Tensor:
            return Slice(name, self.inner.get_slice(name))[...]

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", Counting)
    return bytes_read


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "bloom", "deepseek-v3", "gpt-oss"])
def test_a_span_reads_its_own_tensors_and_nothing_else(
    name: str, make: Callable[[str], Checkpoint], read: dict[str, int]
) -> None:
    checkpoint = make(name)
    wanted = span_tensors(checkpoint, load_config(checkpoint), SPAN)
    peer = load_span(checkpoint, SPAN, dtype=torch.float32, device="cpu")
    assert sorted(read) == sorted(wanted)
    assert sum(read.values()) == checkpoint.num_bytes(wanted) <= peer.weight_bytes
    assert all(".1." in tensor or ".2." in tensor for tensor in wanted)


def test_experts_are_stored_singly_and_read_singly(make: Callable[[str], Checkpoint]) -> None:
    checkpoint = make("mixtral")
    wanted = span_tensors(checkpoint, load_config(checkpoint), BlockSpan(0, 1))
    assert sum("experts" in tensor for tensor in wanted) == 4 * 3  # transformers fuses them while loading


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bloom", "opt"])
def test_a_client_reads_all_but_the_blocks(name: str, make: Callable[[str], Checkpoint], read: dict[str, int]) -> None:
    checkpoint = make(name)
    load_client(checkpoint, dtype=torch.float32, device="cpu")
    blocks = span_tensors(checkpoint, load_config(checkpoint), BlockSpan(0, NUM_BLOCKS))
    assert sorted(read) == sorted(client_tensors(checkpoint, load_config(checkpoint)))
    assert sorted(read) == sorted(checkpoint.weight_map.keys() - set(blocks))


def test_shards_that_a_span_does_not_need_may_be_missing(tmp_path: Path) -> None:
    whole = save_checkpoint(FAMILIES["llama"], tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    whole.save_pretrained(tmp_path / "model", max_shard_size="16KB")
    checkpoint = resolve(str(tmp_path / "model"), cache=tmp_path / "cache")
    needed = {checkpoint.weight_map[name] for name in span_tensors(checkpoint, load_config(checkpoint), SPAN)}
    others = set(checkpoint.weight_map.values()) - needed
    assert others
    for file in others:
        (tmp_path / "model" / file).unlink()
    peer = load_span(checkpoint, SPAN, dtype=torch.float32, device="cpu")
    for mine, theirs in zip(peer.module.layers, whole.model.layers[1:3], strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("llama", "model.layers.2.mlp.up_proj.weight"),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.1.w1.weight"),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.1.w2.weight"),
    ],
)
def test_a_lost_tensor_is_named_instead_of_drawn_at_random(name: str, lost: str, tmp_path: Path) -> None:
    save_checkpoint(FAMILIES[name], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = resolve(str(tmp_path / "model"), cache=tmp_path / "cache")
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.2\.mlp\."):
        load_span(checkpoint, SPAN, dtype=torch.float32, device="cpu")


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    save_checkpoint(FAMILIES["llama"], tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 50}))
    checkpoint = resolve(str(tmp_path / "model"), cache=tmp_path / "cache")
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.1\.mlp"):
        load_span(checkpoint, SPAN, dtype=torch.float32, device="cpu")


def test_blocks_outside_the_model_are_refused(make: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(InvalidSpan, match=f"2:9 are outside the model, which has {NUM_BLOCKS}"):
        load_span(make("llama"), BlockSpan(2, 9), dtype="auto", device="cpu")


def test_dtypes_are_those_asked_for(make: Callable[[str], Checkpoint]) -> None:
    checkpoint = make("llama")
    assert load_span(checkpoint, SPAN, dtype="auto", device="cpu").dtype is torch.float32
    half = load_span(checkpoint, SPAN, dtype=torch.bfloat16, device="cpu")
    assert half.dtype is torch.bfloat16
    assert {weight.dtype for weight in half.module.parameters()} == {torch.bfloat16}
    assert load_client(checkpoint, dtype=torch.bfloat16, device="cpu").dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "gpt2"])
def test_a_client_looks_like_the_whole_model(name: str, tmp_path: Path) -> None:
    whole = save_checkpoint(FAMILIES[name], tmp_path / "model")
    checkpoint = resolve(str(tmp_path / "model"), cache=tmp_path / "cache")
    client = load_client(checkpoint, dtype=torch.float32, device="cpu")
    assert type(client) is type(whole)
    shapes = {key: weight.shape for key, weight in whole.named_parameters()}
    assert {key: weight.shape for key, weight in client.named_parameters()} == shapes
    assert client.config.num_hidden_layers == NUM_BLOCKS
    assert client.generation_config.eos_token_id == whole.generation_config.eos_token_id
    assert not any(tensor.is_meta for tensor in (*client.parameters(), *client.buffers()))
    held = sum(weight.untyped_storage().nbytes() > 8 for weight in client.parameters())
    assert held == len(client_tensors(checkpoint, load_config(checkpoint)))
    tied = client.get_output_embeddings().weight is client.get_input_embeddings().weight
    assert tied == whole.config.tie_word_embeddings


def test_generate_runs_the_route(make: Callable[[str], Checkpoint]) -> None:
    client = load_client(make("llama"), dtype=torch.float32, device="cpu")
    arguments: list[set[str]] = []

    def route(hidden: torch.Tensor, others: Any) -> torch.Tensor:
        arguments.append(set(others))
        return hidden + 1

    install_route(client, route)
    ids = torch.randint(3, VOCABULARY, (2, 5))
    out = client.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
    assert isinstance(client, LlamaForCausalLM)
    assert out.shape[1] <= 8
    assert len(arguments) == out.shape[1] - 5
    assert {"attention_mask", "position_ids", "past_key_values", "position_embeddings"} <= arguments[0]


def test_weights_loaded_under_inference_mode_can_be_trained_through(make: Callable[[str], Checkpoint]) -> None:
    with torch.inference_mode():
        peer = load_span(make("llama"), SPAN, dtype=torch.float32, device="cpu")
    hidden = torch.randn(1, 3, peer.hidden_size, requires_grad=True)
    peer.forward(hidden, torch.arange(3)[None]).sum().backward()
    assert hidden.grad is not None


def test_loading_tells_its_progress_in_bytes(
    make: Callable[[str], Checkpoint], capfd: pytest.CaptureFixture[str]
) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.log: list[tuple[str, int]] = []

        def start(self, label: str, total: int) -> None:
            self.log.append((label, total))

        def advance(self, n: int) -> None:
            self.log.append(("advance", n))

        def done(self) -> None:
            self.log.append(("done", 0))

    recorder, checkpoint = Recorder(), make("llama")
    capfd.readouterr()
    peer = load_span(checkpoint, SPAN, dtype=torch.float32, device="cpu", progress=recorder)
    at = recorder.log.index(("loading blocks 1:3", peer.weight_bytes))
    assert sum(n for what, n in recorder.log[at:] if what == "advance") == peer.weight_bytes
    assert recorder.log[-1] == ("done", 0)
    assert capfd.readouterr().err == ""

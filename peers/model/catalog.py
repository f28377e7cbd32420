"""Where a model's files come from: a local folder, a hub id, or a built-in name, behind one `Checkpoint`.

Owns the meaning of MODEL and the folders that expose only the shards somebody asked for. Knows no architecture and
reads no tensor; importing it imports neither torch nor an HTTP client.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from peers.errors import CorruptCheckpoint, UnknownModel
from peers.model.builtin import BUILT_IN, built_in_folder
from peers.model.hashes import sha256_of
from peers.model.identity import model_id
from peers.model.layout import CONFIG, INDEX, SINGLE_FILE, is_companion, read_config, read_index, weight_files
from peers.model.progress import Progress, Silent
from peers.model.safetensors_header import TensorInfo, read_file_header
from peers.model.storage import cache_folder, full_disk_named
from routing.ids import ModelId

__all__ = ["BUILT_IN", "Checkpoint", "Progress", "built_in_folder", "resolve"]

Header = Mapping[str, TensorInfo]
GGUF = ".gguf"


class WeightFiles(Protocol):
    """The weight files of one checkpoint, wherever they are."""

    def header(self, name: str) -> Header:
        """The tensors of one file. Raises CorruptCheckpoint, HubUnreachable."""
        ...

    def fetch(self, names: Sequence[str], progress: Progress) -> Mapping[str, Path]:
        """Local files whose hashes are those of the model id.

        Raises CorruptCheckpoint, NotEnoughDisk, GatedModel, HubUnreachable.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One model whose identity is known; its weights may still be elsewhere."""

    name: str
    model_id: ModelId
    folder: Path
    """Holds config.json, generation_config.json and the tokenizer's files; always local."""
    weight_map: Mapping[str, str]
    """Tensor name → name of the safetensors file that holds it."""
    _fetch_files: Callable[[Sequence[str], Progress], Mapping[str, Path]] = field(repr=False)
    _header: Callable[[str], Header] = field(repr=False)
    _cache: Path = field(repr=False)

    def fetch(self, tensors: Iterable[str], progress: Progress | None = None) -> Path:
        """A folder for `from_pretrained` that holds the configuration and only the files which `tensors` need.

        Those files are downloaded where needed (resuming), verified against the model id once per file, and linked;
        the index names the tensors inside them and nothing else. The folder stays valid as long as the cache does.
        Raises CorruptCheckpoint, NotEnoughDisk, GatedModel, HubUnreachable.
        """
        paths = self._fetch_files(sorted(self._by_file(tensors)), progress or Silent())
        held = {tensor: file for tensor, file in self.weight_map.items() if file in paths}
        for tensor, file in held.items():
            if tensor not in self._header(file):
                raise CorruptCheckpoint(f"{file} of {self.name} lacks {tensor}, which the index promises")
        return self._view(paths, held)

    def num_bytes(self, tensors: Iterable[str]) -> int:
        """What `tensors` occupy in their files; from headers alone. Raises CorruptCheckpoint, HubUnreachable."""
        total = 0
        for file, names in self._by_file(tensors).items():
            header = self._header(file)
            if lacking := set(names) - set(header):
                raise CorruptCheckpoint(f"{file} of {self.name} lacks {min(lacking)}, which the index promises")
            total += sum(header[tensor].num_bytes for tensor in names)
        return total

    def _by_file(self, tensors: Iterable[str]) -> dict[str, list[str]]:
        by_file: dict[str, list[str]] = {}
        for tensor in tensors:
            if tensor not in self.weight_map:
                raise CorruptCheckpoint(f"{self.name} holds no tensor {tensor!r}")
            by_file.setdefault(self.weight_map[tensor], []).append(tensor)
        return by_file

    def _view(self, paths: Mapping[str, Path], weight_map: Mapping[str, str]) -> Path:
        links = {name: path.absolute() for name, path in paths.items()}
        links |= {name: self.folder / name for name in os.listdir(self.folder) if is_companion(name)}
        key = hashlib.sha256(repr(sorted(links.items())).encode()).hexdigest()[:16]
        view = self._cache / "views" / f"{self.model_id}-{key}"
        if view.is_dir():
            return view
        index = {"metadata": {"total_size": self.num_bytes(weight_map)}, "weight_map": dict(weight_map)}
        with full_disk_named(self._cache):
            view.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(dir=view.parent, prefix=".draft-"))
            for name, path in links.items():
                (draft / name).symlink_to(path)
            (draft / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        try:
            draft.rename(view)
        except OSError:
            shutil.rmtree(draft)
            if not view.is_dir():  # else another process has just made the same one
                raise
        return view


def resolve(
    model: str,
    *,
    cache: Path | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    accept: Callable[[Path], None] = lambda folder: None,
) -> Checkpoint:
    """Find MODEL and establish its identity, without downloading weights from a hub.

    A built-in name is fetched and converted on first use, and so is a GGUF file (a path, or `hub/id:file.gguf`), which
    has to be here as a whole for that; every weight file of a local folder is hashed once. `cache`
    is where everything is kept (default: `peers.model.storage.cache_folder()`); `token` opens gated repositories
    (default: the one huggingface_hub finds); `accept` sees the folder of the configuration before any weight file is
    read, and refuses the model by raising. Raises UnknownModel, UnsupportedModel (weights offered as pickle only),
    CorruptCheckpoint, GatedModel, NotEnoughDisk, MissingExtra, HubUnreachable (within 5 s).
    """
    cache = (cache or cache_folder()).absolute()
    progress = progress or Silent()
    if model in BUILT_IN:
        folder = built_in_folder(model, cache=cache, progress=progress)
        accept(folder)
        return _checkpoint(
            model, folder, BUILT_IN[model].shards, LocalFiles(folder, BUILT_IN[model].shards, cache), cache
        )
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path.absolute(), cache, progress, accept)
    if path.is_file() and path.suffix == GGUF:
        return _from_gguf(path.absolute(), cache, progress, accept)
    if path.exists() or model.startswith((".", "~", "/")) or (path.suffix == GGUF and ":" not in model):
        what = "is not a folder with a checkpoint" if path.exists() else "does not exist"
        raise UnknownModel(
            f"{model} {what}",
            hint="give the folder that holds config.json, or a .gguf file; one on a hub is org/name:file.gguf",
        )
    return _from_hub(model, cache, token, progress, accept)


class LocalFiles:
    """Shards in one folder, of known hashes (name → SHA-256)."""

    def __init__(self, folder: Path, hashes: Mapping[str, str], cache: Path) -> None:
        self._folder = folder
        self._hashes = hashes
        self._cache = cache

    def header(self, name: str) -> Header:
        return read_file_header(self._folder / name)

    def fetch(self, names: Sequence[str], progress: Progress) -> Mapping[str, Path]:
        paths = {name: self._folder / name for name in names}
        for name, path in paths.items():
            if _hash(path, self._cache, progress) != self._hashes[name]:
                raise CorruptCheckpoint(
                    f"{path} is damaged: it does not have the hash that belongs to this model",
                    hint="delete it and run again" if path.is_relative_to(self._cache) else "copy it here again",
                )
        return paths


def _from_gguf(path: Path, cache: Path, progress: Progress, accept: Callable[[Path], None]) -> Checkpoint:
    from peers.model.gguf_source import converted  # torch and transformers

    folder = converted(path, cache, progress, accept)
    return replace(_from_folder(folder, cache, progress, lambda folder: None), name=path.stem)


def _from_folder(folder: Path, cache: Path, progress: Progress, accept: Callable[[Path], None]) -> Checkpoint:
    if not (folder / CONFIG).is_file():
        raise UnknownModel(f"{folder} holds no {CONFIG}", hint="give the folder of a Hugging Face checkpoint")
    read_config(folder)  # bounded, before anybody else reads it
    accept(folder)
    files = weight_files(folder, os.listdir(folder), str(folder))
    hashes = {file: _hash(folder / file, cache, progress) for file in files}
    return _checkpoint(folder.resolve().name, folder, hashes, LocalFiles(folder, hashes, cache), cache)


def _from_hub(
    name: str, cache: Path, token: str | None, progress: Progress, accept: Callable[[Path], None]
) -> Checkpoint:
    from peers.model.hub import HubRepository  # with its HTTP client it takes half a second to import

    name, _, gguf = name.partition(":")
    repository = HubRepository.open(name, cache=cache, token=token)
    if gguf:
        if gguf not in repository.files or not gguf.endswith(GGUF):
            raise UnknownModel(
                f"{name} on the hub holds no GGUF file {gguf!r}", hint="write organisation/model:file.gguf"
            )
        checkpoint = _from_gguf(repository.fetch([gguf], progress)[gguf], cache, progress, accept)
        return replace(checkpoint, name=gguf.removesuffix(GGUF))
    if CONFIG not in repository.files:
        raise UnknownModel(f"{name} on the hub holds no {CONFIG}", hint="give the id of a Hugging Face checkpoint")
    repository.fetch_companions()
    read_config(repository.folder)  # bounded, before anybody else reads it
    accept(repository.folder)
    files = weight_files(repository.folder, repository.files.keys(), name)
    if absent := set(files) - repository.files.keys():
        raise CorruptCheckpoint(f"{name} on the hub lacks {min(absent)}, which its index names")
    hashes = {file: repository.weight_hash(file, progress) for file in files}
    return _checkpoint(name, repository.folder, hashes, repository, cache)


def _checkpoint(name: str, folder: Path, hashes: Mapping[str, str], weights: WeightFiles, cache: Path) -> Checkpoint:
    header = functools.cache(weights.header)
    return Checkpoint(
        name=name,
        model_id=model_id(read_config(folder), hashes),
        folder=folder,
        weight_map=dict.fromkeys(header(SINGLE_FILE), SINGLE_FILE) if SINGLE_FILE in hashes else read_index(folder),
        _fetch_files=weights.fetch,
        _header=header,
        _cache=cache,
    )


def _hash(path: Path, cache: Path, progress: Progress) -> str:
    try:
        return sha256_of(path, cache=cache, progress=progress)
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{path} is missing", hint="copy or download it again") from error

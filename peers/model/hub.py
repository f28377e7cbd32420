"""A model repository on a Hugging Face hub: what it lists, and its files on this disk.

Owns every network request to the hub, and the only map from huggingface_hub's errors to ours. Downloads resume where
an earlier process stopped and are verified against the hub's own hashes. Weights lie under their SHA-256 in the
cache, so that revisions and repositories share equal shards. Knows nothing of tensors beyond a file's header.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from huggingface_hub import HfApi, constants, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id

from peers.errors import CorruptCheckpoint, GatedModel, HubUnreachable, UnknownModel
from peers.model.builtin import BUILT_IN
from peers.model.download import part_of, receive, size_of
from peers.model.hashes import sha256_of
from peers.model.layout import INDEX, is_companion
from peers.model.progress import Progress, Silent
from peers.model.safetensors_header import TensorInfo, read_file_header, read_header
from peers.model.storage import locked, require_disk, write_atomically

logger = logging.getLogger(__name__)

T = TypeVar("T")

HUB_DEADLINE_S = 4.0
"""For the first answer, whatever hangs (name lookup, connection, reading): a user learns within 5 s."""

MAX_COMPANION_BYTES = 64 << 20
_OBJECT_ID = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


class HubFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a revision, as the hub lists it; `sha256` for LFS files (weights), else `git_oid`."""

    name: str
    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str | None = None
    git_oid: str | None = None

    def __post_init__(self) -> None:
        if not _OBJECT_ID.fullmatch(self.sha256 or self.git_oid or ""):
            raise ValueError("not the hash of a file")


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """A repository at one commit; kept on disk, so that a peer starts again while the hub is away."""

    commit: str
    files: tuple[HubFile, ...]

    def __post_init__(self) -> None:
        if not _OBJECT_ID.fullmatch(self.commit):
            raise ValueError("not a commit")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRepository:
    """One commit of a repository. `files` maps the names of its top-level files."""

    name: str
    commit: str
    files: Mapping[str, HubFile]
    cache: Path
    endpoint: str
    token: str | None

    @classmethod
    def open(cls, name: str, *, cache: Path, token: str | None) -> HubRepository:
        """Ask the hub, or, when it is away, the listing of the last visit.

        Raises UnknownModel, GatedModel, HubUnreachable (within 5 s).
        """
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UnknownModel(
                f"{name!r} is neither a folder here, nor a built-in model, nor a hub id",
                hint="a hub id looks like organisation/model",
            ) from error
        endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        note = cache / "hub" / f"{_folder_name(name)}.json"
        try:
            with _translated(name, endpoint):
                listing = _within(HUB_DEADLINE_S, lambda: _list(name, endpoint, token))
        except HubUnreachable as error:
            remembered = _recall(note, Listing)
            if remembered is None:
                raise
            logger.warning("%s; continuing with %s as it was on the last visit", error, name)
            listing = remembered
        else:
            write_atomically(note, msgspec.json.encode(listing))
        files = {file.name: file for file in listing.files if "/" not in file.name}
        return cls(name=name, commit=listing.commit, files=files, cache=cache, endpoint=endpoint, token=token)

    @property
    def folder(self) -> Path:
        return self.cache / "hub" / _folder_name(self.name) / self.commit

    def fetch_companions(self) -> None:
        """Bring configuration, tokenizer, templates and the index of the shards into `folder`."""
        for file in self.files.values():
            if (is_companion(file.name) or file.name == INDEX) and file.size <= MAX_COMPANION_BYTES:
                self._download(file, self.folder / file.name, Silent())

    def fetch(self, names: Sequence[str], progress: Progress) -> dict[str, Path]:
        """Verified local files, downloaded where needed. Raises NotEnoughDisk before the first byte."""
        missing = [self.files[name] for name in names if self._local(self.files[name]) is None]
        parts_bytes = sum(size_of(part_of(self._blob(file))) for file in missing)
        require_disk(self.cache, sum(file.size for file in missing) - parts_bytes, f"downloading {self.name}")
        for file in missing:
            self._download(file, self._blob(file), progress)
        return {name: self._verified(self.files[name], progress) for name in names}

    def weight_hash(self, name: str, progress: Progress) -> str:
        """From the hub's metadata; only a file too small for LFS has to be downloaded for it."""
        file = self.files[name]
        return file.sha256 or sha256_of(self.fetch([name], progress)[name], cache=self.cache)

    def header(self, name: str) -> dict[str, TensorInfo]:
        """The tensors of a weight file; two ranges are read from the hub when it is not here yet, and never again."""
        file = self.files[name]
        if local := self._local(file):
            return read_file_header(local)
        note = self.cache / "headers" / f"{self._blob(file).name}.json"
        if (remembered := _recall(note, dict[str, TensorInfo])) is not None:
            return remembered

        def read(offset: int, count: int) -> bytes:
            with self._get(file, offset, offset + count - 1, HUB_DEADLINE_S) as response:
                if response.status_code != 206:
                    raise HubUnreachable(f"{self.endpoint} does not serve ranges, so {name} cannot be inspected")
                answer = bytearray()
                for chunk in response.iter_bytes():
                    answer += chunk
                    if len(answer) > count:
                        raise HubUnreachable(f"{self.endpoint} sent more of {name} than it was asked for")
                return bytes(answer)

        header = read_header(read, file.size, name)
        with contextlib.suppress(OSError):  # the disk is full: the next start asks again
            write_atomically(note, msgspec.json.encode(header))
        return header

    def _blob(self, file: HubFile) -> Path:
        return self.cache / "blobs" / (file.sha256 or f"git-{file.git_oid}")

    def _local(self, file: HubFile) -> Path | None:
        """Our copy, or the one that another program put into huggingface_hub's own cache, of the right size."""
        theirs = try_to_load_from_cache(self.name, file.name, revision=self.commit)
        candidates = [self._blob(file), *([Path(theirs)] if isinstance(theirs, str) else [])]
        return next((path for path in candidates if path.is_file() and size_of(path) == file.size), None)

    def _verified(self, file: HubFile, progress: Progress) -> Path:
        path = self._local(file)
        if path is None:
            raise CorruptCheckpoint(f"{file.name} of {self.name} vanished from {self.cache}", hint="run again")
        if not self._intact(path, file, progress):
            hint = f"delete {path.resolve()} and run again"
            if path == self._blob(file):
                path.unlink()
                hint = "it was deleted: run again to download it anew"
            raise CorruptCheckpoint(f"{file.name} of {self.name} is damaged: {path} has another hash", hint=hint)
        return path

    def _intact(self, path: Path, file: HubFile, progress: Progress) -> bool:
        if not path.is_file() or size_of(path) != file.size:
            return False
        if file.sha256 is not None:
            return sha256_of(path, cache=self.cache, progress=progress) == file.sha256
        return _git_oid(path) == file.git_oid

    def _download(self, file: HubFile, target: Path, progress: Progress) -> None:
        with locked(target):
            if self._intact(target, file, progress):
                return
            part = part_of(target)
            progress.start(f"downloading {file.name}", file.size)

            def get(first: int, timeout_s: float) -> contextlib.AbstractContextManager[Any]:
                return self._get(file, first, None, timeout_s)

            receive(part, file.size, get, progress, name=file.name, first_timeout_s=HUB_DEADLINE_S)
            progress.done()
            part.replace(target)
            if not self._intact(target, file, progress):
                target.unlink()
                raise CorruptCheckpoint(
                    f"{file.name} of {self.name} did not arrive as the hub lists it",
                    hint="run again to download it anew",
                )

    @contextlib.contextmanager
    def _get(self, file: HubFile, first: int, last: int | None, timeout_s: float) -> Iterator[Any]:
        url = hf_hub_url(self.name, file.name, revision=self.commit, endpoint=self.endpoint)
        headers = build_hf_headers(token=self.token)
        headers |= {"Range": f"bytes={first}-{'' if last is None else last}", "Accept-Encoding": "identity"}
        with (
            _translated(self.name, self.endpoint),
            get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response,
        ):
            hf_raise_for_status(response)
            yield response


def _list(name: str, endpoint: str, token: str | None) -> Listing:
    info = HfApi(endpoint=endpoint, token=token).model_info(name, files_metadata=True, timeout=HUB_DEADLINE_S)
    files = [
        {
            "name": sibling.rfilename,
            "size": sibling.lfs["size"] if sibling.lfs else sibling.size,
            "sha256": sibling.lfs["sha256"] if sibling.lfs else None,
            "git_oid": sibling.blob_id,
        }
        for sibling in info.siblings
    ]
    return msgspec.convert({"commit": info.sha, "files": files}, Listing)


def _recall(note: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(note.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None  # never visited, or the note is damaged: nothing to go on with


@contextlib.contextmanager
def _translated(name: str, endpoint: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise GatedModel(
            f"{name} is gated: its owner wants you to accept conditions",
            hint="accept them on the model's page, then give your access token: --token TOKEN, or set HF_TOKEN",
        ) from error
    except RepositoryNotFoundError as error:
        raise UnknownModel(
            f"the hub at {endpoint} has no model {name!r}",
            hint="check the spelling; for a private model give --token TOKEN, or set HF_TOKEN",
        ) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise UnknownModel(f"a file of {name} is no longer on the hub", hint="run again") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise GatedModel(
                f"the hub refuses access to {name} ({status})",
                hint="give --token TOKEN, or set HF_TOKEN, to one that may read it",
            ) from error
        raise HubUnreachable(f"the hub at {endpoint} answered {status} for {name}", hint="try again later") from error
    except (HTTPError, OfflineModeIsEnabled, TimeoutError) as error:
        raise HubUnreachable(
            f"the hub at {endpoint} cannot be reached for {name}: {str(error) or type(error).__name__}",
            hint=f"check the network; a folder or a built-in model ({', '.join(BUILT_IN)}) needs no hub",
        ) from error
    except (ValueError, TypeError, LookupError, msgspec.ValidationError) as error:
        raise HubUnreachable(
            f"what answers at {endpoint} is not a model hub", hint="a login page of this network? check HF_ENDPOINT"
        ) from error


def _within(deadline_s: float, call: Callable[[], T]) -> T:
    """`call()` in a thread that is abandoned at the deadline, because name lookup obeys no timeout of ours."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised again in the waiting thread
            answer.set_exception(error)

    threading.Thread(target=run, name="hub-request", daemon=True).start()
    try:
        return answer.result(timeout=deadline_s)
    except TimeoutError as error:
        raise TimeoutError(str(error) or "timed out") from error  # as a socket says it, whichever of them is first


def _folder_name(name: str) -> str:
    return name.replace("/", "--")


def _git_oid(path: Path) -> str:
    """What git calls a blob: SHA-1 over a header and the content."""
    with open(path, "rb") as file:
        start = hashlib.sha1(b"blob %d\0" % size_of(path), usedforsecurity=False)
        return hashlib.file_digest(file, lambda: start).hexdigest()

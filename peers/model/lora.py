"""Low-rank adapters as PEFT writes them: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Owns what of such a folder a peer can compute with, and that nothing in it is ignored: what is not plain LoRA of linear
layers inside the blocks is refused by name. Reads safetensors only, after its header was checked.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import torch
from msgspec import Meta
from safetensors import safe_open

from peers.errors import CorruptCheckpoint
from peers.model.adapters import Adapter, num_values
from peers.model.progress import Progress, Silent
from peers.model.safetensors_header import TensorInfo, read_file_header
from peers.model.storage import cache_folder
from peers.wire.messages import MAX_RANK, AdapterTarget
from routing.errors import CallerError
from routing.records import ADAPTER_DIGEST_BYTES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
VALUE_BYTES = 4
"""They are held in float32."""
MAX_ADAPTER_BYTES = 1 << 30
"""Of the values for the blocks of one peer."""
WRITTEN_BY_PEFT = "an adapter is what PEFT's save_pretrained writes, as safetensors"
BEYOND_LORA = (
    *("use_dora", "use_qalora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices"),
    *("target_parameters", "alora_invocation_tokens"),
)
"""Settings that change what is computed, and that no peer knows."""
_ROOT = "base_model.model."
_KEY = re.compile(r"(.+)\.lora_(A|B)\.weight")
Number = TypeVar("Number", int, float)
Rank = Annotated[int, Meta(ge=1, le=MAX_RANK)]


class _Config(msgspec.Struct, kw_only=True):
    """What PEFT's LoraConfig says that decides what is computed; defaults are PEFT's."""

    peft_type: Literal["LORA"]
    r: Rank = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    use_dora: Any = None
    use_qalora: Any = None
    lora_bias: Any = None
    modules_to_save: Any = None
    layer_replication: Any = None
    trainable_token_indices: Any = None
    target_parameters: Any = None
    alora_invocation_tokens: Any = None

    def __post_init__(self) -> None:
        if beyond := [name for name in BEYOND_LORA if getattr(self, name)]:
            raise ValueError(f"it has {beyond[0]}, which is not plain LoRA")

    def scaling(self, path: str) -> float:
        alpha = _matched(self.alpha_pattern, path, self.lora_alpha)
        rank = _matched(self.rank_pattern, path, self.r)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """One adapter on this disk, checked as far as that needs no model."""

    source: str
    config: _Config
    weights: Path
    digest: bytes
    """Of both files."""

    def read(self, layers_path: str, num_blocks: int, blocks: Collection[int]) -> Adapter | None:
        """What of it is of these blocks of a model whose layers are at `layers_path`; None where nothing is.

        Raises CallerError for what no peer can compute with, wherever it is.
        """
        mine = [pair for pair in self._targets(layers_path, num_blocks) if pair[0].block in blocks]
        targets = [target for target, _ in mine]
        if VALUE_BYTES * sum(map(num_values, targets)) > MAX_ADAPTER_BYTES:
            raise CallerError(
                f"{self.source} takes more than {MAX_ADAPTER_BYTES >> 20} MiB for the blocks of this peer",
                hint="serve fewer blocks, or an adapter of lower rank",
            )
        if not targets:
            return None
        with safe_open(self.weights, framework="pt") as file:
            parts = [file.get_tensor(f"{_ROOT}{path}.lora_{side}.weight").float() for _, path in mine for side in "AB"]
        values = torch.cat([part.flatten() for part in parts])
        if not torch.isfinite(values).all():
            raise CorruptCheckpoint(f"{self.weights} has values that are NaN or infinite", hint="copy it here again")
        return Adapter(tuple(targets), values)

    def block_bytes(self, layers_path: str, num_blocks: int) -> int:
        """What `read` holds of any one block of that model, at most. Raises as it does."""
        sizes: Counter[int] = Counter()
        for target, _ in self._targets(layers_path, num_blocks):
            sizes[target.block] += VALUE_BYTES * num_values(target)
        return max(sizes.values(), default=0)

    def _targets(self, layers_path: str, num_blocks: int) -> list[tuple[AdapterTarget, str]]:
        """All of them in order, each with its module's path in the model."""
        tensors = read_file_header(self.weights)
        places: dict[tuple[int, str], str] = {}
        for name in tensors:
            path = _path_of(name, self.source)
            block, _, module = path.removeprefix(f"{layers_path}.").partition(".")
            if not path.startswith(f"{layers_path}.") or not block.isdecimal() or int(block) >= num_blocks:
                raise CallerError(
                    f"{self.source} adapts {path}, which is no part of the model's {num_blocks} blocks",
                    hint="is it an adapter of this model?",
                )
            places[int(block), module] = path
        return [(self._target(*place, path, tensors), path) for place, path in sorted(places.items())]

    def _target(self, block: int, module: str, path: str, tensors: Mapping[str, TensorInfo]) -> AdapterTarget:
        found = [tensors.get(f"{_ROOT}{path}.lora_{side}.weight") for side in "AB"]
        a, b = (None if info is None or len(info.shape) != 2 else info.shape for info in found)
        rank = _matched(self.config.rank_pattern, path, self.config.r)
        if a is None or b is None or a[0] != rank or b[1] != rank:
            raise CallerError(f"{self.source} has no A and B of rank {rank} for {path}", hint=WRITTEN_BY_PEFT)
        scaling = self.config.scaling(path)
        return AdapterTarget(block=block, module=module, rank=rank, inputs=a[1], outputs=b[0], scaling=scaling)


def open_adapter(
    source: str, *, cache: Path | None = None, token: str | None = None, progress: Progress | None = None
) -> AdapterFolder:
    """The adapter in a folder here or, with that id, on a hub, from which it is downloaded. Raises SwarmError."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.exists() or source.startswith((".", "~", "/")):
            raise CallerError(f"{source} is not a folder with an adapter", hint=f"give the folder that holds {CONFIG}")
        from peers.model.hub import HubRepository  # with its HTTP client it takes half a second to import

        repository = HubRepository.open(source, cache=(cache or cache_folder()).absolute(), token=token)
        paths = _required(repository.files, source)
        if repository.files[WEIGHTS].size > 2 * MAX_ADAPTER_BYTES or repository.files[CONFIG].size > MAX_CONFIG_BYTES:
            raise CallerError(f"{source} is too large for an adapter", hint="is it a whole model?")
        fetched = repository.fetch(paths, progress or Silent())
        return _checked(source, fetched[CONFIG], fetched[WEIGHTS])
    _required([file.name for file in folder.iterdir()], source)
    return _checked(source, folder / CONFIG, folder / WEIGHTS)


def _required(files: Iterable[str], source: str) -> list[str]:
    if missing := sorted({CONFIG, WEIGHTS}.difference(files)):
        raise CallerError(f"{source} holds no {missing[0]}", hint=WRITTEN_BY_PEFT)
    return [CONFIG, WEIGHTS]


def _checked(source: str, config: Path, weights: Path) -> AdapterFolder:
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise CallerError(f"{config} is too large for a configuration", hint=WRITTEN_BY_PEFT)
    raw = config.read_bytes()
    try:
        told = msgspec.json.decode(raw, type=_Config)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CallerError(
            f"{source} is no adapter that peers can compute with: {error}", hint=WRITTEN_BY_PEFT
        ) from error
    with weights.open("rb") as file:
        content = hashlib.sha256(raw).digest() + hashlib.file_digest(file, "sha256").digest()
    read_file_header(weights)
    digest = hashlib.sha256(content).digest()[:ADAPTER_DIGEST_BYTES]
    return AdapterFolder(source=source, config=told, weights=weights, digest=digest)


def _path_of(name: str, source: str) -> str:
    found = _KEY.fullmatch(name.removeprefix(_ROOT))
    if found is None or not name.startswith(_ROOT):
        raise CallerError(
            f"{source} holds {name}, which is not LoRA of a linear layer", hint="peers host plain LoRA only"
        )
    return found[1]


def _matched(patterns: Mapping[str, Number], path: str, default: Number) -> Number:
    """As PEFT has it (`peft.utils.get_pattern_key`): the first pattern that is the end of the path."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error as error:
            raise CallerError(f"{pattern!r} is no pattern of module names", hint=WRITTEN_BY_PEFT) from error
    return default

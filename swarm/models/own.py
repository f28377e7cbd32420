"""An adapter of one's own, in a folder that `swarm finetune` or PEFT wrote, and a model whose layers are remote.

Owns what tells such a folder from the name of an adapter that peers host. What of it can travel is said by
`swarm.models.adapters`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peers.model.lora import CONFIG, WEIGHTS, WRITTEN_BY_PEFT
from peers.model.support import one_line
from routing.errors import CallerError, SwarmError
from swarm.extras import require_extra


def is_folder(adapter: str) -> bool:
    """Whether this is a folder rather than a name: it has the form of a path, or an adapter is there."""
    return os.sep in adapter or (Path(adapter) / CONFIG).exists()


def with_adapter(model: Any, folder: str) -> Any:
    """The model with the adapter in this folder. Raises CallerError."""
    require_extra("train", "peft")
    from peft import PeftModel

    path = Path(folder).expanduser()
    if missing := [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]:
        raise CallerError(f"{folder} holds no {missing[0]}", hint=WRITTEN_BY_PEFT)
    try:
        return PeftModel.from_pretrained(model, str(path)).eval()
    except SwarmError:
        raise
    except Exception as error:  # a stranger's file runs through PEFT's own code: KeyError, RuntimeError, …
        raise CallerError(
            f"the adapter in {folder} cannot be put on this model: {one_line(error)}",
            hint="an adapter goes with the model that it was trained on",
        ) from error

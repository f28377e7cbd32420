from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from peers.errors import MissingExtra
from swarm.extras import require_extra

DECLARED = tomllib.loads(Path(__file__, "../../../pyproject.toml").resolve().read_text())["project"]


def test_what_is_installed_is_not_missed() -> None:
    require_extra("train", "torch", "transformers")


@pytest.mark.parametrize("extra", ["gateway", "gpu", "train", "quant"])
def test_a_missing_extra_is_named_with_the_line_that_installs_it(extra: str) -> None:
    with pytest.raises(MissingExtra, match=r"^no_such_module is not installed$") as caught:
        require_extra(extra, "torch", "no_such_module")
    assert caught.value.hint == f"pip install '{DECLARED['name']}[{extra}]'"
    assert extra in DECLARED["optional-dependencies"]

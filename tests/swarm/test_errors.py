"""Every error that a person may see says what to do next."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import peers
import routing
import swarm
from routing.errors import CallerError, PeerError, SwarmError, Unavailable

ROOT = Path(swarm.__file__).parent.parent
BRANCHES = {CallerError, PeerError, Unavailable}
SPOKEN = [*ROOT.glob("swarm/**/*.py"), *ROOT.glob("peers/*.py"), *ROOT.glob("peers/model/*.py")]
"""Where a bare CallerError reaches a person."""


def errors_below(kind: type[SwarmError]) -> Iterator[type[SwarmError]]:
    for child in kind.__subclasses__():
        yield child
        yield from errors_below(child)


def test_every_kind_of_error_has_a_hint() -> None:
    for package in (routing, peers, swarm):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    ours = {kind for kind in errors_below(SwarmError) if kind.__module__.startswith(("routing.", "peers.", "swarm."))}
    # what an engine raises reaches people as a peer's refusal
    leaves = {kind for kind in ours - BRANCHES if kind.__module__ != "peers.runtime.works"}
    assert len(leaves) > 25
    bare = {parent.default_hint for parent in BRANCHES}
    assert [kind.__name__ for kind in leaves if kind.default_hint in bare] == []


@pytest.mark.parametrize("path", SPOKEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_plain_caller_error_comes_with_a_hint(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "CallerError":
            assert any(argument.arg == "hint" for argument in node.keywords), f"line {node.lineno}"

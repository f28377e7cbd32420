"""Optional dependencies, by the extra that installs them: `pip install 'hiveswarm[train]'`."""

from __future__ import annotations

import importlib.util

from peers.errors import MissingExtra


def require_extra(extra: str, *modules: str) -> None:
    """Call before importing `modules`, top-level ones. Raises MissingExtra, which names the line that installs them."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtra(f"{', '.join(missing)} is not installed", hint=f"pip install 'hiveswarm[{extra}]'")

"""What a person can do with the network. `from swarm import SwarmModelForCausalLM` is the Python API.

Names are loaded when first used, because torch and transformers take seconds and `swarm --help` should not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.models import SwarmModelForCausalLM

__all__ = ["SwarmModelForCausalLM"]


def __getattr__(name: str) -> Any:
    if name == "SwarmModelForCausalLM":
        from swarm.models import SwarmModelForCausalLM

        return SwarmModelForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What a person can do with the network. `from swarm import SwarmModelForCausalLM, SwarmHealth` is the Python API.

Names are loaded when first used, because torch and transformers take seconds and `swarm --help` should not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.health import SwarmHealth
    from swarm.models import SwarmModelForCausalLM, SwarmModelForSequenceClassification

__all__ = ["SwarmHealth", "SwarmModelForCausalLM", "SwarmModelForSequenceClassification"]


def __getattr__(name: str) -> Any:
    if name == "SwarmModelForCausalLM":
        from swarm.models import SwarmModelForCausalLM, SwarmModelForSequenceClassification

        return SwarmModelForCausalLM
    if name == "SwarmModelForSequenceClassification":
        from swarm.models import SwarmModelForSequenceClassification

        return SwarmModelForSequenceClassification
    if name == "SwarmHealth":
        from swarm.health import SwarmHealth

        return SwarmHealth
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

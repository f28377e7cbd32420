"""Models whose layers stand at peers, seen as Hugging Face models."""

from swarm.models.generation import Session
from swarm.models.loading import SwarmModelForCausalLM, SwarmModelForSequenceClassification

__all__ = ["Session", "SwarmModelForCausalLM", "SwarmModelForSequenceClassification"]

"""Fine-tuning through the swarm: examples from a file, and a run that can be stopped and goes on.

Parameters, optimizer and data stay with the client. Gradients come from `swarm.models`; the loop is transformers'.
"""

from swarm.training.data import BadData, Example, encode, encode_all, read_examples, read_preferences
from swarm.training.finetune import FinetuneConfig, Outcome, finetune

__all__ = [
    "BadData",
    "Example",
    "FinetuneConfig",
    "Outcome",
    "encode",
    "encode_all",
    "finetune",
    "read_examples",
    "read_preferences",
]

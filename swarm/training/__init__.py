"""Fine-tuning through the swarm: examples from a file, and a run that can be stopped and goes on.

Parameters, optimizer and data stay with the client. Gradients come from `swarm.models`; the loop is transformers'.
"""

from swarm.training.data import Example, encode, read_examples
from swarm.training.finetune import FinetuneConfig, Outcome, finetune

__all__ = ["Example", "FinetuneConfig", "Outcome", "encode", "finetune", "read_examples"]

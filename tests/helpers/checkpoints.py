"""Small checkpoints with random weights, for where the real model's are not the point: nodes load them in no time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def save_llama(folder: Path, *, seed: int = 0, layers: int = 2, **options: float) -> LlamaForCausalLM:
    """Write a Llama with 64 words into `folder`. The same seed and options give the same model id."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | options), num_hidden_layers=layers))
    model.save_pretrained(folder)
    return model.eval()

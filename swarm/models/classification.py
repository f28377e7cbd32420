"""A class head at the client, over layers that stand at peers.

Owns the change of a causal language model into the architecture's own sequence classifier: embeddings, norm and
skeleton layers are the same modules, the language-model head goes, a head of the user's own comes. Knows no network.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

from peers.errors import UnsupportedModel
from routing.errors import CallerError


def with_class_head(model: Any, num_labels: int) -> Any:
    """`model`, which is consumed, as a classifier of whole sequences; its head is random, and the only trainable part.

    Raises UnsupportedModel where transformers has no such class, CallerError.
    """
    if num_labels < 1:
        raise CallerError(f"{num_labels} labels", hint="num_labels is at least 1")
    config = model.config
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        raise UnsupportedModel(f"transformers has no sequence classifier for {config.model_type} models")
    config.num_labels = num_labels
    with torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops():
        classifier = kind(config)
    body = model.base_model
    if type(classifier.base_model) is not type(body):
        raise UnsupportedModel(
            f"the sequence classifier of {config.model_type} models is not built around the same body"
        )
    setattr(classifier, classifier.base_model_prefix, body)
    for name, child in classifier.named_children():
        if name != classifier.base_model_prefix:
            child.to_empty(device=model.device).to(model.dtype)
            for module in child.modules():
                classifier._init_weights(module)
            child.requires_grad_(True)
    return classifier.eval()

"""The client: embeddings, head and everything trainable, around blocks that run on servers."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.client.auto import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
    from swarm.client.peft_model import DistributedPeftModel, get_peft_model
    from swarm.client.training_client import TrainingClient

__all__ = [
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "DistributedPeftModel",
    "TrainingClient",
    "get_peft_model",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("swarm"), name)

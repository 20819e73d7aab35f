"""Runs the transformer blocks of large language models on many machines.

    from swarm import AutoDistributedModelForCausalLM

Importing this package loads neither torch nor transformers; the names below come in when they are first used.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.client.auto import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
    from swarm.client.federated import FederatedRun
    from swarm.client.federated_stages import FederatedSettings
    from swarm.client.peft_model import DistributedPeftModel, get_peft_model
    from swarm.client.training_client import TrainingClient

__all__ = [
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "DistributedPeftModel",
    "FederatedRun",
    "FederatedSettings",
    "TrainingClient",
    "__version__",
    "get_peft_model",
]
__version__ = "0.1.0"

# In a checkout, its root must not stay on sys.path: our kernels/ folder would hide the `kernels` package that
# transformers imports. The sub-packages are found through the installation, editable or not.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _root]


_HOMES = {
    "AutoDistributedModelForCausalLM": "swarm.client.auto",
    "AutoDistributedModelForSequenceClassification": "swarm.client.auto",
    "DistributedPeftModel": "swarm.client.peft_model",
    "FederatedRun": "swarm.client.federated",
    "FederatedSettings": "swarm.client.federated_stages",
    "TrainingClient": "swarm.client.training_client",
    "get_peft_model": "swarm.client.peft_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

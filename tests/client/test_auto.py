"""From a name to a model that generates, or one clear error."""

from typing import Any

import pytest
import torch

from swarm import AutoDistributedModelForCausalLM
from swarm.client import auto
from swarm.errors import InvalidRequest, UnknownModel
from tests.client.conftest import Pair
from tests.client.local_blocks import LocalBlockService

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def test_a_directory_and_a_service_make_a_model(pair: Pair) -> None:
    """The model generates what the local one does, and closes its service."""
    service = LocalBlockService(pair.local)
    with AutoDistributedModelForCausalLM.from_pretrained(
        pair.path, block_service=service, dtype="float32", cache_dir=pair.path / "cache"
    ) as model:
        found = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, pair.local.generate(IDS, max_new_tokens=5, do_sample=False))
    assert service.is_closed


def test_a_swarm_is_joined_with_what_the_config_says(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """`connect` learns the checkpoint, the number and width of the blocks, and the peers."""
    from swarm.client import runtime

    calls: list[dict[str, Any]] = []

    def connect(checkpoint: Any, **options: Any) -> LocalBlockService:
        calls.append({"model": checkpoint.digest, **options})
        return LocalBlockService(pair.local)

    monkeypatch.setattr(runtime, "connect", connect)
    AutoDistributedModelForCausalLM.from_pretrained(
        pair.path, initial_peers=["/ip4/10.0.0.5/tcp/1/p2p/Qm"], cache_dir=pair.path / "cache"
    )
    assert calls == [
        {
            "model": pair.distributed.checkpoint.digest,
            "num_blocks": 3,
            "hidden_size": 32,
            "initial_peers": ["/ip4/10.0.0.5/tcp/1/p2p/Qm"],
            "config": None,
            "identity": None,
            "credentials": None,
        }
    ]


def test_the_service_is_closed_when_loading_fails(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong after the swarm was joined."""

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(auto, "distribute", fail)
    service = LocalBlockService(pair.local)
    with pytest.raises(KeyboardInterrupt):
        AutoDistributedModelForCausalLM.from_pretrained(pair.path, block_service=service, cache_dir=pair.path / "cache")
    assert service.is_closed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "initial_peers is empty"),
        ({"initial_peers": "/ip4/1.2.3.4"}, "must be a list"),
        ({"initial_peers": ["/ip4/1.2.3.4"], "dtype": "int8"}, "int8"),
        ({"initial_peers": ["/ip4/1.2.3.4"], "dtype": "nonsense"}, "nonsense"),
    ],
)
def test_bad_arguments_are_refused(pair: Pair, options: dict[str, Any], message: str) -> None:
    """Before anything is loaded or joined."""
    with pytest.raises(InvalidRequest, match=message):
        AutoDistributedModelForCausalLM.from_pretrained(pair.path, **options)


def test_unknown_models_are_refused() -> None:
    """With the name that was asked for."""
    with pytest.raises(UnknownModel, match="no-such-model"):
        AutoDistributedModelForCausalLM.from_pretrained("no-such-model", initial_peers=["/ip4/1.2.3.4"])


def test_the_class_is_not_instantiated() -> None:
    """As with the auto classes of transformers."""
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoDistributedModelForCausalLM()

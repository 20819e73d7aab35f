"""What PEFT finds in a distributed model is what it finds in a local one, and takes no memory."""

from collections.abc import Callable

import peft
import pytest
import torch
from peft import LoraConfig
from transformers import set_seed

from swarm.client.peft_model import get_peft_model
from swarm.client.remote_blocks import RemoteBlocks
from swarm.errors import UnsupportedModel
from tests.client.conftest import Pair


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "qwen3_moe", "gemma2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*is_gradient_checkpointing")
def test_peft_finds_the_same_linears_in_the_same_order(name, make_pair: Callable[[str], Pair]):
    """So the same seed gives the same parameters; GPT-2's linears lie the other way round."""
    pair = make_pair(name)
    [path] = {"gpt2": "c_attn", "bloom": "query_key_value"}.get(name, "o_proj").split()
    found = []
    for get, model in ((get_peft_model, pair.distributed), (peft.get_peft_model, pair.local)):
        set_seed(3)
        wrapped = get(model, LoraConfig(target_modules=[path], task_type="CAUSAL_LM"))
        found.append({key: it.detach().clone() for key, it in wrapped.named_parameters() if it.requires_grad})
        wrapped.unload()
    ours, right = found
    assert list(ours) == list(right) and ours
    assert all(torch.equal(ours[key], value) for key, value in right.items())


def test_placeholders_take_no_memory_and_never_run(pair: Pair):
    """They are no parameters, one number stands for all of a weight's, and the model sees one layer."""
    layers = pair.distributed.remote_layers
    assert len(layers) == 1 and [*layers] == layers[:] and isinstance(layers[0], RemoteBlocks)
    assert not list(layers.parameters()) and len(layers.placeholders) == 3
    linear = layers.placeholders[1].self_attn.q_proj
    original = pair.local.model.layers[1].self_attn.q_proj
    assert linear.weight.shape == original.weight.shape and linear.weight.untyped_storage().nbytes() == 4
    with pytest.raises(UnsupportedModel, match="called locally"):
        linear(torch.zeros(1, linear.in_features))

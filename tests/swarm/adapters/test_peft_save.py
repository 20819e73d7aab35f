"""What was trained in the swarm is a PEFT adapter: PEFT loads it, and so do we."""

from dataclasses import replace

import peft
import pytest
import torch

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.format import decode_shard
from swarm.adapters.peft import read_adapter
from swarm.adapters.peft_save import save_lora
from swarm.checkpoint.layout import model_layout
from swarm.errors import AdapterError
from tests.families.configs import FAMILIES


@pytest.fixture(scope="module")
def layout():
    return model_layout(FAMILIES["llama"].config())


def deltas_of(layout, *, dora=False):
    """Ranks and scales that differ from linear to linear, in two of three blocks."""

    def linear(shape, rank, scale):
        a, b = torch.randn(rank, shape.num_inputs), torch.randn(shape.num_outputs, rank)
        return LinearDelta(a_rI=a, b_Or=b, scale=scale, magnitude_O=torch.rand(shape.num_outputs) + 1 if dora else None)

    return {
        block: BlockDelta(
            linears={
                path: linear(layout.blocks[block].linears[path], rank, scale)
                for path, rank, scale in (
                    ("self_attn.q_proj", 3, 2.0),
                    ("self_attn.v_proj", 3, 0.5),
                    ("mlp.down_proj", 4 + block, 2.0),
                )
            }
        )
        for block in (0, 2)
    }


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_comes_back_as_it_was(layout, tmp_path, dora):
    """Through PEFT's format and our reader: all tensors and scales."""
    deltas = deltas_of(layout, dora=dora)
    save_lora(tmp_path, deltas, layout=layout, base="org/base")
    loaded = read_adapter(tmp_path, layout=layout)
    assert loaded.manifest.base == "org/base" and list(loaded.shards) == [0, 2]
    for info in loaded.manifest.shards:
        back = decode_shard(loaded.shards[info.block], info, layout.blocks[info.block], 0)
        for path, linear in deltas[info.block].linears.items():
            assert back.linears[path].scale == pytest.approx(linear.scale)
            for name, tensor in linear.tensors().items():
                assert torch.equal(back.linears[path].tensors()[name], tensor)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_loads_it_with_the_same_weights(layout, tmp_path):
    """Each linear of the model gets s B A, with ranks and alphas of its own."""
    deltas = deltas_of(layout)
    save_lora(tmp_path, deltas, layout=layout)
    model = peft.PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path).get_base_model()
    for block, delta in deltas.items():
        for path, linear in delta.linears.items():
            layer = model.get_submodule(f"{layout.blocks_path}.{block}.{path}")
            expected = linear.scale * linear.b_Or @ linear.a_rI
            torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    assert not hasattr(model.get_submodule(f"{layout.blocks_path}.1.self_attn.q_proj"), "lora_A")


def test_what_lora_files_cannot_hold_is_refused(layout, tmp_path):
    """By name, before anything is written."""
    good = deltas_of(layout)[0].linears["self_attn.q_proj"]
    for delta, message in (
        (BlockDelta(prompt_PH=torch.zeros(2, 32)), "virtual positions"),
        (BlockDelta(), "at least one linear"),
        (BlockDelta(linears={"self_attn.q_proj": replace(good, input_scale_I=torch.ones(32))}), "input_scale_I"),
        (BlockDelta(linears={"self_attn.q_proj": LinearDelta(bias_O=torch.ones(32))}), "has no A and B"),
    ):
        with pytest.raises(AdapterError, match=message):
            save_lora(tmp_path / "new", {0: delta}, layout=layout)
    assert not (tmp_path / "new").exists()

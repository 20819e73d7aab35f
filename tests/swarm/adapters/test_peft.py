"""PEFT's files become what servers apply, or are refused by the name of what is wrong with them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from swarm.adapters.format import decode_shard
from swarm.adapters.layout import BlockShape, LinearShape, ModelLayout
from swarm.adapters.peft import read_adapter
from swarm.adapters.peft_files import CONFIG_FILE, PICKLE_FILE, TENSORS_FILE
from swarm.errors import AdapterError

HIDDEN, OUT = 6, 4
BLOCK = BlockShape(
    hidden_size=HIDDEN, linears={"attn.q": LinearShape(num_inputs=HIDDEN, num_outputs=OUT)}, kv_shape=(2, 3, 3)
)
LAYOUT = ModelLayout(blocks_path="model.layers", blocks=(BLOCK, BLOCK))
Q0, Q1 = ("base_model.model.model.layers.%d.attn.q." % block for block in (0, 1))  # noqa: UP031
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": "org/base"}


def lora_tensors(rank=2):
    return {Q1 + "lora_A.weight": torch.ones(rank, HIDDEN), Q1 + "lora_B.weight": torch.ones(OUT, rank)}


@pytest.fixture
def read(tmp_path):
    """Write an adapter's two files and read them."""

    def write_and_read(config, tensors, layout=LAYOUT):
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
        save_file(tensors, tmp_path / TENSORS_FILE)
        return read_adapter(tmp_path, layout=layout)

    return write_and_read


def delta_of(loaded, block=1):
    info = next(it for it in loaded.manifest.shards if it.block == block)
    return decode_shard(loaded.shards[block], info, BLOCK, loaded.manifest.num_virtual)


def test_only_blocks_that_are_changed_have_shards(read):
    """The manifest names method and base for people, and everything by hash."""
    loaded = read(LORA, lora_tensors())
    assert loaded.manifest.method == "LORA" and loaded.manifest.base == "org/base"
    assert [shard.block for shard in loaded.manifest.shards] == list(loaded.shards) == [1]
    assert loaded.manifest.num_blocks == 2 and loaded.manifest.hidden_size == HIDDEN
    assert loaded.embeddings_PH is None
    assert delta_of(loaded).linears["attn.q"].scale == 4.0
    assert loaded.digest == read(LORA, lora_tensors()).digest
    assert loaded.digest != read({**LORA, "lora_alpha": 9}, lora_tensors()).digest


@pytest.mark.parametrize(
    ("options", "rank", "scale"),
    [
        ({"use_rslora": True}, 2, 8 / 2**0.5),
        ({"rank_pattern": {"q": 3}}, 3, 8 / 3),
        ({"rank_pattern": {"layers.0.attn.q": 3}}, 2, 4),
        ({"rank_pattern": {"^model.layers.1.attn.q": 3}, "alpha_pattern": {"attn.q": 6}}, 3, 2),
        ({"rank_pattern": {r".*\.1\..*": 3, "q": 5}}, 3, 8 / 3),
        ({"rank_pattern": {"kq": 5}, "alpha_pattern": {"t.q": 5}}, 2, 4),
    ],
)
def test_ranks_and_scales_follow_the_patterns(read, options, rank, scale):
    """The first expression that matches a module's name, from its end or a dot on."""
    loaded = read({**LORA, **options}, lora_tensors(rank))
    linear = delta_of(loaded).linears["attn.q"]
    assert linear.rank == rank and linear.scale == pytest.approx(scale)


def test_trained_biases_become_the_base_s_new_ones(read):
    """With or without matrices beside them, under both of the names that PEFT has given them."""
    for key in ("base_layer.bias", "bias"):
        loaded = read({**LORA, "bias": "all"}, {**lora_tensors(), Q0 + key: torch.arange(4.0)})
        linear = delta_of(loaded, 0).linears["attn.q"]
        assert linear.rank == 0 and torch.equal(linear.base_bias_O, torch.arange(4.0))


@pytest.mark.parametrize("path", ["model.language_model.layers", "language_model.model.layers", "model.layers"])
def test_the_language_model_may_have_been_part_of_a_larger_one(read, path):
    """Its name in the file depends on the class that was trained."""
    tensors = {key.replace("model.layers", path): it for key, it in lora_tensors().items()}
    for layout in (LAYOUT, ModelLayout(blocks_path="model.language_model.layers", blocks=LAYOUT.blocks)):
        assert list(read(LORA, tensors, layout).shards) == [1]


def test_prompt_embeddings_stay_with_the_client(read):
    """Servers get positions to expect and nothing else."""
    loaded = read({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, {"prompt_embeddings": torch.ones(3, HIDDEN)})
    assert not loaded.shards and loaded.manifest.num_virtual == 3
    assert loaded.embeddings_PH.shape == (3, HIDDEN)


def test_deep_prompts_are_one_tensor_for_all_blocks(read):
    """Our own kind, with embeddings beside them or without."""
    config = {"peft_type": "DEEP_PROMPT_TUNING", "num_virtual_tokens": 3}
    deep, top = torch.randn(2, 3, HIDDEN), torch.randn(3, HIDDEN)
    loaded = read(config, {"deep_prompts": deep, "prompt_embeddings": top})
    assert torch.equal(delta_of(loaded, 1).prompt_PH, deep[1]) and torch.equal(loaded.embeddings_PH, top)
    assert read(config, {"deep_prompts": deep}).embeddings_PH is None


PREFIX = {
    "peft_type": "PREFIX_TUNING",
    "num_virtual_tokens": 3,
    "num_layers": 2,
    "num_attention_heads": 2,
    "token_dim": 6,
}
VERA = {"peft_type": "VERA", "r": 2}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "HIRA"}, {}, "method HIRA can't be applied"),
        ({"peft_type": "XLORA"}, {}, "method XLORA"),
        ({"peft_type": ["LORA"]}, {}, "can't be applied"),
        ({}, {}, "method None"),
        ({**LORA, "modules_to_save": ["lm_head"]}, {}, "with modules_to_save can't"),
        ({**LORA, "target_parameters": ["experts.up"]}, {}, "with target_parameters can't"),
        ({**LORA, "alora_invocation_tokens": [1]}, {}, "with alora_invocation_tokens can't"),
        ({**LORA, "trainable_token_indices": [1]}, {}, "with trainable_token_indices can't"),
        ({**LORA, "layer_replication": [[0, 1]]}, {}, "with layer_replication can't"),
        ({**LORA, "loftq_config": {"loftq_bits": 4}}, {}, "with loftq_config can't"),
        ({**LORA, "kasa_config": {"beta": 1}}, {}, "with kasa_config can't"),
        ({**LORA, "use_next_years_trick": True}, {}, "with use_next_years_trick can't"),
        ({**LORA, "init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights = 'pissa_niter_4'"),
        ({**LORA, "init_lora_weights": "loftq"}, {}, "init_lora_weights = 'loftq'"),
        ({**LORA, "use_dora": True, "lora_bias": True}, {}, "use_dora and lora_bias"),
        (LORA, {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 6)}, "lm_head, which is outside the blocks"),
        (LORA, {"base_model.model.vision.layers.0.attn.q.lora_A.weight": torch.ones(2, 6)}, "vision.layers.0.attn.q"),
        (LORA, {Q0.replace("attn.q", "mlp.experts.0.w1") + "lora_A.weight": torch.ones(2, 6)}, "is no linear"),
        (LORA, {Q0.replace("layers.0", "layers.2") + "lora_A.weight": torch.ones(2, 6)}, "base model has 2 blocks"),
        (LORA, {Q0.replace("layers.0", "layers.9999999") + "lora_A.weight": torch.ones(2, 6)}, "outside the blocks"),
        (LORA, {"base_model.model.model.embed.lora_embedding_A": torch.ones(2, 6)}, "lora_embedding_A, which servers"),
        (LORA, {Q1 + "lora_A.weight": torch.ones(2, 6)}, "layers.1.attn.q has no lora_B"),
        (LORA, lora_tensors(3), r"lora_A.weight has shape \(3, 6\), expected \(2, 6\)"),
        (LORA, {**lora_tensors(), Q1 + "lora_A.weight": torch.ones(2, 7)}, r"\(2, 7\), expected \(2, 6\)"),
        (LORA, {**lora_tensors(), Q1 + "lora_A.weight": torch.full((2, 6), torch.nan)}, "has numbers that"),
        (LORA, {**lora_tensors(), Q1 + "lora_A.weight": torch.ones(2, 6).double()}, "F64, expected one of F32"),
        (LORA, {**lora_tensors(), Q1 + "bias": torch.ones(4), Q1 + "base_layer.bias": torch.ones(4)}, "twice"),
        (LORA, {**lora_tensors(), Q1 + "lora_magnitude_vector": torch.ones(4)}, "magnitude, which its config denies"),
        ({**LORA, "use_dora": True}, lora_tensors(), "has no magnitude"),
        ({**LORA, "r": 100000}, lora_tensors(), "rank 100000 of .*, expected 1..512"),
        ({**LORA, "r": "2"}, lora_tensors(), "rank 2 of"),
        ({**LORA, "r": True}, lora_tensors(1), "rank True of"),
        ({**LORA, "lora_alpha": "8"}, lora_tensors(), "alpha of .* = '8', expected a finite number"),
        ({**LORA, "rank_pattern": [1]}, lora_tensors(), "rank_pattern is list"),
        ({**LORA, "rank_pattern": {"(a+)+$": 1}}, lora_tensors(), "too involved"),
        ({**LORA, "rank_pattern": {"(": 1}}, lora_tensors(), "no regular expression"),
        ({"peft_type": "ADALORA", "lora_alpha": 8}, lora_tensors(), "init_r = None, expected an integer in 1..512"),
        ({**VERA, "r": 5000}, {}, "r = 5000, expected an integer in 1..512"),
        (VERA, {Q0 + "vera_lambda_b": torch.ones(4), Q0 + "vera_lambda_d": torch.ones(2)}, "vera_A has shape"),
        ({"peft_type": "IA3"}, {Q0 + "ia3_l": torch.ones(3, 1)}, r"shape \(3, 1\), expected \(4, 1\) or \(1, 6\)"),
        ({"peft_type": "BEFT"}, {Q0 + "beft_bias": torch.ones(1, 3)}, r"\(1, 3\), expected \(1, 4\)"),
        ({**PREFIX, "num_layers": 3}, {}, "has 3 layers, the base model 2"),
        ({**PREFIX, "num_attention_heads": 6}, {}, "6 heads of 1, block 0 of the base model"),
        ({**PREFIX, "num_virtual_tokens": 1 << 20}, {}, "num_virtual_tokens = 1048576, expected"),
        (PREFIX, {"prompt_embeddings": torch.ones(3, 23)}, r"\(3, 23\), expected \(3, 24\)"),
        ({**PREFIX, "num_transformer_submodules": 2}, {}, "encoder and decoder"),
        (PREFIX, {"prompt_embeddings": torch.ones(3, 24), "more": torch.ones(1)}, "has more, which servers can't"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, {"prompt_embeddings": torch.ones(3, 7)}, r"\(3, 7\)"),
    ],
)  # fmt: skip
def test_what_servers_cannot_do_is_refused_by_name(read, config, tensors, message):
    """The method, the option, the module, or the tensor with both shapes."""
    with pytest.raises(AdapterError, match=message):
        read(config, tensors)


def test_a_prefix_needs_attention_in_every_block(read):
    """In a recurrent block its positions would change the state."""
    layout = ModelLayout(
        blocks_path="model.layers", blocks=(BLOCK, BlockShape(hidden_size=HIDDEN, linears={}, kv_shape=None))
    )
    with pytest.raises(AdapterError, match="block 1 has none"):
        read(PREFIX, {"prompt_embeddings": torch.ones(3, 24)}, layout)


def test_pickles_are_not_opened(read, tmp_path):
    """Not even where there is nothing else."""
    read(LORA, lora_tensors())
    shutil.move(tmp_path / TENSORS_FILE, tmp_path / PICKLE_FILE)
    with pytest.raises(AdapterError, match=r"adapter_model.bin, a pickle"):
        read_adapter(tmp_path, layout=LAYOUT)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\xff" * 64, b'\x08\0\0\0\0\0\0\0{"a":1}'])
def test_broken_files_are_refused(read, tmp_path, data):
    """Tensors that are no safetensors, a config that is no JSON object."""
    read(LORA, lora_tensors())
    (tmp_path / TENSORS_FILE).write_bytes(data)
    with pytest.raises(AdapterError, match="no safetensors file"):
        read_adapter(tmp_path, layout=LAYOUT)
    save_file(lora_tensors(), tmp_path / TENSORS_FILE)
    (tmp_path / CONFIG_FILE).write_bytes(b"[" + data)
    with pytest.raises(AdapterError, match="no JSON object"):
        read_adapter(tmp_path, layout=LAYOUT)


def test_a_directory_without_an_adapter_is_named(tmp_path):
    """With the file that is missing."""
    with pytest.raises(AdapterError, match="it has no adapter_config.json"):
        read_adapter(tmp_path, layout=LAYOUT)
    (tmp_path / CONFIG_FILE).write_text("{}")
    with pytest.raises(AdapterError, match="it has no adapter_model.safetensors"):
        read_adapter(tmp_path, layout=LAYOUT)

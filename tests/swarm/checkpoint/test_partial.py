"""Blocks and the rest of a checkpoint load bitwise as transformers loads them, reading only what they need."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from swarm.checkpoint.partial import build_model, build_rotary, find_blocks, iter_blocks, load_rest, shards_for
from swarm.errors import CheckpointMismatch, InvalidRequest, UnsupportedModel
from swarm.types import BlockRange

LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
GPT2: dict[str, Any] = dict(n_embd=32, n_layer=3, n_head=4, n_positions=128, **TOKENS)
BLOOM: dict[str, Any] = dict(hidden_size=32, n_layer=3, n_head=4, **TOKENS)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mixtral": dict(LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    "gemma3_text": dict(
        LLAMA, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gpt_neox": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "phi3": LLAMA,
    "gpt2": GPT2,
    "gptj": dict(GPT2, rotary_dim=4),
    "bloom": BLOOM,
    "falcon": dict(BLOOM, num_attention_heads=4, num_hidden_layers=3, new_decoder_architecture=False),
    "mpt": dict(d_model=32, n_layers=3, n_heads=4, expansion_ratio=2, **TOKENS),
    "opt": dict(LLAMA, ffn_dim=48, word_embed_proj_dim=32),
}


class Directory:
    """A checkpoint directory that notes which shards were asked for."""

    def __init__(self, path: Path):
        self.path, self.name, self.asked = path, path.name, set[str]()

    @property
    def weight_map(self) -> dict[str, str]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return weight_map
        with safe_open(self.path / "model.safetensors", framework="pt") as file:
            return dict.fromkeys(file.keys(), "model.safetensors")

    def config(self) -> PretrainedConfig:
        config: PretrainedConfig = AutoConfig.from_pretrained(self.path)
        return config

    def ensure(self, shards: Iterable[str]) -> dict[str, Path]:
        self.asked |= set(shards)
        return {shard: self.path / shard for shard in shards}


def make(path: Path, model_type: str, *, shard_size: str = "30KB", **changes: Any) -> tuple[PreTrainedModel, Directory]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(path, max_shard_size=shard_size)
    return model, Directory(path)


def assert_equal(loaded: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Every parameter and buffer, the non-persistent ones too, is real and bitwise equal."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(loaded, kind)()), dict(getattr(reference, kind)())
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert not tensor.is_meta, name
            assert torch.equal(tensor, theirs[name]), name


def rewrite(path: Path, change: Any) -> None:
    """Apply `change` to the tensors of a single-file checkpoint."""
    tensors = load_file(path / "model.safetensors")
    save_file(change(tensors), path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", CONFIGS)
def test_blocks_and_rest_equal_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    """Layers, embeddings, norms, head and rotary tables are bitwise those of the whole model."""
    model, source = make(tmp_path, model_type)
    path, blocks = find_blocks(model)
    for index, block in iter_blocks(source, BlockRange(1, 3), dtype=torch.float32):
        assert_equal(block, blocks[index])
        assert not block.training and not any(parameter.requires_grad for parameter in block.parameters())
    rest = build_model(source.config(), dtype=torch.float32)
    load_rest(rest, source, dtype=torch.float32)
    parent, _, name = path.rpartition(".")
    assert len(rest.get_submodule(path)) == 0
    setattr(model.get_submodule(parent), name, torch.nn.ModuleList())
    assert_equal(rest, model)
    for attribute, rotary in build_rotary(source.config()).items():
        assert_equal(rotary, getattr(model.get_submodule(parent), attribute))


def test_layer_output_equals_the_whole_model(tmp_path: Path) -> None:
    """A layer loaded alone computes what it computes inside the whole model, under its global index."""
    model, source = make(tmp_path, "llama")
    hidden, positions = torch.randn(1, 5, 32), torch.arange(5)[None]
    rotary = build_rotary(source.config())["rotary_emb"](hidden, positions)
    [(index, block)] = iter_blocks(source, BlockRange(2, 3), dtype=torch.float32)
    assert index == 2 and block.self_attn.layer_idx == 2
    expected = model.model.layers[2](hidden, position_embeddings=rotary)
    assert torch.equal(block(hidden, position_embeddings=rotary), expected)


def test_only_the_shards_of_the_blocks_are_asked_for(tmp_path: Path) -> None:
    """A span of blocks, and the client's part, ask for exactly the files that hold them."""
    _, source = make(tmp_path, "llama")
    files = set(source.weight_map.values())
    list(iter_blocks(source, BlockRange(0, 1), dtype=torch.float32))
    expected = {file for key, file in source.weight_map.items() if ".layers.0." in key}
    assert source.asked == expected == set(shards_for(source, BlockRange(0, 1))) < files
    source.asked.clear()
    load_rest(build_model(source.config(), dtype=torch.float32), source, dtype=torch.float32)
    expected = {file for key, file in source.weight_map.items() if ".layers." not in key}
    assert source.asked == expected == set(shards_for(source, None)) < files


def test_single_file_checkpoint_without_prefix(tmp_path: Path) -> None:
    """Names of old checkpoints (no "transformer." in front, stored masks) load as in transformers."""
    model, source = make(tmp_path, "gpt2", shard_size="1GB")

    def old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(3)}
        return {key.removeprefix("transformer."): value for key, value in tensors.items()} | masks

    rewrite(tmp_path, old_names)
    assert "h.0.attn.bias" in source.weight_map and "wte.weight" in source.weight_map
    for index, block in iter_blocks(source, BlockRange(0, 3), dtype=torch.float32):
        assert_equal(block, model.transformer.h[index])
    rest = build_model(source.config(), dtype=torch.float32)
    load_rest(rest, source, dtype=torch.float32)
    assert torch.equal(rest.transformer.wpe.weight, model.transformer.wpe.weight)


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    """A head tied to the embeddings shares their storage; an untied one is read."""
    for tied in (True, False):
        model, source = make(tmp_path / str(tied), "llama", tie_word_embeddings=tied)
        rest = build_model(source.config(), dtype=torch.float32)
        load_rest(rest, source, dtype=torch.float32)
        same = rest.lm_head.weight.data_ptr() == rest.model.embed_tokens.weight.data_ptr()
        assert same is tied
        assert torch.equal(rest.lm_head.weight, model.lm_head.weight)


def test_multimodal_checkpoint_gives_its_text_part(tmp_path: Path) -> None:
    """Text layers that sit deeper are found; the vision tower is not read."""
    text = CONFIGS["gemma3_text"]
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    source = Directory(tmp_path)
    path, blocks = find_blocks(model)
    assert path == "model.language_model.layers"
    for index, block in iter_blocks(source, BlockRange(0, 3), dtype=torch.float32):
        assert_equal(block, blocks[index])
    source.asked.clear()
    rest = build_model(source.config(), dtype=torch.float32)
    load_rest(rest, source, dtype=torch.float32)
    assert torch.equal(rest.lm_head.weight, model.lm_head.weight)
    assert not any("vision" in name for name, _ in rest.named_parameters())
    assert source.asked == set(shards_for(source, None)) < set(source.weight_map.values())


def test_low_precision_is_converted(tmp_path: Path) -> None:
    """The dtype asked for is the dtype that comes, whatever the file holds."""
    model, source = make(tmp_path, "llama")
    [(_, block)] = iter_blocks(source, BlockRange(0, 1), dtype=torch.bfloat16)
    assert torch.equal(block.mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight.bfloat16())


@pytest.mark.parametrize("damage", ["missing", "shape", "unknown"])
@pytest.mark.parametrize("part", ["block", "rest"])
def test_damaged_checkpoint_is_refused(part: str, damage: str, tmp_path: Path) -> None:
    """A missing, misshapen or (in a block) unknown tensor is an error, never a random weight."""
    _, source = make(tmp_path, "llama", shard_size="1GB")
    key = "model.layers.1.mlp.up_proj.weight" if part == "block" else "model.norm.weight"

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if damage == "missing":
            del tensors[key]
        elif damage == "shape":
            tensors[key] = torch.zeros(7)
        else:
            tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(48)
        return tensors

    rewrite(tmp_path, change)
    rest = build_model(source.config(), dtype=torch.float32)
    if part == "rest" and damage == "unknown":
        load_rest(rest, source, dtype=torch.float32)
        return
    if part == "rest":
        with pytest.raises(CheckpointMismatch, match=r"norm\.weight"):
            load_rest(rest, source, dtype=torch.float32)
    else:
        with pytest.raises(CheckpointMismatch, match="up_proj"):
            next(iter_blocks(source, BlockRange(1, 2), dtype=torch.float32))


def test_range_outside_the_model_is_refused(tmp_path: Path) -> None:
    """The message names the range asked for and the one there is."""
    _, source = make(tmp_path, "llama")
    with pytest.raises(InvalidRequest, match=r"2:4 .*\(0:3\)"):
        next(iter_blocks(source, BlockRange(2, 4), dtype=torch.float32))
    with pytest.raises(InvalidRequest, match=r"0:9"):
        shards_for(source, BlockRange(0, 9))


def test_unsupported_configs_are_refused() -> None:
    """A model without a causal head, and one that is quantised already, are named as unsupported."""
    with pytest.raises(UnsupportedModel, match="vit"):
        build_model(AutoConfig.for_model("vit"), dtype=torch.float32)
    quantised = AutoConfig.for_model("llama", **LLAMA, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UnsupportedModel, match="mxfp4"):
        build_model(quantised, dtype=torch.float32)


def test_models_built_at_the_same_time_leave_torchs_default_dtype_alone():
    """transformers changes it for all threads while it builds; it must be what it was when the last one is done."""
    config = AutoConfig.for_model("llama", **LLAMA)
    before = torch.get_default_dtype()
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(lambda dtype: build_model(config, dtype=dtype), [torch.bfloat16, torch.float16] * 16))
    assert {model.dtype for model in models} == {torch.bfloat16, torch.float16}
    assert torch.get_default_dtype() == before

"""Tiny random models, one per family: the smallest config of each model type that still has all its peculiarities.

`FAMILIES` maps a name to a `Family`. Both the block tests and the generate tests run over this table, and the table of
supported families in docs/families.md is generated from it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One tiny model."""

    model_type: str
    options: dict[str, Any]
    """Arguments of its config class."""
    note: str = ""
    """What is peculiar about it, for the table in the docs."""
    stateful: bool = False
    """It has blocks with a recurrent state."""
    reference: str = "eager"
    """Attention implementation of the plain model that it is compared with. Not always the default one: sdpa ignored
    Gemma 2's soft cap in transformers 5.17, and eager applies Falcon's ALiBi twice."""
    incremental: bool = False
    """Its rotary frequencies depend on the length so far: plain transformers must be fed the same chunks."""

    def config(self) -> PretrainedConfig:
        return CONFIG_MAPPING[self.model_type](**self.options)

    def model(self, seed: int = 0) -> PreTrainedModel:
        """A random fp32 model whose weights are large enough for every path to matter."""
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(self.config(), attn_implementation=self.reference, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval()


_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {**_BASE, "head_dim": 16}
_MOE = {**_BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _f(model_type: str, base: dict[str, Any] = _BASE, note: str = "", **options: Any) -> Family:
    fields = {
        "stateful": options.pop("stateful", False),
        "reference": options.pop("reference", "eager"),
        "incremental": options.pop("incremental", False),
    }
    merged = {name: value for name, value in {**base, **options}.items() if value is not ...}
    return Family(model_type=model_type, options=merged, note=note, **fields)


_MLA = {
    **_BASE,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_LAYERS4 = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 8}  # fmt: skip
_MAMBA1 = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "time_step_rank": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "afmoe": _f("afmoe", _MOE, "MoE, gated attention, window and full layers", num_hidden_layers=4, num_dense_layers=1,
                head_dim=16, global_attn_every_n_layers=2, sliding_window=16),
    "apertus": _f("apertus", _BASE, "xIELU"),
    "arcee": _f("arcee", _BASE, "ReLU squared"),
    "aria_text": _f("aria_text", _BASE, "MoE", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "biogpt": _f("biogpt", _BASE, "learned positions at the client", num_key_value_heads=...),
    "bitnet": _f("bitnet", _BASE, "sub-norms"),
    "bloom": _f("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}, "ALiBi; quirks"),
    "cohere": _f("cohere", _BASE, "parallel blocks, logit scale"),
    "cohere2": _f("cohere2", _BASE, "window layers with rope, full layers without", num_hidden_layers=4, sliding_window=16),
    "ctrl": _f("ctrl", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "dff": 48}),
    "cwm": _f("cwm", _HEADS, "window and full layers", num_hidden_layers=4, layer_types=_LAYERS4, sliding_window=16),
    "deepseek_v2": _f("deepseek_v2", _MLA, "MLA, MoE", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                      n_shared_experts=1, first_k_dense_replace=1, head_dim=8, n_group=1, topk_group=1),
    "deepseek_v3": _f("deepseek_v3", _MLA, "MLA: keys wider than values; MoE", n_routed_experts=4, num_experts_per_tok=2,
                      moe_intermediate_size=24, n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1, head_dim=8),
    "ernie4_5": _f("ernie4_5", _HEADS),
    "ernie4_5_moe": _f("ernie4_5_moe", _BASE, "MoE", moe_num_experts=4, moe_k=2, moe_intermediate_size=24,
                       moe_num_shared_experts=1, moe_layer_start_index=1),
    "exaone4": _f("exaone4", _BASE, "window layers with rope, full layers without", num_hidden_layers=4,
                  sliding_window=16, sliding_window_pattern=2),
    "exaone_moe": _f("exaone_moe", _MOE, "MoE", num_hidden_layers=4, sliding_window=16, sliding_window_pattern=2,
                     num_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1),
    "falcon-7b": _f("falcon", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "bos_token_id": 1, "eos_token_id": 2}, "multi-query; quirks", multi_query=True, parallel_attn=True, bias=False),
    "falcon-40b": _f("falcon", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                     "bos_token_id": 1, "eos_token_id": 2}, "grouped queries; quirks", new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": _f("falcon", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "bos_token_id": 1, "eos_token_id": 2}, "ALiBi; quirks", alibi=True, reference="sdpa", multi_query=False, parallel_attn=False, bias=True),
    "flex_olmo": _f("flex_olmo", _BASE, "MoE", num_experts=4, num_experts_per_tok=2),
    "gemma": _f("gemma", _HEADS),
    "gemma2": _f("gemma2", _HEADS, "soft cap, alternating window", num_hidden_layers=4, sliding_window=16,
                 query_pre_attn_scalar=16, attn_logit_softcapping=5.0),
    "gemma3_text": _f("gemma3_text", _HEADS, "rope differs by layer type", num_hidden_layers=4, layer_types=_LAYERS4, sliding_window=16),
    "glm": _f("glm", _HEADS, "partial rotary"),
    "glm4": _f("glm4", _HEADS, "partial rotary, sandwich norms"),
    "glm4_moe": _f("glm4_moe", _HEADS, "MoE", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                   n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
    "gpt2": _f("gpt2", _GPT2, "Conv1D, learned positions at the client"),
    "gpt_bigcode": _f("gpt_bigcode", _GPT2, "multi-query", multi_query=True),
    "gpt_neox": _f("gpt_neox", _BASE, "parallel residual, partial rotary", num_key_value_heads=...),
    "gpt_oss": _f("gpt_oss", _HEADS, "attention sinks, alternating window, MoE", num_hidden_layers=4, num_local_experts=4,
                  num_experts_per_tok=2, sliding_window=16, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "gptj": _f("gptj", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 4,
               "bos_token_id": 1, "eos_token_id": 2}, "quirks"),
    "granite": _f("granite", _BASE, "multipliers"),
    "granitemoe": _f("granitemoe", _BASE, "MoE", num_local_experts=4, num_experts_per_tok=2),
    "granitemoeshared": _f("granitemoeshared", _BASE, "MoE", num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32),
    "helium": _f("helium", _BASE, head_dim=8),
    "hunyuan_v1_dense": _f("hunyuan_v1_dense", _HEADS),
    "hunyuan_v1_moe": _f("hunyuan_v1_moe", _HEADS, "MoE", num_experts=4, moe_topk=2),
    "jais2": _f("jais2", _BASE),
    "jetmoe": _f("jetmoe", _BASE, "MoE attention", kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    "kimi_linear": _f("kimi_linear", _MLA, "linear and MLA layers, MoE", stateful=True, num_experts=4, num_experts_per_tok=2,
                      moe_intermediate_size=24, linear_head_dim=8, linear_num_heads=2, head_dim=8,
                      layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "lfm2": _f("lfm2", _BASE, "short convolutions", num_hidden_layers=4, stateful=True,
               layer_types=["conv", "full_attention", "conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "llama": _f("llama"),
    "llama-3.1": _f("llama", _HEADS, "llama3 rope scaling", rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0,
                    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
    "llama-dynamic": _f("llama", _BASE, "dynamic rope, per sequence", incremental=True, max_position_embeddings=24,
                        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}),
    "llama4_text": _f("llama4_text", _HEADS, "chunked attention, position-free layers, MoE; quirks", num_hidden_layers=4,
                      intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1, attention_chunk_size=16,
                      no_rope_layers=[1, 1, 0, 1], floor_scale=4, attn_scale=0.5, moe_layers=[1, 3], use_qk_norm=True),
    "mamba2": _f("mamba2", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 16,
                 "state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2}, "recurrent", stateful=True),
    "minicpm3": _f("minicpm3", _MLA, "MLA"),
    "minimax_m2": _f("minimax_m2", _HEADS, "MoE", num_local_experts=4, num_experts_per_tok=2),
    "ministral": _f("ministral", _HEADS, "window", sliding_window=16, layer_types=["sliding_attention"] * 3),
    "ministral3": _f("ministral3", _HEADS),
    "mistral": _f("mistral", _HEADS, "window", sliding_window=16),
    "mixtral": _f("mixtral", _BASE, "MoE", num_local_experts=4, num_experts_per_tok=2),
    "moshi": _f("moshi", _HEADS, "", reference="sdpa", ffn_dim=96),
    "mpt": _f("mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2,
              "max_seq_len": 128}, "ALiBi; quirks"),
    "nanochat": _f("nanochat", _BASE, "query and key norms"),
    "nemotron": _f("nemotron", _HEADS),
    "nemotron_h": _f("nemotron_h", _HEADS, "mamba, attention and MLP layers", stateful=True, num_hidden_layers=4),
    "olmo": _f("olmo", _BASE, "norms without weights"),
    "olmo2": _f("olmo2", _BASE, "norms after the sublayers"),
    "olmo3": _f("olmo3", _BASE, "window and full layers", num_hidden_layers=4, layer_types=_LAYERS4, sliding_window=16),
    "olmo_hybrid": _f("olmo_hybrid", _BASE, "linear and full attention", num_hidden_layers=4, stateful=True),
    "olmoe": _f("olmoe", _BASE, "MoE", num_experts=4, num_experts_per_tok=2),
    "opt": _f("opt", {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
              "max_position_embeddings": 128, "word_embed_proj_dim": 32}, "learned positions at the client"),
    "persimmon": _f("persimmon", _BASE, "partial rotary", num_key_value_heads=...),
    "phi": _f("phi", _BASE, "partial rotary, parallel"),
    "phi3": _f("phi3", _BASE, "fused projections, window", sliding_window=16),
    "phi3-longrope": _f("phi3", _BASE, "longrope, per sequence", incremental=True, max_position_embeddings=128,
                        original_max_position_embeddings=32,
                        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                                         "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}),
    "phimoe": _f("phimoe", _BASE, "MoE", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _f("qwen2", _BASE, "biases in the projections"),
    "qwen2_moe": _f("qwen2_moe", _MOE, "MoE with a shared expert", shared_expert_intermediate_size=24),
    "qwen3": _f("qwen3", _HEADS, "query and key norms"),
    "qwen3_moe": _f("qwen3_moe", {**_MOE, "head_dim": 16}, "MoE"),
    "qwen3_next": _f("qwen3_next", {**_MOE, "head_dim": 16, **_LINEAR}, "linear and full attention, MoE", num_hidden_layers=4,
                     stateful=True, shared_expert_intermediate_size=24, layer_types=["linear_attention", "full_attention"] * 2),
    "qwen3_5_text": _f("qwen3_5_text", {**_HEADS, **_LINEAR}, "linear and full attention", num_hidden_layers=4,
                       stateful=True, layer_types=["linear_attention", "full_attention"] * 2),
    "qwen3_5_moe_text": _f("qwen3_5_moe_text", {**_MOE, "head_dim": 16, **_LINEAR}, "linear and full attention, MoE",
                           num_hidden_layers=4, stateful=True, shared_expert_intermediate_size=24,
                           layer_types=["linear_attention", "full_attention"] * 2),
    "seed_oss": _f("seed_oss", _HEADS),
    "smollm3": _f("smollm3", _BASE, "layers without positions", num_hidden_layers=4, no_rope_layer_interval=2),
    "stablelm": _f("stablelm", _BASE, "partial rotary"),
    "starcoder2": _f("starcoder2", _BASE, "window", sliding_window=16),
    "vaultgemma": _f("vaultgemma", _HEADS, "soft cap", num_hidden_layers=4, layer_types=_LAYERS4, sliding_window=16,
                     query_pre_attn_scalar=16, attn_logit_softcapping=5.0),
    "youtu": _f("youtu", _MLA, "MLA"),
    "bamba": _f("bamba", {**_BASE, **_MAMBA}, "mamba and attention layers", stateful=True, attn_layer_indices=[1]),
    "falcon_h1": _f("falcon_h1", {**_HEADS, **_MAMBA}, "mamba beside attention in each layer; quirks", stateful=True,
                    mamba_d_ssm=64, ssm_multipliers=[0.5, 1.5, 0.7, 1.3, 0.9]),
    "falcon_mamba": _f("falcon_mamba", _MAMBA1, "recurrent", stateful=True),
    "mamba": _f("mamba", _MAMBA1, "recurrent", stateful=True),
    "jamba": _f("jamba", _BASE, "mamba and attention layers, MoE", stateful=True, num_hidden_layers=4, attn_layer_period=2,
                attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4, num_experts_per_tok=2,
                mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    "granitemoehybrid": _f("granitemoehybrid", {**_BASE, **_MAMBA}, "mamba and attention layers, MoE", stateful=True,
                           num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32,
                           layer_types=["mamba", "attention", "mamba"]),
    "granitemoe_swa": _f("granitemoe_swa", _BASE, "rope differs by layer, MoE", num_local_experts=4, num_experts_per_tok=2),
    "granite_swa": _f("granite_swa", _BASE, "rope differs by layer"),
    "laguna": _f("laguna", _HEADS, "MoE"),
    "mimo_v2_flash": _f("mimo_v2_flash", _HEADS, "rope differs by layer type, MoE", n_routed_experts=4, num_experts_per_tok=2,
                        moe_intermediate_size=24),
    "mellum": _f("mellum", _HEADS, "MoE", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "flint": _f("flint", _HEADS, "MoE", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "glm4_moe_lite": _f("glm4_moe_lite", _MLA, "MLA, MoE", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                        n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
    "axk1": _f("axk1", _MLA, "MLA, MoE", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
               n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
    "hy_v3": _f("hy_v3", _HEADS, "MoE", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "hyperclovax": _f("hyperclovax"),
    "iquestcoder": _f("iquestcoder"),
    "internlm3": _f("internlm3"),
    "cohere2_moe": _f("cohere2_moe", _MOE, "MoE, window", sliding_window=16),
    "solar_open": _f("solar_open", _HEADS, "MoE", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                     n_shared_experts=1, n_group=1, topk_group=1),
    "dots1": _f("dots1", _HEADS, "MoE", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1,
                n_group=1, topk_group=1, first_k_dense_replace=1),
    "lfm2_moe": _f("lfm2_moe", _MOE, "short convolutions, MoE", num_hidden_layers=4, stateful=True, num_dense_layers=1,
                   layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "dbrx": _f("dbrx", {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128}, "MoE",
               attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
               ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}),
    "gemma4_text": _f("gemma4_text", _HEADS, "head width differs by layer type; without per-layer inputs and shared caches",
                      hidden_size_per_layer_input=0, num_kv_shared_layers=0, num_hidden_layers=4, global_head_dim=32,
                      layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16),
}  # fmt: skip
"""By name; several names may share a model type."""

REFUSED: dict[str, tuple[Family, str]] = {
    "codegen": (_f("codegen", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128,
                   "rotary_dim": 4}), "mixes tokens without calling attention"),
    "gpt_neo": (_f("gpt_neo", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                   "max_position_embeddings": 128, "attention_types": [[["global", "local"], 1]]}), "AttentionInterface"),
    "gpt_neox_japanese": (_f("gpt_neox_japanese", _BASE, num_key_value_heads=..., intermediate_multiple_size=2),
                          "mixes tokens without calling attention"),
    "xglm": (_f("xglm", {"vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
                "max_position_embeddings": 128}), "mixes tokens without calling attention"),
    "diffllama": (_f("diffllama"), "calls attention 2 times"),
    "doge": (_f("doge"), "a mask of its own"),
    "minimax": (_f("minimax", _HEADS, num_local_experts=4, num_experts_per_tok=2), "without a recurrent state"),
    "recurrent_gemma": (_f("recurrent_gemma", _HEADS), "without a recurrent state"),
    "bert": (_f("bert", _BASE, num_key_value_heads=...), "takes no inputs_embeds"),
    "openai-gpt": (_f("openai-gpt", _GPT2), "hidden states of the shape"),
}  # fmt: skip
"""Models that the generic runner would run wrongly, and a part of the reason that it gives."""

"""The few model types whose attention doesn't go through transformers' AttentionInterface, or not with all it needs.

    falcon, bloom, mpt   own attention code with a mask and ALiBi as tensors: their attention's forward is replaced
    gptj                 its inner `_attn` is replaced
    llama4               position-free layers scale queries by the row index instead of the position: we do it
    falcon_h1            the model, not the layer, fills a buffer of each layer: no layer loaded alone would have it

Everything else is generic. Each replacement keeps the projections and calls `internals.attend` between them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from swarm.server.blocks.internals import ATTENTION, attend


@dataclass(frozen=True, slots=True, kw_only=True)
class Quirks:
    """What one model type needs beyond the generic runner."""

    attn_implementation: str = ATTENTION
    """Name under which transformers builds the model."""
    ignored: frozenset[str] = frozenset()
    """Arguments of its layers that our attention replaces (masks and biases as tensors)."""
    patch: Callable[[nn.Module], None] | None = None
    """Makes a layer's attention call `attend`."""
    alibi_H: Callable[[PretrainedConfig], Tensor | None] = lambda config: None
    """Slopes of its attention with linear biases."""
    temperature: Callable[[nn.Module], tuple[float, float] | None] = lambda layer: None
    """(floor_scale, attn_scale) where a layer scales its queries by position."""


def quirks_of(config: PretrainedConfig) -> Quirks:
    """Those of a model type; none for nearly all of them."""
    return _BY_TYPE.get(config.model_type, _GENERIC)


def alibi_slopes(num_heads: int) -> Tensor:
    """[num_heads] slopes, interleaved beyond a power of two (Press et al., ALiBi, 2021, section 3 and its code)."""
    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = torch.tensor([2 ** (-8 * (i + 1) / lower) for i in range(lower)])
    between = torch.tensor([2 ** (-4 * (2 * i + 1) / lower) for i in range(num_heads - lower)])
    return torch.cat([slopes, between])


def _mpt_slopes(config: PretrainedConfig) -> Tensor:
    heads, upper = config.n_heads, 2 ** math.ceil(math.log2(config.n_heads))
    slopes = torch.tensor([2 ** (-8 * (i + 1) / upper) for i in range(upper)])
    return slopes if heads == upper else torch.cat([slopes[1::2], slopes[::2]])[:heads]


def _falcon_slopes(config: PretrainedConfig) -> Tensor | None:
    """Falcon keeps its slopes in bf16 and applies the attention scale to the sum of logit and bias."""
    if not config.alibi:
        return None
    scale = float((config.hidden_size // config.num_attention_heads) ** -0.5)
    return alibi_slopes(config.num_attention_heads).bfloat16().float() * scale


def _patch_falcon(layer: Any) -> None:
    layer.self_attention.forward = MethodType(_falcon_forward, layer.self_attention)


def _falcon_forward(
    self: Any, hidden_states: Tensor, alibi: Any, attention_mask: Any, position_embeddings: Any = None, **_: Any
) -> tuple[Tensor, None]:
    fused = self.query_key_value(hidden_states)
    if self.new_decoder_architecture:
        groups = self.num_heads // self.num_kv_heads
        qkv = fused.view(*fused.shape[:2], self.num_kv_heads, groups + 2, self.head_dim)
        query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
    else:
        query, key, value = self._split_heads(fused)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if not self.config.alibi:
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb as falcon_rotary

        query, key = falcon_rotary(query, key, *position_embeddings)  # type: ignore[no-untyped-call]
    output, _none = attend(self, query, key, value, None, scaling=self.inv_norm_factor)
    return self.dense(output.flatten(2)), None


def _patch_bloom(layer: Any) -> None:
    layer.self_attention.forward = MethodType(_bloom_forward, layer.self_attention)


def _bloom_forward(
    self: Any, hidden_states: Tensor, residual: Tensor, alibi: Any = None, attention_mask: Any = None, **_: Any
) -> tuple[Tensor, None]:
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    output, _none = attend(self, query, key, value, None, scaling=self.inv_norm_factor)
    return residual + self.dense(output.flatten(2)), None


def _patch_mpt(layer: Any) -> None:
    layer.attn.forward = MethodType(_mpt_forward, layer.attn)


def _mpt_forward(self: Any, hidden_states: Tensor, position_bias: Any = None, **_: Any) -> tuple[Tensor, None]:
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    shape = (*hidden_states.shape[:2], self.n_heads, self.head_dim)
    query, key, value = (part.reshape(shape).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    output, _none = attend(self, query, key, value, None, scaling=self.softmax_scale)
    return self.out_proj(output.flatten(2)), None


def _patch_gptj(layer: Any) -> None:
    layer.attn._attn = MethodType(_gptj_attn, layer.attn)


def _gptj_attn(self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    output, _none = attend(self, query, key, value, None, scaling=1 / float(self.scale_attn))
    return output.transpose(1, 2), None


def _patch_llama4(layer: Any) -> None:
    layer.self_attn.attn_temperature_tuning = False


def _patch_falcon_h1(layer: Any) -> None:
    from transformers.models.falcon_h1.modeling_falcon_h1 import compute_mup_vector

    multipliers: Tensor = compute_mup_vector(layer.self_attn.config)  # type: ignore[no-untyped-call]
    layer.mamba.mup_vector = multipliers.to(layer.mamba.in_proj.weight)


def _llama4_temperature(layer: nn.Module) -> tuple[float, float] | None:
    attention: Any = layer.self_attn
    if not attention.config.attn_temperature_tuning or attention.use_rope:
        return None
    return float(attention.floor_scale), float(attention.attn_scale)


_GENERIC = Quirks()
_FALCON = Quirks(
    attn_implementation="eager",
    ignored=frozenset({"alibi"}),
    patch=_patch_falcon,
    alibi_H=_falcon_slopes,
)
_LLAMA4 = Quirks(patch=_patch_llama4, temperature=_llama4_temperature)
_BY_TYPE = {
    "falcon": _FALCON,
    "bloom": Quirks(
        attn_implementation="eager",
        ignored=frozenset({"alibi"}),
        patch=_patch_bloom,
        alibi_H=lambda config: alibi_slopes(config.n_head),
    ),
    "mpt": Quirks(
        attn_implementation="eager",
        ignored=frozenset({"position_bias"}),
        patch=_patch_mpt,
        alibi_H=_mpt_slopes,
    ),
    "falcon_h1": Quirks(patch=_patch_falcon_h1),
    "gptj": Quirks(attn_implementation="eager", patch=_patch_gptj),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
}

"""The layout of a model as adapters see it, from its config alone: for a client, which holds no blocks.

    config --build_model (meta device)--> names and shapes of the blocks' linears --> swarm.adapters.layout.ModelLayout

What a server finds out by running its blocks decides (`BlockSpan.shape`); this is so that a mistake is noticed before
anything is sent. It knows no weights.
"""

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from swarm.adapters.layout import BlockShape, LinearShape, ModelLayout
from swarm.checkpoint.partial import build_model, find_blocks


def model_layout(config: PretrainedConfig) -> ModelLayout:
    """What adapters may change in a model.

    Args:
        config: of the whole model.

    Raises:
        UnsupportedModel: transformers has no such causal model, or it has no list of blocks.
    """
    path, blocks = find_blocks(build_model(config, dtype=torch.float32))
    text = config.get_text_config(decoder=True)
    return ModelLayout(
        blocks_path=path,
        blocks=tuple(
            BlockShape(hidden_size=int(text.hidden_size), linears=_linears(block), kv_shape=_kv_shape(text, number))
            for number, block in enumerate(blocks)
        ),
    )


def is_expert(path: str) -> bool:
    """Whether a linear is one of many alike, which are given the rows that were routed to them."""
    parts = path.split(".")
    return "experts" in parts[:-1] and any(part.isdigit() for part in parts)


def _linears(block: nn.Module) -> dict[str, LinearShape]:
    found = {}
    for name, module in block.named_modules():
        if is_expert(name):
            continue
        if isinstance(module, nn.Linear):
            found[name] = LinearShape(num_inputs=module.in_features, num_outputs=module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = LinearShape(num_inputs=module.weight.shape[0], num_outputs=module.weight.shape[1])
    return found


def _kv_shape(config: PretrainedConfig, block: int) -> tuple[int, int, int] | None:
    """(heads, key width, value width), as configs usually have them; None for a block without attention."""
    kinds = getattr(config, "layer_types", None) or []
    heads = getattr(config, "num_attention_heads", None)
    if not heads or (block < len(kinds) and not _is_attention(kinds[block])):
        return None
    if getattr(config, "kv_lora_rank", None) is not None:
        return heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    new_falcon = getattr(config, "new_decoder_architecture", False)
    if getattr(config, "multi_query", False) and not new_falcon:
        return 1, width, width
    shared = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return int(shared or heads), int(width), int(width)


def _is_attention(kind: str) -> bool:
    return kind.endswith("attention") and not kind.startswith("linear")

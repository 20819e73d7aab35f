"""PEFT's methods that put virtual positions before a sequence, and deep prompts, which are our own.

    PROMPT_TUNING, P_TUNING     prompt_embeddings [P, H]                       embeddings, which stay with the client
    PREFIX_TUNING, CARTRIDGE    prompt_embeddings [P, blocks * 2 * K * D]      keys and values of each block
    DEEP_PROMPT_TUNING          deep_prompts [blocks, P, H], which are added to hidden states where they enter a block,
                                and, if there are any, prompt_embeddings [P, H] as the embeddings themselves

PEFT saves what its encoders compute (prefix_projection, P-tuning's MLP), not the encoders. Legend: P positions, H
hidden size, K heads of keys, D their width.
"""

from collections.abc import Mapping

from torch import Tensor

from swarm.adapters.delta import MAX_PREFIX, BlockDelta
from swarm.adapters.layout import ModelLayout
from swarm.adapters.peft_files import PeftFiles
from swarm.errors import AdapterError

_KEY = "prompt_embeddings"
_DEEP_KEY = "deep_prompts"
_SHAPES = frozenset({"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads",
                     "num_layers"})  # fmt: skip
_OF_TRAINING = frozenset({"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
                          "init_weights", "encoder_hidden_size", "prefix_projection", "num_frozen_tokens",
                          "encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"})  # fmt: skip


def read_prompt(files: PeftFiles, layout: ModelLayout) -> Tensor:
    """Prompt tuning and P-tuning -> embeddings [P, H].

    Raises:
        AdapterError: malformed, for another base, or with an option that servers can't honour.
    """
    num_virtual = _check(files, {_KEY})
    return files.read(_KEY, (num_virtual, layout.hidden_size))


def read_prefix(files: PeftFiles, layout: ModelLayout) -> tuple[int, Mapping[int, BlockDelta]]:
    """Prefix tuning and cartridges -> number of positions, keys and values by block.

    Raises:
        AdapterError: malformed, for another base, or with an option that servers can't honour.
    """
    num_virtual, num_blocks = _check(files, {_KEY}), len(layout.blocks)
    if (found := files.integer("num_layers", 1, 1 << 16)) != num_blocks:
        raise AdapterError(f"{files.method} adapter has {found} layers, the base model {num_blocks}")
    heads = files.integer("num_attention_heads", 1, 1 << 16)
    width = files.integer("token_dim", heads, 1 << 24) // heads
    for number, block in enumerate(layout.blocks):
        if block.kv_shape is None:
            raise AdapterError(f"{files.method} adapters need attention in every block, block {number} has none")
        if block.kv_shape != (heads, width, width):
            raise AdapterError(f"{files.method} adapter has {heads} heads of {width}, block {number} of the base model "
                               f"(heads, key width, value width) = {block.kv_shape}")  # fmt: skip
    prefix = files.read(_KEY, (num_virtual, num_blocks * 2 * heads * width))
    parts = prefix.view(num_virtual, num_blocks, 2, heads, width)
    return num_virtual, {
        number: BlockDelta(prefix_k_PKD=parts[:, number, 0], prefix_v_PKE=parts[:, number, 1])
        for number in range(num_blocks)
    }


def read_deep_prompts(files: PeftFiles, layout: ModelLayout) -> tuple[int, Mapping[int, BlockDelta], Tensor | None]:
    """Deep prompts -> number of positions, prompts by block, embeddings.

    Raises:
        AdapterError: malformed, for another base, or with an option that servers can't honour.
    """
    num_virtual = _check(files, {_DEEP_KEY, *({_KEY} & set(files.shapes))})
    prompts = files.read(_DEEP_KEY, (len(layout.blocks), num_virtual, layout.hidden_size))
    embeddings = files.read(_KEY, (num_virtual, layout.hidden_size)) if _KEY in files.shapes else None
    return num_virtual, {number: BlockDelta(prompt_PH=it) for number, it in enumerate(prompts)}, embeddings


def _check(files: PeftFiles, keys: set[str]) -> int:
    """The number of virtual positions of files that have no more than they should."""
    files.refuse_other_options(_SHAPES | _OF_TRAINING)
    if files.config.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(f"{files.method} adapter for encoder and decoder: the base model has only a decoder")
    if surplus := sorted(set(files.shapes) - keys):
        raise AdapterError(f"{files.method} adapter has {surplus[0]}, which servers can't apply")
    return files.integer("num_virtual_tokens", 1, MAX_PREFIX)

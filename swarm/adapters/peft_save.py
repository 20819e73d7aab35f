"""The way back: what was trained in the swarm as a PEFT adapter, which PEFT itself loads.

    {block: BlockDelta} with A, B, s (and DoRA's magnitudes, biases) --> adapter_config.json, adapter_model.safetensors

Only what LoRA's files can hold is written; anything else is refused. It does not know how it was trained.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save_file
from torch import Tensor

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.adapters.layout import ModelLayout
from swarm.adapters.peft_files import CONFIG_FILE, TENSORS_FILE
from swarm.errors import AdapterError


def save_lora(directory: Path | str, deltas: Mapping[int, BlockDelta], *, layout: ModelLayout, base: str = "") -> None:
    """Write a LoRA adapter.

    Args:
        directory: is made if it isn't there.
        deltas: by block.
        layout: of the base model.
        base: its name or path, for whoever loads the adapter.

    Raises:
        AdapterError: there is something in it that LoRA's files can't hold; names it.
    """
    linears = {
        f"{layout.blocks_path}.{block}.{path}": linear
        for block, delta in sorted(deltas.items())
        for path, linear in sorted(delta.linears.items())
    }
    if any(delta.prefix_k_PKD is not None or delta.prompt_PH is not None for delta in deltas.values()):
        raise AdapterError("an adapter with virtual positions is no LoRA adapter")
    dora = {linear.magnitude_O is not None for linear in linears.values()}
    if not linears or len(dora) > 1:
        raise AdapterError("a LoRA adapter changes at least one linear, and has magnitudes for all or for none")
    tensors: dict[str, Tensor] = {}
    for name, linear in linears.items():
        tensors |= {f"base_model.model.{name}.{suffix}": it for suffix, it in _tensors(name, linear).items()}
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / TENSORS_FILE, metadata={"format": "pt"})
    config = msgspec.json.encode(_config(linears, base, use_dora=dora.pop()), order="sorted")
    (target / CONFIG_FILE).write_bytes(msgspec.json.format(config, indent=2))


def _tensors(name: str, linear: LinearDelta) -> dict[str, Tensor]:
    if linear.a_rI is None or linear.b_Or is None:
        raise AdapterError(f"{name} has no A and B, so it is no part of a LoRA adapter")
    for attribute in ("input_scale_I", "output_scale_O", "bias_O"):
        if getattr(linear, attribute) is not None:
            raise AdapterError(f"{name} has {attribute}, which a LoRA adapter can't hold")
    named = {
        "lora_A.weight": linear.a_rI,
        "lora_B.weight": linear.b_Or,
        "lora_magnitude_vector": linear.magnitude_O,
        "base_layer.bias": linear.base_bias_O,
    }
    return {suffix: it.detach().cpu().clone().contiguous() for suffix, it in named.items() if it is not None}


def _config(linears: Mapping[str, LinearDelta], base: str, *, use_dora: bool) -> dict[str, Any]:
    """PEFT's fields; those that are left out have its defaults."""
    ranks = {name: linear.rank for name, linear in linears.items()}
    alphas = {name: linear.scale * linear.rank for name, linear in linears.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": it for name, it in ranks.items() if it != rank},
        "alpha_pattern": {f"^{re.escape(name)}": it for name, it in alphas.items() if it != alpha},
        "target_modules": sorted(linears),
        "bias": "lora_only" if any(it.base_bias_O is not None for it in linears.values()) else "none",
        "use_dora": use_dora,
    }


def _most_common(values: Mapping[str, Any]) -> Any:
    found = list(values.values())
    return max(dict.fromkeys(found), key=found.count)

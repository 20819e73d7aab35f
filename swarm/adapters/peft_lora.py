"""PEFT's low-rank methods as A, B and a scale per linear: LoRA with its variants, AdaLoRA and VeRA.

    LoRA      A, B; s = alpha / r or alpha / sqrt(r), both by pattern; DoRA's magnitude; trained biases
    AdaLoRA   y += B (E * A x) alpha / r0: E goes into A
    VeRA      y += b * B (d * A x): d and b go into slices of the A and B that all linears share

A variant that isn't known here changes what is computed in a way that isn't known either, so each option of a config
is either honoured, or of training only, or refused by name.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from swarm.adapters.delta import MAX_RANK, BlockDelta, LinearDelta
from swarm.adapters.layout import ModelLayout
from swarm.adapters.peft_files import Patterns, PeftFiles, finite
from swarm.adapters.peft_linears import BIASES, LinearParts, linears_of
from swarm.errors import AdapterError

Deltas = Mapping[int, BlockDelta]

_OF_TRAINING = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
                          "fan_in_fan_out", "ensure_weight_tying"})  # fmt: skip
"""What they select is there in the file, in one orientation whatever the base's linears have."""
_LORA_HONOURED = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
                            "bias", "init_lora_weights"})  # fmt: skip
_LORA_OF_TRAINING = _OF_TRAINING | {"lora_dropout", "megatron_core", "qalora_group_size", "eva_config",
                                    "velora_config"}  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations that subtract something from the base's weights, which servers don't."""
_ADALORA_OF_TRAINING = frozenset({"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
                                  "total_step", "rank_pattern"})  # fmt: skip
_LORA_SUFFIXES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    **BIASES,
}
_ADALORA_SUFFIXES = {".lora_A": "lora_A", ".lora_B": "lora_B", ".lora_E": "lora_E", **BIASES}
_VERA_SUFFIXES = {".vera_lambda_b": "vera_lambda_b", ".vera_lambda_d": "vera_lambda_d", **BIASES}
_VERA_A, _VERA_B = "base_model.vera_A", "base_model.vera_B"


def read_lora(files: PeftFiles, layout: ModelLayout) -> Deltas:
    """LoRA, rsLoRA and DoRA.

    Raises:
        AdapterError: malformed, for another base, or with an option that servers can't honour.
    """
    _refuse_changed_base(files)
    files.refuse_other_options(_LORA_HONOURED | _LORA_OF_TRAINING)
    if files.config.get("use_dora") and files.config.get("lora_bias"):
        raise AdapterError("LORA adapters with use_dora and lora_bias together can't be applied by servers")
    ranks = Patterns(files.config.get("rank_pattern"), "rank_pattern")
    alphas = Patterns(files.config.get("alpha_pattern"), "alpha_pattern")
    return gathered((parts, _lora_linear(parts, ranks, alphas)) for parts in linears_of(files, layout, _LORA_SUFFIXES))


def read_adalora(files: PeftFiles, layout: ModelLayout) -> Deltas:
    """AdaLoRA: the singular values are folded into A.

    Raises:
        AdapterError: malformed, for another base, or with an option that servers can't honour.
    """
    _refuse_changed_base(files)
    options = (_LORA_HONOURED | _LORA_OF_TRAINING | _ADALORA_OF_TRAINING | {"init_r"}) - {"use_dora", "lora_bias"}
    files.refuse_other_options(options)
    initial = files.integer("init_r", 1, MAX_RANK)
    alpha = files.number("lora_alpha")
    scale = (alpha if alpha > 0 else float(initial)) / (initial + 1e-5)  # PEFT's own safeguard
    return gathered((parts, _adalora_linear(parts, scale)) for parts in linears_of(files, layout, _ADALORA_SUFFIXES))


def read_vera(files: PeftFiles, layout: ModelLayout) -> Deltas:
    """VeRA: its vectors are folded into the matrices that all linears share.

    Raises:
        AdapterError: malformed, for another base, or with an option that servers can't honour.
    """
    files.refuse_other_options(
        _OF_TRAINING
        | {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "bias", "init_weights"}
    )
    rank = files.integer("r", 1, MAX_RANK)
    linears = list(linears_of(files, layout, _VERA_SUFFIXES, frozenset({_VERA_A, _VERA_B})))
    adapted = [parts.shape for parts in linears if "vera_lambda_b" in parts.keys]
    inputs = max((shape.num_inputs for shape in adapted), default=1)
    outputs = max((shape.num_outputs for shape in adapted), default=1)
    if files.config.get("save_projection", True):
        # they may be larger than these linears need, if others were adapted that aren't in the file
        a_rI, b_Or = (_shared(files, key, axis, rank, least) for key, axis, least in (
            (_VERA_A, 0, inputs), (_VERA_B, 1, outputs)))  # fmt: skip
    else:
        a_rI, b_Or = _vera_projections(rank, inputs, outputs, files.integer("projection_prng_key", 0, (1 << 63) - 1))
    return gathered((parts, _vera_linear(parts, a_rI, b_Or, rank)) for parts in linears)


def gathered(linears: Iterable[tuple[LinearParts, LinearDelta]]) -> Deltas:
    """By block."""
    blocks: dict[int, dict[str, LinearDelta]] = {}
    for parts, delta in linears:
        if delta.tensors():
            blocks.setdefault(parts.block, {})[parts.path] = delta
    return {block: BlockDelta(linears=found) for block, found in blocks.items()}


def _refuse_changed_base(files: PeftFiles) -> None:
    way = files.config.get("init_lora_weights")
    if isinstance(way, str) and way.lower().startswith(_CHANGES_BASE):
        raise AdapterError(f"{files.method} adapters with init_lora_weights = {way[:40]!r} belong to a base with "
                           f"other weights; save with path_initial_model_for_weight_conversion")  # fmt: skip


def _lora_linear(parts: LinearParts, ranks: Patterns, alphas: Patterns) -> LinearDelta:
    inputs, outputs = parts.shape.num_inputs, parts.shape.num_outputs
    base_bias_O = parts.read_if_there("base_bias", (outputs,))
    if not parts.keys.keys() - {"base_bias"}:
        return LinearDelta(base_bias_O=base_bias_O)
    config = parts.files.config
    rank = ranks.get(parts.name, config.get("r"))
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"LORA adapter: rank {str(rank)[:20]} of {parts.name}, expected 1..{MAX_RANK}")
    alpha = finite(alphas.get(parts.name, config.get("lora_alpha")), f"LORA adapter: alpha of {parts.name}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    lora_bias_O = parts.read_if_there("lora_bias", (outputs,))
    if "magnitude" in parts.keys and not config.get("use_dora"):
        raise AdapterError(f"LORA adapter: {parts.name} has a magnitude, which its config denies")
    return LinearDelta(
        a_rI=parts.read("lora_A", (rank, inputs)),
        b_Or=parts.read("lora_B", (outputs, rank)),
        scale=scale,
        magnitude_O=parts.read("magnitude", (outputs,)) if config.get("use_dora") else None,
        bias_O=None if lora_bias_O is None else lora_bias_O.float() * scale,
        base_bias_O=base_bias_O,
    )


def _adalora_linear(parts: LinearParts, scale: float) -> LinearDelta:
    inputs, outputs = parts.shape.num_inputs, parts.shape.num_outputs
    base_bias_O = parts.read_if_there("base_bias", (outputs,))
    shape = parts.shape_of("lora_A")
    rank = shape[0] if len(shape) == 2 else 0  # the allocator may leave a linear without any
    if rank == 0:
        return LinearDelta(base_bias_O=base_bias_O)
    if rank > MAX_RANK:
        raise AdapterError(f"ADALORA adapter: rank {rank} of {parts.name}, limit {MAX_RANK}")
    a_rI = parts.read("lora_A", (rank, inputs)).float() * parts.read("lora_E", (rank, 1)).float()
    return LinearDelta(a_rI=a_rI, b_Or=parts.read("lora_B", (outputs, rank)), scale=scale, base_bias_O=base_bias_O)


def _vera_linear(parts: LinearParts, a_rI: Tensor, b_Or: Tensor, rank: int) -> LinearDelta:
    inputs, outputs = parts.shape.num_inputs, parts.shape.num_outputs
    base_bias_O = parts.read_if_there("base_bias", (outputs,))
    if not parts.keys.keys() - {"base_bias"}:
        return LinearDelta(base_bias_O=base_bias_O)
    return LinearDelta(
        a_rI=parts.read("vera_lambda_d", (rank,)).float()[:, None] * a_rI[:, :inputs],
        b_Or=parts.read("vera_lambda_b", (outputs,)).float()[:, None] * b_Or[:outputs],
        base_bias_O=base_bias_O,
    )


def _shared(files: PeftFiles, key: str, rank_axis: int, rank: int, least: int) -> Tensor:
    shape = files.shapes.get(key, ())
    if len(shape) != 2 or shape[rank_axis] != rank or not least <= shape[1 - rank_axis] <= 1 << 20:
        raise AdapterError(f"VERA adapter: {key} has shape {shape}, expected rank {rank} and at least {least}")
    return files.read(key, shape).float()


def _vera_projections(rank: int, inputs: int, outputs: int, key: int) -> tuple[Tensor, Tensor]:
    """The matrices that PEFT draws for this key: Kaiming-uniform, A before B, from one generator."""
    generator = torch.Generator().manual_seed(key)

    def draw(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    a_rI = draw(rank, inputs)
    return a_rI, draw(outputs, rank)

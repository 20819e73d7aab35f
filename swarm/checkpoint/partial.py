"""Loads parts of a transformers checkpoint: some blocks, or everything but the blocks.

    config --build_model--> model on the meta device (no memory) --rename mapping--> which tensor belongs where
        iter_blocks   one block after another, for a server        (peak: one block above what is kept)
        load_rest     embeddings, norms, head, for a client
        build_rotary  position embeddings, which need no tensor
        shards_for    files to download for either

Knows nothing of swarms, devices' memory or attention kernels. It is the only user of transformers' loading
internals, so that old names, missing prefixes, fused experts and tied weights work here as they do there:

    core_model_loading.convert_and_load_state_dict_in_model, rename_source_key, WeightConverter, WeightRenaming
    conversion_mapping.get_model_conversion_mapping
    modeling_utils.LoadStateDictConfig, PreTrainedModel._get_dtype_plan, ._finalize_model_loading,
        .all_tied_weights_keys, ._keys_to_ignore_on_load_unexpected, ._is_hf_initialized flags on modules

Tested with transformers 5.17 to 5.23. Two traps: the rename mapping is looked up by the *class name* of the model, so
it is computed before anything renames the class; and _finalize_model_loading silently fills missing tensors with
random numbers, so anything missing is refused before.
"""

import copy
import logging
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from swarm.errors import CheckpointMismatch, InvalidRequest, UnsupportedModel
from swarm.types import BlockRange

logger = logging.getLogger(__name__)

_HARMLESS = (
    r"rotary_emb\.inv_freq$",
    r"(^|\.)position_ids$",
    r"\.masked_bias$",
    r"\.attn\.bias$",
    r"\.attention\.bias$",
)
"""Buffers that old checkpoints stored and that current layers compute: never an error when left over."""


class TensorSource(Protocol):
    """What this module needs of a checkpoint (swarm.checkpoint.source.Checkpoint has it)."""

    @property
    def name(self) -> str: ...
    @property
    def weight_map(self) -> dict[str, str]: ...
    def config(self) -> PretrainedConfig: ...
    def ensure(self, shards: Iterable[str], /) -> dict[str, Path]: ...


_BUILDING = threading.Lock()
"""transformers sets torch's default dtype while it builds, for all threads; two at once would leave a wrong one."""


def build_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    auto_class: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """Build the whole model on the meta device: right shapes and names, no memory (0.2-0.5 s even for 671B).

    Args:
        config: left unchanged; the model gets a copy.
        dtype: of the parameters.
        attn_implementation: name in transformers' AttentionInterface, or None for the model's default.
        auto_class: which head to build.

    Raises:
        UnsupportedModel: transformers has no such causal model, or the checkpoint is already quantised.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        method = _quantization_method(config.quantization_config)
        raise UnsupportedModel(f"{config.model_type} checkpoint is already quantised ({method}); use the original one")
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with _BUILDING, torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    except ValueError as error:
        raise UnsupportedModel(f"transformers can't build {config.model_type!r}: {_first_line(error)}") from error
    model.requires_grad_(False).train(False)
    return model


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the transformer blocks of `model`.

    Returns:
        Dotted path and the list: the outermost nn.ModuleList with one entry per hidden layer of the text model.

    Raises:
        UnsupportedModel: there is none, or no way to tell which one.
    """
    num_blocks = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    found = _outermost_lists(decoder, num_blocks)
    if len(found) > 1:  # a list of norms or projections, one per layer, beside the layers: layers hold the most weights
        sizes = [sum(parameter.numel() for parameter in blocks.parameters()) for _, blocks in found]
        found = [item for item, size in zip(found, sizes, strict=True) if size == max(sizes)]
    if len(found) != 1:
        raise UnsupportedModel(f"{type(model).__name__} has {len(found)} lists of {num_blocks} layers; need exactly 1")
    path, blocks = found[0]
    return f"{prefix}.{path}" if prefix else path, blocks


def iter_blocks(
    checkpoint: TensorSource,
    blocks: BlockRange,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> Iterator[tuple[int, nn.Module]]:
    """Load blocks one at a time, reading only their own tensors.

    Yields:
        (index, module): the decoder layer of transformers with real weights, frozen, in eval mode, its global
        index in `layer_idx`. Nothing keeps a reference to it here, so the peak is one block above what is kept.

    Raises:
        InvalidRequest: `blocks` goes beyond the model.
        CheckpointMismatch: tensors are missing, left over, or of another shape than the config says.
    """
    config = checkpoint.config()
    model = build_model(config, dtype=dtype, attn_implementation=attn_implementation)
    plan = _plan(model, checkpoint.weight_map)
    _check_range(blocks, plan.num_blocks)
    path, found = find_blocks(model)
    modules = list(found)
    _keep_only(model, path)
    holder = cast(nn.ModuleList, model.get_submodule(path))
    model.all_tied_weights_keys = {}
    for index in blocks:
        for position in range(plan.num_blocks):
            holder[position] = modules[position] if position == index else nn.Module()
        _load(model, checkpoint, plan.of_block(index), plan, dtype=dtype, device=device)
        module, modules[index] = modules[index], nn.Module()
        holder[index] = nn.Module()
        yield index, module.requires_grad_(False).eval()
        del module


def load_rest(
    model: PreTrainedModel, checkpoint: TensorSource, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """Fill everything of `model` but its blocks: embeddings, norms, head, rotary buffers; weights are tied.

    Call it before anything renames the class. The list of blocks is left empty, for the caller to fill; towers of
    a multimodal model that text does not need are removed, too.

    Args:
        model: from build_model.

    Raises:
        CheckpointMismatch: tensors are missing or of another shape than the config says.
    """
    plan = _plan(model, checkpoint.weight_map)
    path, _ = find_blocks(model)
    _drop_towers(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList())
    kept = set(model.state_dict())
    _load(model, checkpoint, plan.of_rest(kept), plan, dtype=dtype, device=device)
    model.requires_grad_(False).train(False)


def build_rotary(config: PretrainedConfig, *, device: torch.device | str = "cpu") -> dict[str, nn.Module]:
    """Build the rotary position embeddings that stand beside the blocks, as transformers does.

    Returns:
        By attribute name in the decoder ("rotary_emb", ...); empty for models with learned positions, alibi, or
        rotary tables inside their attention.
    """
    model = build_model(config, dtype=torch.float32)
    path, _ = find_blocks(model)
    parent, _, list_name = path.rpartition(".")
    decoder = model.get_submodule(parent)
    rotary = {
        name: module
        for name, module in decoder.named_children()
        if "rotary" in name.lower() or "rotary" in type(module).__name__.lower()
    }
    _keep_only(model, path)
    setattr(decoder, list_name, nn.ModuleList())
    for name, module in rotary.items():
        setattr(decoder, name, module)
    model.all_tied_weights_keys = {}
    _load(model, None, (), _Plan(), dtype=torch.float32, device=device)
    return rotary


def shards_for(checkpoint: TensorSource, blocks: BlockRange | None) -> tuple[str, ...]:
    """Shard files that hold the tensors of `blocks`, or of everything else where `blocks` is None, sorted."""
    model = build_model(checkpoint.config(), dtype=torch.float32)
    plan = _plan(model, checkpoint.weight_map)
    if blocks is None:
        _drop_towers(model)
        keys = plan.of_rest(set(model.state_dict()))
    else:
        _check_range(blocks, plan.num_blocks)
        keys = tuple(key for index in blocks for key in plan.of_block(index))
    return tuple(sorted({checkpoint.weight_map[key] for key in keys}))


def shards_by_block(checkpoint: TensorSource) -> list[tuple[str, ...]]:
    """For each block of the model, the shard files that hold its tensors."""
    plan = _plan(build_model(checkpoint.config(), dtype=torch.bfloat16), checkpoint.weight_map)
    return [
        tuple(sorted({checkpoint.weight_map[key] for key in plan.of_block(block)})) for block in range(plan.num_blocks)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Where each tensor of a checkpoint goes."""

    mapping: tuple[Any, ...] = ()
    """transformers' renamings and conversions, for this model class."""
    prefix: str = "\0"
    """Names of parameters of block i start with f"{prefix}.{i}."."""
    num_blocks: int = 0
    target: dict[str, str] | None = None
    """Checkpoint key -> name of the parameter (the first one, where a tensor is split) in the model."""

    def of_block(self, index: int) -> tuple[str, ...]:
        head = f"{self.prefix}.{index}."
        return tuple(key for key, name in (self.target or {}).items() if name.startswith(head))

    def of_rest(self, names: set[str]) -> tuple[str, ...]:
        """Keys whose parameter is among `names` and in no block."""
        inside = f"{self.prefix}."
        return tuple(key for key, name in (self.target or {}).items() if name in names and not name.startswith(inside))


def _plan(model: PreTrainedModel, keys: Iterable[str]) -> _Plan:
    path, blocks = find_blocks(model)
    names = model.state_dict()
    mapping = tuple(get_model_conversion_mapping(model))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    ignored = re.compile("|".join(f"({it})" for it in (*_HARMLESS, *(model._keys_to_ignore_on_load_unexpected or ()))))
    target = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:
            name = key
        if name in names or not ignored.search(name):
            target[key] = name
    return _Plan(mapping=mapping, prefix=path, num_blocks=len(blocks), target=target)


def _load(
    model: PreTrainedModel,
    checkpoint: TensorSource | None,
    keys: tuple[str, ...],
    plan: _Plan,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Read `keys` into `model`, check that nothing is missing, then let transformers finish (buffers, ties)."""
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        slices = _open_slices(checkpoint, keys, stack) if checkpoint is not None else {}
        settings = LoadStateDictConfig(
            device_map={"": torch.device(device)},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=list(plan.mapping),
        )
        info, _ = convert_and_load_state_dict_in_model(model, slices, settings)
        _refuse_incomplete(model, info, checkpoint.name if checkpoint is not None else "-")
        PreTrainedModel._finalize_model_loading(model, settings, info)
    _own_memory(model)


def _own_memory(model: PreTrainedModel) -> None:
    """Copy what still lies in a mapped file: one tensor kept there would keep every page of the file that was read."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _open_slices(checkpoint: TensorSource, keys: tuple[str, ...], stack: ExitStack) -> dict[str, Any]:
    by_shard: dict[str, list[str]] = {}
    for key in keys:
        by_shard.setdefault(checkpoint.weight_map[key], []).append(key)
    paths = checkpoint.ensure(sorted(by_shard)) if by_shard else {}
    slices = {}
    for shard, members in by_shard.items():
        file = stack.enter_context(safe_open(paths[shard], framework="pt"))
        slices.update({key: file.get_slice(key) for key in members})
    return slices


def _refuse_incomplete(model: PreTrainedModel, info: Any, name: str) -> None:
    tied = model.all_tied_weights_keys
    loaded_sources = {source for source in tied.values() if source not in info.missing_keys}
    loaded_sources |= {tied[target] for target in tied if target not in info.missing_keys}
    missing = {key for key in info.missing_keys if tied.get(key) not in loaded_sources and key not in loaded_sources}
    for what, found in (
        ("misses", missing),
        ("has unknown", info.unexpected_keys),
        ("has tensors of another shape than the config says:", {str(it) for it in info.mismatched_keys}),
        ("has unconvertible", info.conversion_errors),
    ):
        if found:
            first = ", ".join(sorted(found)[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise CheckpointMismatch(f"checkpoint {name} {what} {first}{more}")


def _keep_only(model: PreTrainedModel, path: str) -> None:
    """Empty every module on the way to `path` of all but the way itself."""
    module: nn.Module = model
    for part in path.split("."):
        for name, _ in list(module.named_children()):
            if name != part:
                setattr(module, name, nn.Module())
        for name in [*module._parameters, *module._buffers]:
            delattr(module, name)
        module.__dict__["_is_hf_initialized"] = True  # its own _init_weights would look for what was just removed
        module = getattr(module, part)


def _drop_towers(model: PreTrainedModel) -> None:
    """Remove what a multimodal model has beside its text decoder and its head."""
    if model.config.get_text_config(decoder=True) is model.config:
        return
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    module: nn.Module = model
    while module is not decoder:
        inside = None
        for name, child in list(module.named_children()):
            if any(it is decoder for it in child.modules()):
                inside = child
            elif child is not head:
                setattr(module, name, nn.Module())
        if inside is None:
            return
        module = inside


def _outermost_lists(module: nn.Module, length: int, prefix: str = "") -> list[tuple[str, nn.ModuleList]]:
    found = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == length:
            found.append((prefix + name, child))
        else:
            found += _outermost_lists(child, length, f"{prefix}{name}.")
    return found


def _check_range(blocks: BlockRange, num_blocks: int) -> None:
    if blocks.end > num_blocks:
        raise InvalidRequest(f"blocks {blocks} are outside the model, which has {num_blocks} (0:{num_blocks})")


def _quantization_method(settings: Any) -> str:
    return str(settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", "?"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' own progress bar, which would appear once per block."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]

"""Turns a transformers causal model into one whose decoder layers run on other machines.

    build on the meta device ─► load embeddings, norms, head ─► class := Distributed<class>
                                                      └─► layer list := RemoteLayers ─► dry run

The model's own forward stays: it embeds, scales, norms and projects as its authors wrote it, and loops over one
"layer". How it treats that layer differs (some take [0] of what it returns), so a dry run with identity blocks finds
out, and refuses a model whose forward can't be driven like this. Knows nothing of networks: blocks come as a
`BlockService`.
"""

import functools
import logging
import weakref
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

from swarm.checkpoint.partial import build_model, find_blocks, load_rest
from swarm.checkpoint.source import Checkpoint
from swarm.client.cache import BlockService
from swarm.client.generation import DistributedClassifier, DistributedModel
from swarm.client.head import HeadFormat, fit_head
from swarm.client.remote_blocks import RemoteBlocks, is_driven
from swarm.client.remote_layers import RemoteLayers
from swarm.errors import CheckpointMismatch, UnsupportedModel

logger = logging.getLogger(__name__)

_REMOTE_ATTENTION = "swarm_remote"
"""Registered for attention but not for masks, so that models build no masks."""


def distribute(
    checkpoint: Checkpoint,
    service: BlockService,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    head: HeadFormat = "auto",
    labels: Mapping[str, Any] | None = None,
) -> DistributedModel:
    """Build the local part of a model and join it with remote blocks.

    Args:
        checkpoint: read for its config, embeddings, norms and head only.
        service: where the blocks are.
        dtype: of the local part; the checkpoint's own by default.
        device: of the local part.
        head: number format of the head's matrix; "auto" keeps `dtype`.
        labels: fields of the config (num_labels, id2label, ...) of a model that classifies sequences; None for one that
            predicts tokens.

    Raises:
        UnsupportedModel: transformers has no such causal model, or its forward can't be driven with remote blocks.
        CheckpointMismatch: tensors are missing or misshapen, or the service has another number of blocks.
    """
    config = checkpoint.config()
    dtype = dtype or _dtype_of(config)
    kind: Any = AutoModelForCausalLM
    if labels is not None:
        config.update(dict(labels))
        kind = AutoModelForSequenceClassification
    model = _build(config, dtype, kind)
    _check_service(model, service)
    path, originals = find_blocks(model)
    marks = _plain_attributes(originals[0])
    if labels is None:
        load_rest(model, checkpoint, dtype=dtype, device=device)
        model.generation_config = _generation_config(checkpoint, model)
        fit_head(model, head)
    else:
        _load_classifier(model, checkpoint, dtype, device)
    model.__class__ = _distributed_class(type(model), DistributedModel if labels is None else DistributedClassifier)
    distributed = cast(DistributedModel, model)
    distributed.checkpoint, distributed.block_service = checkpoint, service
    distributed.name_or_path = checkpoint.name if "/" in checkpoint.name else str(checkpoint.path)
    _fit_blocks(distributed, path, marks, originals, device).service = service
    _drive_inner(distributed)
    return distributed


def _load_classifier(
    model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Load a model with a head for labels; one that the checkpoint doesn't have begins as transformers lets it."""
    name = next((it for it in ("score", "classifier") if isinstance(getattr(model, it, None), nn.Linear)), None)
    if name is None:
        raise UnsupportedModel(f"{type(model).__name__} has no linear `score` or `classifier` as its head")
    head = getattr(model, name)
    has_head = any(key.endswith(f"{name}.weight") for key in checkpoint.weight_map)
    if not has_head:
        setattr(model, name, nn.Identity())
    load_rest(model, checkpoint, dtype=dtype, device=device)
    if not has_head:
        head.to_empty(device=device)
        model._init_weights(head)  # type: ignore[no-untyped-call]
        setattr(model, name, head)
    getattr(model, name).requires_grad_(True)


def _distributed_class(original: type[PreTrainedModel], ways: type[DistributedModel]) -> type[PreTrainedModel]:
    """The same class with our ways, and a forward that still shows the arguments of its own."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ways.forward(self, *args, **kwargs)

    attributes = {"__module__": original.__module__, "forward": forward}
    return type(f"Distributed{original.__name__}", (ways, original), attributes)


def _drive_inner(model: DistributedModel) -> None:
    """Let the model without its head be called on its own, as trainers do that compute the loss in pieces."""
    inner: Any = model.base_model
    if inner is model:
        return
    original, owner = type(inner), weakref.ref(model)

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer = owner()
        if outer is None or is_driven():
            return original.forward(self, *args, **kwargs)
        return outer.drive(functools.partial(original.forward, self), args, kwargs)

    inner.__class__ = type(f"Distributed{original.__name__}", (original,), {"forward": forward})


def _build(config: Any, dtype: torch.dtype, kind: Any) -> PreTrainedModel:
    """Build without masks where the model's attention lets us, else with its plainest attention."""
    AttentionInterface.register(_REMOTE_ATTENTION, _no_local_attention)
    try:
        return build_model(config, dtype=dtype, attn_implementation=_REMOTE_ATTENTION, auto_class=kind)
    except (KeyError, UnsupportedModel):
        return build_model(config, dtype=dtype, attn_implementation="eager", auto_class=kind)


def _no_local_attention(*_: Any, **__: Any) -> Any:
    raise UnsupportedModel("a local attention layer ran in a model whose blocks are remote")


def _check_service(model: PreTrainedModel, service: BlockService) -> None:
    text = model.config.get_text_config(decoder=True)
    ours = (text.num_hidden_layers, text.hidden_size)
    theirs = (service.num_blocks, service.hidden_size)
    if ours != theirs:
        raise CheckpointMismatch(f"the model has (blocks, width) {ours}, the remote blocks have {theirs}")


def _fit_blocks(
    model: DistributedModel,
    path: str,
    marks: dict[str, Any],
    originals: Iterable[nn.Module],
    device: torch.device | str,
) -> RemoteBlocks:
    """Put RemoteBlocks into the layer list in the way that the model's forward can work with, the cheapest first."""
    parent, _, name = path.rpartition(".")
    decoder = model.get_submodule(parent)
    rotary = {key: module for key, module in decoder.named_children() if "rotary" in key.lower()}
    stubs: dict[str, nn.Module] = {key: _NoRotary() for key in rotary}
    error: Exception | None = None
    for with_masks, modules, returns_tuple in product((False, True), (stubs, rotary), (False, True)):
        blocks = RemoteBlocks(None, returns_tuple=returns_tuple)
        blocks.__dict__.update(marks)
        setattr(decoder, name, RemoteLayers(blocks, originals, device))
        for key, module in modules.items():
            setattr(decoder, key, module)
        if with_masks:
            model.config._attn_implementation = "eager"
        try:
            _dry_run(model)
        except Exception as raised:  # noqa: BLE001 - any failure of foreign code means: not like this
            error = raised
        else:
            return blocks
    raise UnsupportedModel(
        f"the forward of {type(model).__name__} can't be driven with remote blocks: {type(error).__name__}: {error}"
    ) from error


def _plain_attributes(block: nn.Module) -> dict[str, Any]:
    """Words and numbers on a layer that a model's forward may look at, such as its kind."""
    return {
        name: value
        for name, value in vars(block).items()
        if isinstance(value, str | int | float) and not name.startswith("_") and name != "training"
    }


def _dry_run(model: DistributedModel) -> None:
    """Run two rows through the local part; a wrong treatment of the layer's result shows in the shape of the logits."""
    ids = torch.zeros(2, 3, dtype=torch.long, device=model.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        if isinstance(model, DistributedClassifier):
            result = model.drive(model.base_model.forward, (), given).last_hidden_state
        else:
            result = model(**given).logits
    if result.shape[:2] != (2, 3):
        raise UnsupportedModel(f"the result has shape {tuple(result.shape)}, need (2, 3, width)")


class _NoRotary(nn.Module):
    """Stands for rotary tables, which only layers use."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nothing = hidden_states.new_empty(0)
        return nothing, nothing


def _dtype_of(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _generation_config(checkpoint: Checkpoint, model: PreTrainedModel) -> GenerationConfig:
    if (checkpoint.path / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(checkpoint.path)
    else:
        config = GenerationConfig.from_model_config(model.config)
    config.use_cache = True  # some configs say no; over a network that would send the whole text for each token
    return config

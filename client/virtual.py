"""Virtual positions: what adapters put before the tokens of a row goes through the model like tokens that are padded.

    input_ids [B, T] ─► embeddings [B, V + T, H]     V columns before the first token, of which row i uses its last P_i:
    mask      [B, t] ─► [B, V + t]                   its own embeddings (prompt tuning), or zeros, which servers replace
    positions        ─► count each row's own

So a row holds its virtual positions [0, P_i), then its tokens, whatever stands beside it in the batch and however it is
padded; the model's own forward scales embeddings and adds learned positions as it does for tokens. Only the first pass
of a session brings them along; later ones count them. Knows nothing of sessions or networks.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swarm.client.row_adapters import RowAdapters
from swarm.errors import InvalidRequest


def with_virtual(
    model: PreTrainedModel, kwargs: dict[str, Any], adapters: RowAdapters, *, is_first: bool, length: int
) -> dict[str, Any]:
    """The arguments of the model's forward with the virtual positions of the rows before the tokens.

    Args:
        model: its embeddings are asked, and what its forward takes.
        kwargs: arguments by name; input_ids or inputs_embeds among them.
        adapters: of the rows.
        is_first: whether nothing of the rows went through the model before.
        length: columns that did, virtual positions not counted.

    Raises:
        InvalidRequest: an argument that can't be had together with virtual positions.
    """
    columns = adapters.num_columns
    if not columns:
        return kwargs
    if kwargs.get("token_type_ids") is not None:
        raise InvalidRequest("token_type_ids can't be given with an adapter that has virtual positions")
    result = dict(kwargs)
    ids = result.get("input_ids")
    num_tokens = (result["inputs_embeds"] if ids is None else ids).shape[1]
    mask = _mask(result.get("attention_mask"), adapters, length + num_tokens, model.device)
    result["attention_mask"] = mask
    if is_first:
        embeds = result.pop("inputs_embeds", None) if ids is None else model.get_input_embeddings()(ids)
        result["input_ids"] = None
        result["inputs_embeds"] = torch.cat([_embeddings(adapters, embeds), embeds], dim=1)
        if (labels := result.get("labels")) is not None:
            result["labels"] = _labels(labels, adapters)
    if "position_ids" in inspect.signature(model.forward).parameters:
        count = num_tokens + (columns if is_first else 0)
        result["position_ids"] = _positions(result.get("position_ids"), mask, adapters, count)
    return result


def _mask(mask: Tensor | None, adapters: RowAdapters, length: int, device: torch.device) -> Tensor:
    """[B, V + length]: the virtual columns that each row uses, and its own mask."""
    counts = torch.tensor(adapters.num_virtual, device=device)
    columns = torch.arange(adapters.num_columns, device=device)
    virtual = columns[None] >= adapters.num_columns - counts[:, None]
    if mask is None:
        mask = torch.ones(len(adapters), length, dtype=torch.long, device=device)
    if mask.shape != (len(adapters), length):
        raise InvalidRequest(f"attention_mask is {tuple(mask.shape)}, need {(len(adapters), length)}")
    return torch.cat([virtual.to(mask.dtype), mask], dim=1)


def _embeddings(adapters: RowAdapters, embeds_BTH: Tensor) -> Tensor:
    """[B, V, H]: what the virtual positions look like, each row's at the end of the columns."""
    rows_BVH = embeds_BTH.new_zeros(len(adapters), adapters.num_columns, embeds_BTH.shape[2])
    for row in range(len(adapters)):
        adapter = adapters.row(row)
        if adapter is not None and (own_PH := adapter.embeddings_PH) is not None and len(own_PH):
            rows_BVH[row, -len(own_PH) :] = own_PH.to(rows_BVH)
    return rows_BVH


def _labels(labels: Tensor, adapters: RowAdapters) -> Tensor:
    """[B, V + T]: a row's first token is predicted from the row's own embeddings alone, as there is nothing else."""
    result = torch.nn.functional.pad(labels, (adapters.num_columns, 0), value=-100)
    for row in range(len(adapters)):
        adapter = adapters.row(row)
        if adapter is None or adapter.embeddings_PH is None:
            result[row, adapters.num_columns] = -100
    return result


def _positions(given: Tensor | None, mask: Tensor, adapters: RowAdapters, count: int) -> Tensor:
    """[B, count]: positions of the last columns of the mask; those of tokens as they were given, where they were."""
    found = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -count:]
    if given is not None:
        counts = torch.tensor(adapters.num_virtual, device=found.device)
        tokens = given.expand(len(adapters), -1).to(found.device) + counts[:, None]
        found = torch.cat([found[:, : count - tokens.shape[1]], tokens], dim=1)
    return found

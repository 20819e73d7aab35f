"""Causal attention of whole sequences without a cache, with gradients: what training needs of one layer.

    q_HTD, k_KTD, v_KTE, rows of all sequences --groups of about equal length--> [B, ., L, .], padded on the right
        --fused attention, or by hand where there is a soft cap--> [B, H, L, E] --rows that are no padding--> out_THE

The maths is that of `paged_attention` with every sequence starting at position 0, so one mask serves all sequences, and
none is needed against padding: it stands behind all tokens. A padded row repeats the last one of its own sequence, so
that nothing of one sequence, NaN included, ever gets near another.

It does not know models, layers or sessions. Legend: T rows of all sequences, H query heads, K key/value heads, D key
width, E value width, B sequences of a group, L its longest, S keys (L, and one more where there is a sink).
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.kernels.paged_attention import AttentionForm, RowSpan, visible

__all__ = ["RaggedBatch", "ragged_attention"]

_MIN_FILL = 0.75
"""A sequence shorter than this part of a group's longest one goes into another group."""


class _Group(NamedTuple):
    """Sequences that one call attends to: rows [start, start + num_sequences * length), or those of `rows_BL`."""

    start: int
    num_sequences: int
    length: int
    rows_BL: Tensor | None

    def take(self, x_NTD: Tensor) -> Tensor:
        """[B, N, L, D]."""
        if self.rows_BL is None:
            rows = x_NTD.narrow(1, self.start, self.num_sequences * self.length)
        else:
            rows = x_NTD.index_select(1, self.rows_BL.flatten())
        taken: Tensor = rows.unflatten(1, (self.num_sequences, self.length)).transpose(0, 1)
        return taken


class RaggedBatch:
    """Whole sequences, one after another. Every layer of a pass uses it.

    Args:
        lengths: of each, at least 1.
        device: of the rows.
    """

    __slots__ = ("device", "groups", "lengths", "memo", "num_rows", "order_T")

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths = tuple(lengths)
        self.device = device
        self.num_rows = sum(lengths)
        self.groups: list[_Group] = []
        self.order_T: Tensor | None = None
        """Where each row is among the (padded) rows of all groups; None where they are in order."""
        self.memo: dict[Hashable, Tensor] = {}
        """Masks and biases, kept for other layers."""
        if len(set(lengths)) == 1:
            self.groups.append(_Group(0, len(lengths), lengths[0], None))
        else:
            self._pad()

    def _pad(self) -> None:
        starts, row = [], 0
        for length in self.lengths:
            starts.append(row)
            row += length
        places = [0] * self.num_rows
        first = 0
        for members in _groups_of_like_length(self.lengths):
            longest = self.lengths[members[0]]
            rows: list[int] = []
            for number, member in enumerate(members):
                start, length = starts[member], self.lengths[member]
                rows += range(start, start + length)
                rows += [start + length - 1] * (longest - length)
                place = first + number * longest
                places[start : start + length] = range(place, place + length)
            rows_BL = torch.tensor(rows).view(len(members), longest).to(self.device)
            self.groups.append(_Group(0, len(members), longest, rows_BL))
            first += len(rows)
        self.order_T = torch.tensor(places).to(self.device)


def _groups_of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices, longest first, so that in each group none is much shorter than the first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and lengths[index] >= _MIN_FILL * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def ragged_attention(q_HTD: Tensor, k_KTD: Tensor, v_KTE: Tensor, batch: RaggedBatch, form: AttentionForm) -> Tensor:
    """Attention of all rows over their own sequences.

    Args:
        q_HTD, k_KTD, v_KTE: of all rows; fp32, fp16 or bf16.
        batch: how long the sequences are.
        form: what this layer computes.

    Returns:
        [T, H, E] in the dtype of the queries; differentiable in queries, keys and values.
    """
    parts = []
    for group in batch.groups:
        out_BHLE = _attend(group.take(q_HTD), group.take(k_KTD), group.take(v_KTE), form, batch)
        parts.append(out_BHLE.transpose(1, 2).flatten(0, 1))
    out_THE = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out_THE if batch.order_T is None else out_THE.index_select(0, batch.order_T)


def _attend(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLE: Tensor, form: AttentionForm, batch: RaggedBatch) -> Tensor:
    length, grouped = q_BHLD.shape[2], q_BHLD.shape[1] != k_BKLD.shape[1]
    if form.softcap is not None or (form.alibi_H is not None and q_BHLD.dtype != torch.float32):
        return _attend_by_hand(q_BHLD, k_BKLD, v_BKLE, form, batch)
    if form.sinks_H is None and form.alibi_H is None and _sees_all(form, length):
        return F.scaled_dot_product_attention(
            q_BHLD, k_BKLD, v_BKLE, is_causal=True, scale=form.scale, enable_gqa=grouped
        )
    if form.sinks_H is not None:  # one more key, 0 ... 0 1, without a value; one more column of queries: the sink
        sinks = (form.sinks_H / form.scale).to(q_BHLD.dtype)[:, None, None].expand(len(q_BHLD), -1, length, 1)
        q_BHLD = torch.cat([q_BHLD, sinks], -1)
        k_BKLD, v_BKLE = F.pad(k_BKLD, (0, 1, 0, 1)), F.pad(v_BKLE, (0, 0, 0, 1))
        k_BKLD[..., -1, -1] = 1
    mask = _mask(form, length, batch) if form.alibi_H is None else _bias(form, length, batch)
    return F.scaled_dot_product_attention(q_BHLD, k_BKLD, v_BKLE, attn_mask=mask, scale=form.scale, enable_gqa=grouped)


def _attend_by_hand(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLE: Tensor, form: AttentionForm, batch: RaggedBatch) -> Tensor:
    groups, length = q_BHLD.shape[1] // k_BKLD.shape[1], q_BHLD.shape[2]
    k_BHLD, v_BHLE = k_BKLD.repeat_interleave(groups, 1), v_BKLE.repeat_interleave(groups, 1)
    logits_BHLS = (q_BHLD @ k_BHLD.transpose(2, 3)).float() * form.scale
    if form.softcap is not None:
        logits_BHLS = form.softcap * torch.tanh(logits_BHLS / form.softcap)
    if form.sinks_H is not None:
        sinks = form.sinks_H.float()[:, None, None].expand(len(q_BHLD), -1, length, 1)
        logits_BHLS = torch.cat([logits_BHLS, sinks], -1)
    weights_BHLS = (logits_BHLS + _bias(form, length, batch)).softmax(-1)
    return weights_BHLS[..., :length].to(v_BHLE.dtype) @ v_BHLE


def _sees_all(form: AttentionForm, length: int) -> bool:
    """Whether every row sees all rows before it."""
    return (form.window is None or form.window >= length) and (form.chunk is None or form.chunk >= length)


def _mask(form: AttentionForm, length: int, batch: RaggedBatch) -> Tensor:
    """[L, S] bool: which rows see which keys; all see the sink."""
    key = ("mask", form.window, form.chunk, form.sinks_H is None, length)
    known = batch.memo.get(key)
    if known is None:
        seen_LL = visible(RowSpan(0, length, 0, ()), form)
        known = seen_LL if form.sinks_H is None else F.pad(seen_LL, (0, 1), value=True)
        known = batch.memo[key] = known.to(batch.device)
    return known


def _bias(form: AttentionForm, length: int, batch: RaggedBatch) -> Tensor:
    """What is added to the logits, [L, S] or, with slopes, [H, L, S]: -inf where a row doesn't see a key."""
    key = ("bias", form.window, form.chunk, form.sinks_H is None, id(form.alibi_H), length)
    known = batch.memo.get(key)
    if known is None:
        seen_LS = _mask(form, length, batch)
        bias = torch.zeros(seen_LS.shape, device=batch.device)
        if form.alibi_H is not None:
            positions = torch.arange(length, device=batch.device)
            slopes_HLL = form.alibi_H.float()[:, None, None] * (positions - positions[:, None])
            bias = F.pad(slopes_HLL, (0, seen_LS.shape[1] - length))
        known = batch.memo[key] = bias.masked_fill(~seen_LS, float("-inf"))
    return known

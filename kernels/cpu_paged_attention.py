"""Paged attention on the CPU with torch's own operators. Maths, legend and data flow: `paged_attention`.

Measured on one core, which decides the form: a sequence in one run of pages is read as a view (no copy at all), one
call per sequence. Many short decode rows are cheaper as one padded batch whose pages are gathered, because a call
costs ~12 us; past ~128 keys the copy costs more than the calls it saves (8 rows x 1024 keys x 8 heads: 6 times more).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.kernels.paged_attention import AttentionForm, PagedBatch, RowSpan, visible

_MAX_GATHERED_KEYS = 128
_MIN_GATHERED_ROWS = 3


def paged_attention_cpu(
    q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, batch: PagedBatch, form: AttentionForm
) -> Tensor:
    """See `paged_attention`."""
    if batch.decode_run is not None and form.simple:
        return _attend_one_row(q_HTD, k_pool_KSD, v_pool_KSE, batch, form)
    plan = _plan(batch, form)
    if len(plan.singles) == 1 and plan.gathered is None:
        single = plan.singles[0]
        return _attend_single(q_HTD, k_pool_KSD, v_pool_KSE, single, form, batch).transpose(0, 1).contiguous()
    out_THE = q_HTD.new_empty(batch.num_rows, q_HTD.shape[0], v_pool_KSE.shape[2])
    for single in plan.singles:
        start, end = single.span.start, single.span.start + single.span.count
        out_HnE = _attend_single(q_HTD[:, start:end], k_pool_KSD, v_pool_KSE, single, form, batch)
        out_THE[start:end] = out_HnE.transpose(0, 1)
    if plan.gathered is not None:
        group = plan.gathered
        q_BH1D = q_HTD[:, group.rows].transpose(0, 1)[:, :, None]
        k_BKLD = _gather(k_pool_KSD, group, batch.page_size)
        v_BKLE = _gather(v_pool_KSE, group, batch.page_size)
        out_THE[group.rows] = _attend(q_BH1D, k_BKLD, v_BKLE, _gathered_bias(group, form, batch, q_HTD), form)[:, :, 0]
    return out_THE


def _attend_one_row(
    q_H1D: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, batch: PagedBatch, form: AttentionForm
) -> Tensor:
    """One row of one sequence in one run of pages, with as few operators as can be: no mask, no gather, no copy."""
    assert batch.decode_run is not None
    span = batch.spans[0]
    first = form.first_key(span.position)
    num_keys, slot = span.position + 1 - first, batch.decode_run + first
    k_1KLD = k_pool_KSD.narrow(1, slot, num_keys).unsqueeze(0)
    v_1KLE = v_pool_KSE.narrow(1, slot, num_keys).unsqueeze(0)
    q_1KGD = q_H1D.reshape(1, k_pool_KSD.shape[0], -1, k_pool_KSD.shape[2])
    out_1KGE = F.scaled_dot_product_attention(q_1KGD, k_1KLD, v_1KLE, scale=form.scale)
    return out_1KGE.reshape(1, q_H1D.shape[0], -1)


class _Single(NamedTuple):
    """One sequence on its own: keys [first_key, length) as a view of the pool or, scattered, by their slots."""

    span: RowSpan
    first_key: int
    first_slot: int
    slots: Tensor | None


class _Gathered(NamedTuple):
    """Decode rows of several short sequences, padded to the same number of pages (with pages of their own)."""

    rows: Tensor
    pages: Tensor
    keys_BL: Tensor
    seen_BL: Tensor
    positions_B: Tensor


class _Plan(NamedTuple):
    singles: list[_Single]
    gathered: _Gathered | None


def _plan(batch: PagedBatch, form: AttentionForm) -> _Plan:
    key = ("plan", form.window, form.chunk)
    plan = batch.memo.get(key)
    if plan is None:
        plan = batch.memo[key] = _make_plan(batch, form)
    return plan


def _make_plan(batch: PagedBatch, form: AttentionForm) -> _Plan:
    short = [
        index
        for index, span in enumerate(batch.spans)
        if span.count == 1 and span.length - form.first_key(span.position) <= _MAX_GATHERED_KEYS
    ]
    if len(short) < _MIN_GATHERED_ROWS:
        short = []
    singles = [
        _single(span, run, batch.page_size, form)
        for index, (span, run) in enumerate(zip(batch.spans, batch.runs, strict=True))
        if index not in short
    ]
    return _Plan(singles, _gathered([batch.spans[i] for i in short], batch.page_size, form) if short else None)


def _single(span: RowSpan, run: int | None, page_size: int, form: AttentionForm) -> _Single:
    first_key = form.first_key(span.position)
    if run is not None:
        return _Single(span, first_key, run + first_key, None)
    slots = [span.pages[i // page_size] * page_size + i % page_size for i in range(first_key, span.length)]
    return _Single(span, first_key, 0, torch.tensor(slots))


def _gathered(spans: list[RowSpan], page_size: int, form: AttentionForm) -> _Gathered:
    firsts = [form.first_key(span.position) for span in spans]
    tables = [
        list(span.pages[first // page_size : span.position // page_size + 1])
        for span, first in zip(spans, firsts, strict=True)
    ]
    width = max(map(len, tables))
    pages = torch.tensor([table + table[:1] * (width - len(table)) for table in tables])
    first_B1 = torch.tensor(firsts)[:, None]
    positions_B = torch.tensor([span.position for span in spans])
    keys_BL = first_B1 // page_size * page_size + torch.arange(width * page_size)
    seen_BL = (keys_BL >= first_B1) & (keys_BL <= positions_B[:, None])
    return _Gathered(torch.tensor([span.start for span in spans]), pages, keys_BL, seen_BL, positions_B)


def _gather(pool_KSD: Tensor, group: _Gathered, page_size: int) -> Tensor:
    heads, slots, width = pool_KSD.shape
    num_rows, num_pages = group.pages.shape
    pages_KPX = pool_KSD.view(heads, slots // page_size, page_size * width)
    taken = pages_KPX.index_select(1, group.pages.flatten())
    return taken.view(heads, num_rows, num_pages * page_size, width).transpose(0, 1)


def _attend_single(
    q_HnD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, single: _Single, form: AttentionForm, batch: PagedBatch
) -> Tensor:
    span = single.span
    if single.slots is None:
        num_keys = span.length - single.first_key
        k_KLD = k_pool_KSD.narrow(1, single.first_slot, num_keys)
        v_KLE = v_pool_KSE.narrow(1, single.first_slot, num_keys)
    else:
        k_KLD, v_KLE = k_pool_KSD.index_select(1, single.slots), v_pool_KSE.index_select(1, single.slots)
    bias, fused = None, _fused(form, q_HnD.dtype)
    causal = fused and span.position == 0 and form.alibi_H is None and form.first_key(span.length - 1) == 0
    if not causal and (span.count > 1 or form.alibi_H is not None):
        bias = _single_bias(single, form, batch, q_HnD)
    return _attend(q_HnD[None], k_KLD[None], v_KLE[None], bias, form, causal)[0]


def _fused(form: AttentionForm, dtype: torch.dtype) -> bool:
    """Whether torch's fused operator can do it; it can't cap, has no sinks, and rounds a bias to the queries' dtype."""
    return form.softcap is None and form.sinks_H is None and (form.alibi_H is None or dtype == torch.float32)


def _attend(
    q_BHnD: Tensor, k_BKLD: Tensor, v_BKLE: Tensor, bias: Tensor | None, form: AttentionForm, causal: bool = False
) -> Tensor:
    """[B, H, n, E]; `bias` (added to the logits) broadcasts to [B, H, n, L]; `causal`: n == L and no other mask."""
    batch, heads, rows, width = q_BHnD.shape
    kv_heads = k_BKLD.shape[1]
    groups = heads // kv_heads
    if _fused(form, q_BHnD.dtype):
        if rows > 1:
            return F.scaled_dot_product_attention(
                q_BHnD, k_BKLD, v_BKLE, attn_mask=bias, scale=form.scale, is_causal=causal, enable_gqa=groups > 1
            )
        if bias is not None and bias.shape[1] > 1:
            bias = bias.view(bias.shape[0], kv_heads, groups, -1)
        q_BKGD = q_BHnD.reshape(batch, kv_heads, groups, width)
        out_BKGE = F.scaled_dot_product_attention(q_BKGD, k_BKLD, v_BKLE, attn_mask=bias, scale=form.scale)
        return out_BKGE.reshape(batch, heads, 1, -1)
    return _attend_by_hand(q_BHnD, k_BKLD, v_BKLE, bias, form)


def _attend_by_hand(q_BHnD: Tensor, k_BKLD: Tensor, v_BKLE: Tensor, bias: Tensor | None, form: AttentionForm) -> Tensor:
    """The same with separate operators, logits in fp32."""
    batch, heads, rows, width = q_BHnD.shape
    kv_heads = k_BKLD.shape[1]
    q_BKXD = q_BHnD.reshape(batch, kv_heads, -1, width)
    logits = (q_BKXD @ k_BKLD.transpose(2, 3)).float().view(batch, heads, rows, -1) * form.scale
    if form.softcap is not None:
        logits = torch.tanh(logits / form.softcap) * form.softcap
    if bias is not None:
        logits = logits + bias
    num_keys = logits.shape[-1]
    if form.sinks_H is not None:
        logits = torch.cat([logits, form.sinks_H.float()[None, :, None, None].expand(batch, -1, rows, 1)], -1)
    weights = logits.softmax(-1)[..., :num_keys].to(q_BHnD.dtype)
    return (weights.reshape(batch, kv_heads, -1, num_keys) @ v_BKLE).view(batch, heads, rows, -1)


def _single_bias(single: _Single, form: AttentionForm, batch: PagedBatch, like: Tensor) -> Tensor:
    span = single.span
    key = ("bias", span.start, form.window, form.chunk, id(form.alibi_H))
    if (bias := batch.memo.get(key)) is None:
        seen_nL = visible(span, form, single.first_key)
        distance_nL = torch.arange(single.first_key, span.length) - torch.arange(span.position, span.length)[:, None]
        bias = batch.memo[key] = _bias(seen_nL, distance_nL, form, like)[None]
    return bias


def _gathered_bias(group: _Gathered, form: AttentionForm, batch: PagedBatch, like: Tensor) -> Tensor:
    key = ("bias", form.window, form.chunk, id(form.alibi_H))
    if (bias := batch.memo.get(key)) is None:
        distance_BL = group.keys_BL - group.positions_B[:, None]
        bias_HBL = _bias(group.seen_BL, distance_BL, form, like)
        bias = batch.memo[key] = bias_HBL.transpose(0, 1)[:, :, None].contiguous()
    return bias


def _bias(seen: Tensor, distance: Tensor, form: AttentionForm, like: Tensor) -> Tensor:
    """[1 or H, *seen.shape]: 0 or the ALiBi term where a key is seen, -inf elsewhere."""
    if form.alibi_H is None:
        return torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, float("-inf"))[None]
    alibi = form.alibi_H.float()[:, None, None] * distance
    return alibi.masked_fill_(~seen, float("-inf"))

"""Paged attention on the CPU with torch's own operators. Maths, legend and data flow: `paged_attention`.

    rows of a step --plan, once for all layers--> rows        decode rows in one run of pages: views of the pools
                                                  sequences   chunks, scattered pages, biases: one call each
                                                  gathered    many tiny decode rows, padded: one call for all

Measured on one core, which decides the form. A fused call costs ~5 us and reads keys that lie in one run where they
are, at the memory's speed. Gathering and padding reads them, writes them and reads them again, so that one call for
all sequences pays only while their keys are few: 16 rows x 9 heads x 64, views / gathered, by keys: 24: 147 / 92 us,
64: 189 / 174, 128: 253 / 286, 256: 406 / 633, 1024: 2290 / 4610.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.kernels.paged_attention import AttentionForm, PagedBatch, RowSpan, visible

_MAX_GATHERED_BYTES = {"fused": 48 << 10, "by hand": 144 << 10}
"""Keys and values of one sequence and layer up to which it may be gathered; separate operators cost ~28 us a call."""
_MIN_GATHERED_ROWS = 3
_MAX_LOGITS_BYTES = 64 << 20
"""Logits that separate operators make at once."""

_flash = torch._scaled_dot_product_flash_attention_for_cpu
"""torch's fused operator itself, which tells the log-sum-exp too: (q, k, v) -> (out, lse); heads may be grouped."""


def paged_attention_cpu(
    q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, batch: PagedBatch, form: AttentionForm
) -> Tensor:
    """See `paged_attention`."""
    if batch.decode_run is not None and form.simple:
        return _attend_one_row(q_HTD, k_pool_KSD, v_pool_KSE, batch, form)
    plan = _plan(batch, form, k_pool_KSD, v_pool_KSE)
    parts: list[Tensor] = []
    if plan.rows:
        parts.append(_attend_rows(q_HTD, k_pool_KSD, v_pool_KSE, plan.rows, form))
    parts += [_attend_sequence(q_HTD, k_pool_KSD, v_pool_KSE, it, form, batch) for it in plan.sequences]
    if plan.gathered is not None:
        parts.append(_attend_gathered(q_HTD, k_pool_KSD, v_pool_KSE, plan.gathered, form, batch))
    out_THE = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return out_THE if plan.order_T is None else out_THE.index_select(0, plan.order_T)


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


class _Row(NamedTuple):
    """A decode row whose visible keys are the slots [first_slot, first_slot + num_keys)."""

    row: int
    first_slot: int
    num_keys: int


class _Sequence(NamedTuple):
    """One sequence on its own: keys [first_key, length) from `first_slot` on or, scattered, in whole pages."""

    span: RowSpan
    first_key: int
    first_slot: int
    pages: Tensor | None


class _Gathered(NamedTuple):
    """Decode rows of several short sequences, padded to the same number of pages (with pages of their own)."""

    rows: Tensor
    pages: Tensor
    keys_BL: Tensor
    seen_BL: Tensor
    positions_B: Tensor


class _Plan(NamedTuple):
    """The sequences of a step by the way they are read; results come in this order."""

    rows: list[_Row]
    sequences: list[_Sequence]
    gathered: _Gathered | None
    order_T: Tensor | None
    """Where each row of the step is among the results; None where they are in order."""


def _plan(batch: PagedBatch, form: AttentionForm, k_pool_KSD: Tensor, v_pool_KSE: Tensor) -> _Plan:
    key_bytes = k_pool_KSD.shape[0] * (k_pool_KSD.shape[2] + v_pool_KSE.shape[2]) * k_pool_KSD.element_size()
    fused = _fused(form, k_pool_KSD.dtype, k_pool_KSD.shape[2] == v_pool_KSE.shape[2])
    max_gathered_keys = _MAX_GATHERED_BYTES["fused" if fused else "by hand"] // key_bytes
    as_views = fused and form.alibi_H is None
    key = ("plan", form.window, form.chunk, max_gathered_keys, as_views)
    plan: _Plan | None = batch.memo.get(key)
    if plan is None:
        plan = batch.memo[key] = _make_plan(batch, form, max_gathered_keys, as_views)
    return plan


def _make_plan(batch: PagedBatch, form: AttentionForm, max_gathered_keys: int, as_views: bool) -> _Plan:
    rows: list[_Row] = []
    sequences: list[_Sequence] = []
    firsts = [form.first_key(span.position) for span in batch.spans]
    short = {
        index
        for index, (span, first) in enumerate(zip(batch.spans, firsts, strict=True))
        if span.count == 1 and span.length - first <= max_gathered_keys
    }
    if len(short) < _MIN_GATHERED_ROWS:
        short = set()
    for index, (span, run, first) in enumerate(zip(batch.spans, batch.runs, firsts, strict=True)):
        if index in short:
            continue
        if run is not None and span.count == 1 and as_views:
            rows.append(_Row(span.start, run + first, span.length - first))
        else:
            sequences.append(_sequence(span, run, first, batch.page_size))
    gathered = [batch.spans[index] for index in sorted(short)]
    order = [it.row for it in rows]
    for span in (*(it.span for it in sequences), *gathered):
        order += range(span.start, span.start + span.count)
    return _Plan(
        rows,
        sequences,
        _gathered(gathered, batch.page_size, form) if gathered else None,
        None if order == list(range(batch.num_rows)) else torch.tensor(order).argsort(),
    )


def _sequence(span: RowSpan, run: int | None, first_key: int, page_size: int) -> _Sequence:
    if run is not None:
        return _Sequence(span, first_key, run + first_key, None)
    first_page = first_key // page_size
    pages = torch.tensor(list(span.pages[first_page : -(-span.length // page_size)]))
    return _Sequence(span, first_key, first_key - first_page * page_size, pages)


def _gathered(spans: Sequence[RowSpan], page_size: int, form: AttentionForm) -> _Gathered:
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


def _attend_rows(
    q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, rows: list[_Row], form: AttentionForm
) -> Tensor:
    """Decode rows over views of the pools: a fused call per row, and nothing else per row. -> [rows, H, E]."""
    heads, num_rows, width = q_HTD.shape
    kv_heads, scale = k_pool_KSD.shape[0], form.scale
    q_rows = q_HTD.transpose(0, 1).reshape(num_rows, 1, kv_heads, -1, width).unbind()
    k_pool, v_pool = k_pool_KSD.unsqueeze(0), v_pool_KSE.unsqueeze(0)
    calls = [
        (q_rows[row], k_pool.narrow(2, slot, num_keys), v_pool.narrow(2, slot, num_keys))
        for row, slot, num_keys in rows
    ]
    if form.sinks_H is None:
        outs = [F.scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in calls]
        return torch.cat(outs).view(len(rows), heads, -1)
    results = [_flash(q, k, v, scale=scale) for q, k, v in calls]
    out_RKGE, lse_RKG = (torch.cat(tensors) for tensors in zip(*results, strict=True))
    return _with_sinks(out_RKGE.view(len(rows), heads, -1), lse_RKG.view(len(rows), heads), form.sinks_H)


def _attend_sequence(
    q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, sequence: _Sequence, form: AttentionForm, batch: PagedBatch
) -> Tensor:
    """[n, H, E] of one sequence."""
    span, bias = sequence.span, None
    num_keys = span.length - sequence.first_key
    k_KLD, v_KLE = (
        pool if sequence.pages is None else _gather(pool, sequence.pages, batch)[0] for pool in (k_pool_KSD, v_pool_KSE)
    )
    k_KLD, v_KLE = (keys.narrow(1, sequence.first_slot, num_keys) for keys in (k_KLD, v_KLE))
    causal = span.position == 0 and form.alibi_H is None and form.first_key(span.length - 1) == 0
    if not causal and (span.count > 1 or form.alibi_H is not None):
        bias = _sequence_bias(sequence, form, batch, q_HTD)
    q_1HnD = q_HTD[None, :, span.start : span.start + span.count]
    return _attend(q_1HnD, k_KLD[None], v_KLE[None], bias, form, causal and span.count > 1)[0].transpose(0, 1)


def _attend_gathered(
    q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, group: _Gathered, form: AttentionForm, batch: PagedBatch
) -> Tensor:
    """[rows of the group, H, E]."""
    q_BH1D = q_HTD.index_select(1, group.rows).transpose(0, 1)[:, :, None]
    k_BKLD, v_BKLE = (_gather(pool, group.pages, batch) for pool in (k_pool_KSD, v_pool_KSE))
    return _attend(q_BH1D, k_BKLD, v_BKLE, _gathered_bias(group, form, batch, q_HTD), form)[:, :, 0]


def _gather(pool_KSD: Tensor, pages: Tensor, batch: PagedBatch) -> Tensor:
    """[B, K, L, D]: `pages` [B, L / page size] or [L / page size] one after the other."""
    heads, slots, width = pool_KSD.shape
    pages_KPX = pool_KSD.view(heads, slots // batch.page_size, batch.page_size * width)
    taken = pages_KPX.index_select(1, pages.flatten())
    return taken.view(heads, -1, pages.shape[-1] * batch.page_size, width).transpose(0, 1)


def _fused(form: AttentionForm, dtype: torch.dtype, same_width: bool) -> bool:
    """Whether torch's fused operators can do it.

    They don't cap logits, round a bias to the queries' dtype, and tell the log-sum-exp that sinks need only where keys
    and values have one width.
    """
    return (
        form.softcap is None
        and (form.alibi_H is None or dtype == torch.float32)
        and (form.sinks_H is None or (same_width and form.alibi_H is None))
    )


def _attend(
    q_BHnD: Tensor, k_BKLD: Tensor, v_BKLE: Tensor, bias: Tensor | None, form: AttentionForm, causal: bool = False
) -> Tensor:
    """[B, H, n, E]; `bias` (added to the logits) broadcasts to [B, H, n, L]; `causal`: n == L and no other mask."""
    batch, heads, rows, width = q_BHnD.shape
    kv_heads, num_keys = k_BKLD.shape[1:3]
    if not _fused(form, q_BHnD.dtype, width == v_BKLE.shape[3]):
        return _attend_by_hand(q_BHnD, k_BKLD, v_BKLE, _causal_bias(rows, num_keys, q_BHnD) if causal else bias, form)
    if rows == 1:  # the heads of a group become the rows of one head
        q_BHnD = q_BHnD.reshape(batch, kv_heads, -1, width)
        if bias is not None and bias.shape[1] > 1:
            bias = bias.view(bias.shape[0], kv_heads, -1, num_keys)
    if form.sinks_H is None:
        grouped = q_BHnD.shape[1] != kv_heads
        out = F.scaled_dot_product_attention(
            q_BHnD, k_BKLD, v_BKLE, attn_mask=bias, scale=form.scale, is_causal=causal, enable_gqa=grouped
        )
        return out.reshape(batch, heads, rows, -1)
    out, lse = _flash(q_BHnD, k_BKLD, v_BKLE, is_causal=causal, attn_mask=bias, scale=form.scale)
    return _with_sinks(out.reshape(batch, heads, rows, -1), lse.reshape(batch, heads, rows), form.sinks_H[:, None])


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The softmax that also has the sinks in its sum: out * sum / (sum + exp(sink)), for `out` [..., E]."""
    return (out.float() * torch.sigmoid(lse - sinks.float()).unsqueeze(-1)).to(out.dtype)


def _attend_by_hand(q_BHnD: Tensor, k_BKLD: Tensor, v_BKLE: Tensor, bias: Tensor | None, form: AttentionForm) -> Tensor:
    """The same with separate operators, logits in fp32, of as many rows at a time as memory should be spent on."""
    batch, heads, rows, _ = q_BHnD.shape
    at_once = max(1, _MAX_LOGITS_BYTES // (4 * batch * heads * k_BKLD.shape[2]))
    if rows <= at_once:
        return _attend_tile(q_BHnD, k_BKLD, v_BKLE, bias, form)
    starts = range(0, rows, at_once)
    biases = [None if bias is None else bias[:, :, start : start + at_once] for start in starts]
    tiles = zip(q_BHnD.split(at_once, 2), biases, strict=True)
    return torch.cat([_attend_tile(q, k_BKLD, v_BKLE, tile_bias, form) for q, tile_bias in tiles], 2)


def _attend_tile(q_BHnD: Tensor, k_BKLD: Tensor, v_BKLE: Tensor, bias: Tensor | None, form: AttentionForm) -> Tensor:
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


def _sequence_bias(sequence: _Sequence, form: AttentionForm, batch: PagedBatch, like: Tensor) -> Tensor:
    span = sequence.span
    key = ("bias", span.start, form.window, form.chunk, id(form.alibi_H))
    if (bias := batch.memo.get(key)) is None:
        seen_nL = visible(span, form, sequence.first_key)
        distance_nL = torch.arange(sequence.first_key, span.length) - torch.arange(span.position, span.length)[:, None]
        bias = batch.memo[key] = _bias(seen_nL, distance_nL, form, like)[None]
    return bias


def _causal_bias(rows: int, num_keys: int, like: Tensor) -> Tensor:
    return torch.full((rows, num_keys), float("-inf"), dtype=like.dtype).triu_(1)[None, None]


def _gathered_bias(group: _Gathered, form: AttentionForm, batch: PagedBatch, like: Tensor) -> Tensor:
    key = ("bias", id(group), id(form.alibi_H))  # the batch keeps its plans, so no other group has this id
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

"""Paged attention on the CPU with torch's own operators. Maths, legend and data flow: `paged_attention`.

    rows of a step --plan, once for all layers--> rows        decode rows in one run of pages: views of the pools
                                                  shared      decode rows with a prefix in common, which is read
                                                              once for all of them; a view and a call per run
                                                  sequences   chunks, scattered pages, biases: one call each
                                                  gathered    many tiny decode rows, padded: one call for all

Measured on one core, which decides the form. A fused call costs ~5 us and reads keys that lie in one run where they
are (at 10 GB/s; the memory gives 30). Gathering and padding reads them, writes them and reads them again, so that one
call for all sequences pays only while their keys are few: 16 rows x 9 heads x 64, views / gathered, by keys:
24: 147 / 92 us, 64: 189 / 174, 128: 253 / 286, 256: 406 / 633, 1024: 2290 / 4610.

Rows that share 512 keys and have 100 of their own: 2 rows 1.15, 8 rows 1.7 times as fast as gathered. Without a shared
run, views of two or three runs are no faster than gathering (0.65 to 1.05 times), which keeps a row's bits, too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.kernels.cpu_attention_plan import Gathered, OneSequence, Plan, Row, Shared, make_plan
from swarm.kernels.paged_attention import AttentionForm, PagedBatch, visible

_MAX_GATHERED_BYTES = {"fused": 96 << 10, "by hand": 144 << 10}
"""Keys and values of one sequence and layer up to which it may be gathered; separate operators cost ~28 us a call."""
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
    if plan.shared is not None:
        parts.append(_attend_shared(q_HTD, k_pool_KSD, v_pool_KSE, plan.shared, form))
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


def _plan(batch: PagedBatch, form: AttentionForm, k_pool_KSD: Tensor, v_pool_KSE: Tensor) -> Plan:
    key_bytes = k_pool_KSD.shape[0] * (k_pool_KSD.shape[2] + v_pool_KSE.shape[2]) * k_pool_KSD.element_size()
    fused = _fused(form, k_pool_KSD.dtype, k_pool_KSD.shape[2] == v_pool_KSE.shape[2])
    max_gathered_keys = _MAX_GATHERED_BYTES["fused" if fused else "by hand"] // key_bytes
    as_views = fused and form.alibi_H is None
    can_merge = as_views and k_pool_KSD.shape[2] == v_pool_KSE.shape[2]
    key = ("plan", form.window, form.chunk, max_gathered_keys, as_views, can_merge)
    plan: Plan | None = batch.memo.get(key)
    if plan is None:
        plan = batch.memo[key] = make_plan(batch, form, max_gathered_keys, as_views, can_merge)
    return plan


def _attend_rows(q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, rows: list[Row], form: AttentionForm) -> Tensor:
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


def _attend_shared(q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, plan: Shared, form: AttentionForm) -> Tensor:
    """Decode rows over views of the pools, a fused call per run, weighted by the runs' shares of the softmax."""
    heads, _, width = q_HTD.shape
    k_pool, v_pool = k_pool_KSD.unsqueeze(0), v_pool_KSE.unsqueeze(0)
    outs, lses = [], []
    for rows, first_slot, num_keys in plan.calls:
        q = q_HTD.index_select(1, rows).view(1, k_pool.shape[1], -1, width)
        out, lse = _flash(
            q, k_pool.narrow(2, first_slot, num_keys), v_pool.narrow(2, first_slot, num_keys), scale=form.scale
        )
        outs.append(out.reshape(heads, len(rows), -1))
        lses.append(lse.reshape(heads, len(rows)))
    out_HPE = F.pad(torch.cat(outs, 1), (0, 0, 0, 1))
    lse_HP = F.pad(torch.cat(lses, 1), (0, 1), value=float("-inf"))
    lse_HNR = lse_HP[:, plan.places_NR]
    total_HN1 = lse_HNR.logsumexp(2, keepdim=True)
    if form.sinks_H is not None:
        total_HN1 = torch.logaddexp(total_HN1, form.sinks_H.float()[:, None, None])
    shares_HNR1 = (lse_HNR - total_HN1).exp_().unsqueeze(3)
    return (out_HPE[:, plan.places_NR] * shares_HNR1).sum(2).to(q_HTD.dtype).transpose(0, 1)


def _attend_sequence(
    q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, sequence: OneSequence, form: AttentionForm, batch: PagedBatch
) -> Tensor:
    """[n, H, E] of one sequence."""
    span, bias = sequence.span, None
    if sequence.slots is None:
        num_keys = span.length - sequence.first_key
        k_KLD, v_KLE = (pool.narrow(1, sequence.first_slot, num_keys) for pool in (k_pool_KSD, v_pool_KSE))
    else:
        k_KLD, v_KLE = (pool.index_select(1, sequence.slots) for pool in (k_pool_KSD, v_pool_KSE))
    causal = span.position == 0 and form.alibi_H is None and form.first_key(span.length - 1) == 0
    if not causal and (span.count > 1 or form.alibi_H is not None):
        bias = _sequence_bias(sequence, form, batch, q_HTD)
    q_1HnD = q_HTD[None, :, span.start : span.start + span.count]
    return _attend(q_1HnD, k_KLD[None], v_KLE[None], bias, form, causal and span.count > 1)[0].transpose(0, 1)


def _attend_gathered(
    q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, group: Gathered, form: AttentionForm, batch: PagedBatch
) -> Tensor:
    """[rows of the group, H, E]."""
    q_BH1D = q_HTD.index_select(1, group.rows).transpose(0, 1)[:, :, None]
    k_BKLD, v_BKLE = (_gather(pool, group.pages, batch) for pool in (k_pool_KSD, v_pool_KSE))
    return _attend(q_BH1D, k_BKLD, v_BKLE, _gathered_bias(group, form, batch, q_HTD), form)[:, :, 0]


def _gather(pool_KSD: Tensor, pages: Tensor, batch: PagedBatch) -> Tensor:
    """[B, K, L, D] of pages [B, L / page size]."""
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


def _sequence_bias(sequence: OneSequence, form: AttentionForm, batch: PagedBatch, like: Tensor) -> Tensor:
    span = sequence.span
    key = ("bias", span.start, form.window, form.chunk, id(form.alibi_H))
    if (bias := batch.memo.get(key)) is None:
        seen_nL = visible(span, form, sequence.first_key)
        distance_nL = torch.arange(sequence.first_key, span.length) - torch.arange(span.position, span.length)[:, None]
        bias = batch.memo[key] = _bias(seen_nL, distance_nL, form, like)[None]
    return bias


def _causal_bias(rows: int, num_keys: int, like: Tensor) -> Tensor:
    return torch.full((rows, num_keys), float("-inf"), dtype=like.dtype).triu_(1)[None, None]


def _gathered_bias(group: Gathered, form: AttentionForm, batch: PagedBatch, like: Tensor) -> Tensor:
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

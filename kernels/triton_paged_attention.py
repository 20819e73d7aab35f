"""Paged attention in Triton: prefill and decode rows in one launch. Maths, legend and data flow: `paged_attention`.

One program computes a tile of up to BLOCK_M // G consecutive rows of one sequence for the G query heads that share a
key/value head, so each key is loaded once per group. Keys are addressed through the page table, page by page, with
an online softmax in fp32 (Dao et al., FlashAttention-2, 2023, section 3.1). With few tiles and long contexts the
keys are cut into splits whose results are combined by their log-sum-exp (Flash-Decoding, Dao et al., 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from swarm.kernels.paged_attention import AttentionForm, PagedBatch

_LOG2_E = 1.4426950408889634
_MIN_KEYS_PER_SPLIT = 256


def paged_attention_triton(
    q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, batch: PagedBatch, form: AttentionForm
) -> Tensor:
    """See `paged_attention`."""
    heads, num_rows, width = q_HTD.shape
    kv_heads, value_width = k_pool_KSD.shape[0], v_pool_KSE.shape[2]
    groups = heads // kv_heads
    padded_groups = triton.next_power_of_2(groups)
    decode = all(span.count == 1 for span in batch.spans)
    block_m = max(16, padded_groups if decode else min(64, 16 * padded_groups), padded_groups)
    tables = _tables(batch, block_m // padded_groups)
    num_tiles = tables["tile_span"].shape[0]
    splits = _num_splits(num_tiles * kv_heads, max(span.length for span in batch.spans), q_HTD.device)
    out = q_HTD.new_empty(num_rows, heads, value_width)
    parts = q_HTD.new_empty(splits, num_rows, heads, value_width, dtype=torch.float32) if splits > 1 else out[None]
    lse = q_HTD.new_empty(splits, num_rows, heads, dtype=torch.float32)
    _kernel[(num_tiles, kv_heads, splits)](
        q_HTD, k_pool_KSD, v_pool_KSE, parts, lse,
        form.sinks_H, form.alibi_H,
        tables["tile_span"], tables["tile_row"], tables["span"], tables["pages"],
        form.scale, form.window or 0, form.chunk or 0, form.softcap or 0.0,
        *q_HTD.stride(), *k_pool_KSD.stride(), *v_pool_KSE.stride(), *parts.stride(), *lse.stride(),
        tables["pages"].stride(0),
        GROUPS=groups, PADDED_GROUPS=padded_groups, WIDTH=width, VALUE_WIDTH=value_width,
        BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK_E=max(16, triton.next_power_of_2(value_width)),
        PAGE=batch.page_size, BLOCK_M=block_m, BLOCK_N=32 if width > 128 or q_HTD.dtype == torch.float32 else 64,
        HAS_SINKS=form.sinks_H is not None, HAS_ALIBI=form.alibi_H is not None, SPLITS=splits,
        num_warps=4 if block_m <= 32 or width <= 128 else 8, num_stages=2,
    )  # fmt: skip
    return out if splits == 1 else _combine(parts, lse, form.sinks_H, out)


def _combine(parts: Tensor, lse: Tensor, sinks_H: Tensor | None, out: Tensor) -> Tensor:
    """Sum of the splits' results, each weighted by its share of the softmax."""
    total = torch.logsumexp(lse, 0)
    if sinks_H is not None:
        total = torch.logaddexp(total, sinks_H.float())
    weights = torch.exp(lse - total)
    return out.copy_((parts * weights[..., None]).sum(0))


def _num_splits(programs: int, max_keys: int, device: torch.device) -> int:
    """Enough splits to occupy the device about twice, none shorter than _MIN_KEYS_PER_SPLIT keys."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = -(-2 * processors // programs)
    return max(1, min(wanted, max_keys // _MIN_KEYS_PER_SPLIT))


def _tables(batch: PagedBatch, rows_per_tile: int) -> dict[str, Tensor]:
    """Int32 tables of the step on the device, one upload each, shared by all layers."""
    key = ("tables", rows_per_tile)
    known: dict[str, Tensor] | None = batch.memo.get(key)
    if known is not None:
        return known
    tile_span, tile_row, spans = [], [], []
    for index, span in enumerate(batch.spans):
        for row in range(0, span.count, rows_per_tile):
            tile_span.append(index)
            tile_row.append(row)
        spans.append((span.start, span.count, span.position))
    tables = [list(span.pages[: -(-span.length // batch.page_size)]) for span in batch.spans]
    width = max(map(len, tables))
    pages = [table + [0] * (width - len(table)) for table in tables]
    columns = {"tile_span": tile_span, "tile_row": tile_row, "span": spans, "pages": pages}
    uploaded = {
        name: torch.tensor(rows, dtype=torch.int32).to(batch.device, non_blocking=True)
        for name, rows in columns.items()
    }
    batch.memo[key] = uploaded
    return uploaded


@triton.jit
def _kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sinks_ptr, alibi_ptr,
    tile_span_ptr, tile_row_ptr, span_ptr, pages_ptr,
    scale, window, chunk, softcap,
    q_stride_h, q_stride_t, q_stride_d, k_stride_k, k_stride_s, k_stride_d, v_stride_k, v_stride_s, v_stride_e,
    out_stride_p, out_stride_t, out_stride_h, out_stride_e, lse_stride_p, lse_stride_t, lse_stride_h,
    pages_stride,
    GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    tile, kv_head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    span = tl.load(tile_span_ptr + tile)
    start = tl.load(span_ptr + span * 3).to(tl.int64)
    count = tl.load(span_ptr + span * 3 + 1)
    position = tl.load(span_ptr + span * 3 + 2)
    tile_row = tl.load(tile_row_ptr + tile)

    lane_M = tl.arange(0, BLOCK_M)
    row_M = tile_row + lane_M // PADDED_GROUPS
    group_M = lane_M % PADDED_GROUPS
    live_M = (row_M < count) & (group_M < GROUPS)
    head_M = kv_head * GROUPS + group_M
    position_M = position + row_M
    d_D = tl.arange(0, BLOCK_D)
    e_E = tl.arange(0, BLOCK_E)
    q_offset = head_M[:, None] * q_stride_h + (start + row_M)[:, None] * q_stride_t + d_D[None, :] * q_stride_d
    q_MD = tl.load(q_ptr + q_offset, mask=live_M[:, None] & (d_D < WIDTH)[None, :], other=0.0)
    slope_M = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slope_M += tl.load(alibi_ptr + head_M, mask=live_M, other=0.0).to(tl.float32)

    # keys that any row of the tile may see, cut into equal splits of whole key blocks
    first_position = position + tile_row
    last_key = tl.minimum(first_position + BLOCK_M // PADDED_GROUPS, position + count)
    first_key = 0
    if window > 0:
        first_key = tl.maximum(first_key, first_position - window + 1)
    if chunk > 0:
        first_key = tl.maximum(first_key, first_position // chunk * chunk)
    per_split = tl.cdiv(tl.cdiv(last_key - first_key, SPLITS), BLOCK_N) * BLOCK_N
    split_first = first_key + split * per_split
    split_last = tl.minimum(split_first + per_split, last_key)

    # a masked logit is finite, so that a tile without any visible key has no inf - inf
    max_M = tl.full([BLOCK_M], -1.0e30, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for block in range(split_first, split_last, BLOCK_N):
        key_N = block + tl.arange(0, BLOCK_N)
        real_N = key_N < split_last
        page_N = tl.load(pages_ptr + span.to(tl.int64) * pages_stride + key_N // PAGE, mask=real_N, other=0)
        slot_N = page_N.to(tl.int64) * PAGE + key_N % PAGE
        k_offset = kv_head * k_stride_k + slot_N[None, :] * k_stride_s + d_D[:, None] * k_stride_d
        k_DN = tl.load(k_ptr + k_offset, mask=real_N[None, :] & (d_D < WIDTH)[:, None], other=0.0)
        logits_MN = tl.dot(q_MD, k_DN, input_precision="ieee") * scale
        if softcap > 0:
            capped = logits_MN / softcap
            capped = 2 / (1 + tl.exp(-2 * capped)) - 1
            logits_MN = softcap * capped
        if HAS_ALIBI:
            logits_MN += slope_M[:, None] * (key_N[None, :] - position_M[:, None]).to(tl.float32)
        seen_MN = real_N[None, :] & (key_N[None, :] <= position_M[:, None])
        if window > 0:
            seen_MN = seen_MN & (key_N[None, :] > position_M[:, None] - window)
        if chunk > 0:
            seen_MN = seen_MN & (key_N[None, :] // chunk == position_M[:, None] // chunk)
        logits_MN = tl.where(seen_MN, logits_MN, -1.0e30)
        new_max_M = tl.maximum(max_M, tl.max(logits_MN, 1))
        weights_MN = tl.where(seen_MN, tl.exp(logits_MN - new_max_M[:, None]), 0.0)
        decay_M = tl.exp(max_M - new_max_M)
        v_offset = kv_head * v_stride_k + slot_N[:, None] * v_stride_s + e_E[None, :] * v_stride_e
        v_NE = tl.load(v_ptr + v_offset, mask=real_N[:, None] & (e_E < VALUE_WIDTH)[None, :], other=0.0)
        sum_M = sum_M * decay_M + tl.sum(weights_MN, 1)
        acc_ME = acc_ME * decay_M[:, None] + tl.dot(weights_MN.to(v_NE.dtype), v_NE, input_precision="ieee")
        max_M = new_max_M

    if HAS_SINKS and SPLITS == 1:
        sink_M = tl.load(sinks_ptr + head_M, mask=live_M, other=0.0).to(tl.float32)
        new_max_M = tl.maximum(max_M, sink_M)
        decay_M = tl.exp(max_M - new_max_M)
        sum_M = sum_M * decay_M + tl.exp(sink_M - new_max_M)
        acc_ME = acc_ME * decay_M[:, None]
        max_M = new_max_M
    safe_sum_M = tl.where(sum_M > 0, sum_M, 1.0)
    out_ME = acc_ME / safe_sum_M[:, None]
    out_offset = split.to(tl.int64) * out_stride_p + (start + row_M)[:, None] * out_stride_t
    out_offset += head_M[:, None] * out_stride_h + e_E[None, :] * out_stride_e
    live_ME = live_M[:, None] & (e_E < VALUE_WIDTH)[None, :]
    tl.store(out_ptr + out_offset, out_ME.to(out_ptr.dtype.element_ty), mask=live_ME)
    lse_M = tl.where(sum_M > 0, max_M + tl.log(safe_sum_M), -1.0e30)
    lse_offset = split.to(tl.int64) * lse_stride_p + (start + row_M) * lse_stride_t + head_M * lse_stride_h
    tl.store(lse_ptr + lse_offset, lse_M, mask=live_M)

"""Paged attention in Triton: decode and prefill rows of a step. Maths, legend and data flow: `paged_attention`.

    spans --tiles--> items (tile, keys [first, last)) --_kernel--> out_THE      tiles whose keys are one item
                                                          '------> parts, lse --_merge_kernel--> out_THE

A tile is up to BLOCK_M // G consecutive rows of one sequence for the G query heads that share a key/value head, so
each key is loaded once per group; a program computes one item, keys addressed page by page, with an online softmax in
fp32 (Dao et al., FlashAttention-2, 2023, section 3.1). Sequences of few rows (decode) and of many (prefill) are two
launches with tiles of their own. The keys of a tile are cut into items of about equal size, so that few rows with long
contexts fill the device and one long sequence among short ones doesn't hold up the step; what the items of a tile found
is merged by log-sum-exp (Flash-Decoding, Dao et al., 2023). Logits, maxima and log-sum-exps are to base 2.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from swarm.kernels.paged_attention import AttentionForm, PagedBatch, RowSpan

_LOG2_E = 1.4426950408889634
_MIN_KEYS_PER_ITEM = {"narrow": 256, "wide": 2048}
_ITEMS_PER_PROCESSOR = 4


class Tile(NamedTuple):
    """How a launch is cut; see `tile_of`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class _Launch(NamedTuple):
    """One launch of `_kernel`, for all layers of one form."""

    tile: Tile
    items: Tensor
    """[items, 5] int32: span, first row in it, first key, last key + 1, part to write or -1 for none."""
    num_parts: int
    merges: Tensor | None
    """[tiles in parts, 4] int32: span, first row in it, first part, number of parts."""


def paged_attention_triton(
    q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, batch: PagedBatch, form: AttentionForm
) -> Tensor:
    """See `paged_attention`."""
    # Triton launches on the current device, which need not be the one of the tensors
    with torch.cuda.device(q_HTD.device) if q_HTD.is_cuda else nullcontext():
        return _attend(q_HTD, k_pool_KSD, v_pool_KSE, batch, form)


def _attend(q_HTD: Tensor, k_pool_KSD: Tensor, v_pool_KSE: Tensor, batch: PagedBatch, form: AttentionForm) -> Tensor:
    heads, num_rows, width = q_HTD.shape
    kv_heads, value_width = k_pool_KSD.shape[0], v_pool_KSE.shape[2]
    groups = heads // kv_heads
    if q_HTD.stride(2) != 1:
        q_HTD = q_HTD.contiguous()
    shape = {
        "KV_HEADS": kv_heads, "GROUPS": groups, "PADDED_GROUPS": triton.next_power_of_2(groups),
        "VALUE_WIDTH": value_width, "BLOCK_E": max(16, triton.next_power_of_2(value_width)),
        "HAS_SINKS": form.sinks_H is not None,
    }  # fmt: skip
    block_d = max(16, triton.next_power_of_2(width))
    spans, pages = _tables(batch)
    out = q_HTD.new_empty(num_rows, heads, value_width)
    cap = form.softcap or 0.0
    factor = form.scale / cap if cap else form.scale * _LOG2_E
    for launch in _launches(batch, form, kv_heads, shape["PADDED_GROUPS"], q_HTD.dtype, max(block_d, shape["BLOCK_E"])):
        tile = launch.tile
        parts = q_HTD.new_empty(launch.num_parts, kv_heads, tile.block_m, value_width, dtype=torch.float32)
        lse = q_HTD.new_empty(launch.num_parts, kv_heads, tile.block_m, dtype=torch.float32)
        _kernel[(launch.items.shape[0], kv_heads)](
            q_HTD, k_pool_KSD, v_pool_KSE, out, parts, lse, form.sinks_H, form.alibi_H, launch.items, spans, pages,
            factor, cap * _LOG2_E, form.window or 0, form.chunk or 0,
            q_HTD.stride(0), q_HTD.stride(1), *k_pool_KSD.stride()[:2], *v_pool_KSE.stride()[:2],
            **shape, WIDTH=width, BLOCK_D=block_d, PAGE=batch.page_size, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            HAS_SOFTCAP=cap > 0, HAS_ALIBI=form.alibi_H is not None,
            BANDED=form.window is not None or form.chunk is not None,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if launch.merges is not None:
            rows_per_tile = tile.block_m // shape["PADDED_GROUPS"]
            _merge_kernel[(launch.merges.shape[0], kv_heads, rows_per_tile * groups)](
                parts, lse, out, form.sinks_H, launch.merges, spans, **shape, BLOCK_M=tile.block_m, BLOCK_P=16,
                num_warps=4,
            )  # fmt: skip
    return out


def tile_of(kind: str, padded_groups: int, dtype: torch.dtype, width: int) -> Tile:
    """The tile of a launch.

    Bounded by the shared memory of the smallest devices (99 KB: sm_86, sm_89) and by registers, which
    tests/kernels/test_triton_compiles.py checks, and by tl.dot's least size of 16. Keys' places come from a load of the
    page table, which takes pipeline stages of its own: 5 stages keep two key blocks in flight, 3 only one.

    Args:
        kind: "narrow" or "wide": few rows per sequence, whose time is that of reading keys, or many.
        padded_groups: query heads per key/value head, a power of two.
        dtype: of queries and pools.
        width: the larger one of key and value width, a power of two.
    """
    if dtype == torch.float32:
        block_m, block_n, num_stages = 16, (32 if width <= 64 else 16), 2
    elif width <= 128:
        block_m, block_n, num_stages = 128, 64, 5
    elif width <= 256:
        block_m, block_n, num_stages = 64, 32, 2
    else:
        block_m, block_n, num_stages = 32, 16, 2
    if kind == "narrow":
        block_m = 16
        num_stages = 5 if width <= 256 and dtype != torch.float32 else 2
    block_m = max(block_m, padded_groups)
    num_warps = 8 if block_m >= 128 or (width == 256 and block_m >= 64) else 4
    return Tile(block_m, block_n, num_warps, num_stages)


def _tables(batch: PagedBatch) -> tuple[Tensor, Tensor]:
    """([sequences, 4]: first row, rows, position, place of its first page in the other one; pages of all), int32."""
    tables: tuple[Tensor, Tensor] | None = batch.memo.get("tables")
    if tables is None:
        rows: list[int] = []
        pages: list[Tensor] = []
        total = 0
        for span, run in zip(batch.spans, batch.runs, strict=True):
            num_pages = -(-span.length // batch.page_size)
            rows += (span.start, span.count, span.position, total)
            pages.append(_pages(span, run, num_pages, batch.page_size))
            total += num_pages
        tables = batch.memo["tables"] = (_upload(rows, 4, batch.device), torch.cat(pages).to(batch.device))
    return tables


def _pages(span: RowSpan, run: int | None, num_pages: int, page_size: int) -> Tensor:
    if run is not None:
        return torch.arange(run // page_size, run // page_size + num_pages, dtype=torch.int32)
    return torch.tensor(span.pages[:num_pages], dtype=torch.int32)


def _upload(numbers: list[int], columns: int, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32).view(-1, columns).to(device, non_blocking=True)


def _launches(
    batch: PagedBatch, form: AttentionForm, kv_heads: int, padded_groups: int, dtype: torch.dtype, width: int
) -> list[_Launch]:
    key = ("launches", form.window, form.chunk, kv_heads, padded_groups, dtype, width)
    launches: list[_Launch] | None = batch.memo.get(key)
    if launches is None:
        launches = batch.memo[key] = []
        rows = tile_of("narrow", padded_groups, dtype, width).block_m // padded_groups
        few = [index for index, span in enumerate(batch.spans) if span.count <= rows]
        many = [index for index, span in enumerate(batch.spans) if span.count > rows]
        for kind, spans in (("narrow", few), ("wide", many)):
            if spans:
                tile = tile_of(kind, padded_groups, dtype, width)
                tiles = _tiles(batch, spans, tile.block_m // padded_groups, form)
                most_keys = _keys_per_item(kind, tiles, kv_heads, _num_processors(batch.device))
                launches.append(_launch(tile, tiles, most_keys, batch.device))
    return launches


def _tiles(
    batch: PagedBatch, spans: Sequence[int], rows_per_tile: int, form: AttentionForm
) -> list[tuple[int, int, int, int]]:
    """(span, first row in it, first key, last key + 1) of each tile, those with most keys first."""
    tiles = []
    for index in spans:
        span = batch.spans[index]
        for row in range(0, span.count, rows_per_tile):
            position = span.position + row
            tiles.append((index, row, form.first_key(position), min(position + rows_per_tile, span.length)))
    return sorted(tiles, key=lambda tile: tile[2] - tile[3])


def _keys_per_item(kind: str, tiles: list[tuple[int, int, int, int]], kv_heads: int, num_processors: int) -> int:
    """Keys of an item such that all items together occupy the device a few times."""
    total = kv_heads * sum(last - first for _, _, first, last in tiles)
    return max(_MIN_KEYS_PER_ITEM[kind], -(-total // (_ITEMS_PER_PROCESSOR * num_processors)))


def _launch(tile: Tile, tiles: list[tuple[int, int, int, int]], most_keys: int, device: torch.device) -> _Launch:
    """Cut the keys of each tile into equal items of about `most_keys`, whole key blocks each."""
    items: list[int] = []
    merges: list[int] = []
    num_parts = 0
    for span, row, first, last in tiles:
        wanted = max(1, round((last - first) / most_keys))
        step = -(-(last - first) // (wanted * tile.block_n)) * tile.block_n
        count = -(-(last - first) // step)
        for index in range(count):
            start = first + index * step
            items += (span, row, start, min(start + step, last), num_parts + index if count > 1 else -1)
        if count > 1:
            merges += (span, row, num_parts, count)
            num_parts += count
    return _Launch(tile, _upload(items, 5, device), num_parts, _upload(merges, 4, device) if merges else None)


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _attend_keys(
    q_MD, max_M, sum_M, acc_ME, block, last_key, position_M, slope_M,
    k_ptr, v_ptr, pages_ptr, factor, cap, window, chunk, k_stride_s, v_stride_s,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BANDED: tl.constexpr, ALL_SEEN: tl.constexpr,
):  # fmt: skip
    """Take keys [block, block + BLOCK_N) into the running softmax; ALL_SEEN: every row sees every one of them."""
    key_N = block + tl.arange(0, BLOCK_N)
    d_D = tl.arange(0, BLOCK_D)
    e_E = tl.arange(0, BLOCK_E)
    real_N = key_N < last_key
    page_N = tl.load(pages_ptr + key_N // PAGE, mask=real_N, other=0)
    slot_N = page_N.to(tl.int64) * PAGE + key_N % PAGE
    k_mask_DN = (d_D < WIDTH)[:, None] & real_N[None, :]
    v_mask_NE = real_N[:, None] & (e_E < VALUE_WIDTH)[None, :]
    k_DN = tl.load(k_ptr + slot_N[None, :] * k_stride_s + d_D[:, None], mask=k_mask_DN, other=0.0)
    logits_MN = tl.dot(q_MD, k_DN, input_precision="ieee") * factor
    if HAS_SOFTCAP:
        logits_MN = (2.0 / (1.0 + tl.exp(-2.0 * logits_MN)) - 1.0) * cap
    if HAS_ALIBI:
        logits_MN += slope_M[:, None] * (key_N[None, :] - position_M[:, None]).to(tl.float32)
    seen_MN = real_N[None, :] & (key_N[None, :] <= position_M[:, None])
    if BANDED:
        if window > 0:
            seen_MN = seen_MN & (key_N[None, :] > position_M[:, None] - window)
        if chunk > 0:
            seen_MN = seen_MN & (key_N[None, :] // chunk == position_M[:, None] // chunk)
    if not ALL_SEEN:
        # a masked logit is finite, so that a row that sees nothing here has no inf - inf
        logits_MN = tl.where(seen_MN, logits_MN, -1.0e30)
    new_max_M = tl.maximum(max_M, tl.max(logits_MN, 1))
    weights_MN = tl.exp2(logits_MN - new_max_M[:, None])
    if not ALL_SEEN:
        weights_MN = tl.where(seen_MN, weights_MN, 0.0)
    decay_M = tl.exp2(max_M - new_max_M)
    v_NE = tl.load(v_ptr + slot_N[:, None] * v_stride_s + e_E[None, :], mask=v_mask_NE, other=0.0)
    sum_M = sum_M * decay_M + tl.sum(weights_MN, 1)
    acc_ME = tl.dot(weights_MN.to(v_NE.dtype), v_NE, acc_ME * decay_M[:, None], input_precision="ieee")
    return new_max_M, sum_M, acc_ME


@triton.jit(do_not_specialize=["factor", "cap", "window", "chunk"])
def _kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, parts_ptr, lse_ptr, sinks_ptr, alibi_ptr, items_ptr, spans_ptr, pages_ptr,
    factor, cap, window, chunk, q_stride_h, q_stride_t, k_stride_k, k_stride_s, v_stride_k, v_stride_s,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """One item for one key/value head: grid (items, KV_HEADS). Query, key and value rows have stride 1 inside."""
    item_ptr = items_ptr + tl.program_id(0).to(tl.int64) * 5
    kv_head = tl.program_id(1).to(tl.int64)
    span = tl.load(item_ptr).to(tl.int64)
    first_row = tl.load(item_ptr + 1)
    first_key = tl.load(item_ptr + 2)
    last_key = tl.load(item_ptr + 3)
    part = tl.load(item_ptr + 4).to(tl.int64)
    start = tl.load(spans_ptr + span * 4).to(tl.int64)
    count = tl.load(spans_ptr + span * 4 + 1)
    position = tl.load(spans_ptr + span * 4 + 2)
    pages_ptr += tl.load(spans_ptr + span * 4 + 3).to(tl.int64)
    k_ptr += kv_head * k_stride_k
    v_ptr += kv_head * v_stride_k

    lane_M = tl.arange(0, BLOCK_M)
    row_M = first_row + lane_M // PADDED_GROUPS
    group_M = lane_M % PADDED_GROUPS
    live_M = (row_M < count) & (group_M < GROUPS)
    head_M = kv_head * GROUPS + group_M
    position_M = position + row_M
    d_D = tl.arange(0, BLOCK_D)
    e_E = tl.arange(0, BLOCK_E)
    q_offset_M = head_M * q_stride_h + (start + row_M) * q_stride_t
    q_mask_MD = live_M[:, None] & (d_D < WIDTH)[None, :]
    q_MD = tl.load(q_ptr + q_offset_M[:, None] + d_D[None, :], mask=q_mask_MD, other=0.0)
    slope_M = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slope_M += tl.load(alibi_ptr + head_M, mask=live_M, other=0.0).to(tl.float32) * 1.4426950408889634

    max_M = tl.full([BLOCK_M], -1.0e30, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    middle = first_key  # the key blocks before it are seen by all rows of the tile
    if not BANDED:
        all_see = tl.minimum(last_key, position + first_row + 1)
        middle += tl.maximum(all_see - first_key, 0) // BLOCK_N * BLOCK_N
        for block in range(first_key, middle, BLOCK_N):
            max_M, sum_M, acc_ME = _attend_keys(
                q_MD, max_M, sum_M, acc_ME, block, last_key, position_M, slope_M,
                k_ptr, v_ptr, pages_ptr, factor, cap, window, chunk, k_stride_s, v_stride_s,
                WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, PAGE, BLOCK_N, HAS_SOFTCAP, HAS_ALIBI, BANDED, True,
            )  # fmt: skip
    for block in range(middle, last_key, BLOCK_N):
        max_M, sum_M, acc_ME = _attend_keys(
            q_MD, max_M, sum_M, acc_ME, block, last_key, position_M, slope_M,
            k_ptr, v_ptr, pages_ptr, factor, cap, window, chunk, k_stride_s, v_stride_s,
            WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, PAGE, BLOCK_N, HAS_SOFTCAP, HAS_ALIBI, BANDED, False,
        )  # fmt: skip

    live_ME = live_M[:, None] & (e_E < VALUE_WIDTH)[None, :]
    if part < 0:
        if HAS_SINKS:
            sink_M = tl.load(sinks_ptr + head_M, mask=live_M, other=0.0).to(tl.float32) * 1.4426950408889634
            new_max_M = tl.maximum(max_M, sink_M)
            decay_M = tl.exp2(max_M - new_max_M)
            sum_M = sum_M * decay_M + tl.exp2(sink_M - new_max_M)
            acc_ME = acc_ME * decay_M[:, None]
        out_ME = acc_ME / tl.where(sum_M > 0, sum_M, 1.0)[:, None]
        out_offset_M = ((start + row_M) * KV_HEADS * GROUPS + head_M) * VALUE_WIDTH
        tl.store(out_ptr + out_offset_M[:, None] + e_E[None, :], out_ME.to(out_ptr.dtype.element_ty), mask=live_ME)
    else:
        safe_sum_M = tl.where(sum_M > 0, sum_M, 1.0)
        lse_M = tl.where(sum_M > 0, max_M + tl.log2(safe_sum_M), -1.0e30)
        slot_M = (part * KV_HEADS + kv_head) * BLOCK_M + lane_M
        tl.store(lse_ptr + slot_M, lse_M, mask=live_M)
        part_ME = acc_ME / safe_sum_M[:, None]
        tl.store(parts_ptr + slot_M[:, None] * VALUE_WIDTH + e_E[None, :], part_ME, mask=live_ME)


@triton.jit
def _merge_kernel(
    parts_ptr, lse_ptr, out_ptr, sinks_ptr, merges_ptr, spans_ptr,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Parts of one query head of one row, weighted by their shares of the softmax: grid (tiles, KV_HEADS, lanes)."""
    merge_ptr = merges_ptr + tl.program_id(0).to(tl.int64) * 4
    kv_head = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(2)
    span = tl.load(merge_ptr).to(tl.int64)
    row = tl.load(merge_ptr + 1) + lane // GROUPS
    first_part = tl.load(merge_ptr + 2).to(tl.int64)
    num_parts = tl.load(merge_ptr + 3)
    start = tl.load(spans_ptr + span * 4).to(tl.int64)
    count = tl.load(spans_ptr + span * 4 + 1)
    head = kv_head * GROUPS + lane % GROUPS
    tile_lane = lane // GROUPS * PADDED_GROUPS + lane % GROUPS
    e_E = tl.arange(0, BLOCK_E)
    if row < count:
        most = tl.full([1], -1.0e30, tl.float32)
        total = tl.zeros([1], tl.float32)
        acc_E = tl.zeros([BLOCK_E], tl.float32)
        if HAS_SINKS:
            most = tl.zeros([1], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
            total += 1.0
        for block in range(0, num_parts, BLOCK_P):
            part_P = block + tl.arange(0, BLOCK_P)
            real_P = part_P < num_parts
            slot_P = ((first_part + part_P) * KV_HEADS + kv_head) * BLOCK_M + tile_lane
            lse_P = tl.load(lse_ptr + slot_P, mask=real_P, other=-1.0e30)
            mask_PE = real_P[:, None] & (e_E < VALUE_WIDTH)[None, :]
            part_PE = tl.load(parts_ptr + slot_P[:, None] * VALUE_WIDTH + e_E[None, :], mask=mask_PE, other=0.0)
            new_most = tl.maximum(most, tl.max(lse_P, 0))
            decay = tl.exp2(most - new_most)
            share_P = tl.where(real_P, tl.exp2(lse_P - new_most), 0.0)
            total = total * decay + tl.sum(share_P, 0)
            acc_E = acc_E * decay + tl.sum(share_P[:, None] * part_PE, 0)
            most = new_most
        out_offset = ((start + row) * KV_HEADS * GROUPS + head) * VALUE_WIDTH
        tl.store(out_ptr + out_offset + e_E, (acc_E / total).to(out_ptr.dtype.element_ty), mask=e_E < VALUE_WIDTH)

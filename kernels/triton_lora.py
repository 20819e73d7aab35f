"""Adapters in Triton: shrink, expand and the gradients of pools. Maths, legend and data flow: `lora`.

    rows of a step --layout, once--> tiles: up to BLOCK_M rows of one adapter; ranks of each (target, adapter)
    source_TC --_shrink_kernel--> h [splits, ragged] --_expand_kernel--> y or dx
                                                     '--_gradient_kernel (h, source)--> gradients of rank rows

A program works on rows of one adapter and on as many rank rows as that adapter has, whose numbers it reads from a
table, so that adapters of any ranks share a launch, nothing is padded to the largest and no weight of one adapter ever
meets a row of another. One launch covers all targets of a fused linear: their pools are addressed from the first one's
address. Long reductions of few rows are split into partial sums, which expand adds up in a fixed order: there are no
atomics, and as long as the number of splits is the same (it depends on the width, and on whether the step has more than
_MAX_SPLIT_ROWS rows) a row's result is to the bit what it is alone. h is fp32; products with it are in TF32 where the
other factor is of half precision, which rounds less than bf16 and doesn't overflow as fp16 does.

BLOCK_N is 64: with 128, an expand like this one is known to give NaN on Hopper; `lora_self_test` looks for the like.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from swarm.kernels import torch_lora
from swarm.kernels.lora import LoraBatch, LoraTarget, Side

_MIN_PLAIN_ROWS = 512
"""Rows of a batch of one adapter from which plain matrix products take over."""
_MAX_SPLIT_ROWS = 256
_MIN_SPLIT_WIDTH = 1024
"""Columns of a split, at least."""
_MAX_SPLITS = 8
_MAX_TARGETS = 4
BLOCK_N = 64
BLOCK_K = 128


class _Part(NamedTuple):
    """Up to _MAX_TARGETS targets, their layout on the device, int32; S adapters in the order of the batch."""

    targets: Sequence[LoraTarget]
    deltas: dict[Side, list[int]]
    """Elements from the first target's pool to each one's."""
    aligned: dict[Side, bool]
    """Whether rows of pools, and targets' columns, start and end at multiples of 16 elements."""
    order: Tensor
    """Rows of the step, adapter by adapter."""
    tiles: Tensor
    """[tiles, 3]: adapter, first row in `order`, rows."""
    places: Tensor
    """[S, 2]: first row in `order`, rows."""
    sides: dict[Side, Tensor]
    """[targets, 4]: first column, width, stride of the pool's rows, first of its rank rows."""
    ranks: Tensor
    """[targets, S, 4]: rank, first of its rank rows within the target, first element in h, bits of the scale."""
    rows: dict[Side, Tensor]
    """Rank rows, of target after target and adapter after adapter."""
    num_ranks: list[int]
    """Of each target."""
    h_size: int
    max_rank: int
    block_m: int
    num_splits: int


class _H(NamedTuple):
    """[splits, elements] of each part, of which each element is the sum over splits."""

    parts: list[tuple[_Part, Tensor]]


def add(y_TO: Tensor, x_TI: Tensor, targets: Sequence[LoraTarget], batch: LoraBatch) -> None:
    """See `LoraForm`."""
    if batch.homogeneous is not None and batch.num_rows >= _MIN_PLAIN_ROWS:
        torch_lora.add(y_TO, x_TI, targets, batch)
    else:
        expand(y_TO, shrink(x_TI, targets, "a", batch), targets, "b", batch)


def shrink(source: Tensor, targets: Sequence[LoraTarget], side: Side, batch: LoraBatch) -> _H:
    """See `LoraForm`."""
    if source.stride(1) != 1:
        source = source.contiguous()
    h = _H([])
    for start in range(0, len(targets), _MAX_TARGETS):
        part = _part(targets[start : start + _MAX_TARGETS], side, batch, source.device)
        h_SE = source.new_empty(part.num_splits, part.h_size, dtype=torch.float32)
        h.parts.append((part, h_SE))
        if not part.h_size:
            continue
        pool, block_r = part.targets[0].pool(side), _block_r(part.max_rank)
        grid = (len(part.tiles), part.num_splits, len(part.targets) * triton.cdiv(part.max_rank, block_r))
        _shrink_kernel[grid](
            source, pool, h_SE, part.order, part.tiles, part.places, part.sides[side], part.ranks, part.rows[side],
            *part.deltas[side], source.stride(0), part.h_size, len(part.places), part.num_splits,
            NUM_TARGETS=len(part.targets), ALIGNED=part.aligned[side], PRECISION=_precision(source, pool),
            SAME=source.dtype == pool.dtype, BLOCK_M=part.block_m, BLOCK_R=block_r, BLOCK_K=BLOCK_K,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return h


def expand(into: Tensor, h: _H, targets: Sequence[LoraTarget], side: Side, batch: LoraBatch) -> None:
    """See `LoraForm`."""
    for part, h_SE in h.parts:
        if not part.h_size:
            continue
        pool, shared = part.targets[0].pool(side), side == "a"
        width = max(target.width(side) for target in part.targets)
        grid = (len(part.tiles), triton.cdiv(width, BLOCK_N), 1 if shared else len(part.targets))
        _expand_kernel[grid](
            into, pool, h_SE, part.order, part.tiles, part.places, part.sides[side], part.ranks, part.rows[side],
            *part.deltas[side], *into.stride(), part.h_size, len(part.places),
            NUM_TARGETS=len(part.targets), SHARED=shared, ALIGNED=part.aligned[side], PRECISION=_precision(into, pool),
            NUM_SPLITS=part.num_splits, BLOCK_M=part.block_m, BLOCK_R=_block_r(part.max_rank), BLOCK_N=BLOCK_N,
            num_warps=4, num_stages=2,
        )  # fmt: skip


def pool_gradients(
    h: _H, source: Tensor, targets: Sequence[LoraTarget], side: Side, batch: LoraBatch
) -> list[tuple[Tensor, Tensor]]:
    """See `LoraForm`."""
    results = []
    for part, h_SE in h.parts:
        starts = itertools.accumulate(part.num_ranks, initial=0)
        for index, (target, num_ranks, start) in enumerate(zip(part.targets, part.num_ranks, starts, strict=False)):
            columns = target.of(source, side)
            sums_RC = source.new_empty(num_ranks, columns.shape[1], dtype=torch.float32)
            results.append((part.rows[side][start : start + num_ranks], sums_RC))
            if not num_ranks:
                continue
            block_r = _block_r(part.max_rank)
            grid = (len(part.places), triton.cdiv(columns.shape[1], BLOCK_N), triton.cdiv(part.max_rank, block_r))
            _gradient_kernel[grid](
                columns, h_SE, sums_RC, part.order, part.places, part.ranks[index], *columns.stride(), part.h_size,
                columns.shape[1], NUM_SPLITS=part.num_splits, PRECISION=_precision(columns, columns), BLOCK_M=32,
                BLOCK_R=block_r, BLOCK_N=BLOCK_N, num_warps=4, num_stages=2,
            )  # fmt: skip
    return results


def _block_r(max_rank: int) -> int:
    return 16 if max_rank <= 16 else 32


def _precision(one: Tensor, other: Tensor) -> str:
    """Of products: TF32 holds a number of half precision as it is, but not one of fp32."""
    return "ieee" if torch.float32 in (one.dtype, other.dtype) else "tf32"


def _part(targets: Sequence[LoraTarget], side: Side, batch: LoraBatch, device: torch.device) -> _Part:
    key = ("part", side, *map(id, targets))
    part: _Part | None = batch.memo.get(key)
    if part is None:
        layout_key = ("layout", side, *((id(it.ranks), it.column, *_strides(it)) for it in targets))
        layout: _Part | None = batch.memo.get(layout_key)
        if layout is None:
            layout = batch.memo[layout_key] = _layout(targets, side, batch, device)
        part = batch.memo[key] = _placed(layout, targets)
    return part


def _strides(target: LoraTarget) -> tuple[int, ...]:
    return (*target.a_pool_RI.shape, *target.a_pool_RI.stride(), *target.b_pool_RO.shape, *target.b_pool_RO.stride())


def _placed(layout: _Part, targets: Sequence[LoraTarget]) -> _Part:
    """A layout for targets that have it, in pools of their own."""
    deltas: dict[Side, list[int]] = {}
    aligned: dict[Side, bool] = {}
    for side in ("a", "b"):
        pools = [target.pool(side) for target in targets]
        if {pool.dtype for pool in pools} != {pools[0].dtype} or any(pool.stride(1) != 1 for pool in pools):
            raise ValueError("parts of one linear need pools of one dtype, with rows that are contiguous")
        bytes_between = [pool.data_ptr() - pools[0].data_ptr() for pool in pools]
        elements = [distance // pools[0].element_size() for distance in bytes_between]
        numbers = [*elements, *(n for it in targets for n in (it.column, it.width(side), it.pool(side).stride(0)))]
        aligned[side] = all(number % 16 == 0 for number in numbers) and pools[0].data_ptr() % 16 == 0
        deltas[side] = (elements[1:] + [0] * _MAX_TARGETS)[: _MAX_TARGETS - 1]
    return layout._replace(targets=targets, deltas=deltas, aligned=aligned)


def _layout(targets: Sequence[LoraTarget], side: Side, batch: LoraBatch, device: torch.device) -> _Part:
    counts = [len(batch.rows_of[adapter]) for adapter in batch.adapters]
    firsts = list(itertools.accumulate(counts, initial=0))
    block_m = 64 if max(counts) > 32 else 32 if max(counts) > 16 else 16
    tiles = [
        (segment, firsts[segment] + row, min(block_m, count - row))
        for segment, count in enumerate(counts)
        for row in range(0, count, block_m)
    ]
    table: list[int] = []
    rows: dict[Side, list[int]] = {"a": [], "b": []}
    rank_starts, h_size, max_rank = [0], 0, 0
    scales: list[float] = []
    for target in targets:
        for adapter, count in zip(batch.adapters, counts, strict=True):
            ranks = target.ranks.get(adapter)
            rank = 0 if ranks is None else ranks.rank
            table += (rank, len(rows["a"]) - rank_starts[-1], h_size, 0)
            scales.append(1.0 if ranks is None else ranks.scale)
            if ranks is not None:
                rows["a"] += ranks.a_rows
                rows["b"] += ranks.b_rows
            h_size += count * rank
            max_rank = max(max_rank, rank)
        rank_starts.append(len(rows["a"]))
    table[3::4] = torch.tensor(scales, dtype=torch.float32).view(torch.int32).tolist()
    sides = {
        each: [
            number
            for target, start in zip(targets, rank_starts, strict=False)
            for number in (target.column if each == "b" else 0, target.width(each), target.pool(each).stride(0), start)
        ]
        for each in ("a", "b")
    }
    order, tile_table, places, side_a, side_b, rank_table, rows_a, rows_b = _upload(
        [
            [row for adapter in batch.adapters for row in batch.rows_of[adapter]],
            [number for tile in tiles for number in tile],
            [number for pair in zip(firsts, counts, strict=False) for number in pair],
            sides["a"],
            sides["b"],
            table,
            rows["a"],
            rows["b"],
        ],
        device,
    )
    return _Part(
        targets=targets, deltas={}, aligned={}, order=order, tiles=tile_table.view(-1, 3), places=places.view(-1, 2),
        sides={"a": side_a.view(-1, 4), "b": side_b.view(-1, 4)},
        ranks=rank_table.view(len(targets), len(counts), 4), rows={"a": rows_a, "b": rows_b},
        num_ranks=[last - first for first, last in itertools.pairwise(rank_starts)], h_size=h_size, max_rank=max_rank,
        block_m=block_m, num_splits=_num_splits(max(target.width(side) for target in targets), batch.num_rows),
    )  # fmt: skip


def _num_splits(width: int, num_rows: int) -> int:
    """Of shrink's reduction, so that few rows occupy a device."""
    return 1 if num_rows > _MAX_SPLIT_ROWS else max(1, min(_MAX_SPLITS, width // _MIN_SPLIT_WIDTH))


def _upload(lists: list[list[int]], device: torch.device) -> list[Tensor]:
    """Tensors of these numbers, in one copy; each starts at a multiple of 16 bytes."""
    starts = list(itertools.accumulate((-(-len(numbers) // 4) * 4 for numbers in lists), initial=0))
    padded = [number for numbers in lists for number in (*numbers, *[0] * (-len(numbers) % 4))]
    uploaded = torch.tensor(padded, dtype=torch.int32).to(device, non_blocking=True)
    return [uploaded.narrow(0, start, len(numbers)) for start, numbers in zip(starts, lists, strict=False)]


@triton.jit
def _delta_of(target, delta_1, delta_2, delta_3, ALIGNED: tl.constexpr):
    """Elements from the first target's pool to this one's."""
    delta = tl.where(target == 1, delta_1, 0).to(tl.int64)
    delta += tl.where(target == 2, delta_2, 0).to(tl.int64)
    delta += tl.where(target == 3, delta_3, 0).to(tl.int64)
    if ALIGNED:
        delta = tl.multiple_of(delta, 16)
    return delta


@triton.jit(do_not_specialize=["delta_1", "delta_2", "delta_3", "h_size", "num_segments", "num_splits"])
def _shrink_kernel(
    source_ptr, pool_ptr, h_ptr, order_ptr, tiles_ptr, places_ptr, sides_ptr, ranks_ptr, rows_ptr,
    delta_1: tl.int64, delta_2: tl.int64, delta_3: tl.int64, source_stride, h_size, num_segments, num_splits,
    NUM_TARGETS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, SAME: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_R ranks of one tile and target over one split of the columns: grid (tiles, splits, targets * ranks)."""
    segment = tl.load(tiles_ptr + tl.program_id(0) * 3)
    first = tl.load(tiles_ptr + tl.program_id(0) * 3 + 1)
    count = tl.load(tiles_ptr + tl.program_id(0) * 3 + 2)
    split = tl.program_id(1)
    target = tl.program_id(2) % NUM_TARGETS
    rank_R = tl.program_id(2) // NUM_TARGETS * BLOCK_R + tl.arange(0, BLOCK_R)
    entry_ptr = ranks_ptr + (target * num_segments + segment) * 4
    rank = tl.load(entry_ptr)
    if tl.program_id(2) // NUM_TARGETS * BLOCK_R >= rank:
        return
    place = tl.load(entry_ptr + 1) + tl.load(sides_ptr + target * 4 + 3)
    h_start = tl.load(entry_ptr + 2).to(tl.int64)
    scale = tl.load(entry_ptr + 3).to(tl.float32, bitcast=True)
    column = tl.load(sides_ptr + target * 4)
    width = tl.load(sides_ptr + target * 4 + 1)
    stride = tl.load(sides_ptr + target * 4 + 2)
    if ALIGNED:
        column = tl.multiple_of(column, 16)
        stride = tl.multiple_of(stride, 16)
    lane_M = tl.arange(0, BLOCK_M)
    live_M = lane_M < count
    real_R = rank_R < rank
    row_M = tl.load(order_ptr + first + lane_M, mask=live_M, other=0).to(tl.int64)
    row_R = tl.load(rows_ptr + place + rank_R, mask=real_R, other=0).to(tl.int64)
    source_M_ptr = source_ptr + row_M * source_stride + column
    pool_R_ptr = pool_ptr + _delta_of(target, delta_1, delta_2, delta_3, ALIGNED) + row_R * stride
    acc_MR = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    per_split = tl.cdiv(tl.cdiv(width, num_splits), BLOCK_K) * BLOCK_K
    last = tl.minimum(width, (split + 1) * per_split)
    if ALIGNED:
        last = tl.multiple_of(last, 16)  # a mask must be as regular as its addresses for loads of 16 bytes
    for k in range(split * per_split, last, BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        real_K = k_K < last
        source_MK = tl.load(source_M_ptr[:, None] + k_K[None, :], mask=live_M[:, None] & real_K[None, :], other=0.0)
        pool_KR = tl.load(pool_R_ptr[None, :] + k_K[:, None], mask=real_R[None, :] & real_K[:, None], other=0.0)
        if SAME:
            acc_MR = tl.dot(source_MK, pool_KR, acc_MR, input_precision=PRECISION)
        else:
            acc_MR = tl.dot(source_MK.to(tl.float32), pool_KR.to(tl.float32), acc_MR, input_precision=PRECISION)
    # rows of the tile are counted from the first row of their adapter
    row_in_segment_M = first - tl.load(places_ptr + segment * 2) + lane_M
    h_M = split.to(tl.int64) * h_size + h_start + row_in_segment_M.to(tl.int64) * rank
    tl.store(h_ptr + h_M[:, None] + rank_R[None, :], acc_MR * scale, mask=live_M[:, None] & real_R[None, :])


@triton.jit(do_not_specialize=["delta_1", "delta_2", "delta_3", "h_size", "num_segments"])
def _expand_kernel(
    into_ptr, pool_ptr, h_ptr, order_ptr, tiles_ptr, places_ptr, sides_ptr, ranks_ptr, rows_ptr,
    delta_1: tl.int64, delta_2: tl.int64, delta_3: tl.int64, into_stride, into_stride_n, h_size, num_segments,
    NUM_TARGETS: tl.constexpr, SHARED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    NUM_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one tile: grid (tiles, columns, targets), or (tiles, columns, 1) where targets share them."""
    segment = tl.load(tiles_ptr + tl.program_id(0) * 3)
    first = tl.load(tiles_ptr + tl.program_id(0) * 3 + 1)
    count = tl.load(tiles_ptr + tl.program_id(0) * 3 + 2)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_target = tl.program_id(2)
    last_target = first_target + 1
    if SHARED:
        last_target = NUM_TARGETS
    width = tl.load(sides_ptr + first_target * 4 + 1)
    column = tl.load(sides_ptr + first_target * 4)
    if ALIGNED:
        column = tl.multiple_of(column, 16)
        width = tl.multiple_of(width, 16)
    if tl.program_id(1) * BLOCK_N >= width:
        return
    lane_M = tl.arange(0, BLOCK_M)
    live_M = lane_M < count
    real_N = n_N < width
    row_M = tl.load(order_ptr + first + lane_M, mask=live_M, other=0).to(tl.int64)
    row_in_segment_M = (first - tl.load(places_ptr + segment * 2) + lane_M).to(tl.int64)
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for target in range(first_target, last_target):
        entry_ptr = ranks_ptr + (target * num_segments + segment) * 4
        rank = tl.load(entry_ptr)
        place = tl.load(entry_ptr + 1) + tl.load(sides_ptr + target * 4 + 3)
        h_M_ptr = h_ptr + tl.load(entry_ptr + 2).to(tl.int64) + row_in_segment_M * rank
        stride = tl.load(sides_ptr + target * 4 + 2)
        if ALIGNED:
            stride = tl.multiple_of(stride, 16)
        target_pool_ptr = pool_ptr + _delta_of(target, delta_1, delta_2, delta_3, ALIGNED)
        for r in range(0, rank, BLOCK_R):
            rank_R = r + tl.arange(0, BLOCK_R)
            real_R = rank_R < rank
            h_mask_MR = live_M[:, None] & real_R[None, :]
            h_MR = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for split in tl.static_range(NUM_SPLITS):
                split_ptr = h_M_ptr + tl.cast(h_size, tl.int64) * split
                h_MR += tl.load(split_ptr[:, None] + rank_R[None, :], mask=h_mask_MR, other=0.0)
            row_R = tl.load(rows_ptr + place + rank_R, mask=real_R, other=0).to(tl.int64)
            pool_RN_ptr = target_pool_ptr + row_R[:, None] * stride + n_N[None, :]
            pool_RN = tl.load(pool_RN_ptr, mask=real_R[:, None] & real_N[None, :], other=0.0)
            acc_MN = tl.dot(h_MR, pool_RN.to(tl.float32), acc_MN, input_precision=PRECISION)
    into_MN_ptr = into_ptr + row_M[:, None] * into_stride + (column + n_N).to(tl.int64)[None, :] * into_stride_n
    live_MN = live_M[:, None] & real_N[None, :]
    into_MN = tl.load(into_MN_ptr, mask=live_MN, other=0.0).to(tl.float32)
    tl.store(into_MN_ptr, (into_MN + acc_MN).to(into_ptr.dtype.element_ty), mask=live_MN)


@triton.jit(do_not_specialize=["h_size"])
def _gradient_kernel(
    source_ptr, h_ptr, sums_ptr, order_ptr, places_ptr, ranks_ptr, source_stride, source_stride_n, h_size, width,
    NUM_SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_R ranks and BLOCK_N columns of one adapter, over all its rows: grid (adapters, columns, ranks)."""
    segment = tl.program_id(0)
    rank = tl.load(ranks_ptr + segment * 4)
    if tl.program_id(2) * BLOCK_R >= rank:
        return
    first = tl.load(places_ptr + segment * 2)
    count = tl.load(places_ptr + segment * 2 + 1)
    place = tl.load(ranks_ptr + segment * 4 + 1).to(tl.int64)
    h_ptr += tl.load(ranks_ptr + segment * 4 + 2).to(tl.int64)
    rank_R = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_R = rank_R < rank
    real_N = n_N < width
    acc_RN = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_M):
        m_M = start + tl.arange(0, BLOCK_M)
        live_M = m_M < count
        row_M = tl.load(order_ptr + first + m_M, mask=live_M, other=0).to(tl.int64)
        h_RM = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        for split in tl.static_range(NUM_SPLITS):
            h_RM_ptr = h_ptr + tl.cast(h_size, tl.int64) * split + m_M.to(tl.int64)[None, :] * rank + rank_R[:, None]
            h_RM += tl.load(h_RM_ptr, mask=real_R[:, None] & live_M[None, :], other=0.0)
        source_MN_ptr = source_ptr + row_M[:, None] * source_stride + n_N.to(tl.int64)[None, :] * source_stride_n
        source_MN = tl.load(source_MN_ptr, mask=live_M[:, None] & real_N[None, :], other=0.0)
        acc_RN = tl.dot(h_RM, source_MN.to(tl.float32), acc_RN, input_precision=PRECISION)
    sums_ptr_RN = sums_ptr + (place + rank_R)[:, None] * width + n_N[None, :]
    tl.store(sums_ptr_RN, acc_RN, mask=real_R[:, None] & real_N[None, :])

"""What the rows of a step do in adapters of one layout of ranks, derived once for all layers and steps.

    adapter of each row, ranks of each adapter ─plan_of─► Plan ─┬─ Sparse: rows of adapters that have few in the step
                                                                └─ Dense: one adapter with many rows

Row numbers alone: no weights are read and nothing is multiplied here. Legend: `lora`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swarm.kernels.lora import AdapterRanks, LoraBatch, LoraTarget, Side

_MIN_DENSE_ROWS = 16
"""Rows of an adapter from which two matrix products beat reading its ranks once per row."""


class Numbers(NamedTuple):
    """Numbers of rows, which are a slice where they ascend by one."""

    first: int
    num: int
    listed: Tensor | None
    """All of them, where they are no run."""

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor: a view if they are a run."""
        if self.listed is not None:
            return tensor.index_select(0, self.listed)
        return tensor if self.num == len(tensor) else tensor.narrow(0, self.first, self.num)


class Entries(NamedTuple):
    """One side of a sparse part's entries, which are (row, rank) pairs in order of rows."""

    in_pool: Tensor
    """[entries]: the rank row."""
    used: Numbers
    """The rank rows of all adapters of the part, one adapter after the other."""
    among_used: Tensor
    """[entries]: where the rank row is in `used`."""


class Sparse(NamedTuple):
    """The adapters with few rows each."""

    rows: Tensor | None
    """Rows of the step; None if all are here (one without an adapter has no entries)."""
    num_rows: int
    offsets: Tensor
    """[rows + 1]: first entry of each row."""
    a: Entries
    b: Entries
    scale: float
    """Of all entries, or 1."""
    scales: Tensor | None
    """[entries], when they differ."""
    members: list[tuple[AdapterRanks, Tensor, Tensor]]
    """Each adapter, its rows of the step, and the entries [n, r] of these."""


class Dense(NamedTuple):
    """An adapter with many rows."""

    adapter: AdapterRanks
    rows: Numbers
    a: Numbers
    b: Numbers

    def ranks(self, pool: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
        """[r, width]: a view of the pool, if it can be."""
        return (self.a if side == "a" else self.b).of(pool).to(dtype)


class Plan(NamedTuple):
    """What the rows of a step do in the targets of one layout of ranks."""

    sparse: Sparse | None
    dense: list[Dense]
    ranks: object
    """Keeps the mapping alive whose id is the key of this plan."""


def plan_of(target: LoraTarget, batch: LoraBatch, source: Tensor) -> Plan:
    """The plan of a batch for a target, kept with the batch.

    Args:
        target: one of those that share a mapping of ranks.
        batch: whose rows.
        source: of the dtype and device that is computed in.
    """
    key = ("plan", id(target.ranks), source.dtype, source.device)
    plan: Plan | None = batch.memo.get(key)
    if plan is None:
        plan = batch.memo[key] = _make_plan(target, batch, source.dtype, source.device)
    return plan


def _make_plan(target: LoraTarget, batch: LoraBatch, dtype: torch.dtype, device: torch.device) -> Plan:
    sparse_runs = device.type == "cpu"
    mine = {adapter: ranks for adapter in batch.adapters if (ranks := target.ranks.get(adapter)) and ranks.rank}
    few = {
        adapter: ranks
        for adapter, ranks in mine.items()
        if sparse_runs and adapter != batch.homogeneous and len(batch.rows_of[adapter]) < _MIN_DENSE_ROWS
    }
    dense = [
        Dense(ranks, *(_numbers(it, device) for it in (batch.rows_of[adapter], ranks.a_rows, ranks.b_rows)))
        for adapter, ranks in mine.items()
        if adapter not in few
    ]
    return Plan(_sparse(few, batch, dtype) if few else None, dense, target.ranks)


def _sparse(adapters: dict[int, AdapterRanks], batch: LoraBatch, dtype: torch.dtype) -> Sparse:
    adapter_of = {row: adapter for adapter in adapters for row in batch.rows_of[adapter]}
    rows = sorted(adapter_of)
    every = 2 * len(rows) > batch.num_rows
    listed = range(batch.num_rows) if every else rows
    lengths = [adapters[adapter_of[row]].rank if row in adapter_of else 0 for row in listed]
    offsets = list(itertools.accumulate(lengths, initial=0))
    starts = dict(zip(listed, offsets, strict=False))
    scales = {ranks.scale for ranks in adapters.values()}
    uniform = scales.pop() if len(scales) == 1 else None
    each = [adapters[adapter_of[row]].scale for row in rows for _ in adapters[adapter_of[row]].a_rows]
    members = [
        (ranks, torch.tensor(mine), torch.tensor([starts[row] for row in mine])[:, None] + torch.arange(ranks.rank))
        for adapter, ranks in adapters.items()
        if (mine := batch.rows_of[adapter])
    ]
    return Sparse(
        rows=None if every else torch.tensor(rows),
        num_rows=len(listed),
        offsets=torch.tensor(offsets),
        a=_entries(adapters, [adapter_of[row] for row in rows], "a"),
        b=_entries(adapters, [adapter_of[row] for row in rows], "b"),
        scale=1.0 if uniform is None else uniform,
        scales=torch.tensor(each, dtype=dtype) if uniform is None else None,
        members=members,
    )


def _entries(adapters: dict[int, AdapterRanks], order: list[int], side: Side) -> Entries:
    starts = dict(zip(adapters, itertools.accumulate((it.rank for it in adapters.values()), initial=0), strict=False))
    in_pool = [rank for adapter in order for rank in adapters[adapter].rows(side)]
    used = [rank for ranks in adapters.values() for rank in ranks.rows(side)]
    among_used = [starts[adapter] + j for adapter in order for j in range(adapters[adapter].rank)]
    return Entries(torch.tensor(in_pool), _numbers(used, torch.device("cpu")), torch.tensor(among_used))


def _numbers(numbers: Sequence[int], device: torch.device) -> Numbers:
    first, count = numbers[0], len(numbers)
    run = numbers == range(first, first + count) or list(numbers) == list(range(first, first + count))
    return Numbers(first, count, None if run else torch.tensor(list(numbers), device=device))

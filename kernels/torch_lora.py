"""Adapters with torch's own operators: what a CPU runs, and the fallback of a GPU. Maths, legend, flow: `lora`.

    rows of a step --torch_lora_plan, once per layout-> sparse: adapters with few rows of the step
                                                         h   = sampled product of x with just the row's own ranks
                                                         y  += embedding bag of these ranks, weighted by h
                                                       dense: adapters with many rows, two matrix products each

In the sparse part a step is a sparse matrix [T, R] whose row t has an entry for every rank of t's adapter: shrink
evaluates x . A^T at these entries only, and expand multiplies by B^T. Each reads exactly the rank rows that it needs,
where they lie in the pool, for any mix of ranks; a row's result is to the bit what it is alone.

`add`, which a decode step calls a hundred times with little to do, works out once per batch what is to be done in each
linear (`_ready`): on a whole step of the embedded model that saves a third of what 8 distinct adapters cost.

Measured on one core, which decides the form: 7 linears of 30 layers of SmolLM2-135M in fp32, 32 rows, ms. The base
linears, packed, take 41; reading the weights of 32 adapters of rank 16 just once takes 17:

    distinct adapters of rank 16                    1      4      8     32
    sparse (sampled product + embedding bag)      8.1   10.4   ~12   22-26
    dense, adapter by adapter                     6.2   20.3   21.4   > 68
    masked product with all resident ranks        5.0   24.3   50.5   > 135
    gathered and batched, equal ranks only                            35.4

That is near the bound of 32 adapters: their weights are 1.5 times the base's. Pools of half precision are converted on
the way, which takes 1.5 times as long and keeps half as many bytes.

The masked product (one dense [T, all ranks], others' entries zeroed, one expand) is not among the forms: it loses from
two adapters on, and lets a NaN of one adapter into everybody's rows.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swarm.kernels.lora import LoraBatch, LoraTarget, Side
from swarm.kernels.torch_lora_plan import Dense, Numbers, Plan, Sparse, plan_of


class _H(NamedTuple):
    """The h of one target."""

    plan: Plan
    sparse_E: Tensor
    """Of the sparse part's entries."""
    dense: list[Tensor]
    """[n, r] of each dense adapter."""


def add(y_TO: Tensor, x_TI: Tensor, targets: Sequence[LoraTarget], batch: LoraBatch) -> None:
    """See `LoraForm`."""
    ready = _ready(targets, batch)
    if not ready.dtype == x_TI.dtype == y_TO.dtype:
        expand(y_TO, shrink(x_TI, targets, "a", batch), targets, "b", batch)
        return
    whole = y_TO.shape[1]
    for part in ready.parts:
        into = y_TO if part.width == whole else y_TO.narrow(1, part.column, part.width)
        for product in part.products:
            _add_product(into, x_TI, product)
        if part.sampled is not None:
            _add_sampled(into, x_TI, part.sampled)


def shrink(source: Tensor, targets: Sequence[LoraTarget], side: Side, batch: LoraBatch) -> list[_H]:
    """See `LoraForm`."""
    source = source.to(_exact(source.dtype))
    h = []
    for target in targets:
        plan = plan_of(target, batch, source)
        columns, pool = target.of(source, side), target.pool(side)
        sparse_E = source.new_empty(0)
        if plan.sparse is not None:
            sparse_E = _shrink_sparse(columns, pool, plan.sparse, side)
        h.append(_H(plan, sparse_E, [_shrink_dense(columns, pool, dense, side) for dense in plan.dense]))
    return h


def expand(into: Tensor, h: list[_H], targets: Sequence[LoraTarget], side: Side, batch: LoraBatch) -> None:
    """See `LoraForm`."""
    for target, (plan, sparse_E, dense) in zip(targets, h, strict=True):
        columns, pool = target.of(into, side), target.pool(side)
        if plan.sparse is not None:
            _expand_sparse(columns, sparse_E, pool, plan.sparse, side)
        for part, h_nr in zip(plan.dense, dense, strict=True):
            _expand_dense(columns, h_nr, pool, part, side)


def pool_gradients(
    h: list[_H], source: Tensor, targets: Sequence[LoraTarget], side: Side, batch: LoraBatch
) -> list[tuple[Tensor, Tensor]]:
    """See `LoraForm`."""
    source = source.to(_exact(source.dtype))
    results = []
    for target, (plan, sparse_E, dense) in zip(targets, h, strict=True):
        columns = target.of(source, side)
        ranks: list[int] = []
        sums = [source.new_empty(0, columns.shape[1])]
        for adapter, rows, entries_nr in plan.sparse.members if plan.sparse is not None else ():
            ranks += adapter.rows(side)
            sums.append(sparse_E[entries_nr].t() @ columns[rows])
        for part, h_nr in zip(plan.dense, dense, strict=True):
            ranks += part.adapter.rows(side)
            sums.append(h_nr.t() @ part.rows.of(columns))
        results.append((torch.tensor(ranks, dtype=torch.int64, device=source.device), torch.cat(sums)))
    return results


class _Product(NamedTuple):
    """Two matrix products of one adapter's rows."""

    rows: Numbers | None
    """None: all of them."""
    a_Ir: Tensor
    b_rO: Tensor
    scale: float


class _Sampled(NamedTuple):
    """The sparse part of one target."""

    part: Sparse
    a_IR: Tensor
    h_TR: Tensor
    """Sparse: the entries that are to be computed, at every step anew."""
    h_E: Tensor
    """Its values."""
    b_RO: Tensor


class _ReadyPart(NamedTuple):
    """What is to be done in one target."""

    products: list[_Product]
    sampled: _Sampled | None
    column: int
    width: int


class _Ready(NamedTuple):
    """What `add` does in the targets of one linear, worked out once for all steps of a batch.

    A decode step calls it 200 times with little to do each; deriving this anew cost as much as doing it.
    """

    parts: list[_ReadyPart]
    dtype: torch.dtype | None
    """Of all pools that are used; None where there is no short way."""
    targets: object
    """Keeps alive whose id is the key of this."""


def _ready(targets: Sequence[LoraTarget], batch: LoraBatch) -> _Ready:
    ready: _Ready | None = batch.memo.get(id(targets))
    if ready is None:
        pools = [pool for target in targets for pool in (target.a_pool_RI, target.b_pool_RO)]
        dtype = pools[0].dtype if len({pool.dtype for pool in pools}) == 1 else None
        short = dtype is not None and (dtype == _exact(dtype) or batch.homogeneous is not None)
        if not short or not all(pool.is_contiguous() for pool in pools):
            dtype = None
        parts = [_ready_part(target, batch) for target in targets] if dtype is not None else []
        ready = batch.memo[id(targets)] = _Ready([it for it in parts if it.products or it.sampled], dtype, targets)
    return ready


def _ready_part(target: LoraTarget, batch: LoraBatch) -> _ReadyPart:
    a_pool, b_pool = target.a_pool_RI, target.b_pool_RO
    plan = plan_of(target, batch, a_pool)
    products = [
        _Product(
            None if batch.homogeneous is not None else part.rows,
            part.a.of(a_pool).t(),
            part.b.of(b_pool),
            part.adapter.scale,
        )
        for part in plan.dense
    ]
    sampled = None if plan.sparse is None else _sampled(plan.sparse, target, batch)
    return _ReadyPart(products, sampled, target.column, b_pool.shape[1])


def _sampled(part: Sparse, target: LoraTarget, batch: LoraBatch) -> _Sampled:
    pool_RI = target.a_pool_RI
    key = ("h", id(part), pool_RI.shape[0])
    kept: tuple[Tensor, Tensor, Sparse] | None = batch.memo.get(key)
    if kept is None:  # layers whose pools are laid out alike share it, since each is done with it before the next
        h_E = torch.zeros(part.a.in_pool.shape, dtype=pool_RI.dtype)
        h_TR = _csr(part.offsets, part.a.in_pool, h_E, (part.num_rows, pool_RI.shape[0]))
        kept = batch.memo[key] = (h_TR, h_E, part)
    return _Sampled(part, pool_RI.t(), kept[0], kept[1], target.b_pool_RO)


def _add_product(into: Tensor, x_TI: Tensor, product: _Product) -> None:
    rows, a_Ir, b_rO, scale = product
    if rows is None:
        into.addmm_(x_TI.mm(a_Ir), b_rO, alpha=scale)
    elif rows.listed is None:
        rows.of(into).addmm_(rows.of(x_TI).mm(a_Ir), b_rO, alpha=scale)
    else:
        into.index_add_(0, rows.listed, rows.of(x_TI).mm(a_Ir).mm(b_rO), alpha=scale)


def _add_sampled(into: Tensor, x_TI: Tensor, sampled: _Sampled) -> None:
    part, a_IR, h_TR, h_E, b_RO = sampled
    if part.rows is not None:
        x_TI = x_TI.index_select(0, part.rows)
    h_E.zero_()  # a NaN of the last step would survive beta = 0
    torch.sparse.sampled_addmm(h_TR, x_TI, a_IR, beta=0.0, alpha=part.scale, out=h_TR)
    if part.scales is not None:
        h_E.mul_(part.scales)
    _add_bags(into, h_E, part.b.in_pool, b_RO, part)


def _add_bags(into: Tensor, h_E: Tensor, entries: Tensor, weights: Tensor, part: Sparse) -> None:
    sums = F.embedding_bag(entries, weights, part.offsets, mode="sum", per_sample_weights=h_E, include_last_offset=True)
    if part.rows is None:
        into.add_(sums)
    else:
        into.index_add_(0, part.rows, sums.to(into.dtype))


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _shrink_sparse(columns: Tensor, pool: Tensor, part: Sparse, side: Side) -> Tensor:
    """[entries]."""
    weights, entries = _weights(pool, part, side, columns.dtype)
    if part.rows is not None:
        columns = columns.index_select(0, part.rows)
    h_E = torch.zeros(entries.shape, dtype=columns.dtype)
    wanted = _csr(part.offsets, entries, h_E, (part.num_rows, weights.shape[0]))
    torch.sparse.sampled_addmm(wanted, columns, weights.t(), beta=0.0, alpha=part.scale, out=wanted)
    return h_E if part.scales is None else h_E.mul_(part.scales)


def _expand_sparse(columns: Tensor, h_E: Tensor, pool: Tensor, part: Sparse, side: Side) -> None:
    weights, entries = _weights(pool, part, side, h_E.dtype)
    _add_bags(columns, h_E, entries, weights, part)


def _weights(pool: Tensor, part: Sparse, side: Side, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rank rows of `dtype`, and which of them the entries are: the pool itself, or what is used of it, converted."""
    entries = part.a if side == "a" else part.b
    if pool.dtype == dtype and pool.is_contiguous():
        return pool, entries.in_pool
    return entries.used.of(pool).to(dtype), entries.among_used


def _shrink_dense(columns: Tensor, pool: Tensor, part: Dense, side: Side) -> Tensor:
    """[n, r]."""
    h_nr = part.rows.of(columns) @ part.ranks(pool, side, columns.dtype).t()
    return h_nr if part.adapter.scale == 1.0 else h_nr.mul_(part.adapter.scale)


def _expand_dense(columns: Tensor, h_nr: Tensor, pool: Tensor, part: Dense, side: Side) -> None:
    weights_rO = part.ranks(pool, side, h_nr.dtype)
    if part.rows.listed is not None:
        columns.index_add_(0, part.rows.listed, (h_nr @ weights_rO).to(columns.dtype))
    elif columns.dtype == h_nr.dtype:
        part.rows.of(columns).addmm_(h_nr, weights_rO)
    else:
        part.rows.of(columns).add_(h_nr @ weights_rO)


def _csr(offsets: Tensor, entries: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    _accept_sparse_tensors()
    return torch.sparse_csr_tensor(offsets, entries, values, shape, check_invariants=False)


@functools.cache
def _accept_sparse_tensors() -> None:
    """Have torch say, once and to nobody, that its sparse tensors may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1))

"""Batches of adapters and the comparison with the reference that all tests of adapters share. Needs torch alone."""

from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch

from swarm.kernels import lora
from swarm.kernels.lora import AdapterRanks, LoraBatch, LoraTarget, add_lora, add_lora_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the largest expected magnitude."""
QKV = (24, 8, 8)
MIXED = [0, 1, 2, -1, 3, 0, 2, 4, 4, -1] + [1] * 17 + [5] * 33
RANKS = [1, 4, 8, 12, 16, 24]


class Step(NamedTuple):
    """One linear's step."""

    y: torch.Tensor
    x: torch.Tensor
    targets: tuple[LoraTarget, ...]
    batch: LoraBatch


def make_step(
    adapters, ranks, *, width=20, outs=QKV, dtype=torch.float32, pool_dtype=None, scattered=True, absent=(), seed=0
):
    """A step of rows with these adapters, whose ranks lie in shuffled rows of pools (or in runs), the rest NaN.

    Args:
        absent: (target, adapter) pairs that don't exist.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(ranks) + 5
    targets = []
    for index, out in enumerate(outs):
        orders = [torch.randperm(total, generator=generator).tolist() if scattered else range(total) for _ in "ab"]
        pools = [torch.full((total, columns), float("nan"), dtype=pool_dtype or dtype) for columns in (width, out)]
        table, start = {}, 0
        for adapter, rank in enumerate(ranks):
            rows = [order[start : start + rank] for order in orders]
            start += rank
            if (index, adapter) in absent:
                continue
            for pool, mine in zip(pools, rows, strict=True):
                pool[list(mine)] = torch.randn(rank, pool.shape[1], generator=generator).to(pool.dtype)
            table[adapter] = AdapterRanks(a_rows=rows[0], b_rows=rows[1], scale=1 / (adapter + 1))
        targets.append(LoraTarget(a_pool_RI=pools[0], b_pool_RO=pools[1], ranks=table, column=3 + sum(outs[:index])))
    num_rows = len(adapters)
    y = torch.randn(num_rows, sum(outs) + 6, generator=generator).to(dtype)
    x = torch.randn(num_rows, width, generator=generator).to(dtype)
    return Step(y, x, tuple(targets), LoraBatch(adapters))


@contextmanager
def using(form):
    """`add_lora` runs this form, forth and back."""
    with mock.patch.object(lora, "lora_form", return_value=form):
        yield


def check_forward(form, step):
    """The result is the reference's, in y itself; rows and columns that are nobody's keep every bit."""
    expected = add_lora_reference(*step)
    y = step.y.clone()
    with using(form), torch.no_grad():
        assert add_lora(y, *step[1:]) is y
    assert_near(y, expected)
    bare = [row for row in range(step.batch.num_rows) if not any(row in rows for rows in step.batch.rows_of.values())]
    assert torch.equal(y[bare], step.y[bare])
    assert torch.equal(y[:, :3], step.y[:, :3]) and torch.equal(y[:, -3:], step.y[:, -3:])


def check_gradients(form, step):
    """Every gradient is that of the reference by autograd; unused rank rows have zero."""
    generator = torch.Generator().manual_seed(9)
    dy = torch.randn(step.y.shape, generator=generator).to(step.y.dtype)
    expected = gradients(add_lora_reference, step, dy, torch.promote_types(step.y.dtype, torch.float32))
    with using(form):
        got = gradients(add_lora, step, dy, None)
    for mine, theirs in zip(got, expected, strict=True):
        assert_near(mine, theirs.to(mine.dtype))


def gradients(add, step, dy, dtype):
    """Of y, x and all pools (in `dtype`), whose unused rows are made zero first."""

    def leaf(tensor):
        return tensor.detach().to(dtype or tensor.dtype, copy=True).nan_to_num(0.0).requires_grad_()

    y, x = leaf(step.y), leaf(step.x)
    targets = tuple(
        LoraTarget(a_pool_RI=leaf(it.a_pool_RI), b_pool_RO=leaf(it.b_pool_RO), ranks=it.ranks, column=it.column)
        for it in step.targets
    )
    pools = [pool for it in targets for pool in (it.a_pool_RI, it.b_pool_RO)]
    out = add(y, x, targets, step.batch)
    return torch.autograd.grad(out, [y, x, *pools], dy.to(out.dtype), materialize_grads=True)


def assert_near(got, expected):
    assert torch.isfinite(got).all()
    most = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, atol=TOLERANCE[got.dtype] * max(1.0, most), rtol=0)

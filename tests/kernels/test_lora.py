"""Adapters in one batch equal the reference, forth and back, and no adapter reaches another one's rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.kernels import lora, torch_lora
from swarm.kernels.lora import AdapterRanks, LoraBatch, LoraTarget, add_lora, add_lora_reference, page_rows
from tests.kernels.lora_cases import MIXED, QKV, RANKS, check_forward, check_gradients, make_step

BATCHES = {
    "mixed": MIXED,
    "decode rows": [0, 1, 2, -1, 3, 0, 2, 4, 4, 5],
    "one adapter": [3] * 6,
    "one adapter, many rows": [3] * 40,
    "one row": [5],
    "one adapter among rows without": [-1, -1, 2, -1, -1],
    "few among many without": [-1] * 30 + [1, 2],
    "none": [-1, -1],
}


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_forward_equals_reference(name, scattered):
    """Any mix of ranks and rows, in runs of the pools or scattered; pools' unused rows are NaN."""
    check_forward(torch_lora, make_step(BATCHES[name], RANKS, scattered=scattered))


@pytest.mark.parametrize("name", BATCHES)
def test_gradients_equal_reference(name):
    """Of y, x and both pools of every target."""
    check_gradients(torch_lora, make_step(BATCHES[name], RANKS, absent={(0, 1), (2, 3)}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixed", "decode rows", "one adapter"])
def test_dtypes_of_adapters_may_differ(name, dtype, pool_dtype):
    """Rows and pools of other dtypes are as near as the coarser one's rounding allows."""
    step = make_step(BATCHES[name], RANKS, dtype=dtype, pool_dtype=pool_dtype)
    check_forward(torch_lora, step)
    check_gradients(torch_lora, make_step(BATCHES[name], RANKS, dtype=torch.float32, pool_dtype=pool_dtype))


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 128), min_size=1, max_size=6),
    rows=st.lists(st.tuples(st.integers(-1, 5), st.integers(1, 20)), min_size=1, max_size=8),
    outs=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    width=st.integers(1, 40),
    absent=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=4),
    scattered=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_batch_equals_reference(ranks, rows, outs, width, absent, scattered, seed):
    """Whatever the ranks, sizes, absences and rows, in any order."""
    adapters = [min(adapter, len(ranks) - 1) for adapter, count in rows for _ in range(count)]
    step = make_step(adapters, ranks, width=width, outs=tuple(outs), absent=absent, scattered=scattered, seed=seed)
    check_forward(torch_lora, step)
    check_gradients(torch_lora, step)


@pytest.mark.parametrize("name", BATCHES)
def test_rows_and_pools_may_be_views(name):
    """x, y and the pools are columns of wider tensors."""
    step = make_step(BATCHES[name], RANKS)
    y, x = (torch.stack([tensor, tensor], 2)[:, :, 0] for tensor in (step.y, step.x))
    targets = tuple(
        LoraTarget(a_pool_RI=torch.cat([it.a_pool_RI] * 2, 1)[:, :20], b_pool_RO=it.b_pool_RO, ranks=it.ranks,
                   column=it.column)
        for it in step.targets
    )  # fmt: skip
    expected = add_lora_reference(*step)
    torch.testing.assert_close(add_lora(y, x, targets, step.batch), expected, atol=1e-4, rtol=0)


def test_an_adapter_of_no_rank_adds_nothing():
    """One whose ranks were all pruned, alone and among others."""
    for adapters in ([0, 0], [0, 1, 0]):
        check_forward(torch_lora, make_step(adapters, [0, 4]))


def test_rows_of_one_dtype_may_add_to_another():
    """fp32 rows into an fp16 result and the other way round, as mixed precision has it."""
    for dtypes in ((torch.float32, torch.float16), (torch.float16, torch.float32)):
        for name in ("mixed", "one adapter"):
            step = make_step(BATCHES[name], RANKS)
            check_forward(torch_lora, step._replace(x=step.x.to(dtypes[0]), y=step.y.to(dtypes[1])))


def test_gradients_by_finite_differences():
    """The autograd function is right by itself, not only like the reference."""
    step = make_step([0, 1, 1, -1], [1, 3], width=4, outs=(3, 2), dtype=torch.float64)
    leaves = [step.y, step.x, *(pool for it in step.targets for pool in (it.a_pool_RI, it.b_pool_RO))]

    def run(y, x, *pools):
        targets = [
            LoraTarget(a_pool_RI=pools[2 * i], b_pool_RO=pools[2 * i + 1], ranks=it.ranks, column=it.column)
            for i, it in enumerate(step.targets)
        ]
        return add_lora(y, x, targets, step.batch)

    assert torch.autograd.gradcheck(run, [leaf.nan_to_num(0.0).requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mixed", "decode rows"])
def test_an_adapter_that_is_not_finite_poisons_its_own_rows_only(name, bad):
    """Others' results and gradients keep every bit when an adapter of the batch becomes NaN or infinite."""
    step = make_step(BATCHES[name], RANKS)
    poison = make_step(BATCHES[name], RANKS)
    for target in poison.targets:
        for side in ("a", "b"):
            target.pool(side)[list(target.ranks[2].rows(side))] = bad
    others = [row for row in range(step.batch.num_rows) if row not in step.batch.rows_of[2]]
    results = []
    for it in (step, poison):
        x = it.x.clone().requires_grad_()
        out = add_lora(it.y, x, it.targets, it.batch)
        (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
        with torch.no_grad():
            plain = add_lora(it.y.clone(), *it[1:])
        assert not torch.isfinite(plain[it.batch.rows_of[2]]).all() or it is step
        results.append([out[others], plain[others], dx[others]])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_decode_row_is_bitwise_what_it_is_in_any_other_company():
    """Who else is in the batch, and with which adapters, changes no bit of a row among few of its adapter."""
    step = make_step([0, 1, 2, -1, 3, 0, 5], RANKS)
    whole = add_lora(step.y.clone(), *step[1:])
    for rows in ([0, 1], [4, 6, 2], [6, 5, 4, 3]):
        adapters = [[0, 1, 2, -1, 3, 0, 5][row] for row in rows]
        part = add_lora(step.y[rows], step.x[rows], step.targets, LoraBatch(adapters))
        assert torch.equal(part, whole[rows])


def test_a_batch_without_adapters_is_not_touched():
    """Rows without adapters cost nothing: the same tensor comes back, without a node in the graph."""
    step = make_step([-1, -1], RANKS)
    y = step.y.clone().requires_grad_()
    assert add_lora(y, *step[1:]) is y


def test_adapters_may_share_rows():
    """Two adapters over the same ranks, as VeRA's are: gradients of the shared rows add up."""
    pools = [torch.randn(8, 12), torch.randn(8, 12)]
    shared = {index: AdapterRanks(a_rows=range(8), b_rows=range(8), scale=index + 1.0) for index in range(2)}
    target = LoraTarget(a_pool_RI=pools[0], b_pool_RO=pools[1], ranks=shared)
    got, expected = [], []
    for add, into in ((add_lora, got), (add_lora_reference, expected)):
        leaves = [pool.clone().requires_grad_() for pool in pools]
        mine = LoraTarget(a_pool_RI=leaves[0], b_pool_RO=leaves[1], ranks=target.ranks)
        torch.manual_seed(1)
        out = add(torch.zeros(5, 12), torch.randn(5, 12), [mine], LoraBatch([0, 1, 1, -1, 0]))
        into += torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def test_one_tensor_may_be_all_pools():
    """A page pool whose rows are both A's and B's, of several targets: its gradient is the sum of all."""
    rows = [page_rows([page], 8) for page in range(4)]

    def run(add, pool):
        targets = [
            LoraTarget(a_pool_RI=pool, b_pool_RO=pool, column=12 * index,
                       ranks={7: AdapterRanks(a_rows=rows[2 * index], b_rows=rows[2 * index + 1], scale=0.5)})
            for index in range(2)
        ]  # fmt: skip
        x = torch.linspace(-1, 1, 36).view(3, 12)
        out = add(torch.zeros(3, 24), x, targets, LoraBatch([7, -1, 7]))
        return out, *torch.autograd.grad(out.square().sum(), pool)

    pool = torch.randn(32, 12, requires_grad=True)
    torch.testing.assert_close(run(add_lora, pool), run(add_lora_reference, pool), atol=1e-3, rtol=1e-4)


def test_pages_hold_eight_ranks_each():
    """Rank j is row j % 8 of page j // 8, and a last page need not be full."""
    assert page_rows([3, 0, 5], 18) == [*range(24, 32), *range(8), 40, 41]


def test_layers_share_what_a_batch_derives():
    """Targets of many layers with one table of ranks plan once; each has pools, and results, of its own."""
    steps = [make_step(MIXED, RANKS, seed=0) for _ in range(3)]
    batch = steps[0].batch
    tables = [target.ranks for target in steps[0].targets]
    for factor, step in enumerate(steps, start=1):
        targets = tuple(
            LoraTarget(a_pool_RI=it.a_pool_RI * factor, b_pool_RO=it.b_pool_RO, ranks=table, column=it.column)
            for it, table in zip(step.targets, tables, strict=True)
        )
        expected = add_lora_reference(step.y, step.x, targets, batch)
        torch.testing.assert_close(add_lora(step.y.clone(), step.x, targets, batch), expected, atol=1e-3, rtol=0)
    assert sum(key[0] == "plan" for key in batch.memo if isinstance(key, tuple)) == len(QKV)


def test_a_step_leaves_nothing_behind_for_the_next():
    """The same batch object at every step: not even NaN of one step's inputs is seen in the next."""
    y, x, targets, batch = make_step([0, 1, 2, -1, 0] + [3] * 20, RANKS)
    add_lora(y.clone(), torch.full_like(x, float("nan")), targets, batch)
    for seed in range(3):
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        expected = add_lora_reference(y, x, targets, batch)
        torch.testing.assert_close(add_lora(y.clone(), x, targets, batch), expected, atol=1e-4, rtol=0)


def test_a_batch_of_one_adapter_is_two_plain_products_per_target(monkeypatch):
    """The homogeneous fast path: no sampled product, no gather."""
    step = make_step([2] * 4, RANKS, scattered=False)
    for name in ("shrink", "expand"):
        monkeypatch.setattr(torch_lora, name, None)
    y = add_lora(step.y.clone(), *step[1:])
    torch.testing.assert_close(y, add_lora_reference(*step), atol=1e-4, rtol=0)


def test_pools_changed_before_backward_are_noticed():
    """An optimiser step between forward and backward is an error, not a wrong gradient."""
    step = make_step([0, 1], RANKS)
    pool = step.targets[0].a_pool_RI.requires_grad_()
    out = add_lora(*step)
    with torch.no_grad():
        pool += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_cpu_runs_the_torch_form():
    """No self-test there, and no Triton."""
    assert lora.lora_form(torch.device("cpu")) is torch_lora

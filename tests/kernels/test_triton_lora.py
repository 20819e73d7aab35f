"""The Triton kernels of adapters equal the reference: in Triton's interpreter everywhere, compiled on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.kernels import torch_lora
from swarm.kernels.lora import add_lora, add_lora_reference
from tests.kernels.cases import poisoned
from tests.kernels.interpreting import interpreted
from tests.kernels.lora_cases import MIXED, RANKS, check_forward, check_gradients, make_step, using

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels():
    """The module of the kernels, interpreted."""
    with interpreted("swarm.kernels.triton_lora") as module:
        yield module


BATCHES = {
    "mixed": MIXED,
    "decode rows": [0, 1, 2, -1, 3, 0, 2, 4, 4, 5],
    "one adapter": [3] * 6,
    "few among many without": [-1] * 30 + [1, 2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", BATCHES)
def test_interpreted_kernels_equal_reference(kernels, name, dtype):
    """Forward and every gradient, with mixed ranks over scattered rows and targets that some adapters leave alone."""
    step = make_step(BATCHES[name], RANKS, dtype=dtype, absent={(0, 1), (2, 3)})
    poisoned(lambda *_: check_forward(kernels, step))(step.x)
    poisoned(lambda *_: check_gradients(kernels, step))(step.x)


@pytest.mark.parametrize(("dtype", "pool_dtype"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_dtypes_of_adapters_may_differ(kernels, dtype, pool_dtype):
    """Pools of another dtype than the rows."""
    check_forward(kernels, make_step(MIXED, RANKS, dtype=dtype, pool_dtype=pool_dtype))


@settings(max_examples=8, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 128), min_size=1, max_size=4),
    rows=st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 20)), min_size=1, max_size=5),
    outs=st.lists(st.sampled_from([1, 16, 33, 80]), min_size=1, max_size=5),
    width=st.sampled_from([1, 16, 130]),
    scattered=st.booleans(),
)
def test_any_batch_equals_reference(kernels, ranks, rows, outs, width, scattered):
    """Whatever the ranks, sizes and rows; linears of more parts than a launch takes are several launches."""
    adapters = [min(adapter, len(ranks) - 1) for adapter, count in rows for _ in range(count)]
    step = make_step(adapters, ranks, width=width, outs=tuple(outs), scattered=scattered)
    check_forward(kernels, step)
    check_gradients(kernels, step)


@pytest.mark.parametrize("splits", [2, 5])
def test_a_reduction_in_splits_is_the_same(kernels, monkeypatch, splits):
    """Partial sums, even empty ones, add up to the whole."""
    monkeypatch.setattr(kernels, "_num_splits", lambda *_: splits)
    step = make_step(BATCHES["decode rows"], RANKS, width=300, outs=(140, 20))
    check_forward(kernels, step)
    check_gradients(kernels, step)


def test_aligned_pools_of_one_allocation_and_of_several(kernels):
    """Parts whose pools are addressed from the first one's, before and behind it, with and without aligned rows."""
    for width, outs in ((32, (48, 16, 16)), (31, (47, 15))):
        step = make_step([0, 1, 2, 0], [8, 16, 24], width=width, outs=outs)
        for targets in (step.targets, step.targets[::-1]):
            check_forward(kernels, step._replace(targets=targets))


def test_rows_may_be_views(kernels):
    """x and y are columns of wider tensors."""
    step = make_step(BATCHES["decode rows"], RANKS)
    y, x = (torch.stack([tensor, tensor], 2)[:, :, 0] for tensor in (step.y, step.x))
    expected = add_lora_reference(*step)
    kernels.add(y, x, step.targets, step.batch)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=0)


def test_an_adapter_of_no_rank_adds_nothing(kernels):
    """One whose ranks were all pruned, alone and among others."""
    for adapters in ([0, 0], [0, 1, 0]):
        check_forward(kernels, make_step(adapters, [0, 4]))


def test_a_row_is_bitwise_what_it_is_in_any_other_company(kernels):
    """Tiles, ranks of others and the size of the batch change no bit of a row."""
    adapters = [0, 1, 2, -1, 3, 0, 5]
    step = make_step(adapters, RANKS)
    with using(kernels):
        whole = add_lora(step.y.clone(), *step[1:])
        for rows in ([0, 1], [4, 6, 2], [6, 5, 4, 3]):
            batch = type(step.batch)([adapters[row] for row in rows])
            assert torch.equal(add_lora(step.y[rows], step.x[rows], step.targets, batch), whole[rows])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, at the poisoned rows
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_poisons_its_own_rows_only(kernels, bad):
    """Others' results keep every bit when an adapter of the batch becomes NaN or infinite."""
    results = []
    for poison in (False, True):
        step = make_step(BATCHES["decode rows"], RANKS)
        if poison:
            for target in step.targets:
                target.a_pool_RI[list(target.ranks[2].a_rows)] = bad
                target.b_pool_RO[list(target.ranks[2].b_rows)] = bad
        others = [row for row in range(step.batch.num_rows) if row not in step.batch.rows_of[2]]
        with using(kernels):
            results.append(add_lora(step.y, *step[1:])[others])
    assert torch.equal(*results)


def test_many_rows_of_one_adapter_are_plain_products(kernels, monkeypatch):
    """The homogeneous fast path on a device: long prompts of one user."""
    calls = []
    monkeypatch.setattr(kernels, "_MIN_PLAIN_ROWS", 8)
    monkeypatch.setattr(torch_lora, "add", lambda *args: calls.append(args))
    step = make_step([1] * 8, RANKS)
    kernels.add(*step)
    kernels.add(*make_step([1] * 7, RANKS))
    assert len(calls) == 1


def test_pools_that_no_launch_can_address_are_refused(kernels):
    """Parts of one linear in pools of two dtypes."""
    step = make_step([0], [4])
    half = make_step([0], [4], pool_dtype=torch.float16)
    with pytest.raises(ValueError, match="pools of one dtype"):
        kernels.add(step.y, step.x, (step.targets[0], half.targets[1]), step.batch)

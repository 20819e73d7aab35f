"""The Triton kernel equals the reference: in Triton's interpreter everywhere, compiled where there is a GPU."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.kernels.paged_attention import paged_attention
from tests.kernels.cases import (
    CASES,
    CPU,
    FORMS,
    MIXED,
    check,
    check_case,
    make_batch,
    make_form,
    make_step,
    poisoned,
)
from tests.kernels.interpreter import mend_interpreter
from tests.kernels.interpreting import interpreted

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernel():
    """The module of the kernel, interpreted."""
    mend_interpreter()
    with interpreted("swarm.kernels.triton_paged_attention") as module:
        yield module


@pytest.mark.parametrize("name", FORMS)
def test_interpreted_kernel_equals_reference(kernel, name):
    """Prefill and decode rows over scattered pages in one step; outputs start as NaN."""
    batch = make_batch([(5, 1), (0, 21), (40, 1), (33, 1)], scattered=True)
    check(poisoned(kernel.paged_attention_triton), batch, make_form(6, **FORMS[name]), heads=6, kv_heads=2, width=8,
          value_width=8)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width"), [(5, 1, 24, 16), (2, 2, 64, 64), (9, 3, 48, 64)]
)
def test_interpreted_kernel_of_other_shapes(kernel, heads, kv_heads, width, value_width, dtype):
    """Groups and widths that are no powers of two, and values narrower or wider than keys."""
    batch = make_batch([(35, 1), (3, 1), (0, 1), (2, 20)], scattered=True)
    check(poisoned(kernel.paged_attention_triton), batch, make_form(heads), heads=heads, kv_heads=kv_heads,
          width=width, value_width=value_width, dtype=dtype)  # fmt: skip


@pytest.mark.parametrize(("name", "keys"), list(itertools.product(["plain", "window", "sinks", "alibi"], [60, 32, 1])))
def test_items_of_a_tile_merge_to_the_same(kernel, monkeypatch, name, keys):
    """Cutting the keys of long decode rows and prompts into items changes nothing."""
    monkeypatch.setattr(kernel, "_keys_per_item", lambda *_: keys)
    batch = make_batch([(150, 1), (9, 1), (100, 3), (70, 40)], scattered=True)
    launches = kernel._launches(batch, make_form(4), 2, 2, torch.float32, 16)
    assert all(launch.merges is not None for launch in launches)
    check(poisoned(kernel.paged_attention_triton), batch, make_form(4, **FORMS[name]), heads=4, kv_heads=2, width=16,
          value_width=16)  # fmt: skip


def test_queries_may_be_a_view(kernel):
    """Queries come as a transposed part of a projection, or with a stride inside a row."""
    batch = make_batch([(35, 1), (0, 20)], scattered=True)
    q, k_pool, v_pool = make_step(batch, heads=4, kv_heads=2, width=16, value_width=16)
    expected = kernel.paged_attention_triton(q, k_pool, v_pool, batch, make_form(4))
    wide = torch.randn(q.shape[1], q.shape[0] + 3, q.shape[2] * 2)
    for view in (wide[:, 2 : 2 + q.shape[0], : q.shape[2]].transpose(0, 1), wide[:, 1:5, ::2].transpose(0, 1)):
        view.copy_(q)
        torch.testing.assert_close(kernel.paged_attention_triton(view, k_pool, v_pool, batch, make_form(4)), expected)


def test_one_step_serves_layers_of_several_forms(kernel):
    """What is kept for the other layers of a step is kept by form and shape."""
    batch = make_batch([(35, 1), (0, 20)], scattered=True)
    for _ in range(2):
        for name in ("plain", "window", "chunk"):
            check(kernel.paged_attention_triton, batch, make_form(4, **FORMS[name]), heads=4, kv_heads=2, width=16,
                  value_width=16)  # fmt: skip
        check(kernel.paged_attention_triton, batch, make_form(8), heads=8, kv_heads=1, width=8, value_width=32)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 200)), min_size=1, max_size=8),
    groups=st.sampled_from([1, 2, 4, 8]),
    most_keys=st.integers(1, 1000),
    options=st.sampled_from([{}, {"window": 100}, {"chunk": 64}]),
)
def test_items_cover_each_visible_key_of_each_row_once(shapes, groups, most_keys, options):
    """Whatever the cut: the items of a tile are adjacent, start at its first visible key and end at its last."""
    module = importlib.import_module("swarm.kernels.triton_paged_attention")
    batch = make_batch(shapes, scattered=False, num_pages=2000)
    form = make_form(4, **options)
    tile = module.tile_of("wide", groups, torch.float16, 128)
    rows = tile.block_m // groups
    tiles = module._tiles(batch, range(len(batch.spans)), rows, form)
    launch = module._launch(tile, tiles, most_keys, CPU)
    items = launch.items.tolist()
    covered = {}
    for span, row, first, last, _ in sorted(items, key=lambda item: item[:3]):
        assert first < last
        start, end = covered.get((span, row), (first, first))
        assert end == first
        covered[span, row] = (start, last)
    assert covered == {
        (index, row): (form.first_key(span.position + row), min(span.position + row + rows, span.length))
        for index, span in enumerate(batch.spans)
        for row in range(0, span.count, rows)
    }
    parts = sorted(item[4] for item in items if item[4] >= 0)
    merges = [] if launch.merges is None else launch.merges.tolist()
    assert parts == list(range(launch.num_parts)) == sorted(p for m in merges for p in range(m[2], m[2] + m[3]))


def test_one_long_context_is_spread_over_the_device():
    """A single decode row of 32768 keys keeps 132 processors busy; 256 rows of 1024 keys aren't cut at all."""
    module = importlib.import_module("swarm.kernels.triton_paged_attention")
    long = [(0, 0, 0, 32768)]
    assert 132 <= 8 * 32768 / module._keys_per_item("narrow", long, 8, 132) <= 4 * 132 * 2
    many = [(i, 0, 0, 1024) for i in range(256)]
    assert module._keys_per_item("narrow", many, 8, 132) >= 1024


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiled_kernel_equals_reference(case):
    """Every form, shape and dtype on the device itself, outputs poisoned."""
    check_case(poisoned(paged_attention), case, torch.device("cuda"))


@pytest.mark.parametrize("name", ["plain", "sinks"])
def test_mixed_steps_use_both_launches(kernel, name):
    """A step with decode rows and a prompt: each row equals what the reference says."""
    batch = make_batch(MIXED, scattered=True)
    assert len(kernel._launches(batch, make_form(6, **FORMS[name]), 2, 4, torch.float32, 16)) == 2
    check(poisoned(kernel.paged_attention_triton), batch, make_form(6, **FORMS[name]), heads=6, kv_heads=2, width=8,
          value_width=8)  # fmt: skip

"""Paged attention on the CPU equals the reference on ragged batches; nothing leaks from page to page."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.kernels import cpu_attention_plan, cpu_paged_attention
from swarm.kernels.cpu_paged_attention import paged_attention_cpu
from swarm.kernels.paged_attention import PagedBatch, RowSpan, paged_attention, write_kv
from tests.kernels.cases import CPU, FORMS, MIXED, PAGE, TOLERANCE, check, make_batch, make_form, make_step


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_cpu_form_equals_reference(name, scattered):
    """Prefill, chunked prefill and decode rows in one batch, in runs of pages and scattered."""
    batch = make_batch(MIXED, scattered=scattered)
    form = make_form(6, **FORMS[name])
    check(paged_attention_cpu, batch, form, heads=6, kv_heads=2, width=8, value_width=8)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["plain", "alibi", "sinks"])
def test_cpu_form_in_half_precision(name, dtype):
    """Half precision is as near to the reference as its rounding allows, ALiBi included."""
    batch = make_batch(MIXED, scattered=False)
    check(paged_attention_cpu, batch, make_form(4, **FORMS[name]), heads=4, kv_heads=4, width=16, value_width=16,
          dtype=dtype)  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads", "width", "value_width"), [(1, 1, 8, 8), (8, 1, 16, 16), (4, 4, 24, 16)])
def test_cpu_form_of_other_head_shapes(heads, kv_heads, width, value_width):
    """One head, multi-query, and values narrower than keys (MLA)."""
    shapes = {"heads": heads, "kv_heads": kv_heads, "width": width, "value_width": value_width}
    for batch in (make_batch(MIXED, scattered=False), make_batch([(30, 1)], scattered=False)):
        check(paged_attention_cpu, batch, make_form(heads), **shapes)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=6),
    decode=st.booleans(),
    scattered=st.booleans(),
    name=st.sampled_from(sorted(FORMS)),
)
def test_any_batch_equals_reference(shapes, decode, scattered, name):
    """Whatever the mix of lengths, each row is what it would be alone."""
    batch = make_batch([(p, 1 if decode else n) for p, n in shapes], scattered=scattered)
    check(paged_attention_cpu, batch, make_form(6, **FORMS[name]), heads=6, kv_heads=3, width=8, value_width=8)


def test_many_tiny_decode_rows_are_one_batched_call(monkeypatch):
    """Where a call costs more than its keys, continuous batching pays one per layer, not one per session."""
    calls = count_calls(monkeypatch, cpu_paged_attention, "_attend")
    batch = make_batch([(position, 1) for position in (3, 17, 40, 90, 100)], scattered=True)
    check(paged_attention_cpu, batch, make_form(4), heads=4, kv_heads=2, width=8, value_width=8)
    assert len(calls) == 1


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"sinks": True}])
def test_decode_rows_in_runs_are_read_in_place(monkeypatch, options):
    """Longer sequences are neither gathered nor called through anything but the fused operator."""
    monkeypatch.setattr(cpu_paged_attention, "_MAX_GATHERED_BYTES", {"fused": 0, "by hand": 0})
    others = [count_calls(monkeypatch, cpu_paged_attention, name) for name in ("_attend", "_gather")]
    batch = make_batch([(position, 1) for position in (3, 17, 40, 90, 100)], scattered=False)
    check(paged_attention_cpu, batch, make_form(4, **options), heads=4, kv_heads=2, width=8, value_width=8)
    assert others == [[], []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"window": 150}])
def test_a_shared_prefix_is_read_once_for_all_rows(monkeypatch, options, dtype):
    """Rows that continue one cached prefix on pages of their own: one call for it, one for each own part, no copy."""
    flash, alone = (count_calls(monkeypatch, cpu_paged_attention, name) for name in ("_flash", "_attend_sequence"))
    prefix = list(range(20, 30))
    spans = [RowSpan(row, 1, 160 + 40 * row + 5, prefix + list(range(first, first + 9)))
             for row, first in enumerate((0, 40, 50))]  # fmt: skip
    batch = PagedBatch(spans, PAGE, CPU)
    shape = {"heads": 4, "kv_heads": 2, "width": 64, "value_width": 64, "dtype": dtype}
    monkeypatch.setattr(cpu_attention_plan, "_MIN_SHARED_KEYS", 300)
    monkeypatch.setattr(cpu_paged_attention, "_MAX_GATHERED_BYTES", {"fused": 0, "by hand": 0})
    check(paged_attention_cpu, batch, make_form(4, **options), **shape)
    if "window" in options:  # begins elsewhere for each row
        assert (len(flash), len(alone)) == (0, 3)
    else:
        assert (len(flash), len(alone)) == (4, 0)


@settings(max_examples=60, deadline=None)
@given(
    positions=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    name=st.sampled_from(["plain", "window", "chunk", "sinks"]),
)
def test_rows_in_any_runs_equal_the_reference(positions, cuts, name):
    """However the pages of a sequence fall into runs."""
    pages = list(range(64))
    for cut in cuts:
        pages = pages[cut:] + pages[:cut][::-1]
    spans, first = [], 0
    for row, position in enumerate(positions):
        need = position // PAGE + 1
        spans.append(RowSpan(row, 1, position, pages[first : first + need]))
        first += need
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention_plan, "_MIN_SHARED_KEYS", 0)
        patch.setattr(cpu_paged_attention, "_MAX_GATHERED_BYTES", {"fused": 0, "by hand": 0})
        batch = PagedBatch(spans, PAGE, CPU)
        check(paged_attention_cpu, batch, make_form(6, **FORMS[name]), heads=6, kv_heads=3, width=8, value_width=8)


def test_a_decode_row_in_place_is_bitwise_what_it_is_alone(monkeypatch):
    """Who else decodes in the same step changes no bit of a row's attention."""
    monkeypatch.setattr(cpu_paged_attention, "_MAX_GATHERED_BYTES", {"fused": 0, "by hand": 0})
    batch = make_batch([(position, 1) for position in (30, 170, 64)], scattered=False)
    q, k_pool, v_pool = make_step(batch, heads=4, kv_heads=2, width=8, value_width=8)
    together = paged_attention_cpu(q, k_pool, v_pool, batch, make_form(4))
    for row, span in enumerate(batch.spans):
        alone = PagedBatch([RowSpan(0, 1, span.position, span.pages)], PAGE, CPU)
        q_row = q[:, row : row + 1].contiguous()
        assert torch.equal(paged_attention_cpu(q_row, k_pool, v_pool, alone, make_form(4))[0], together[row])


def test_separate_operators_take_long_chunks_in_tiles(monkeypatch):
    """A long prompt of a model with capped logits doesn't make all its logits at once."""
    monkeypatch.setattr(cpu_paged_attention, "_MAX_LOGITS_BYTES", 4 * 6 * 60 * 7)
    tiles = count_calls(monkeypatch, cpu_paged_attention, "_attend_tile")
    batch = make_batch([(20, 40)], scattered=False)
    check(paged_attention_cpu, batch, make_form(6, softcap=3.0), heads=6, kv_heads=2, width=8, value_width=8)
    assert len(tiles) == 6


def test_layers_of_several_forms_share_a_step():
    """What is kept for the other layers of a step is kept by form: one batch object serves them all."""
    batch = make_batch(MIXED, scattered=True)
    for name in (*FORMS, *FORMS):
        check(paged_attention_cpu, batch, make_form(6, **FORMS[name]), heads=6, kv_heads=2, width=8, value_width=8)
    check(paged_attention_cpu, batch, make_form(32, sinks=True), heads=32, kv_heads=32, width=64, value_width=64)


def count_calls(monkeypatch, module, name):
    """A list that grows with each call of `module.name`."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: calls.append(1) or function(*args, **options))
    return calls


def test_a_run_of_pages_is_read_as_a_view():
    """A contiguous sequence is not copied: the step never touches slots outside its own keys."""
    batch = make_batch([(70, 1)], scattered=False)
    assert batch.slots_T is None
    q, k_pool, v_pool = make_step(batch, heads=4, kv_heads=2, width=8, value_width=8)
    k_pool[:, 71:], v_pool[:, 71:] = float("nan"), float("nan")
    assert torch.isfinite(paged_attention(q, k_pool, v_pool, batch, make_form(4))).all()


def test_numbers_of_a_former_owner_of_a_page_reach_nobody():
    """A hostile session leaves NaN in a page; the next owner's batched rows stay clean."""
    k_pool = torch.full((1, 4 * PAGE, 8), float("nan"))
    v_pool = k_pool.clone()
    batch = PagedBatch([RowSpan(i, 1, 0, [i]) for i in range(4)], PAGE, CPU)
    rows = torch.randn(1, 4, 8)
    write_kv(rows, rows, k_pool, v_pool, batch)
    assert torch.isfinite(paged_attention(rows, k_pool, v_pool, batch, make_form(1))).all()

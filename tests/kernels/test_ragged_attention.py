"""Attention of whole sequences equals the paged reference, forth and back, whatever the mix of lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.kernels.paged_attention import PagedBatch, RowSpan, paged_attention_reference
from swarm.kernels.ragged_attention import RaggedBatch, ragged_attention
from tests.kernels.cases import CPU, FORMS, PAGE, TOLERANCE, make_form

LENGTHS = (33, 1, 30, 70, 16)


def paged(lengths):
    """The same sequences as prompts over a paged cache in which page i of the pool is page i of the batch."""
    spans, row, page = [], 0, 0
    for length in lengths:
        num_pages = -(-length // PAGE)
        spans.append(RowSpan(row, length, 0, list(range(page, page + num_pages))))
        row, page = row + length, page + num_pages
    return PagedBatch(spans, PAGE, CPU), page * PAGE


def reference(q, k, v, lengths, form):
    """The definition, differentiable: rows are put into pools where their pages are."""
    batch, num_slots = paged(lengths)
    slots = torch.cat([torch.arange(span.count) + span.pages[0] * PAGE for span in batch.spans])
    pools = [x.new_zeros(x.shape[0], num_slots, x.shape[2]).index_copy(1, slots, x) for x in (k, v)]
    return paged_attention_reference(q, *pools, batch, form)


def make_rows(count, *, heads, kv_heads, width, value_width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, count, width), (kv_heads, count, width), (kv_heads, count, value_width))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def check(lengths, form, **shape):
    """Outputs and all gradients against the reference."""
    rows = make_rows(sum(lengths), **shape)
    out = ragged_attention(*rows, RaggedBatch(lengths, CPU), form)
    expected = reference(*rows, lengths, form)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    gradients = torch.autograd.grad(out, rows, upstream)
    wanted = torch.autograd.grad(expected, rows, upstream)
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, right, atol=5 * tolerance, rtol=5 * tolerance)


@pytest.mark.parametrize("lengths", [LENGTHS, (40, 40, 40), (57,)])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_equals_the_reference_forth_and_back(name, lengths):
    """Windows, chunks, caps, sinks and slopes over grouped heads, for ragged and for equal lengths."""
    check(lengths, make_form(6, **FORMS[name]), heads=6, kv_heads=2, width=8, value_width=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "window", "softcap", "sinks", "alibi"])
def test_half_precision_is_as_near_as_its_rounding_allows(name, dtype):
    """Slopes and caps are applied in fp32."""
    check(LENGTHS, make_form(4, **FORMS[name]), heads=4, kv_heads=4, width=16, value_width=16, dtype=dtype)


def test_sinks_and_slopes_together():
    """The sink's logit gets no slope."""
    for softcap in (None, 3.0):
        form = make_form(4, sinks=True, alibi=True, softcap=softcap, window=20)
        check(LENGTHS, form, heads=4, kv_heads=2, width=8, value_width=8)


@pytest.mark.parametrize(("heads", "kv_heads", "width", "value_width"), [(1, 1, 8, 8), (8, 1, 16, 16), (4, 4, 24, 16)])
def test_other_head_shapes(heads, kv_heads, width, value_width):
    """One head, multi-query, and values narrower than keys (MLA)."""
    check(LENGTHS, make_form(heads), heads=heads, kv_heads=kv_heads, width=width, value_width=value_width)


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=7), name=st.sampled_from(sorted(FORMS)))
def test_any_mix_of_lengths_equals_the_reference(lengths, name):
    """Sequences are grouped, padded and put back in order."""
    check(lengths, make_form(4, **FORMS[name]), heads=4, kv_heads=2, width=8, value_width=8)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_padding_stays_below_a_third(lengths):
    """Sequences of very different lengths don't share a call, and every row has exactly one place."""
    batch = RaggedBatch(lengths, CPU)
    padded = sum(group.num_sequences * group.length for group in batch.groups)
    assert sum(lengths) <= padded <= sum(lengths) / 0.75
    assert sum(group.num_sequences for group in batch.groups) == len(lengths)
    places = range(sum(lengths)) if batch.order_T is None else batch.order_T.tolist()
    assert len(set(places)) == sum(lengths)


@pytest.mark.parametrize("name", FORMS)
def test_nothing_of_one_sequence_reaches_another(name):
    """NaN in a sequence, forth and back, leaves every other sequence's numbers finite."""
    form = make_form(4, **FORMS[name])
    lengths = (20, 18, 17)  # one padded group
    rows = make_rows(sum(lengths), heads=4, kv_heads=2, width=8, value_width=8)
    with torch.no_grad():
        for row in rows:
            row[:, 20:38] = float("nan")
    out = ragged_attention(*rows, RaggedBatch(lengths, CPU), form)
    upstream = torch.ones_like(out)
    upstream[20:38] = float("inf")
    gradients = torch.autograd.grad(out, rows, upstream)
    others = [*range(20), *range(38, sum(lengths))]
    assert torch.isfinite(out[others]).all()
    assert all(torch.isfinite(gradient[:, others]).all() for gradient in gradients)

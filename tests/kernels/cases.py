"""Batches, forms and the comparison with the reference that all tests of paged attention share.

Needs torch alone: a bare GPU host without pytest checks `CASES` through tests/bench/gpu/check.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from swarm.kernels.paged_attention import AttentionForm, PagedBatch, RowSpan, paged_attention_reference, write_kv

PAGE = 16
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CPU = torch.device("cpu")

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "chunk": {"chunk": 24},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "window+sinks+softcap": {"window": 40, "sinks": True, "softcap": 5.0},
}
MIXED = [(5, 1), (0, 33), (40, 1), (17, 20), (15, 1), (16, 1), (99, 1)]
"""Prefill, chunked prefill and decode rows: (position, new rows) of each sequence."""


class Shape(NamedTuple):
    """Heads and widths of one layer."""

    heads: int
    kv_heads: int
    width: int
    value_width: int


class Case(NamedTuple):
    """One comparison with the reference."""

    name: str
    sequences: list[tuple[int, int]]
    form: dict[str, Any]
    shape: Shape
    dtype: torch.dtype


SHAPES = [Shape(5, 1, 24, 16), Shape(2, 2, 64, 64), Shape(71, 1, 64, 64), Shape(9, 3, 64, 64), Shape(3, 3, 80, 80),
          Shape(4, 4, 192, 128), Shape(8, 2, 256, 256), Shape(2, 1, 512, 512)]  # fmt: skip


def _cases() -> Iterator[Case]:
    llama = Shape(32, 8, 128, 128)
    ragged = [(2100, 1), (0, 300), (700, 1), (17, 130), (15, 1), (16, 1), (0, 1), (511, 5)]
    for dtype in TOLERANCE:
        kind = str(dtype).removeprefix("torch.")
        for name, form in FORMS.items():
            yield Case(f"{name} ragged {kind}", ragged, form, llama, dtype)
        for shape in SHAPES:
            yield Case(f"plain {tuple(shape)} {kind}", MIXED, {}, shape, dtype)
        for name in ("plain", "window", "sinks", "alibi"):
            form = {"window": 3000} if name == "window" else FORMS[name]
            yield Case(f"{name} long {kind}", [(20000, 1), (9, 1), (5000, 2)], form, llama, dtype)
        yield Case(f"sinks long prefill {kind}", [(9000, 40)], {"sinks": True}, llama, dtype)
        yield Case(f"one row {kind}", [(0, 1)], {}, llama, dtype)


CASES = list(_cases())
"""What a GPU must compute like the reference, each in all dtypes."""


def check_case(attend: Callable[..., Tensor], case: Case, device: torch.device) -> float:
    """The largest error of `attend` in a case.

    Raises:
        AssertionError: it is more than the dtype's tolerance.
    """
    need = sum(-(-(position + count) // PAGE) for position, count in case.sequences) + 3
    batch = make_batch(case.sequences, scattered=True, num_pages=need, device=device)
    form = make_form(case.shape.heads, device=device, scale=case.shape.width**-0.5, **case.form)
    return check(attend, batch, form, **case.shape._asdict(), dtype=case.dtype, num_pages=need)


def make_form(heads, *, sinks=False, alibi=False, scale=0.3, device=CPU, **options):
    generator = torch.Generator().manual_seed(heads)
    return AttentionForm(
        scale=scale,
        sinks_H=torch.randn(heads, generator=generator).to(device) if sinks else None,
        alibi_H=torch.rand(heads, generator=generator).to(device) if alibi else None,
        **options,
    )


def make_batch(shapes, *, scattered, num_pages=64, seed=0, device=CPU):
    """Sequences of (position, new rows), their pages in runs or shuffled all over the pool."""
    order = list(range(num_pages))
    if scattered:
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    spans, row = [], 0
    for position, count in shapes:
        need = -(-(position + count) // PAGE)
        pages, order = order[:need], order[need:]
        spans.append(RowSpan(row, count, position, pages))
        row += count
    return PagedBatch(spans, PAGE, device)


def make_step(batch, *, heads, kv_heads, width, value_width, dtype=torch.float32, num_pages=64):
    """Queries and pools whose unused slots are NaN: only slots of the sequences' own keys may be read."""
    generator, device = torch.Generator().manual_seed(1), batch.device

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    k_pool = torch.full((kv_heads, num_pages * PAGE, width), float("nan"), dtype=dtype, device=device)
    v_pool = torch.full((kv_heads, num_pages * PAGE, value_width), float("nan"), dtype=dtype, device=device)
    for span in batch.spans:
        if span.position:
            before = PagedBatch([RowSpan(0, span.position, 0, span.pages)], PAGE, device)
            write_kv(random(kv_heads, span.position, width), random(kv_heads, span.position, value_width),
                     k_pool, v_pool, before)  # fmt: skip
    rows = batch.num_rows
    write_kv(random(kv_heads, rows, width), random(kv_heads, rows, value_width), k_pool, v_pool, batch)
    return random(heads, rows, width), k_pool, v_pool


def check(attend, batch, form, **shape):
    """The largest error; AssertionError where it is too large."""
    dtype = shape.get("dtype", torch.float32)
    q, k_pool, v_pool = make_step(batch, **shape)
    expected = paged_attention_reference(q, k_pool, v_pool, batch, form)
    assert torch.isfinite(expected).all()
    result = attend(q, k_pool, v_pool, batch, form)
    torch.testing.assert_close(result, expected, atol=TOLERANCE[dtype], rtol=0)
    return (result.float() - expected.float()).abs().max().item()


@contextmanager
def poisoned_memory():
    """NaN in every floating-point tensor that `new_empty` gives."""
    empty = torch.Tensor.new_empty

    def poison(self, *shape, **options):
        tensor = empty(self, *shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with mock.patch.object(torch.Tensor, "new_empty", poison):
        yield


def poisoned(attend):
    """`attend` with NaN in every tensor that it allocates."""

    def run(*args):
        with poisoned_memory():
            return attend(*args)

    return run

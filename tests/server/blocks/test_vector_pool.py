"""Each row gets the factors and offsets of its own adapter, whoever came and went before."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.kernels.lora import LoraBatch
from swarm.server.blocks.vector_pool import VectorPool

WIDTH = 3
events = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.booleans(), st.booleans()),
        st.tuples(st.just("remove"), st.integers(0, 30), st.none()),
    ),
    max_size=25,
)


@torch.inference_mode()
@given(events=events, rows=st.lists(st.integers(-1, 24), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_any_history_of_adapters_leaves_each_row_its_own(events, rows, seed):
    """factor * row + offset, where one of the two may be absent; rows of absent adapters stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    pool, known = VectorPool(WIDTH, torch.device("cpu")), {}
    for number, (what, first, second) in enumerate(events):
        if what == "put" and (first or second):
            factor = torch.rand(WIDTH, generator=generator) + 1 if first else None
            offset = torch.rand(WIDTH, generator=generator) + 1 if second else None
            pool.put(number, factor, offset)
            known[number] = (factor, offset)
        elif what == "remove":
            pool.remove(first)
            known.pop(first, None)
    assert bool(pool) == bool(known)
    source = torch.randn(len(rows), WIDTH, generator=generator)
    expected = source.clone()
    for row, handle in enumerate(rows):
        factor, offset = known.get(handle, (None, None))
        expected[row] = expected[row] * (1 if factor is None else factor) + (0 if offset is None else offset)
    found = pool.rows_of(LoraBatch(rows))
    if found is None:
        assert not any(handle in known for handle in rows)
        return
    torch.testing.assert_close(found.apply(source), expected)
    torch.testing.assert_close(found.apply_(source.clone()), expected)

"""Pages and recurrent states become bytes and come back the same, or the bytes are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import InvalidRequest
from swarm.server.blocks.parcel import Layout, pack, unpack
from swarm.server.pages import PAGE_SIZE

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
layouts = st.builds(
    Layout,
    dtype=dtypes,
    kv_shapes=st.lists(st.tuples(*[st.integers(1, 3)] * 2, st.integers(0, 3)), max_size=3).map(tuple),
    states=st.lists(st.tuples(st.lists(st.integers(1, 3), max_size=3).map(tuple), dtypes), max_size=3).map(tuple),
)


@given(layouts, st.integers(0, 3), st.integers(0, 3))
def test_what_was_packed_comes_out(layout: Layout, num_pages: int, num_states: int) -> None:
    """Any mix of shapes and dtypes, none of anything included; the size is what the layout says."""
    pages = [
        tuple(torch.randn(heads, num_pages, PAGE_SIZE * width).to(layout.dtype) for width in (key, value))
        for heads, key, value in layout.kv_shapes
    ]
    states = [[torch.randn(shape).to(dtype) for shape, dtype in layout.states] for _ in range(num_states)]
    data = pack(layout, pages, states)  # type: ignore[arg-type]
    assert len(data) == layout.num_bytes(num_pages, num_states)
    found_pages, found_states = unpack(layout, data, num_pages, num_states)
    for ours, theirs in zip([*pages, *states], [*found_pages, *found_states], strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


def test_bytes_of_another_length_are_refused() -> None:
    """The message has both numbers."""
    layout = Layout(dtype=torch.float32, kv_shapes=((1, 2, 2),))
    with pytest.raises(InvalidRequest, match="255 bytes of 1 pages and 0 states, expected 256"):
        unpack(layout, bytearray(255), 1, 0)


def test_a_state_of_another_shape_is_not_packed() -> None:
    """Both sides know the layout; what doesn't fit it would be read as something else."""
    layout = Layout(dtype=torch.float32, kv_shapes=(), states=(((2,), torch.float32),))
    with pytest.raises(InvalidRequest, match="1 tensors"):
        pack(layout, [], [[torch.zeros(3)]])

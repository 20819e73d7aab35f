"""Tensors survive the wire exactly, or within the bound of their encoding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.codec import decode_tensor, encode_tensor
from swarm.errors import InvalidRequest, PeerMisbehaved
from swarm.protocol import DType, Encoding, TensorSpec

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@given(st.sampled_from(DTYPES), st.integers(0, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_raw_tensors_are_bitwise_equal(dtype, num_tokens, hidden_size, seed):
    """Every element type and shape, the empty one included."""
    tensor = torch.randn(num_tokens, hidden_size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    spec, body = encode_tensor(tensor)
    assert len(body) == spec.num_bytes
    assert torch.equal(decode_tensor(spec, body), tensor)


@given(st.sampled_from(DTYPES), st.integers(0, 5), st.integers(1, 64), st.floats(1e-3, 1e3), st.integers(0, 2**32))
def test_int8_rows_stay_within_half_a_step(dtype, num_tokens, hidden_size, scale, seed):
    """The error of each element is at most half of its own row's step, plus the dtype's rounding."""
    tensor = (torch.randn(num_tokens, hidden_size, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    spec, body = encode_tensor(tensor, Encoding.INT8_ROWS)
    assert len(body) == spec.num_bytes
    step = tensor.float().abs().amax(1, keepdim=True) / 127
    bound = step / 2 + tensor.float().abs() * torch.finfo(dtype).eps + 1e-6
    assert ((decode_tensor(spec, body).float() - tensor.float()).abs() <= bound * 1.001).all()


def test_a_body_of_the_wrong_length_is_refused():
    """The size is checked against the declared shape before anything is allocated."""
    with pytest.raises(PeerMisbehaved, match="of 8 bytes"):
        decode_tensor(TensorSpec(DType.FLOAT32, (65536, 1 << 20)), b"\x00" * 8)


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3)])
def test_only_matrices_of_floats_are_sent(tensor):
    """Other shapes and dtypes are refused at the sender."""
    with pytest.raises(InvalidRequest, match="cannot send"):
        encode_tensor(tensor)

"""Differences of adapters' bytes: exact, small after a step, and never more than is expected."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.adapters.difference import apply_difference, encode_difference
from swarm.errors import InvalidRequest

NOTHING = zlib.compress(b"")


@given(st.binary(max_size=200), st.data())
def test_what_comes_out_is_what_went_in(old, data):
    """Any bytes, whatever they stand for."""
    new = data.draw(st.binary(min_size=len(old), max_size=len(old)))
    made = encode_difference(old, new)
    assert made is None or (len(made) < len(new) and apply_difference(old, made) == new)


@pytest.mark.parametrize("relative", [1e-2, 1e-4])
def test_after_a_step_it_is_half_to_two_thirds(relative):
    """Numbers that moved by one part in a hundred take 2.5 of their 4 bytes; by less, down to 2."""
    random = np.random.default_rng(0)
    old = random.normal(size=50_000).astype(np.float32)
    new = (old * (1 + relative * random.normal(size=old.size))).astype(np.float32)
    made = encode_difference(old.tobytes(), new.tobytes())
    assert made is not None and len(made) < (0.65 if relative == 1e-2 else 0.52) * new.nbytes
    assert apply_difference(old.tobytes(), made) == new.tobytes()


def test_other_lengths_and_unlike_bytes_have_no_difference():
    """Then the whole is sent."""
    random = np.random.default_rng(0)
    assert encode_difference(b"abcd", b"abcde") is None
    assert encode_difference(random.bytes(4000), random.bytes(4000)) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(16),
        bytes(16) + b"not deflate",
        bytes(16) + NOTHING,
        bytes(16) + zlib.compress(bytes(15)),
        bytes(16) + zlib.compress(bytes(1 << 20)),
        bytes(16) + zlib.compress(bytes(16))[:-1],
        bytes(16) + zlib.compress(bytes(16)) + b"more",
    ],
)
def test_what_is_no_difference_is_refused(data):
    """Too short, damaged, cut short, or one that would take more memory than there are bytes."""
    with pytest.raises(InvalidRequest, match="difference"):
        apply_difference(bytes(32), data)

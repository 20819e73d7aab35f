"""What all clients draw from a run's name: fixed for good."""

from hashlib import sha256

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.federated.common_start import common_a, selection


@settings(max_examples=30)
@given(st.text(max_size=20), st.integers(1, 16), st.integers(1, 64))
def test_a_begins_as_pefts_does(seed, rank, inputs):
    """Uniform within +-1 / sqrt(inputs), the same for the same name."""
    a = common_a(seed, rank, inputs)
    assert a.shape == (rank, inputs) and a.dtype is torch.float32
    assert float(a.abs().max()) <= inputs**-0.5 * (1 + 1e-6)
    assert torch.equal(a, common_a(seed, rank, inputs))


def test_a_has_the_variance_of_a_uniform_distribution():
    """1/3 of the squared bound, and names differ."""
    a = common_a("one", 64, 512)
    assert abs(float(a.var()) * 512 * 3 - 1) < 0.05 and abs(float(a.mean())) < 1e-3
    assert not torch.equal(a, common_a("other", 64, 512))


@settings(max_examples=30)
@given(st.text(max_size=20), st.integers(1, 64), st.data())
def test_a_selection_has_each_column_once_at_most(seed, inputs, data):
    """A single one in each row, ascending."""
    rows = selection(seed, data.draw(st.integers(1, inputs)), inputs)
    columns = rows.argmax(1).tolist()
    assert torch.equal(rows.sum(1), torch.ones(len(rows))) and bool((rows.sum(0) <= 1).all())
    assert columns == sorted(columns)


def test_the_bits_are_those_that_they_were():
    """A client of an older version begins with the same numbers."""
    assert sha256(common_a("run", 4, 8).numpy().tobytes()).hexdigest() == A_DIGEST
    assert selection("run", 3, 10).argmax(1).tolist() == COLUMNS


A_DIGEST = "57f79aafb534279dfc253cc38bdae4750e10cc6e01697d0e5261a4e82496146e"
COLUMNS = [0, 4, 6]

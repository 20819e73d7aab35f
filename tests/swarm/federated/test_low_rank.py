"""The SVD of a product of factors: that of LAPACK to rounding, and the same bits however it is computed."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.federated.low_rank import squared_norm, truncate


def factors(seed: int, columns: int, outputs: int, inputs: int, linears: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-3, 3, size=(columns, 1, 1))
    return scales * rng.normal(size=(columns, outputs, linears)), rng.normal(size=(columns, inputs, linears))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1 << 30), st.integers(1, 12), st.integers(1, 20), st.integers(1, 20), st.integers(1, 3),
    st.integers(1, 14), st.sampled_from(["any", "twice the same", "zero column"]),
)  # fmt: skip
def test_nothing_of_that_rank_is_nearer(seed, columns, outputs, inputs, linears, rank, kind):
    """The distance to the product is what LAPACK's singular values say it must be, dependent columns or not."""
    b, a = factors(seed, columns, outputs, inputs, linears)
    if kind == "twice the same":
        b[-1] = 2 * b[0]
    elif kind == "zero column":
        a[-1] = 0.0
    found = truncate(b, a, rank)
    assert found.b_KOL.shape == (rank, outputs, linears) and found.a_KIL.shape == (rank, inputs, linears)
    for index in range(linears):
        product = b[:, :, index].T @ a[:, :, index]
        sigma = np.linalg.svd(product, compute_uv=False)
        rest = np.sqrt((sigma[rank:] ** 2).sum())
        distance = np.linalg.norm(found.b_KOL[:, :, index].T @ found.a_KIL[:, :, index] - product)
        largest = sigma[0] + 1e-300
        assert distance <= rest * (1 + 1e-9) + 1e-11 * largest
        some = min(columns, len(sigma))
        np.testing.assert_allclose(found.sigma_RL[:some, index], sigma[:some], atol=1e-11 * largest)
        np.testing.assert_allclose(squared_norm(b, a)[index], (product**2).sum(), rtol=1e-9, atol=1e-300)


def test_linears_have_the_same_bits_alone_and_together():
    """No result depends on what else is worked on, as it would with a library that picks its ways by size."""
    b, a = factors(0, 24, 40, 30, 7)
    together = truncate(b, a, 8)
    for index in range(7):
        alone = truncate(b[:, :, index : index + 1], a[:, :, index : index + 1], 8)
        assert alone.b_KOL[:, :, 0].tobytes() == np.ascontiguousarray(together.b_KOL[:, :, index]).tobytes()
        assert alone.a_KIL[:, :, 0].tobytes() == np.ascontiguousarray(together.a_KIL[:, :, index]).tobytes()


def test_memory_grows_with_two_factors_not_with_all_pairs():
    """Many clients of some rank: products of all columns with all are never there at once."""
    b, a = factors(0, 64, 48, 40, 4)
    pairs = 64 * 64 * 40 * 4 * 8
    for work in (lambda: truncate(b, a, 4), lambda: squared_norm(b, a)):
        tracemalloc.start()
        work()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < pairs / 2


def test_the_bits_are_those_that_they_were():
    """Computed once, on another day: exactly representable inputs, so only our own arithmetic can change them."""
    b = (np.arange(36, dtype=np.float64).reshape(3, 4, 3) % 7 - 3) / 8
    a = (np.arange(45, dtype=np.float64).reshape(3, 5, 3) % 11 - 5) / 16
    found = truncate(b, a, 2)
    assert [float(value).hex() for value in found.sigma_RL[:2, 0]] == EXPECTED


EXPECTED = ["0x1.8275aa6a3baabp-2", "0x1.0fb3868cead7ap-2"]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_numbers_are_no_trouble(scale):
    """Squares of fp32's extremes have room in float64."""
    b, a = factors(1, 4, 6, 5, 1)
    found, plain = truncate(b * scale, a, 3), truncate(b, a, 3)
    np.testing.assert_allclose(found.sigma_RL / scale, plain.sigma_RL, rtol=1e-9, atol=1e-12)

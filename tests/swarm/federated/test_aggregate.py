"""What becomes of several updates: exact means, approximations of them, and bounds for outliers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.adapters.delta import BlockDelta, LinearDelta
from swarm.errors import InvalidRequest
from swarm.federated import aggregate, low_rank
from swarm.federated.aggregate import (
    averaged,
    clipped,
    distance,
    padded,
    stacked,
    truncated,
    weights_of,
    with_common_a,
)

SHAPES = {(0, "q"): (6, 5), (0, "v"): (6, 5), (2, "down"): (9, 4)}
"""Inputs and outputs, by block and path."""


def update(seed: int, rank: int = 2, scale: float = 0.5, a_seed: int | None = None) -> dict[int, BlockDelta]:
    generator = torch.Generator().manual_seed(seed)
    a_generator = generator if a_seed is None else torch.Generator().manual_seed(a_seed)
    blocks: dict[int, dict[str, LinearDelta]] = {}
    for (block, path), (inputs, outputs) in SHAPES.items():
        a = torch.randn(rank, inputs, generator=a_generator)
        b = torch.randn(outputs, rank, generator=generator)
        blocks.setdefault(block, {})[path] = LinearDelta(a_rI=a, b_Or=b, scale=scale)
    return {block: BlockDelta(linears=linears) for block, linears in blocks.items()}


def product(update, block: int, path: str) -> torch.Tensor:
    linear = update[block].linears[path]
    return linear.scale * (linear.b_Or.double() @ linear.a_rI.double())


def mean(updates, weights, block: int, path: str) -> torch.Tensor:
    return sum(weight * product(it, block, path) for weight, it in zip(weights, updates, strict=True))


def test_linears_in_parts_have_the_same_bits(monkeypatch):
    """However many there is room for."""
    updates = [update(1), update(2)]
    whole, far = truncated(updates, [0.5, 0.5], rank=2), distance(updates[0], updates[1])
    monkeypatch.setattr(aggregate, "MAX_NUMBERS", 1)
    seen = []
    monkeypatch.setattr(
        aggregate, "truncate", lambda b, a, rank: seen.append(b.shape[-1]) or low_rank.truncate(b, a, rank)
    )
    parts = truncated(updates, [0.5, 0.5], rank=2)
    assert seen == [1, 1, 1]
    for block, path in SHAPES:
        for name in ("a_rI", "b_Or"):
            assert torch.equal(*(getattr(it[block].linears[path], name) for it in (whole, parts)))
    assert distance(updates[0], updates[1]) == far


seeds = st.lists(st.integers(0, 1 << 30), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(
    seeds, st.lists(st.integers(1, 4), min_size=5, max_size=5), st.lists(st.integers(1, 100), min_size=5, max_size=5)
)
def test_stacking_is_the_exact_mean_of_products(seeds, ranks, numbers):
    """Whatever their ranks; and the rank is the sum of theirs."""
    updates = [update(seed, rank) for seed, rank in zip(seeds, ranks, strict=False)]
    weights = weights_of(numbers[: len(updates)])
    found = stacked(updates, weights)
    for block, path in SHAPES:
        assert found[block].linears[path].rank == sum(ranks[: len(updates)])
        torch.testing.assert_close(
            product(found, block, path), mean(updates, weights, block, path), rtol=1e-5, atol=1e-5
        )


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 6), st.sampled_from([1.0, 0.5, 2.0, 3.0]))
def test_truncation_is_the_best_of_its_rank(seeds, rank, scale):
    """As near to the mean as torch's SVD comes, with the scale that was asked for."""
    updates = [update(seed) for seed in seeds]
    weights = weights_of([1] * len(updates))
    found = truncated(updates, weights, rank=rank, scale=scale)
    for block, path in SHAPES:
        exact = mean(updates, weights, block, path)
        u, s, v = torch.linalg.svd(exact, full_matrices=False)
        best = torch.linalg.norm((u[:, :rank] * s[:rank]) @ v[:rank] - exact)
        assert found[block].linears[path].scale == scale and found[block].linears[path].rank == rank
        assert torch.linalg.norm(product(found, block, path) - exact) <= best + 1e-5 * s[0]


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_means_apart_are_exact_with_a_common_a(seeds):
    """As FFA-LoRA has it; and A is kept to the bit."""
    updates = [update(seed, a_seed=7) for seed in seeds]
    weights = weights_of(list(range(1, len(seeds) + 1)))
    for found in (averaged(updates, weights), with_common_a(updates, weights)):
        for block, path in SHAPES:
            torch.testing.assert_close(
                product(found, block, path), mean(updates, weights, block, path), rtol=1e-5, atol=1e-5
            )
    assert torch.equal(found[0].linears["q"].a_rI, updates[0][0].linears["q"].a_rI)


def test_means_apart_are_wrong_otherwise():
    """Which is why they are for comparison only: half of two equal products with opposite signs in A and B is lost."""
    one = update(0)
    other = {
        block: BlockDelta(
            linears={
                path: LinearDelta(a_rI=-linear.a_rI, b_Or=-linear.b_Or, scale=linear.scale)
                for path, linear in delta.linears.items()
            }
        )
        for block, delta in one.items()
    }
    assert float(product(averaged([one, other], [0.5, 0.5]), 0, "q").abs().max()) == 0.0
    torch.testing.assert_close(product(stacked([one, other], [0.5, 0.5]), 0, "q"), product(one, 0, "q"))


def test_means_apart_need_one_rank():
    """Both ranks are in the message."""
    with pytest.raises(InvalidRequest, match=r"\(2, 0.5\), \(3, 0.5\)"):
        averaged([update(0), update(1, rank=3)], [0.5, 0.5])


@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=64))
def test_weights_are_parts_of_the_whole(numbers):
    """In proportion to the examples."""
    weights = weights_of(numbers)
    assert math.isclose(math.fsum(weights), 1.0)
    assert all(math.isclose(weight * sum(numbers), number) for weight, number in zip(weights, numbers, strict=True))


@pytest.mark.parametrize("numbers", [[], [0, 3], [-1]])
def test_nobody_may_have_learnt_from_nothing(numbers):
    """A weight of zero, or below, is an error."""
    with pytest.raises(InvalidRequest, match="at least 1 each"):
        weights_of(numbers)


def test_a_distance_is_that_of_all_weights_together():
    """From zero, or from what the round began with."""
    one, base = update(0), update(1, rank=3)
    squares = sum(float((product(one, *site) ** 2).sum()) for site in SHAPES)
    assert math.isclose(distance(one, None), math.sqrt(squares), rel_tol=1e-9)
    squares = sum(float(((product(one, *site) - product(base, *site)) ** 2).sum()) for site in SHAPES)
    assert math.isclose(distance(one, base), math.sqrt(squares), rel_tol=1e-9)
    assert distance(one, one) < 1e-6


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20), st.floats(1.0, 10.0))
def test_a_minority_can_move_the_mean_no_further_than_the_others(distances, ratio):
    """Each clipped update counts as if it had gone `ratio` times the median; those below count in full."""
    weights = [1 / len(distances)] * len(distances)
    found = clipped(weights, distances, ratio)
    limit = ratio * sorted(distances)[(len(distances) - 1) // 2]
    for weight, before, far in zip(found, weights, distances, strict=True):
        assert weight * far <= before * limit * (1 + 1e-9)
        assert far > limit or weight == before


def test_padding_changes_no_product():
    """Zeros only."""
    wide = padded(update(0), 5)
    assert wide[0].linears["q"].rank == 5
    torch.testing.assert_close(product(wide, 2, "down"), product(update(0), 2, "down"))

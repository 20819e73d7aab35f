"""What placements are judged by, against trying all of them."""

from itertools import product

import numpy as np
import pytest

from swarm.types import BlockRange
from tests.bench.flow import best_placement, fewest_moves, max_flow

NUM_BLOCKS = 5


@pytest.mark.parametrize("seed", range(4))
def test_programming_finds_what_trying_all_placements_finds(seed):
    """The most throughput that three servers can give, and the fewest moves to four fifths of it."""
    generator = np.random.default_rng(seed)
    lengths = [int(it) for it in generator.integers(2, 5, 3)]
    capacities = [float(it) for it in generator.uniform(1.0, 4.0, 3)]
    choices = [[BlockRange(at, at + length) for at in range(NUM_BLOCKS - length + 1)] for length in lengths]
    found = [(spans, max_flow(spans, capacities, NUM_BLOCKS)) for spans in product(*choices)]
    most_tps = max(tps for _, tps in found)
    assert best_placement(lengths, capacities, NUM_BLOCKS, time_limit_s=60.0) == pytest.approx(
        (most_tps, most_tps), rel=0.01
    )
    least_tps = 0.8 * most_tps
    good = [spans for spans, tps in found if tps >= least_tps * (1 + 1e-6)]
    for present, _ in found:
        fewest = min(sum(a != b for a, b in zip(present, spans, strict=True)) for spans in good)
        assert fewest_moves(present, capacities, NUM_BLOCKS, least_tps=least_tps, time_limit_s=60.0) == fewest

"""The smallest share is the max-flow, and shares are as fair as spans permit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.shares import shares
from swarm.types import BlockRange
from tests.bench.flow import max_flow


@st.composite
def swarms(draw):
    """Up to 8 spans over up to 10 blocks, with capacities."""
    num_blocks = draw(st.integers(1, 10))
    starts = draw(st.lists(st.integers(0, num_blocks - 1), min_size=1, max_size=8))
    spans = [BlockRange(start, draw(st.integers(start + 1, num_blocks))) for start in starts]
    capacities = draw(st.lists(st.floats(0.1, 100.0), min_size=len(spans), max_size=len(spans)))
    return num_blocks, spans, capacities


@given(swarms())
def test_the_smallest_share_is_the_throughput_that_linear_programming_finds(swarm):
    """For every set of spans and capacities, gaps included."""
    num_blocks, spans, capacities = swarm
    found = shares(spans, capacities, num_blocks)
    assert found.min() == pytest.approx(max_flow(spans, capacities, num_blocks), rel=1e-6, abs=1e-9)


@given(swarms())
def test_shares_use_all_capacity_and_nobody_can_be_helped_at_the_cost_of_a_better_off_block(swarm):
    """They sum up to all capacity; each set of blocks below a level uses all capacity that reaches it."""
    num_blocks, spans, capacities = swarm
    found = shares(spans, capacities, num_blocks)
    assert found.sum() == pytest.approx(sum(capacities))
    for level in found:
        poor = set(np.flatnonzero(found <= level * (1 + 1e-6)))
        reaching = sum(capacity for span, capacity in zip(spans, capacities, strict=True) if poor & set(span))
        assert found[list(poor)].sum() == pytest.approx(reaching)


def test_a_server_helps_the_weakest_of_its_blocks():
    """The one that spans both halves works for the half that has less."""
    spans = [BlockRange(0, 4), BlockRange(4, 8), BlockRange(0, 8)]
    assert shares(spans, [40.0, 80.0, 20.0], 8) == pytest.approx([15.0] * 4 + [20.0] * 4)


def test_nobody_serves_nothing():
    """No servers, or none with capacity: nothing for anybody."""
    assert list(shares([], [], 3)) == [0.0] * 3
    assert list(shares([BlockRange(0, 2)], [0.0], 3)) == [0.0] * 3

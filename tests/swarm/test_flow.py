"""Chains cover each block once, load servers by their capacities, and are near the largest flow together."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.flow import EvenDraws, Flow
from swarm.types import BlockRange
from tests.bench.flow import max_flow
from tests.swarm.route_reference import random_offers

WIDE, NARROW = st.floats(1e-3, 1e6), st.floats(1.0, 100.0)
POINTS = st.floats(0.0, 1.0, exclude_max=True)


@st.composite
def flows(draw, capacities=WIDE):
    """Up to 8 spans over up to 12 blocks without gaps, with capacities, and chains over them."""
    num_blocks = draw(st.integers(1, 12))
    spans = [BlockRange(start, draw(st.integers(start + 1, num_blocks)))
             for start in draw(st.lists(st.integers(0, num_blocks - 1), max_size=6))]  # fmt: skip
    middle = draw(st.integers(0, num_blocks))
    spans += [BlockRange(start, end) for start, end in ((0, middle), (middle, num_blocks)) if start < end]
    tps = draw(st.lists(capacities, min_size=len(spans), max_size=len(spans)))
    return num_blocks, spans, tps, flow_over(spans, tps, num_blocks)


def flow_over(spans, capacities, num_blocks):
    first, last = np.array([span.start for span in spans]), np.array([span.end for span in spans])
    return Flow.balanced(first, last, np.array(capacities), num_blocks)


def runs(chain, num_blocks):
    """The hops of a chain, as servers and the blocks that they run."""
    ends = [*(start for _, start in chain[1:]), num_blocks]
    return [(server, BlockRange(start, end)) for (server, start), end in zip(chain, ends, strict=True)]


def work_in(flow):
    """How many blocks each server runs per chain, by chances."""
    return flow.holders.per_server(flow.chances)


def hops_in(flow):
    """How many hops a chain has on average, by chances: whatever is added at the beginning of a block hops."""
    return np.maximum(flow.chances - flow.holders.before(flow.chances), 0.0).sum()


def work_of(flow, points, num_servers, num_blocks):
    """Blocks that each server runs per chain, by drawing chains."""
    work = np.zeros(num_servers)
    for at in points:
        for server, blocks in runs(flow.chain(at), num_blocks):
            work[server] += len(blocks)
    return work / len(points)


@given(flows(), st.lists(POINTS, min_size=1, max_size=8), st.data())
def test_chains_run_each_block_once_on_servers_that_hold_it(drawn, points, data):
    """At every point, also when some servers are hardly wanted."""
    num_blocks, spans, _, flow = drawn
    costs = data.draw(st.lists(st.sampled_from([0.0, 1.0, 1e9, 1e12]), min_size=len(spans), max_size=len(spans)))
    for each in (flow, flow.avoiding(np.array(costs))):
        for at in (0.0, np.nextafter(1.0, 0.0), *points):
            hops = runs(each.chain(at), num_blocks)
            assert [block for _, blocks in hops for block in blocks] == list(range(num_blocks))
            assert all(spans[server].covers(blocks) for server, blocks in hops)
            assert all(one != other for (one, _), (other, _) in pairwise(hops))


@given(flows(NARROW))
def test_chains_run_blocks_as_often_as_their_chances_say(drawn):
    """Points that are spread evenly give each server its work, and as many hops as are announced."""
    num_blocks, spans, _, flow = drawn
    points = (np.arange(200) + 0.5) / 200
    assert work_of(flow, points, len(spans), num_blocks) == pytest.approx(work_in(flow), abs=0.005 * 2 * num_blocks)
    assert work_in(flow).sum() == pytest.approx(num_blocks)
    mean_hops = np.mean([len(flow.chain(at)) for at in points])
    assert mean_hops == pytest.approx(hops_in(flow), abs=0.005 * 2 * num_blocks * len(spans))


@given(flows(NARROW))
def test_chains_carry_nearly_the_largest_flow(drawn):
    """Linear programming finds hardly more, whatever the spans."""
    num_blocks, spans, capacities, flow = drawn
    carried = (np.array(capacities) / np.maximum(work_in(flow), 1e-9)).min()
    assert carried >= 0.9 * max_flow(spans, capacities, num_blocks)


def test_chains_through_random_swarms_carry_nearly_the_largest_flow_with_few_hops():
    """The largest flow of 60 servers over 32 blocks in spans of 8 or so takes 5 to 7 hops per chain."""
    for seed in range(5):
        offers, _ = random_offers(np.random.default_rng(seed), 60, 32, mean_length=8)
        spans, capacities = [it.blocks for it in offers], [it.free_tps for it in offers]
        flow = flow_over(spans, capacities, 32)
        assert (np.array(capacities) / work_in(flow)).min() >= 0.95 * max_flow(spans, capacities, 32)
        assert hops_in(flow) < 9


def test_equal_spans_are_used_in_proportion_to_capacity_and_each_server_for_all_of_its_blocks():
    """Nobody has to hand over in mid-span."""
    spans = [BlockRange(0, 4)] * 3 + [BlockRange(4, 8)] * 2
    flow = flow_over(spans, [100.0, 300.0, 600.0, 250.0, 750.0], 8)
    assert work_in(flow) == pytest.approx([0.4, 1.2, 2.4, 1.0, 3.0])
    assert hops_in(flow) == pytest.approx(2.0)


def test_a_wide_server_helps_where_others_are_weak():
    """It leaves blocks to others that can run them without it."""
    spans = [BlockRange(0, 4), BlockRange(4, 8), BlockRange(0, 8)]
    flow = flow_over(spans, [400.0, 100.0, 100.0], 8)
    assert (np.array([400.0, 100.0, 100.0]) / work_in(flow)).min() >= 0.95 * 50.0


def test_a_weak_block_does_not_keep_the_others_from_being_balanced():
    """As where all its servers are busy: it may not stay so."""
    spans = [BlockRange(0, 1), BlockRange(1, 5), BlockRange(1, 9), BlockRange(5, 9)]
    flow = flow_over(spans, [1e-3, 100.0, 200.0, 300.0], 9)
    quarter = 0.25 * 600.0 / 9
    assert (np.array([100.0, 200.0, 300.0]) / work_in(flow)[1:]).min() >= quarter


def test_servers_that_are_not_wanted_are_left_out_unless_nobody_else_has_the_blocks():
    """Of two that are not wanted the lesser evil is taken."""
    spans = [BlockRange(0, 2), BlockRange(0, 2), BlockRange(2, 4), BlockRange(2, 4)]
    flow = flow_over(spans, [100.0] * 4, 4).avoiding(np.array([1e3, 0.0, 1e9, 1e12]))
    assert work_in(flow) == pytest.approx([0.0, 2.0, 2.0, 0.0])


def test_chains_at_neighbouring_points_hand_over_to_neighbours():
    """Where the first half of servers is here and the other half there, chains stay on their side."""
    spans = [BlockRange(start, start + 4) for _ in ("here", "there") for start in (0, 4, 8)]
    flow = flow_over(spans, [100.0] * 6, 12)
    assert [server for server, _ in flow.chain(0.25)] == [0, 1, 2]
    assert [server for server, _ in flow.chain(0.75)] == [3, 4, 5]


def test_few_even_draws_load_servers_evenly():
    """Of any four draws in a row none falls twice into the same fifth, and any eight fill each quarter."""
    for seed in range(20):
        draws = EvenDraws(np.random.default_rng(seed))
        points = [draws.random() for _ in range(64)]
        assert all(0.0 <= at < 1.0 for at in points)
        for start in range(56):
            gaps = np.diff(np.sort(points[start : start + 4]))
            assert gaps.min() > 0.14
            assert set(np.floor(4 * np.array(points[start : start + 8])).astype(int)) == {0, 1, 2, 3}

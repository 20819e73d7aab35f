"""Chances are those of all chains, weighed by what they cost, and prices rise until no server has too much."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.balance import GOAL, HOP_COST, Holders, balanced_chances, walk_chances
from swarm.types import BlockRange
from tests.bench.flow import max_flow

PARTS = st.floats(0.01, 10.0)


@st.composite
def spans(draw):
    """Up to 3 spans over up to 4 blocks, the first one over all of them."""
    num_blocks = draw(st.integers(1, 4))
    found = [BlockRange(0, num_blocks)]
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, num_blocks - 1))
        found.append(BlockRange(start, draw(st.integers(start + 1, num_blocks))))
    return found


def holders_of(found):
    first, last = np.array([it.start for it in found]), np.array([it.end for it in found])
    return Holders(first, last, int(last.max()))


@given(spans(), st.data())
def test_chances_are_sums_over_all_chains(found, data):
    """Each way of staying and hopping is written down, and weighed."""
    holders = holders_of(found)
    num_pairs, num_blocks = len(holders.servers), found[0].end
    stays = np.array(data.draw(st.lists(PARTS, min_size=len(found), max_size=len(found))))
    hops = np.array(data.draw(st.lists(PARTS, min_size=num_pairs, max_size=num_pairs)))
    sums = np.zeros(num_pairs)
    pairs_of_block = [range(*holders.starts[block : block + 2]) for block in range(num_blocks)]
    for chain in product(*pairs_of_block):
        for hopping in product((False, True), repeat=num_blocks):
            servers = holders.servers[list(chain)]
            stayed = [hop or (block > 0 and servers[block - 1] == servers[block]) for block, hop in enumerate(hopping)]
            if all(stayed):
                weight = np.prod(stays[servers]) * np.prod(
                    [hops[pair] for pair, hop in zip(chain, hopping, strict=True) if hop]
                )
                sums[list(chain)] += weight
    assert walk_chances(holders, stays, hops) == pytest.approx(sums / holders.to_pairs(holders.per_block(sums)))


@given(spans())
def test_pairs_know_the_pair_before(found):
    """A server's pair of the block before, if it holds that."""
    holders = holders_of(found)
    blocks = holders.to_pairs(np.arange(found[0].end)).astype(int)
    pairs = list(zip(blocks, holders.servers, strict=True))
    assert sorted(pairs) == pairs == [(b, s) for b in range(found[0].end) for s, span in enumerate(found) if b in span]
    for (block, server), previous in zip(pairs, holders.previous, strict=True):
        before = (block - 1, server)
        assert previous == (pairs.index(before) if before in pairs else len(pairs))


def test_no_server_gets_more_than_its_capacity_when_the_swarm_carries_the_goal():
    """Thirty spans, some of which cross a weak place."""
    generator = np.random.default_rng(0)
    first = np.r_[0, generator.integers(0, 20, 29)]
    last = np.r_[24, np.minimum(24, first[1:] + generator.integers(1, 9, 29))]
    capacities = generator.uniform(10.0, 1000.0, 30)
    holders = Holders(first, last, 24)
    chances = balanced_chances(holders, capacities)
    assert holders.per_block(chances) == pytest.approx(1.0)
    best = max_flow([BlockRange(int(a), int(b)) for a, b in zip(first, last, strict=True)], capacities, 24)
    assert (holders.per_server(chances) * GOAL * best / capacities).max() <= 1 + 1e-9


def test_servers_with_room_ask_nothing():
    """Where one block limits all chains, others are shared by capacity and hops alone."""
    first, last = np.array([0, 0, 2, 4]), np.array([4, 2, 4, 5])
    holders, capacities = Holders(first, last, 5), np.array([100.0, 100.0, 100.0, 10.0])
    hops = np.exp(-HOP_COST) * np.where(holders.servers == 3, 1.0, 0.5)
    assert balanced_chances(holders, capacities) == pytest.approx(walk_chances(holders, np.ones(4), hops))

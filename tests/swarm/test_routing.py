"""Routes cover each block once and cost what the exact optimum costs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import RouteNotFound
from swarm.routing import Offer, find_route, route_cost
from swarm.types import BlockRange

COSTS = st.floats(1e-4, 1.0)


@st.composite
def swarms(draw):
    """Some servers with random spans, speeds and distances over up to 12 blocks."""
    num_blocks = draw(st.integers(1, 12))
    offers = []
    for index in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, num_blocks - 1))
        blocks = BlockRange(start, draw(st.integers(start + 1, num_blocks)))
        offers.append(Offer(peer_id=f"p{index}", blocks=blocks, block_s=draw(COSTS), hop_s=draw(COSTS)))
    return num_blocks, offers


def optimum(num_blocks, offers):
    """Exact cheapest cost by dynamic programming over (block, server that ran it)."""
    best = {(-1, ""): 0.0}
    for block in range(num_blocks):
        step = {}
        for (_, peer), cost in best.items():
            for offer in offers:
                if block in offer.blocks:
                    total = cost + offer.block_s + (offer.hop_s if offer.peer_id != peer else 0.0)
                    key = (block, offer.peer_id)
                    step[key] = min(step.get(key, math.inf), total)
        best = step
    return min(best.values(), default=math.inf)


@given(swarms())
def test_a_route_covers_each_block_once_at_the_optimal_cost(swarm):
    """Whenever coverage exists the search finds a cheapest chain; otherwise it names what is missing."""
    num_blocks, offers = swarm
    uncovered = [block for block in range(num_blocks) if not any(block in offer.blocks for offer in offers)]
    if uncovered:
        with pytest.raises(RouteNotFound) as caught:
            find_route(offers, BlockRange(0, num_blocks))
        assert list(caught.value.missing) == uncovered
        return
    route = find_route(offers, BlockRange(0, num_blocks))
    by_peer = {offer.peer_id: offer for offer in offers}
    assert [block for hop in route for block in hop.blocks] == list(range(num_blocks))
    assert all(by_peer[hop.peer_id].blocks.covers(hop.blocks) for hop in route)
    assert route_cost(route, by_peer) == pytest.approx(optimum(num_blocks, offers))


def test_missing_blocks_are_named_as_ranges():
    """The message says which blocks nobody serves."""
    offers = [Offer(peer_id="a", blocks=BlockRange(2, 4), block_s=0.1, hop_s=0.1)]
    with pytest.raises(RouteNotFound, match=r"0:2, 4:8"):
        find_route(offers, BlockRange(0, 8))


def test_a_penalised_server_is_used_only_when_it_is_the_only_one():
    """Penalties are costs, not bans."""
    slow = Offer(peer_id="slow", blocks=BlockRange(0, 4), block_s=0.1, hop_s=100.0)
    good = Offer(peer_id="good", blocks=BlockRange(0, 4), block_s=0.1, hop_s=0.1)
    assert find_route([slow, good], BlockRange(0, 4))[0].peer_id == "good"
    assert find_route([slow], BlockRange(0, 4))[0].peer_id == "slow"

"""Clients share servers fairly, and the routes that are compared with are routes."""

import numpy as np
import pytest

from swarm.types import BlockRange
from tests.bench.race import RaceRouter
from tests.bench.sharing import crowd, fair_rates
from tests.swarm.route_reference import random_offers


def test_the_slowest_clients_are_as_fast_as_can_be_then_the_next_ones():
    """Two share a slow server; the third, which meets one of them elsewhere, gets what is left there."""
    work = np.array([[1.0, 0.0], [1.0, 2.0], [0.0, 1.0]])
    assert fair_rates(work, np.array([10.0, 100.0])) == pytest.approx([5.0, 5.0, 90.0])


def test_a_crowd_has_routes_over_all_blocks_and_loads_no_server_beyond_its_capacity():
    """One client or ten, in waves."""
    offers, _ = random_offers(np.random.default_rng(0), 12, 8, mean_length=3)
    total_tps = sum(offer.free_tps for offer in offers)
    for num_clients in (1, 10):
        rates = crowd(RaceRouter, offers, 8, num_clients, np.random.default_rng(1), num_waves=3, num_tokens=1024)
        assert len(rates) == num_clients and rates.min() > 0
        assert 8 * rates.sum() <= total_tps


def test_routes_drawn_each_for_itself_cover_each_block_once():
    """On servers that hold them."""
    offers, _ = random_offers(np.random.default_rng(0), 12, 8, mean_length=3)
    by_peer = {offer.peer_id: offer for offer in offers}
    generator = np.random.default_rng(2)
    for _ in range(20):
        hops = RaceRouter(offers).spread(BlockRange(1, 7), generator, num_tokens=1024).hops
        assert [block for hop in hops for block in hop.blocks] == list(range(1, 7))
        assert all(by_peer[hop.peer_id].blocks.covers(hop.blocks) for hop in hops)

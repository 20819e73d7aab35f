"""Clients of the simulation learn who lies, and load no server beyond what it has."""

import numpy as np
import pytest

from swarm.routing import Offer
from swarm.types import BlockRange
from tests.bench.learning import learn


@pytest.mark.parametrize("learns", [True, False])
def test_clients_who_measure_leave_a_liar_and_get_more(learns):
    """Six servers of 100 block tokens per second over four blocks, of which one announces ten times that."""
    offers = [Offer(peer_id=f"p{it}", blocks=BlockRange(0, 4), block_s=0.01, free_tps=100.0) for it in range(6)]
    boasts = np.array([10.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    learnt = learn(offers, boasts, 4, num_clients=12, seconds=900.0, run_s=300.0, num_tokens=1024,
                   generator=np.random.default_rng(0), learns=learns)  # fmt: skip
    assert learnt.rates.max() <= 6 * 100.0 / 4 + 1e-9
    assert learnt.liars[0] > 0.5
    last = learnt.liars[-10:].mean()
    assert (last < 0.4) == learns and (learnt.num_moves > 0) == learns

"""The optimum of large swarms is that of the reference, which looks at all pairs at once; chains cost what it says."""

from pathlib import Path

import numpy as np
import pytest

from swarm.routing import Router
from swarm.types import BlockRange
from tests.swarm.route_reference import optimum_s, random_offers


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are scripts: they import each other from their own folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_that_of_the_reference(seed):
    """Measured ways included; what the router says of its own chain is right as well."""
    from exact_routes import ExactRoutes

    offers, home = random_offers(np.random.default_rng(seed), 60, 16, mean_length=4)
    exact, blocks = ExactRoutes(offers, 16), BlockRange(0, 16)
    assert exact.optimum_s(home) == pytest.approx(optimum_s(offers, home, blocks))
    route = Router(offers, home).fastest(blocks)
    assert exact.cost_s(route.hops, home) == pytest.approx(route.cost_s, rel=0.02)  # who measured a way counts


def test_a_newcomer_knows_a_sample_of_a_large_swarm_and_all_of_a_small_one():
    """As the directory reads shards; who has been there for minutes knows all of both."""
    from bench_large_routes import by_shard, newcomer, settled

    generator = np.random.default_rng(0)
    offers, _ = random_offers(generator, 100, 16, mean_length=4)
    for view in (newcomer, settled):
        assert sorted(it.peer_id for it in view(by_shard(offers), generator)) == sorted(it.peer_id for it in offers)
    many, _ = random_offers(generator, 6000, 16, mean_length=4)
    assert 1000 <= len(newcomer(by_shard(many), generator)) < 2500
    assert len(settled(by_shard(many), generator)) == 6000

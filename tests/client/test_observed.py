"""What a client makes of the times that training takes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.client.observed import BACK_WORK, Observed
from swarm.client.way_back import Leg
from swarm.flow import EvenDraws
from swarm.routing import Offer, Router
from swarm.types import BlockRange, Hop

TOKENS = 1024
BLOCKS = BlockRange(0, 4)


def offers(**tps: float) -> list[Offer]:
    return [Offer(peer_id=peer_id, blocks=BLOCKS, block_s=0.001, free_tps=own) for peer_id, own in tps.items()]


def leg(*peer_ids: str, since: float) -> Leg:
    return Leg(hops=tuple(Hop(peer_id=peer_id, blocks=BLOCKS) for peer_id in peer_ids), since=since)


@settings(max_examples=30)
@given(
    st.lists(st.floats(500.0, 2000.0), min_size=4, max_size=8),
    st.floats(8.0, 100.0),
    st.floats(0.2, 1.0),
    st.integers(0, 99),
)
def test_who_announces_ten_times_its_speed_loses_most_of_its_share_and_others_keep_theirs(real, boast, common, seed):
    """Routes are drawn, a few steps are made over each, and the next is drawn by what they took; after twenty."""
    names = [f"p{index}" for index in range(len(real))]
    tps = dict(zip(names, real, strict=True))
    claims = {**tps, names[0]: boast * tps[names[0]]}
    seen, now, draws = Observed(), 0.0, EvenDraws(np.random.default_rng(seed))
    shares = []
    for _ in range(40):
        parts = seen.parts(now)
        router = Router(offers(**claims), parts=parts)
        believed = {name: parts.get(name, 1.0) * router.believed_tps(name) for name in names}
        shares.append(believed[names[0]] / sum(believed.values()))
        (hop,) = router.spread(BLOCKS, draws, num_tokens=TOKENS).hops
        for _ in range(3):
            since, now = now, now + BACK_WORK * TOKENS * len(BLOCKS) / (common * tps[hop.peer_id])
            seen.trained(leg(hop.peer_id, since=since), TOKENS, router, now, way_s=0.0)
    fair = real[0] / sum(real)
    assert np.mean(shares[20:]) - fair < 0.5 * (shares[0] - fair)
    assert seen.parts(now).keys() <= {names[0]}


def test_servers_that_share_a_leg_share_its_time_and_are_told_apart_by_other_legs():
    """Those that were quick elsewhere are cleared; the time is with the one without which all is quick."""
    router = Router(offers(a=1000.0, b=1000.0, c=1000.0, slow=1000.0))
    seen, now, due_s = Observed(), 0.0, BACK_WORK * TOKENS * len(BLOCKS) / 1000.0
    for _ in range(20):
        for first, second, took_s in (("a", "slow", 11 * due_s), ("a", "b", 2 * due_s), ("c", "b", 2 * due_s)):
            now += took_s
            seen.trained(leg(first, second, since=now - took_s), TOKENS, router, now, way_s=0.0)
    parts = seen.parts(now)
    assert min(parts, key=parts.__getitem__) == "slow" and parts["slow"] < 0.3
    assert parts.keys() <= {"a", "slow"} and parts.get("a", 1.0) > parts["slow"]


def test_a_chain_is_held_up_by_who_gives_less_than_it_announces_if_that_is_its_slowest():
    """Not by one that is slow as announced, or that is still quicker than the others; of strangers nothing is known."""
    router = Router(offers(liar=10_000.0, a=1000.0, modest=10.0))
    seen = Observed()
    assert not seen.is_held_up(leg("liar", "a", since=0.0).hops, router, 0.0)
    seen["liar"].pace.worked(0.0, due_s=5.0, took_s=100.0, weight=0.1)
    assert seen.is_held_up(leg("liar", "a", since=0.0).hops, router, 0.0)
    assert not seen.is_held_up(leg("liar", "modest", since=0.0).hops, router, 0.0)
    assert not seen.is_held_up(leg("liar", "gone", since=0.0).hops, router, 0.0)
    seen["liar"].pace.worked(0.0, due_s=25.0, took_s=0.0, weight=0.1)
    assert seen.parts(0.0) and not seen.is_held_up(leg("liar", "a", since=0.0).hops, router, 0.0)


def test_a_far_server_is_not_slow():
    """The way to it counts in routes already; where work waits for it, it takes none."""
    router = Router(offers(a=1e6, far=1e6))
    seen = Observed()
    for number in range(100):
        seen.trained(leg("far", since=10.0 * number), TOKENS, router, 10.0 * number + 2.0, way_s=2.0)
    assert not seen.parts(1000.0)
    for number in range(100):
        seen.trained(leg("far", since=10.0 * number), TOKENS, router, 10.0 * number + 2.0, way_s=0.0)
    assert seen.parts(1000.0)["far"] < 0.1


def test_servers_that_no_route_knows_any_more_are_not_measured():
    """What they announced is gone, so there is nothing to compare with."""
    seen = Observed()
    seen.trained(leg("a", "gone", since=0.0), TOKENS, Router(offers(a=1.0)), 100.0, way_s=0.0)
    assert not seen


@pytest.mark.parametrize(("tps", "weight"), [(1000.0, 1.0), (10.0, 1.0), (1e9, 1 / 16)])
def test_who_announces_much_counts_little_in_what_is_typical(tps, weight):
    """As much less as it is drawn more often."""
    seen, router = Observed(), Router(offers(a=tps, b=1000.0, c=1000.0, d=1000.0))
    seen.trained(leg("a", since=0.0), TOKENS, router, 1.0, way_s=0.0)
    assert seen["a"].pace.weight == weight

"""Routes cover each block once, cost what the exact optimum costs, and spread load by free capacity."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.coordinates import Place
from swarm.errors import RouteNotFound
from swarm.flow import EvenDraws
from swarm.route_map import UNKNOWN_RTT_S, Location
from swarm.routing import MIN_FREE, NO_ROOM_S, Need, Offer, Router, free_tps
from swarm.types import BlockRange, Hop
from tests.swarm.route_reference import optimum_s, random_offers

COSTS = st.floats(1e-4, 1.0)


@st.composite
def swarms(draw):
    """Some servers with random spans, speeds and places over up to 12 blocks, which may leave gaps."""
    num_blocks = draw(st.integers(1, 12))
    offers = []
    for index in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, num_blocks - 1))
        blocks = BlockRange(start, draw(st.integers(start + 1, num_blocks)))
        place = Place(position=(draw(st.floats(0.0, 0.3)), 0.0, 0.0), height_s=draw(st.floats(1e-4, 0.1)))
        offers.append(
            Offer(
                peer_id=f"p{index}",
                blocks=blocks,
                block_s=draw(COSTS),
                visit_s=draw(COSTS),
                free_tps=draw(st.floats(0.0, 1e6)),
                location=Location(place=place, tag=index),
            )
        )
    return num_blocks, offers


def offer(peer_id, start=0, end=4, **fields):
    """An offer like any other, but for what is given."""
    return Offer(**{"peer_id": peer_id, "blocks": BlockRange(start, end), "block_s": 0.01, **fields})


def assert_covers(route, offers, blocks):
    by_peer = {it.peer_id: it for it in offers}
    assert [block for hop in route.hops for block in hop.blocks] == list(blocks)
    assert all(by_peer[hop.peer_id].blocks.covers(hop.blocks) for hop in route.hops)


@given(swarms(), st.data())
def test_a_route_covers_each_block_once_at_the_optimal_cost(swarm, data):
    """Whenever coverage exists the search finds a cheapest chain; otherwise it names what is missing."""
    num_blocks, offers = swarm
    start = data.draw(st.integers(0, num_blocks - 1))
    blocks = BlockRange(start, data.draw(st.integers(start + 1, num_blocks)))
    home = data.draw(st.none() | st.just(Place(height_s=0.01)))
    router = Router(offers, home)
    uncovered = [block for block in blocks if not any(block in it.blocks for it in offers)]
    if uncovered:
        with pytest.raises(RouteNotFound) as caught:
            router.fastest(blocks)
        assert list(caught.value.missing) == uncovered
        return
    route = router.fastest(blocks)
    assert_covers(route, offers, blocks)
    assert route.cost_s == pytest.approx(optimum_s(offers, home, blocks))
    assert router.cost_s(route.hops) == pytest.approx(route.cost_s)
    assert_covers(router.spread(blocks, np.random.default_rng(0), num_tokens=1024), offers, blocks)


@pytest.mark.parametrize("seed", range(8))
def test_routes_through_larger_swarms_cost_what_the_optimum_costs(seed):
    """With more servers than the beam is wide, and measured ways that differ from predictions: within a percent."""
    generator = np.random.default_rng(seed)
    offers, home = random_offers(generator, 150, 32, mean_length=6)
    route = Router(offers, home).fastest(BlockRange(0, 32))
    assert_covers(route, offers, range(32))
    assert route.cost_s <= 1.01 * optimum_s(offers, home, BlockRange(0, 32))


def test_shortlists_keep_the_best_of_every_region():
    """1,500 servers of the same blocks: only some may be entered midway, and a near client still gets near ones."""
    generator = np.random.default_rng(1)
    offers, home = random_offers(generator, 1500, 16, mean_length=10)
    router = Router(offers, home)
    assert max(map(len, router._spans.covering)) > max(map(len, router._entries))
    assert router.fastest(BlockRange(0, 16)).cost_s <= 1.01 * optimum_s(offers, home, BlockRange(0, 16))


def test_missing_blocks_are_named_as_ranges():
    """The message says which blocks nobody serves, those behind the last server's too."""
    with pytest.raises(RouteNotFound, match=r"0:2, 4:8"):
        Router([offer("a", 2, 4)]).fastest(BlockRange(0, 8))
    with pytest.raises(RouteNotFound, match=r"0:8"):
        Router([]).fastest(BlockRange(0, 8))


def test_a_penalised_server_is_used_only_when_it_is_the_only_one():
    """Penalties are costs, not bans."""
    pair, alone = Router([offer("failed"), offer("good", block_s=0.05)]), Router([offer("failed")])
    assert pair.fastest(BlockRange(0, 4)).hops[0].peer_id == "failed"
    assert pair.fastest(BlockRange(0, 4), penalties={"failed": 10.0}).hops[0].peer_id == "good"
    assert alone.fastest(BlockRange(0, 4), penalties={"failed": 10.0, "unknown": 1.0}).hops[0].peer_id == "failed"


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"kv_free_tokens": 99}, {"kv_free_tokens": 100}),
        ({"kv_free_tokens": 99}, {"kv_free_tokens": None}),
        ({"is_relayed": True}, {}),
        ({"visit_s": 0.2}, {}),
        ({"location": Location(client_rtt_s=0.2)}, {}),
        ({"location": Location(client_rtt_s=UNKNOWN_RTT_S)}, {"location": Location(client_rtt_s=0.02)}),
    ],
)
def test_soft_costs_decide_between_equal_servers(worse, better):
    """No room, a relay, a queue, a long way: each makes the other one the choice."""
    for offers in (
        [offer("worse", **worse), offer("better", **better)],
        [offer("better", **better), offer("worse", **worse)],
    ):
        route = Router(offers).fastest(BlockRange(0, 4), need=Need(kv_tokens=100))
        assert [hop.peer_id for hop in route.hops] == ["better"]


def test_a_full_server_is_used_where_it_is_the_only_one():
    """It costs what waiting for room costs."""
    router = Router([offer("full", kv_free_tokens=0)])
    difference_s = (
        router.fastest(BlockRange(0, 4), need=Need(kv_tokens=1)).cost_s - router.fastest(BlockRange(0, 4)).cost_s
    )
    assert difference_s == pytest.approx(NO_ROOM_S)


def test_the_replacement_for_a_server_in_mid_chain_is_near_its_neighbours():
    """A gap is filled as seen from the servers around it, not from the client."""
    here, there = Place(position=(0.0, 0.0, 0.0)), Place(position=(0.2, 0.0, 0.0))
    offers = [
        offer("first", 0, 4, location=Location(place=there)),
        offer("near client", 4, 8, location=Location(place=here)),
        offer("near them", 4, 8, location=Location(place=there)),
        offer("last", 8, 12, location=Location(place=there)),
    ]
    router = Router(offers, here)
    assert router.fastest(BlockRange(4, 8)).hops[0].peer_id == "near client"
    assert router.fastest(BlockRange(4, 8), after="first", before="last").hops[0].peer_id == "near them"


def test_measured_ways_count_more_than_predicted_ones_in_both_directions():
    """A ping that either server has announced replaces what their places predict."""
    far = [Place(position=(x, 0.0, 0.0)) for x in (0.0, 0.1, 0.1)]
    offers = [
        offer("first", 0, 4, location=Location(place=far[0], tag=0, client_rtt_s=0.01)),
        offer("predicted", 4, 8, location=Location(place=far[1], tag=1, client_rtt_s=0.01)),
        offer("measured", 4, 8, location=Location(place=far[2], tag=2, pings=[(0, 0.02)], client_rtt_s=0.01)),
    ]
    route = Router(offers).fastest(BlockRange(0, 8))
    assert [hop.peer_id for hop in route.hops] == ["first", "measured"]
    assert route.cost_s == pytest.approx(0.01 + 0.01 + 2 * 0.001 + 8 * 0.01)


@given(swarms(), st.data())
def test_a_replacement_costs_what_the_chain_costs_with_it(swarm, data):
    """Every other server of a hop's blocks is priced like a chain that has it, the cheapest first."""
    num_blocks, offers = swarm
    home = data.draw(st.none() | st.just(Place(height_s=0.01)))
    router = Router(offers, home)
    try:
        hops = router.fastest(BlockRange(0, num_blocks)).hops
    except RouteNotFound:
        return
    index = data.draw(st.integers(0, len(hops) - 1))
    found = router.replacements(hops, index)
    assert {it.hop.peer_id for it in found} == {
        it.peer_id
        for it in offers
        if it.blocks.covers(hops[index].blocks) and it.peer_id not in {hop.peer_id for hop in hops}
    }
    assert [it.cost_s for it in found] == sorted(it.cost_s for it in found)
    for it in found:
        assert it.cost_s == pytest.approx(router.cost_s([*hops[:index], it.hop, *hops[index + 1 :]]))
        assert it.blocks_s == offers[int(it.hop.peer_id[1:])].block_s * len(it.hop.blocks)


def test_a_replacement_has_room_and_penalties_count_against_it():
    """Where a session is, it has its room; where it may go, it needs it. Failures make only others dearer."""
    full, failed, fine = offer("full", kv_free_tokens=10), offer("failed"), offer("fine", kv_free_tokens=100)
    router = Router([offer("used", kv_free_tokens=0), full, failed, fine])
    hops = (Hop(peer_id="used", blocks=BlockRange(1, 3)),)
    found = router.replacements(hops, 0, need=Need(kv_tokens=50), penalties={"failed": 1.0, "used": 1.0})
    assert [it.hop.peer_id for it in found] == ["fine", "failed"]
    assert found[0].cost_s == pytest.approx(router.cost_s(hops))
    assert found[1].cost_s == pytest.approx(router.cost_s(hops) + 1.0)
    assert len(router.replacements(hops, 0, limit=2)) == 2


def test_batches_are_spread_in_proportion_to_free_capacity():
    """Of 3,000 routes over three equal spans, each server gets its share; a full one gets next to nothing."""
    capacity = {"a": 100.0, "b": 300.0, "c": 600.0, "full": 0.0}
    router = Router([offer(peer_id, free_tps=free) for peer_id, free in capacity.items()])
    generator = np.random.default_rng(0)
    counts = Counter(router.spread(BlockRange(0, 4), generator, num_tokens=1024).hops[0].peer_id for _ in range(3000))
    for peer_id, free in capacity.items():
        assert counts[peer_id] / 3000 == pytest.approx(free / 1000.0, abs=0.03)


def test_who_boasts_draws_no_more_than_sixteen_usual_servers():
    """Whatever it announces: else all who train would have it in their chains, and none would train."""
    router = Router([*(offer(f"p{index}", free_tps=100.0) for index in range(16)), offer("boasts", free_tps=1e12)])
    draws = EvenDraws(np.random.default_rng(0))
    peers = [router.spread(BlockRange(0, 4), draws, num_tokens=1024).hops[0].peer_id for _ in range(1000)]
    assert peers.count("boasts") / 1000 == pytest.approx(0.5, abs=0.02)


def test_batches_are_spread_by_what_servers_were_seen_to_have():
    """Of what is believed of their announcements: who boasts without bounds and gives a sixteenth is as others are."""
    offers = [*(offer(f"p{index}", free_tps=100.0) for index in range(9)), offer("boasts", free_tps=1e12)]
    router, draws = Router(offers, parts={"boasts": 1 / 16, "gone": 0.5}), EvenDraws(np.random.default_rng(0))
    peers = [router.spread(BlockRange(0, 4), draws, num_tokens=1024).hops[0].peer_id for _ in range(1000)]
    assert peers.count("boasts") / 1000 == pytest.approx(0.1, abs=0.02)
    assert router.believed_tps("boasts") == 1600.0 and router.usual_tps == 100.0


def test_a_chain_is_as_quick_as_its_slowest_server():
    """By the blocks that this one runs, and what it was seen to have."""
    offers = [offer("a", free_tps=100.0), offer("b", free_tps=400.0)]
    hops = (Hop(peer_id="a", blocks=BlockRange(0, 1)), Hop(peer_id="b", blocks=BlockRange(1, 4)))
    assert Router(offers).throughput_tps(hops) == pytest.approx(100.0)
    assert Router(offers, parts={"b": 0.5}).throughput_tps(hops) == pytest.approx(200.0 / 3)


def test_no_server_is_a_mere_relay_where_a_direct_way_is_slow():
    """Measured ways need not obey the triangle inequality; a hop that runs no block is none."""
    slow, quick = 2.0, 0.001
    pings = [(2, quick), (3, slow)]
    offers = [
        offer("first", 0, 4, location=Location(tag=1, pings=pings, client_rtt_s=quick)),
        offer("between", 2, 6, block_s=0.5, location=Location(tag=2, pings=[(1, quick), (3, quick)])),
        offer("last", 4, 12, location=Location(tag=3, pings=[(1, slow), (2, quick)], client_rtt_s=quick)),
    ]
    hops = Router(offers).fastest(BlockRange(0, 12)).hops
    assert all(hop.blocks.start < hop.blocks.end for hop in hops) and hops[-1].blocks.end == 12


def test_small_batches_stay_near_and_large_ones_use_all_servers():
    """The way to a far server costs as much as the work of many batches at the near one, or next to nothing."""
    near, far = Location(client_rtt_s=0.01), Location(client_rtt_s=0.2)
    router = Router([offer("near", location=near, free_tps=1e5), offer("far", location=far, free_tps=1e5)])
    for num_tokens, part in ((64, 0.01), (100_000_000, 0.5)):
        draws = EvenDraws(np.random.default_rng(0))
        peers = [router.spread(BlockRange(0, 4), draws, num_tokens=num_tokens).hops[0].peer_id for _ in range(1000)]
        assert peers.count("far") / 1000 == pytest.approx(part, abs=0.02)


def test_routes_of_training_stay_in_one_region_where_they_can():
    """Servers of two towns come by turns; each route is within one of them, and each town gets its half."""
    offers = [
        offer(f"{town}{start}", start, start + 4, free_tps=100.0, location=Location(place=Place(position=(x, x, 0.0))))
        for start in (0, 4, 8)
        for town, x in (("a", 0.0), ("b", 0.1))
    ]
    router, draws = Router(offers), EvenDraws(np.random.default_rng(0))
    towns = ["".join(hop.peer_id[0] for hop in router.spread(BlockRange(0, 12), draws, num_tokens=1024).hops)
             for _ in range(100)]  # fmt: skip
    assert set(towns) == {"aaa", "bbb"}
    assert 40 <= towns.count("aaa") <= 60


def test_batches_load_a_swarm_to_nearly_its_max_flow():
    """Servers that span a weak block work there; a range of blocks is balanced for itself."""
    offers = [offer("left", 0, 4, free_tps=800.0), offer("right", 4, 8, free_tps=200.0)]
    router = Router([*offers, offer("wide", 0, 8, free_tps=600.0)])
    for blocks, best in ((BlockRange(0, 8), 200.0), (BlockRange(2, 6), 400.0)):
        draws, work = EvenDraws(np.random.default_rng(0)), Counter()
        for _ in range(1000):
            for hop in router.spread(blocks, draws, num_tokens=1024).hops:
                work[hop.peer_id] += len(hop.blocks)
        loads = [work["left"] / 800.0, work["right"] / 200.0, work["wide"] / 600.0]
        assert 1000 / max(loads) >= 0.9 * best


def test_the_same_draws_give_the_same_routes():
    """Nothing else is random."""
    offers, home = random_offers(np.random.default_rng(0), 30, 24, mean_length=6)
    drawn = [
        [Router(offers, home).spread(BlockRange(0, 24), draws, num_tokens=1024) for _ in range(3)]
        for draws in (EvenDraws(np.random.default_rng(7)), EvenDraws(np.random.default_rng(7)))
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 3


def test_a_busy_server_has_a_part_of_its_capacity_for_others():
    """It shares with whoever comes, so that quick servers are preferred among busy ones, too."""
    assert free_tps(1000.0, 0.0) == 1000.0
    assert free_tps(1000.0, 0.75) == 250.0
    assert free_tps(1000.0, 1.0) == 1000.0 * MIN_FREE > 10 * free_tps(50.0, 1.0)


def test_batches_avoid_penalised_servers_and_use_full_ones_where_they_are_the_only_ones():
    """The same soft rules as for decoding."""
    generator = np.random.default_rng(0)
    router = Router([offer("failed", free_tps=1e6), offer("good", free_tps=1e5)])
    routes = [router.spread(BlockRange(0, 4), generator, num_tokens=64, penalties={"failed": 10.0}) for _ in range(20)]
    assert {route.hops[0].peer_id for route in routes} == {"good"}
    assert Router([offer("full")]).spread(BlockRange(0, 4), generator, num_tokens=64).hops[0].peer_id == "full"

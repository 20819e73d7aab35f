"""The simulated swarm, before its figures are believed: gaps are filled once, the dead linger, rules differ."""

import numpy as np
import pytest

from swarm.pings import PING_TIMEOUT_S, SLOW_S
from swarm.placement import Holding
from swarm.server.mover import GAP_DRAIN_S
from swarm.types import BlockRange, ServerState
from tests.bench import large_swarm, petals_rule
from tests.bench.large_swarm import an_hour, lose_a_quarter
from tests.bench.simulated_look import Look
from tests.bench.swarm_simulation import PERIOD_S, UNLOAD_S, Host, Machine, PetalsRule, SwarmRule, World

LOAD_S = 30.0


def world_of(rule, num_servers, seed=0):
    """Equal servers of a third of 12 blocks each, all of which serve."""
    world = World(12, rule, np.random.default_rng(seed))
    for index in range(num_servers):
        world.join(Machine(name=f"p{index}", length=4, capacity_tps=10.0, load_s=LOAD_S), load_s=0.0)
    world.run(1.0)
    return world


@pytest.mark.parametrize("seed", range(3))
def test_a_gap_is_filled_once_and_within_a_period(seed):
    """All holders of the last block die; of those that could go there one does, and perhaps one more, for balance."""
    world = world_of(SwarmRule(), 6, seed)
    lost = [host.machine.name for host in world.living if 11 in host.blocks]
    world.kill(lost)
    assert world.num_missing
    world.run(world.now + PERIOD_S)
    assert world.num_moves == 1
    world.run(world.now + GAP_DRAIN_S + UNLOAD_S + LOAD_S)
    assert world.num_missing == 0
    world.run(3600.0)
    assert world.num_moves <= 2 and world.num_missing == 0


def test_the_dead_are_seen_until_their_records_expire():
    """And then forgotten; who has asked them in vain knows it before."""
    world = world_of(SwarmRule(watches=False), 3)
    world.kill(["p0"])
    assert world.truth.num_missing == 4 and world.seen().num_missing == 0
    observer = world.hosts["p1"]
    observer.suspects["p0"] = world.hosts["p0"].expires_at(world.now)
    assert world.seen_by(observer).num_missing == 4
    world.run(world.now + 3 * PERIOD_S)
    assert "p0" not in world.hosts


def test_a_server_that_drains_serves_nobody_and_comes_back_elsewhere():
    """It counts again when it has loaded."""
    world = world_of(SwarmRule(), 3)
    host = world.hosts["p0"]
    world.move(host, BlockRange(8, 12), drain_s=10.0)
    assert host.state is ServerState.DRAINING and world.num_missing == 4
    world.run(world.now + 10.0 + UNLOAD_S + LOAD_S)
    assert host.state is ServerState.ONLINE and host.blocks == BlockRange(8, 12)


def test_files_are_fetched_while_a_server_drains():
    """As `Tenancy.leave_for` does: what is left of them when it has let go of its blocks takes time of its own."""
    for fetch_s, served_s in ((25.0, LOAD_S), (5.0, 10.0 + UNLOAD_S + LOAD_S - 5.0)):
        world = World(12, SwarmRule(), np.random.default_rng(0))
        world.join(Machine(name="p", length=4, capacity_tps=1.0, load_s=LOAD_S, fetch_s=fetch_s), load_s=0.0)
        world.run(1.0)
        world.move(world.hosts["p"], BlockRange(8, 12), drain_s=10.0)
        world.run(world.now + served_s - 0.1)
        assert world.hosts["p"].state is ServerState.JOINING
        world.run(world.now + 0.2)
        assert world.hosts["p"].state is ServerState.ONLINE


def test_rounds_of_questions_overlap():
    """A dead neighbour makes it ask the other holder after a second, and both have their three seconds."""
    world = World(12, SwarmRule(watches=False), np.random.default_rng(0))
    for index in range(30):
        world.join(Machine(name=f"p{index}", length=4, capacity_tps=1.0, load_s=LOAD_S), load_s=0.0)
        host = world.hosts[f"p{index}"]
        host.take(BlockRange(4, 8) if index in (1, 2) else BlockRange(0, 4))
    world.run(1.0)
    world.kill(["p1", "p2"])
    ended_at = []
    Look(world, world.hosts["p0"], lambda: ended_at.append(world.now)).begin()
    world.run(20.0)
    assert set(world.hosts["p0"].suspects) == {"p1", "p2"}
    assert PING_TIMEOUT_S <= ended_at[0] - 1.0 <= PING_TIMEOUT_S + SLOW_S + 0.5


def test_the_rule_of_petals_joins_where_least_is_served_and_moves_when_all_would():
    """By the example of its description: the weakest blocks first, ties to the lowest; a third more makes it move."""
    holdings = [Holding(peer_id=name, blocks=BlockRange(0, 4), capacity_tps=10.0) for name in ("a", "b")] + [
        Holding(peer_id="c", blocks=BlockRange(4, 8), capacity_tps=10.0)
    ]
    assert petals_rule.choose(holdings, 4, 12) == BlockRange(8, 12)
    assert petals_rule.choose([], 4, 12) == BlockRange(0, 4)
    generator = np.random.default_rng(0)
    assert petals_rule.should_move(holdings, "a", 12, generator)
    assert petals_rule.should_move(holdings, "b", 12, generator)  # asked at the same time, both go
    assert not petals_rule.should_move(holdings[:2] + holdings[2:], "c", 8, generator)


def test_by_the_rule_of_petals_several_answer_one_loss():
    """The herd that ours avoids: more move than the gap needs."""
    moves = {}
    for name, rule in (("petals", PetalsRule), ("swarm", SwarmRule)):
        world = world_of(rule(), 9)
        world.kill([host.machine.name for host in world.living if host.blocks == BlockRange(8, 12)])
        world.run(3600.0)
        moves[name] = world.num_moves
    assert moves["petals"] > moves["swarm"] >= 1


def test_a_large_swarm_is_whole_after_it_lost_a_quarter(capsys):
    """The benchmark's, with 250 servers and ten minutes: looks are printed, and what is left has routes."""
    hour = an_hour(250, "a quarter died", lose_a_quarter, seed=1, looks_min=(10,))
    before, lost, *later = hour["rows"]
    assert lost["tokens_per_s"] < before["tokens_per_s"] <= 250 * 800 / 126
    assert later[-1]["missing"] == 0 and later[-1]["of_bound"] > 0.7 and later[-1]["route_ms"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(hour["rows"])


def test_the_loss_of_a_region_takes_most_of_those_that_hold_a_block():
    """And nobody else."""
    world = World(large_swarm.NUM_BLOCKS, SwarmRule(), np.random.default_rng(0))
    middle = large_swarm.NUM_BLOCKS // 2
    for index in range(20):
        world.hosts[f"p{index}"] = Host(
            Machine(name=f"p{index}", length=4, capacity_tps=1.0, load_s=LOAD_S),
            BlockRange(middle - 4 * (index % 2), middle + 4 - 4 * (index % 2)),
            phase_s=0.0,
        )
    lost = large_swarm.lose_a_block(world)
    assert len(lost) == 9 and all(middle in world.hosts[name].blocks for name in lost)

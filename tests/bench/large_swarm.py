"""An hour of a large swarm: many die at once, others come and go all the time, and clients route through what is left.

    make_machines ─join─► World (swarm_simulation) ─kill, churn─► look now and then: throughput, gaps, moves, routes

Losses: a random quarter of all servers, which leaves every block as well served as any other; or nine of ten of those
that hold one block, as when the largest owner leaves, so that others must move. Placement and routes are the real ones.
Every server sees all records, and learns of deaths as these expire.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from swarm.route_map import Location
from swarm.routing import Offer, Router
from swarm.types import BlockRange
from tests.bench.machines import TOWNS, make_machines, place_in
from tests.bench.swarm_simulation import SwarmRule, World

NUM_BLOCKS = 126
LONGEST = 22
LOST = 0.25
LOST_OF_BLOCK = 0.9
AT_ONCE = 20
"""Servers that join without seeing each other."""
CHURN = 0.05
"""Part of the servers that dies in an hour, while as many others come."""
SETTLED_S = 120.0
LOOKS_MIN = (5, 20, 60)


def lose_a_quarter(world: World) -> list[str]:
    """Names of a random quarter."""
    names = [host.machine.name for host in world.living]
    return [str(name) for name in world.generator.choice(names, round(LOST * len(names)), replace=False)]


def lose_a_block(world: World) -> list[str]:
    """Names of most of those that hold the block in the middle."""
    names = [host.machine.name for host in world.living if NUM_BLOCKS // 2 in host.blocks]
    return [str(name) for name in world.generator.choice(names, round(LOST_OF_BLOCK * len(names)), replace=False)]


def an_hour(
    num_servers: int,
    name: str,
    lose: Callable[[World], list[str]],
    seed: int,
    looks_min: Sequence[int] = LOOKS_MIN,
) -> dict[str, Any]:
    """One swarm that loses some of its servers; a line for each look is printed as time goes on.

    Args:
        num_servers: at the beginning.
        name: of the loss.
        lose: whom it takes.
        seed: of the swarm.
        looks_min: when it is looked at, in minutes after the loss.
    """
    started = time.perf_counter()
    generator = np.random.default_rng([seed, num_servers])
    machines = make_machines(generator, num_servers, NUM_BLOCKS, longest=LONGEST)
    world = World(NUM_BLOCKS, SwarmRule(watches=False), generator)
    print(f"{num_servers} servers, {NUM_BLOCKS} blocks:{'tokens/s':>16}{'of bound':>10}{'missing':>9}{'moves':>7}"
          f"{'route ms':>10}{'s/token':>9}{'computed s':>12}")  # fmt: skip
    for first in range(0, num_servers, AT_ONCE):
        world.join(*machines[first : first + AT_ONCE], load_s=0.0)
    world.run(SETTLED_S)
    rows = [_look(world, "all are there", started)]
    lost, num_before = lose(world), world.num_moves
    world.kill(lost)
    rows.append(_look(world, name, started))
    _churn(world, round(CHURN * num_servers), 60.0 * looks_min[-1])
    for minutes in looks_min:
        world.run(SETTLED_S + 60.0 * minutes)
        rows.append(_look(world, f"{minutes} minutes later", started))
    return {
        "servers": num_servers,
        "loss": name,
        "rows": rows,
        "moves": round((world.num_moves - num_before) / (num_servers - len(lost)), 4),
    }


def _churn(world: World, count: int, seconds: float) -> None:
    """So many servers die one by one, and as many others come."""
    newcomers = make_machines(world.generator, count, world.num_blocks, longest=LONGEST, prefix="n")
    for machine in newcomers:
        world.at(world.generator.uniform(0.0, seconds), lambda machine=machine: world.join(machine))  # type: ignore[misc]

    def die() -> None:
        living = world.living
        world.kill([living[int(world.generator.integers(len(living)))].machine.name])

    for at_s in world.generator.uniform(0.0, seconds, count):
        world.at(float(at_s), die)


def _look(world: World, when: str, started: float) -> dict[str, Any]:
    """The swarm as it is, and routes through it."""
    truth = world.truth
    bound_tps = sum(it.capacity_tps for it in truth.holdings) / world.num_blocks
    route_ms, token_s = (None, None) if world.num_missing else _routes(_offers(world))
    row = {
        "when": when,
        "tokens_per_s": round(truth.throughput_tps),
        "of_bound": round(truth.throughput_tps / bound_tps, 4),
        "missing": world.num_missing,
        "moves": world.num_moves,
        "route_ms": route_ms,
        "s_per_token": token_s,
        "computed_s": round(time.perf_counter() - started, 1),
    }
    print(f"{row['when']:>28}{row['tokens_per_s']:16}{row['of_bound']:10}{row['missing']:9}{row['moves']:7}"
          f"{row['route_ms'] or '-':>10}{row['s_per_token'] or '-':>9}{row['computed_s']:12}", flush=True)  # fmt: skip
    return row


def _offers(world: World) -> list[Offer]:
    """What those that serve would offer to a client."""
    hosts = {host.machine.name: host.machine for host in world.living}
    return [
        Offer(
            peer_id=it.peer_id,
            blocks=it.blocks,
            block_s=1.0 / it.capacity_tps,
            free_tps=it.capacity_tps,
            location=Location(place=hosts[it.peer_id].place),
        )
        for it in world.truth.holdings
    ]


def _routes(offers: Sequence[Offer]) -> tuple[float, float]:
    """Milliseconds to find a route, after the table was built, and seconds per token of it: from every town."""
    seconds, costs = [], []
    for town in range(len(TOWNS)):
        router = Router(offers, place_in(np.random.default_rng(town), town))
        started = time.perf_counter()
        costs.append(router.fastest(BlockRange(0, NUM_BLOCKS)).cost_s)
        seconds.append(time.perf_counter() - started)
    return round(1e3 * statistics.median(seconds), 1), round(statistics.mean(costs), 4)

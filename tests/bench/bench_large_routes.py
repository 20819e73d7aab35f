"""Routes through 10,000 servers against the exact optimum, by what a client knows, and what it does not.

    python tests/bench/bench_large_routes.py [--servers 10000] [--swarms 3] [--clients 300] [--seed 0]

Each of some random swarms over 126 blocks, in towns, with measured ways that differ from what places predict; clients
in different places. The optimum is found by dynamic programming over (block, server), with all ways between all holders
of adjacent blocks, and chains are judged by the same sums.

    all        the client has the records of all servers: what the search loses (beam, shortlists, cuts)
    newcomer   it has those that `swarm.directory` lets one read who has just joined: what not knowing all costs
    settled    it has been there for minutes: reads what is due every 15 s, and uses what it has read since REMEMBERED_S
    N shards   it has those of so many of the 16 shards
    crowd      many newcomers, one after the other, whose sessions stay; each sees the load that servers have announced
               last, every 20 s, while the optimum knows the load of now

A server of the crowd runs SLOTS sessions at once. It takes up to twice as long for a token when that many are there, as
routes take it to (`swarm.client.peers`), and each is served less often when there are more.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from common import judged, print_report
from exact_routes import ExactRoutes

from swarm.coordinates import Place
from swarm.directory import REMEMBERED_S, shards_due, shards_to_begin
from swarm.registry import NUM_SHARDS, shard_of
from swarm.routing import Offer, Router
from swarm.types import BlockRange, Hop
from tests.swarm.route_reference import random_offers

NUM_BLOCKS = 126
ALL = BlockRange(0, NUM_BLOCKS)
MEAN_LENGTH = 12
SLOTS = 8
PERIOD_S = 20.0
REFRESH_S = 15.0
"""How often a client reads what is due."""
SETTLED_S = 600.0
PARTS = (4, 8)
"""Shards that are known, for the cost of knowing a part."""
ARRIVAL_S = 0.2
"""Between two clients of the crowd."""
JUDGED = 10
"""The last of the crowd, whose routes are compared with the optimum."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=10_000)
    parser.add_argument("--swarms", type=int, default=3, help="random swarms")
    parser.add_argument("--homes", type=int, default=4, help="clients in each, in different places")
    parser.add_argument("--clients", type=int, default=300, help="of the crowd, in the first swarm")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [row for index in range(args.swarms) for row in compare(args.servers, args.homes, [args.seed, index])]
    print(f"{args.servers} servers, {args.swarms} swarms, {len(rows)} routes, cost over the exact optimum's; by all"
          f" records in {statistics.median(row['route_ms'] for row in rows):.1f} ms (median)")  # fmt: skip
    print(f"{'known':>12}{'servers':>9}{'mean':>8}{'worst':>8}")
    for name in rows[0]["over_optimum"]:
        ratios, known = ([row[key][name] for row in rows] for key in ("over_optimum", "known"))
        print(f"{name:>12}{statistics.mean(known):9.0f}{statistics.mean(ratios):8.3f}{max(ratios):8.3f}")
    by_all = [row["over_optimum"]["all"] for row in rows]
    found = crowd(args.servers, args.clients, [args.seed, 0])
    print(f"{args.clients} newcomers one after the other: the last {JUDGED} routes over the optimum's:"
          f" mean {found['mean']:.3f}, worst {found['worst']:.3f};"
          f" at most {found['busiest']} sessions at a server, of {SLOTS}")  # fmt: skip
    targets = {
        "mean_cost": judged(statistics.mean(by_all), "<=", 1.01),
        "worst_cost": judged(max(by_all), "<=", 1.05),
    }
    print_report("large_routes", targets, servers=args.servers, seed=args.seed, rows=rows, crowd=found)


def compare(num_servers: int, num_homes: int, seed: Sequence[int]) -> list[dict[str, Any]]:
    """Routes of some clients through one swarm."""
    generator = np.random.default_rng(seed)
    offers, _ = random_offers(generator, num_servers, NUM_BLOCKS, mean_length=MEAN_LENGTH)
    exact, shards, rows = ExactRoutes(offers, NUM_BLOCKS), by_shard(offers), []
    for _ in range(num_homes):
        home = near_one(generator, offers)
        optimum_s = exact.optimum_s(home)
        router = Router(offers, home)
        started = time.perf_counter()
        best = router.fastest(ALL)
        route_s = time.perf_counter() - started
        views = {"newcomer": newcomer(shards, generator), "settled": settled(shards, generator)}
        for count in PARTS:
            views[f"{count} shards"] = [
                it for shard in generator.permutation(NUM_SHARDS)[:count] for it in shards[shard]
            ]
        found = {name: exact.cost_s(Router(known, home).fastest(ALL).hops, home) for name, known in views.items()}
        found["all"] = exact.cost_s(best.hops, home)
        rows.append({
            "over_optimum": {name: round(cost_s / optimum_s, 4) for name, cost_s in found.items()},
            "known": {**{name: len(known) for name, known in views.items()}, "all": len(offers)},
            "route_ms": round(1e3 * route_s, 2),
        })  # fmt: skip
    return rows


def crowd(num_servers: int, num_clients: int, seed: Sequence[int]) -> dict[str, Any]:
    """Newcomers, one after the other, in a swarm that they fill."""
    generator = np.random.default_rng([*seed, 1])
    offers, _ = random_offers(generator, num_servers, NUM_BLOCKS, mean_length=MEAN_LENGTH)
    index = {offer.peer_id: number for number, offer in enumerate(offers)}
    sessions = np.zeros(num_servers, dtype=np.int64)
    announced = sessions.copy()
    phases_s = generator.uniform(0.0, PERIOD_S, num_servers)
    idle_s = np.array([offer.block_s for offer in offers])
    exact, shards, ratios = ExactRoutes(offers, NUM_BLOCKS), by_shard(offers), []
    for number in range(num_clients):
        now = number * ARRIVAL_S
        is_due = (now - phases_s) % PERIOD_S < ARRIVAL_S
        announced[is_due] = sessions[is_due]
        home = near_one(generator, offers)
        known = [replace(it, block_s=seen_s(it, announced[index[it.peer_id]])) for it in newcomer(shards, generator)]
        hops = Router(known, home).fastest(ALL).hops
        if number >= num_clients - JUDGED:
            exact.block_s = idle_s * slowness(sessions)
            ratios.append(exact.cost_s(hops, home) / exact.optimum_s(home))
        sessions[_servers(hops, index)] += 1
    return {
        "mean": round(statistics.mean(ratios), 4),
        "worst": round(max(ratios), 4),
        "busiest": int(sessions.max()),
        "overfull": int((sessions > SLOTS).sum()),
    }


def seen_s(offer: Offer, num_sessions: int) -> float:
    """What a client takes a block to take, by the load that its server has announced."""
    return offer.block_s * (1.0 + min(1.0, num_sessions / SLOTS))


def slowness(sessions: np.ndarray) -> np.ndarray:
    """How much longer a block takes with so many sessions."""
    return (1.0 + np.minimum(1.0, sessions / SLOTS)) * np.maximum(1.0, sessions / SLOTS)


def near_one(generator: np.random.Generator, offers: Sequence[Offer]) -> Place:
    """A client's place: close to some server."""
    place = offers[int(generator.integers(len(offers)))].location.place
    assert place is not None
    x, y, z = np.array(place.position) + generator.normal(0.0, 0.002, 3)
    return Place(position=(float(x), float(y), float(z)), height_s=0.003, error=0.1)


def by_shard(offers: Sequence[Offer]) -> list[list[Offer]]:
    """Where their records are."""
    shards: list[list[Offer]] = [[] for _ in range(NUM_SHARDS)]
    for offer in offers:
        shards[shard_of(offer.peer_id)].append(offer)
    return shards


def newcomer(shards: Sequence[list[Offer]], generator: np.random.Generator) -> list[Offer]:
    """What a client knows who has just joined: shards in an order of its own, as `swarm.directory` has it read them."""
    order, read_at, known = generator.permutation(NUM_SHARDS).tolist(), [-math.inf] * NUM_SHARDS, []
    for _ in range(2):
        for shard in shards_to_begin(read_at, len(known), order):
            known += shards[shard]
            read_at[shard] = 0.0
    return known


def settled(shards: Sequence[list[Offer]], generator: np.random.Generator) -> list[Offer]:
    """What one knows after minutes: all that were there when their shard was read, not too long ago."""
    read_at, now, num_records = list(-generator.uniform(0.0, 1.0, NUM_SHARDS)), 0.0, sum(map(len, shards))
    while now < SETTLED_S:
        now += REFRESH_S
        for shard in shards_due(read_at, now, REFRESH_S, num_records):
            read_at[shard] = now
    now += generator.uniform(0.0, REFRESH_S)
    return [offer for shard, at in zip(shards, read_at, strict=True) if now - at <= REMEMBERED_S for offer in shard]


def _servers(hops: Sequence[Hop], index: dict[str, int]) -> list[int]:
    return [index[hop.peer_id] for hop in hops]


if __name__ == "__main__":
    main()

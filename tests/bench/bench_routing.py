"""Routes against the exact optimum, and how long one takes in large swarms.

    python tests/bench/bench_routing.py [--swarms 200] [--seed 0]

Quality: random swarms of 20 to 300 servers over 24 to 80 blocks, in towns, with measured ways that differ from what
places predict; the optimum is found by dynamic programming over (block, server) with every way between every pair.
Time: 126 blocks; the table is built once per set of records, a route is one call. Balance: the load that random routes
of training put on the busiest server, next to the largest throughput that the same servers could give (max-flow).
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
from common import judged, percentile, print_report
from flow import max_flow

from swarm.routing import Router
from swarm.types import BlockRange
from tests.swarm.route_reference import optimum_s, random_offers

SIZES = (100, 1_000, 10_000)
NUM_BLOCKS = 126
BATCH_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swarms", type=int, default=200, help="random swarms to compare with the optimum")
    parser.add_argument("--routes", type=int, default=30, help="routes to time per size")
    parser.add_argument("--batches", type=int, default=4000, help="random routes for the balance")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ratios = [ratio_to_optimum(np.random.default_rng([args.seed, index])) for index in range(args.swarms)]
    print(f"cost over the optimum's, {len(ratios)} swarms: mean {statistics.mean(ratios):.5f}, worst {max(ratios):.5f}")
    rows = [timed(size, args.routes, np.random.default_rng([args.seed, size])) for size in SIZES]
    print(f"{'servers':>8}{'table ms':>10}{'route ms: median':>18}{'p95':>8}{'hops':>6}")
    for row in rows:
        print(f"{row['servers']:8}{row['table_ms']:10}{row['route_ms']:18}{row['p95_ms']:8}{row['hops']:6}")
    shares = [balance(np.random.default_rng([args.seed, index, 7]), args.batches) for index in range(8)]
    print(f"throughput of random training routes over the max-flow, 8 swarms: mean {statistics.mean(shares):.3f}")
    targets = {
        "mean_cost": judged(statistics.mean(ratios), "<=", 1.01),
        "worst_cost": judged(max(ratios), "<=", 1.05),
        "route_ms_at_10000": judged(rows[-1]["route_ms"], "<=", 20.0),
    }
    print_report("routing", targets, swarms=args.swarms, seed=args.seed, rows=rows, spread_over_max_flow=shares)


def ratio_to_optimum(generator: np.random.Generator) -> float:
    """Cost of the route that is found over that of the optimum, in one random swarm."""
    num_blocks = int(generator.choice([24, 32, 80]))
    num_servers = int(generator.integers(20, 300))
    mean_length = float(generator.uniform(3, 14))
    offers, home = random_offers(generator, num_servers, num_blocks, mean_length=mean_length)
    blocks = BlockRange(0, num_blocks)
    return Router(offers, home).fastest(blocks).cost_s / optimum_s(offers, home, blocks)


def timed(num_servers: int, num_routes: int, generator: np.random.Generator) -> dict[str, Any]:
    """Milliseconds for the table and for a route."""
    offers, home = random_offers(generator, num_servers, NUM_BLOCKS, mean_length=12)
    started = time.perf_counter()
    router = Router(offers, home)
    table_s = time.perf_counter() - started
    seconds, hops = [], 0
    for _ in range(num_routes):
        started = time.perf_counter()
        route = router.fastest(BlockRange(0, NUM_BLOCKS))
        seconds.append(time.perf_counter() - started)
        hops = len(route.hops)
    return {
        "servers": num_servers,
        "table_ms": round(1e3 * table_s, 1),
        "route_ms": round(1e3 * statistics.median(seconds), 2),
        "p95_ms": round(1e3 * percentile(seconds, 0.95), 2),
        "hops": hops,
    }


def balance(generator: np.random.Generator, num_batches: int) -> float:
    """Throughput at which the busiest server of many random routes is fully loaded, over the max-flow."""
    offers, _ = random_offers(generator, 60, 32, mean_length=8)
    router, blocks = Router(offers), BlockRange(0, 32)
    work = dict.fromkeys((offer.peer_id for offer in offers), 0)
    for _ in range(num_batches):
        for hop in router.spread(blocks, generator, num_tokens=BATCH_TOKENS).hops:
            work[hop.peer_id] += len(hop.blocks)
    busiest_s = max(work[offer.peer_id] / offer.free_tps for offer in offers)
    best = max_flow([offer.blocks for offer in offers], [offer.free_tps for offer in offers], blocks.end)
    return round(num_batches / busiest_s / best, 4)


if __name__ == "__main__":
    main()

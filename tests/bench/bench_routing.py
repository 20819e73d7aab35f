"""Routes against the exact optimum, and how long one takes in large swarms.

    python tests/bench/bench_routing.py [--swarms 200] [--seed 0]

Quality: random swarms of 20 to 300 servers over 24 to 80 blocks, in towns, with measured ways that differ from what
places predict; the optimum is found by dynamic programming over (block, server) with every way between every pair.
Time: 126 blocks; the table is built once per set of records, a route is one call; the first route of training balances
the servers for all that follow. Balance: 60 servers over 32 blocks; the throughput at which the busiest server of many
routes of training is fully loaded, over the largest one that the same servers could give (max-flow): of one client's
routes, and of as many clients with one route each, where what chance makes uneven comes in addition; also of routes
that are each drawn for itself (`race.py`). Crowds: so many clients with one route each, who join at once or in ten
waves, see what is announced after the wave before, and share servers fairly; what they get together, over the max-flow.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
from common import judged, percentile, print_report
from flow import max_flow
from race import RaceRouter
from sharing import crowd

from swarm.flow import EvenDraws
from swarm.routing import Offer, Router
from swarm.types import BlockRange
from tests.swarm.route_reference import optimum_s, random_offers

SIZES = (100, 1_000, 10_000)
NUM_BLOCKS = 126
BATCH_TOKENS = 1024
CROWDS = (15, 60, 240, 960)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swarms", type=int, default=200, help="random swarms to compare with the optimum")
    parser.add_argument("--routes", type=int, default=30, help="routes to time per size")
    parser.add_argument("--balanced", type=int, default=8, help="random swarms for balance and crowds")
    parser.add_argument("--batches", type=int, default=16_000, help="random routes for the balance")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ratios = [ratio_to_optimum(np.random.default_rng([args.seed, index])) for index in range(args.swarms)]
    print(f"cost over the optimum's, {len(ratios)} swarms: mean {statistics.mean(ratios):.5f}, worst {max(ratios):.5f}")
    rows = [timed(size, args.routes, np.random.default_rng([args.seed, size])) for size in SIZES]
    print(f"{'servers':>8}{'table ms':>10}{'route ms: median':>18}{'p95':>8}{'hops':>6}"
          f"{'training: balance ms':>22}{'route ms':>10}{'avoiding 10 %':>15}{'hops':>6}")  # fmt: skip
    for row in rows:
        print(f"{row['servers']:8}{row['table_ms']:10}{row['route_ms']:18}{row['p95_ms']:8}{row['hops']:6}"
              f"{row['balance_ms']:22}{row['spread_ms']:10}{row['avoiding_ms']:15}{row['spread_hops']:6}")  # fmt: skip
    spread = balances(args.seed, args.balanced, args.batches)
    crowds = crowds_over_max_flow(args.seed, args.balanced)
    targets = {
        "mean_cost": judged(statistics.mean(ratios), "<=", 1.01),
        "worst_cost": judged(max(ratios), "<=", 1.05),
        "route_ms_at_10000": judged(rows[-1]["route_ms"], "<=", 20.0),
        "spread_over_max_flow": judged(statistics.mean(spread["one client"]["over_max_flow"]), ">=", 0.9),
        "spread_over_max_flow_many_clients": judged(
            statistics.mean(spread["many clients"]["over_max_flow"]), ">=", 0.9
        ),
    }
    print_report("routing", targets, swarms=args.swarms, seed=args.seed, rows=rows, spread=spread, crowds=crowds)


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
        **timed_spread(router, num_routes, generator),
    }


def timed_spread(router: Router, num_routes: int, generator: np.random.Generator) -> dict[str, Any]:
    """The same of routes for training: the first one, others, and others when a tenth of all servers has failed."""
    penalties = {f"p{index}": 10.0 for index in generator.choice(len(router), len(router) // 10, replace=False)}
    draws, seconds, hops = EvenDraws(generator), [], []
    for number in range(2 * num_routes):
        started = time.perf_counter()
        avoided = None if number < num_routes else penalties
        route = router.spread(BlockRange(0, NUM_BLOCKS), draws, num_tokens=BATCH_TOKENS, penalties=avoided)
        seconds.append(time.perf_counter() - started)
        hops.append(len(route.hops))
    return {
        "balance_ms": round(1e3 * seconds[0], 1),
        "spread_ms": round(1e3 * statistics.median(seconds[1:num_routes]), 2),
        "avoiding_ms": round(1e3 * statistics.median(seconds[num_routes:]), 2),
        "spread_hops": round(statistics.mean(hops[:num_routes]), 1),
    }


def balances(seed: int, num_swarms: int, num_batches: int) -> dict[str, dict[str, list[float]]]:
    """Throughputs over the max-flow in some swarms, and hops, by who draws."""
    print(
        f"{num_batches} random training routes, {num_swarms} swarms:{'over max-flow: mean':>25}{'worst':>8}{'hops':>7}"
    )
    found = {}
    for name, even, rule in (("one client", True, Router), ("many clients", False, Router),
                             ("each for itself", False, RaceRouter)):  # fmt: skip
        shares, hops = [], []
        for index in range(num_swarms):
            generator = np.random.default_rng([seed, index, 7])
            offers, _ = random_offers(generator, 60, 32, mean_length=8)
            share, mean_hops = balance(rule(offers), offers, EvenDraws(generator) if even else generator, num_batches)
            shares.append(share)
            hops.append(mean_hops)
        print(f"{name:>44}{statistics.mean(shares):21.3f}{min(shares):8.3f}{statistics.mean(hops):7.1f}")
        found[name] = {"over_max_flow": shares, "hops": hops}
    return found


def balance(router: Any, offers: list[Offer], draws: Any, num_batches: int) -> tuple[float, float]:
    """Throughput at which the busiest server of many random routes is fully loaded, over the max-flow; hops."""
    work = dict.fromkeys((offer.peer_id for offer in offers), 0)
    num_hops = 0
    for _ in range(num_batches):
        hops = router.spread(BlockRange(0, 32), draws, num_tokens=BATCH_TOKENS).hops
        num_hops += len(hops)
        for hop in hops:
            work[hop.peer_id] += len(hop.blocks)
    busiest_s = max(work[offer.peer_id] / offer.free_tps for offer in offers)
    return round(num_batches / busiest_s / best_of(offers), 4), round(num_hops / num_batches, 2)


def crowds_over_max_flow(seed: int, num_swarms: int) -> list[dict[str, float]]:
    """What crowds of clients get together, over the max-flow, on average over some swarms, by waves and rules."""
    print(
        f"{'clients':>8}{'one wave over max-flow':>24}{'each for itself':>17}{'ten waves':>11}{'each for itself':>17}"
    )
    rows = []
    for num_clients in CROWDS:
        row: dict[str, float] = {"clients": num_clients}
        for num_waves in (1, 10):
            for name, rule in (("now", Router), ("each for itself", RaceRouter)):
                shares = []
                for index in range(num_swarms):
                    generator = np.random.default_rng([seed, index, 7])
                    offers, _ = random_offers(generator, 60, 32, mean_length=8)
                    rates = crowd(rule, offers, 32, num_clients, generator, num_waves=num_waves,
                                  num_tokens=BATCH_TOKENS)  # fmt: skip
                    shares.append(float(rates.sum()) / best_of(offers))
                row[f"{num_waves}, {name}"] = round(statistics.mean(shares), 3)
        print("{:8}{:24}{:17}{:11}{:17}".format(*row.values()))
        rows.append(row)
    return rows


def best_of(offers: list[Offer]) -> float:
    """The max-flow of some servers."""
    return max_flow([offer.blocks for offer in offers], [offer.free_tps for offer in offers], 32)


if __name__ == "__main__":
    main()

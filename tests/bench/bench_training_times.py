"""Does it pay to lie to those who train? Throughput of clients who believe announcements, or what they measure.

    python tests/bench/bench_training_times.py [--swarms 3] [--seed 0]

60 servers over 32 blocks, in spans of 8 or so, their capacities up to a factor of 40 apart; 40 clients train all the
time, in runs of ten minutes on average. One server of ten announces ten times its speed, or none does. What all clients
get together, over the max-flow of what servers really have, in the first half minute and in the last ten minutes of
half an hour; the part of hops that lead over liars; how often a client leaves a chain, and how many honest servers it
takes for slow in the end. Simulated time (`learning.py`), the client's own rules.
"""

import argparse
import statistics
import time

import numpy as np
from common import judged, print_report
from flow import max_flow
from learning import STEP_S, Learnt, learn

from tests.swarm.route_reference import random_offers

NUM_SERVERS, NUM_BLOCKS, NUM_CLIENTS = 60, 32, 40
BOAST = 10.0
RUN_S = 600.0
SECONDS = 1800.0
LAST = round(RUN_S / STEP_S)
BATCH_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swarms", type=int, default=3, help="random swarms")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{'liars':>6}{'clients':>10}{'over max-flow: first':>22}{'last':>7}{'hops over liars':>17}"
          f"{'chains left/h':>15}{'wronged':>9}{'simulated in s':>16}")  # fmt: skip
    rows = [
        row(num_liars, learns, args.seed, args.swarms)
        for num_liars in (0, NUM_SERVERS // 10)
        for learns in (False, True)
    ]
    honest, lied_to = (rows[1]["last"] / rows[0]["last"], rows[3]["last"] / rows[2]["last"])
    targets = {
        "learning_among_the_honest": judged(honest, ">=", 0.98),
        "learning_among_liars": judged(lied_to, ">=", 1.2),
        "among_liars_over_max_flow": judged(rows[3]["last"], ">=", 0.9),
    }
    print_report("training_times", targets, swarms=args.swarms, seed=args.seed, rows=rows)


def row(num_liars: int, learns: bool, seed: int, num_swarms: int) -> dict[str, float]:
    """Means over some swarms."""
    started = time.perf_counter()
    found = [simulated(num_liars, learns, np.random.default_rng([seed, index, 7])) for index in range(num_swarms)]
    means = {
        "first": statistics.mean(float(learnt.rates[0]) / best for learnt, best in found),
        "last": statistics.mean(float(learnt.rates[-LAST:].mean()) / best for learnt, best in found),
        "liar_hops": statistics.mean(float(learnt.liars[-LAST:].mean()) for learnt, _ in found),
        "left_per_hour": statistics.mean(learnt.num_moves / NUM_CLIENTS / SECONDS * 3600 for learnt, _ in found),
        "wronged": statistics.mean(learnt.num_wronged for learnt, _ in found),
    }
    means = {name: round(value, 3) for name, value in means.items()}
    print(f"{num_liars:6}{'measure' if learns else 'believe':>10}{means['first']:22.3f}{means['last']:7.3f}"
          f"{means['liar_hops']:17.3f}{means['left_per_hour']:15.2f}{means['wronged']:9.2f}"
          f"{time.perf_counter() - started:16.1f}", flush=True)  # fmt: skip
    return {"liars": num_liars, "learns": learns, **means}


def simulated(num_liars: int, learns: bool, generator: np.random.Generator) -> tuple[Learnt, float]:
    """What becomes of one swarm, and its max-flow."""
    offers, _ = random_offers(generator, NUM_SERVERS, NUM_BLOCKS, mean_length=8)
    boasts = np.ones(NUM_SERVERS)
    boasts[generator.choice(NUM_SERVERS, num_liars, replace=False)] = BOAST
    best = max_flow([offer.blocks for offer in offers], [offer.free_tps for offer in offers], NUM_BLOCKS)
    learnt = learn(
        offers, boasts, NUM_BLOCKS, num_clients=NUM_CLIENTS, seconds=SECONDS, run_s=RUN_S, num_tokens=BATCH_TOKENS,
        generator=generator, learns=learns,
    )  # fmt: skip
    return learnt, best


if __name__ == "__main__":
    main()

"""Where servers go and when they move, against the best placement there is and against the rule of Petals.

    python tests/bench/bench_placement.py [--swarms 100] [--losses 40] [--servers 10000] [--seed 1]

Quality: random swarms whose servers come one by one; the throughput of the placement that comes out (max-flow, by
linear programming), over what no placement can exceed: all capacity, shared out over all blocks. In small swarms also
over the best placement that mixed-integer programming finds, as in Helix.
Loss: a quarter of the servers dies at once; an hour is simulated, event by event. How long until every block is served
again, beyond loading (180 s for everybody, all but 20 of them to fetch files, or none with --on-disk: files are fetched
while a server drains), and how often do survivors move? Rules were tuned on swarms of seed 0, so
results are those of other seeds. For some of the swarms also how few moves would do, if somebody knew everything and
told each server where to go at once: the fewest for the same throughput, by mixed-integer programming.
Scale: 10,000 servers over 126 blocks in clusters like the world's, of different size, speed and bandwidth, of which a
quarter dies at once and the others come and go; and 1,000 of which nine in ten of those die that hold one block.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from common import judged, print_report
from flow import best_placement, fewest_moves, max_flow

from swarm.placement import Holding, Survey, choose_span, decide_move
from tests.bench import petals_rule
from tests.bench.large_swarm import an_hour, lose_a_block, lose_a_quarter
from tests.bench.machines import make_machines
from tests.bench.swarm_simulation import PERIOD_S, Machine, PetalsRule, SwarmRule, World

PARTS = ("quality", "loss", "scale")
LOAD_S = 180.0
LOST = 0.25
HOUR_S = 3600.0
ORACLE_S = 30.0
"""For one swarm's fewest moves; a bound of them is what is known then."""
RULES: dict[str, Callable[[], SwarmRule | PetalsRule]] = {"swarm": SwarmRule, "petals": PetalsRule}
LOSSES = {"80/24": (80, 24), "80/40": (80, 40), "32/16": (32, 16)}
"""Blocks and servers of the swarms that lose a quarter."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swarms", type=int, default=100, help="random swarms to compare with the optimum")
    parser.add_argument("--optima", type=int, default=8, help="small swarms to solve by programming")
    parser.add_argument("--losses", type=int, default=40, help="swarms of each size that lose a quarter")
    parser.add_argument("--sizes", nargs="+", choices=LOSSES, default=list(LOSSES), help="of those: blocks/servers")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="of those: whose rules")
    parser.add_argument("--on-disk", action="store_true", help="these fetch nothing: a drain is time that is lost")
    parser.add_argument("--oracles", type=int, default=12, help="of these, swarms to find the fewest moves for")
    parser.add_argument("--servers", type=int, default=10_000, help="of the large swarm that loses a quarter")
    parser.add_argument("--uneven", type=int, default=1_000, help="servers of the one that loses most of one block")
    parser.add_argument("--seed", type=int, default=1, help="rules were tuned with 0")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which parts to run")
    args = parser.parse_args()
    targets: dict[str, dict[str, Any]] = {}
    details: dict[str, Any] = {}
    if "quality" in args.parts:
        details["quality"] = report_quality(args.swarms, args.optima, args.seed, targets)
    if "loss" in args.parts:
        details["losses"] = report_losses(args, targets)
    if "scale" in args.parts:
        details["scale"] = an_hour(args.servers, "a quarter died", lose_a_quarter, args.seed)
        details["uneven"] = an_hour(args.uneven, "90 % of a block died", lose_a_block, args.seed)
        targets["moves_per_survivor_at_scale"] = judged(details["scale"]["moves"], "<=", 0.15)
        missing = max(details[name]["rows"][-1]["missing"] for name in ("scale", "uneven"))
        targets["missing_after_an_hour_at_scale"] = judged(missing, "==", 0)
    print_report("placement", targets, seed=args.seed, **details)


def report_quality(num_swarms: int, num_optima: int, seed: int, targets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Random swarms against the bound, small ones against the optimum."""
    pairs = [quality(np.random.default_rng([seed, index])) for index in range(num_swarms)]
    optima = [over_optimum(np.random.default_rng([seed, index, 1])) for index in range(num_optima)]
    found = {"swarm": [pair[0] for pair in pairs], "petals": [pair[1] for pair in pairs], "over_optimum": optima}
    names = {
        "swarm": f"over the bound, {num_swarms} swarms",
        "petals": "the same, rule of Petals",
        "over_optimum": f"over the best found, {num_optima} small swarms",
    }
    print(f"{'throughput':>36}{'mean':>8}{'worst':>8}")
    for key, name in names.items():
        print(f"{name:>36}{statistics.mean(found[key]):8.3f}{min(found[key]):8.3f}")
    targets["mean_quality"] = judged(statistics.mean(found["swarm"]), ">=", 0.9)
    return found


def report_losses(args: argparse.Namespace, targets: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Swarms of some sizes that lose a quarter, by each rule; of the first ones also what an oracle would do."""
    num_oracles = args.oracles
    rows = [
        row
        for size in args.sizes
        for row in lose(size, args.rules, args.losses, num_oracles, args.seed, on_disk=args.on_disk)
    ]
    print(f"{'a quarter lost':>16}{'blocks':>8}{'servers':>8}{'gaps':>6}{'filled s: median':>18}{'worst':>8}"
          f"{'never':>7}{'moves/survivor':>23}{'for gaps':>10}{'of bound':>10}")  # fmt: skip
    for row in rows:
        moves = f"{row['moves']:.3f} ± {row['moves_within']:.3f}"
        print(f"{row['rule']:>16}{row['blocks']:8}{row['servers']:8}{row['gaps']:6}{row['filled_s']:18}"
              f"{row['worst_s']:8}{row['never']:7}{moves:>23}{row['gap_moves']:>10}{row['kept']:10}")  # fmt: skip
    mine = [row for row in rows if row["rule"] == "swarm"]
    if not mine:
        return rows
    for row in mine if num_oracles else ():
        print(f"{row['blocks']} blocks, {row['servers']} servers, the first {num_oracles} swarms: "
              f"{row['oracle_of']} moves/survivor, an oracle needs {row['oracle']} for the same")  # fmt: skip
    targets["worst_fill_beyond_loading_s"] = judged(max(row["worst_s"] for row in mine), "<=", PERIOD_S)
    targets["gaps_never_filled"] = judged(sum(row["never"] for row in mine), "==", 0)
    targets["moves_per_survivor"] = judged(max(row["moves"] for row in mine), "<=", 0.15)
    return rows


def quality(generator: np.random.Generator) -> tuple[float, float]:
    """Throughput over the bound in one random swarm: ours, and that of Petals' rule."""
    num_blocks = int(generator.choice([24, 32, 48, 80]))
    num_servers = int(generator.integers(16, 65))
    machines = make_machines(generator, num_servers, num_blocks, longest=num_blocks // 2, load_s=LOAD_S)
    bound_tps = sum(it.capacity_tps for it in machines) / num_blocks
    found = []
    for arrange in (arrange_ours, arrange_petals):
        holdings = arrange(machines, num_blocks, generator)
        found.append(max_flow([it.blocks for it in holdings], [it.capacity_tps for it in holdings], num_blocks))
    return found[0] / bound_tps, found[1] / bound_tps


def over_optimum(generator: np.random.Generator) -> float:
    """Our throughput over that of the best placement that programming finds in one small swarm."""
    machines = make_machines(generator, 8, 16, longest=8, load_s=LOAD_S)
    spans = arrange_ours(machines, 16, generator)
    capacities = [it.capacity_tps for it in machines]
    best_tps, _ = best_placement([it.length for it in machines], capacities, 16, time_limit_s=5.0)
    return round(max_flow([it.blocks for it in spans], [it.capacity_tps for it in spans], 16) / best_tps, 4)


def arrange_ours(machines: list[Machine], num_blocks: int, generator: np.random.Generator) -> list[Holding]:
    """Servers come one by one, then move one at a time as long as that pays."""
    survey = Survey([], num_blocks)
    for machine in machines:
        blocks = choose_span(survey, machine.length, machine.capacity_tps).blocks
        survey = survey.plus(Holding(peer_id=machine.name, blocks=blocks, capacity_tps=machine.capacity_tps))
    for _ in range(5):
        before = survey
        for own in generator.permutation(np.array(survey.holdings, dtype=object)):
            move = decide_move(survey, own, reload_s=[LOAD_S] * num_blocks, num_sessions=8)
            if move is not None:
                rest = survey.without(own.peer_id)
                survey = rest.plus(Holding(peer_id=own.peer_id, blocks=move.blocks, capacity_tps=own.capacity_tps))
        if survey is before:
            break
    return list(survey.holdings)


def arrange_petals(machines: list[Machine], num_blocks: int, generator: np.random.Generator) -> list[Holding]:
    """The same by the rule of Petals."""
    holdings: dict[str, Holding] = {}

    def place(machine: Machine) -> None:
        holdings.pop(machine.name, None)
        blocks = petals_rule.choose(list(holdings.values()), machine.length, num_blocks)
        holdings[machine.name] = Holding(peer_id=machine.name, blocks=blocks, capacity_tps=machine.capacity_tps)

    for machine in machines:
        place(machine)
    for _ in range(5):
        movers = [
            it for it in machines if petals_rule.should_move(list(holdings.values()), it.name, num_blocks, generator)
        ]
        if not movers:
            break
        for machine in movers:
            place(machine)
    return list(holdings.values())


def lose(
    size: str, rules: Sequence[str], num_swarms: int, num_oracles: int, seed: int, *, on_disk: bool
) -> list[dict[str, Any]]:
    """What follows when a quarter of a swarm dies at once, by each rule; each dies in swarms of its own.

    `moves_within` is half of the 95 % interval of the mean; Petals' rule does not say what a move is for.
    """
    rows = []
    num_blocks, num_servers = LOSSES[size]
    for name in rules:
        run = partial(_lose_once, RULES[name], size, num_oracles if name == "swarm" else 0, seed, on_disk)
        with ProcessPoolExecutor() as pool:
            runs = list(pool.map(run, range(num_swarms)))
        moves = [run["moves"] for run in runs]
        filled = [run["filled_s"] for run in runs if run["had_gap"] and run["filled_s"] is not None]
        rows.append({
            "rule": name,
            "blocks": num_blocks,
            "servers": num_servers,
            "gaps": sum(run["had_gap"] for run in runs),
            "filled_s": round(statistics.median(filled), 1) if filled else 0.0,
            "worst_s": round(max(filled, default=0.0), 1),
            "never": sum(run["had_gap"] and run["filled_s"] is None for run in runs),
            "moves": round(statistics.mean(moves), 3),
            "moves_within": round(1.96 * statistics.stdev(moves) / math.sqrt(num_swarms), 3),
            "gap_moves": round(statistics.mean(run["gap_moves"] for run in runs), 3) if name == "swarm" else "-",
            "kept": round(statistics.mean(run["kept"] for run in runs), 3),
            **_beside_oracle(runs),
        })  # fmt: skip
    return rows


def _beside_oracle(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Moves per survivor of those runs for which an oracle was asked, and the fewest that do."""
    asked = [run for run in runs if run["oracle"] is not None]
    names = {"oracle_of": "moves", "oracle": "oracle"} if asked else {}
    return {name: round(statistics.mean(run[key] for run in asked), 3) for name, key in names.items()}


def _lose_once(
    make: Callable[[], SwarmRule | PetalsRule], size: str, num_oracles: int, seed: int, on_disk: bool, index: int
) -> dict[str, Any]:
    num_blocks, num_servers = LOSSES[size]
    generator = np.random.default_rng([seed, num_blocks, num_servers, index])
    longest = 24 if num_blocks == 80 else 12
    machines = make_machines(generator, num_servers, num_blocks, longest=longest, load_s=LOAD_S, on_disk=on_disk)
    lost = [machine.name for machine in machines[: round(LOST * num_servers)]]
    generator.shuffle(machines)  # who dies is not who came first
    world = World(num_blocks, make(), generator)
    for machine in machines:
        world.join(machine, load_s=0.0)
    world.run(600.0)
    began, num_before, num_gaps_before = world.now, world.num_moves, world.num_gap_moves
    world.kill(lost)
    had_gap, left = world.num_missing > 0, [host.holding for host in world.living]
    world.run(began + HOUR_S)
    covered_at = world.covered_since
    truth, num_survivors = world.truth, num_servers - len(lost)
    oracle = None
    if index < num_oracles:
        oracle = fewest_moves(
            [it.blocks for it in left],
            [it.capacity_tps for it in left],
            num_blocks,
            least_tps=truth.throughput_tps * (1 - 1e-3),
            time_limit_s=ORACLE_S,
        )
    return {
        "had_gap": had_gap,
        "filled_s": None if covered_at is None or not had_gap else float(covered_at - began - LOAD_S),
        "moves": (world.num_moves - num_before) / num_survivors,
        "gap_moves": (world.num_gap_moves - num_gaps_before) / num_survivors,
        "oracle": None if oracle is None else oracle / num_survivors,
        "kept": truth.throughput_tps / (sum(it.capacity_tps for it in truth.holdings) / num_blocks),
    }


if __name__ == "__main__":
    main()

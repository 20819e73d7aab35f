"""The throughput that given servers could give at best, by linear programming, and by the best placement of them.

    max_flow(spans, capacities)     tokens/s through all blocks, for spans that are given
    best_placement(lengths, ...)    an upper bound of it over all placements, and the best placement found, by MILP

Independent of `swarm.placement`: it is what placements are judged by.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array

from swarm.types import BlockRange


def max_flow(spans: Sequence[BlockRange], capacities: Sequence[float], num_blocks: int) -> float:
    """Tokens per second through all blocks, if every server's capacity (block tokens/s) is shared out in the best way.

    The flow of each server through each of its blocks is free as long as their sum stays within its capacity: sessions
    may enter and leave at any block.
    """
    pairs = [(server, block) for server, span in enumerate(spans) for block in span]
    if len({block for _, block in pairs}) < num_blocks:
        return 0.0
    servers, blocks = np.array(pairs).T
    columns, total = np.arange(len(pairs)), len(pairs)
    ones = np.ones(total)
    at_most = coo_array((ones, (servers, columns)), shape=(len(spans), total + 1)).tocsr()
    rows, cols = np.r_[blocks, np.arange(num_blocks)], np.r_[columns, np.full(num_blocks, total)]
    equal = coo_array((np.r_[ones, -np.ones(num_blocks)], (rows, cols)), shape=(num_blocks, total + 1)).tocsr()
    gain = np.r_[np.zeros(total), -1.0]
    result = linprog(gain, A_ub=at_most, b_ub=capacities, A_eq=equal, b_eq=np.zeros(num_blocks), method="highs")
    return float(-result.fun)


def best_placement(
    lengths: Sequence[int], capacities: Sequence[float], num_blocks: int, *, time_limit_s: float
) -> tuple[float, float]:
    """The throughput of the best placement that is found in time, and what no placement can exceed.

    One binary variable per server and first block, as in Helix (ASPLOS 2025).
    """
    starts = [(server, at) for server, length in enumerate(lengths) for at in range(num_blocks - length + 1)]
    index = {pair: column for column, pair in enumerate(starts)}
    num_servers = len(lengths)
    flow = len(starts) + np.arange(num_servers * num_blocks).reshape(num_servers, num_blocks)
    total = len(starts) + num_servers * num_blocks + 1
    entries: list[tuple[int, int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def add(terms: list[tuple[int, float]], at_least: float, at_most: float) -> None:
        entries.extend((len(low), column, value) for column, value in terms)
        low.append(at_least)
        high.append(at_most)

    for server, (length, capacity) in enumerate(zip(lengths, capacities, strict=True)):
        add([(index[server, at], 1.0) for at in range(num_blocks - length + 1)], 1, 1)
        add([(int(column), 1.0) for column in flow[server]], -np.inf, capacity)
        for block in range(num_blocks):
            covering = range(max(0, block - length + 1), min(num_blocks - length, block) + 1)
            add([(int(flow[server, block]), 1.0), *((index[server, at], -capacity) for at in covering)], -np.inf, 0)
    for block in range(num_blocks):
        add([(int(flow[server, block]), 1.0) for server in range(num_servers)] + [(total - 1, -1.0)], 0, 0)
    rows, cols, values = zip(*entries, strict=True)
    upper = np.r_[np.ones(len(starts)), np.full(total - len(starts), np.inf)]
    result = milp(
        np.r_[np.zeros(total - 1), -1.0],
        constraints=LinearConstraint(coo_array((values, (rows, cols)), shape=(len(low), total)).tocsr(), low, high),
        integrality=np.r_[np.ones(len(starts)), np.zeros(total - len(starts))],
        bounds=Bounds(0, upper),
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.005},
    )
    found = float(-result.fun) if result.x is not None else 0.0
    return found, min(float(-result.mip_dual_bound), sum(capacities) / num_blocks)

"""The throughput that given servers could give at best, by linear programming, and by the best placement of them.

    max_flow(spans, capacities)     tokens/s through all blocks, for spans that are given
    best_placement(lengths, ...)    an upper bound of it over all placements, and the best placement found, by MILP
    fewest_moves(spans, ...)        how many servers must move, at least, to reach some throughput, by the same

Independent of `swarm.placement`: it is what placements are judged by.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
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
    """The throughput of the best placement that is found in time, and what no placement can exceed."""
    program = _Program(lengths, capacities, num_blocks)
    gain = np.zeros(program.num_columns)
    gain[program.throughput] = -1.0
    result = program.solve(gain, 0.0, time_limit_s, gap=0.005)
    found = float(-result.fun) if result.x is not None else 0.0
    return found, min(float(-result.mip_dual_bound), sum(capacities) / num_blocks)


def fewest_moves(
    spans: Sequence[BlockRange], capacities: Sequence[float], num_blocks: int, *, least_tps: float, time_limit_s: float
) -> int:
    """How many of these servers must take other blocks for such a throughput: at least so many, if time runs out."""
    program = _Program([len(span) for span in spans], capacities, num_blocks, enough_tps=least_tps)
    cost = np.zeros(program.num_columns)
    for (server, start), column in program.starts.items():
        cost[column] = start != spans[server].start
    result = program.solve(cost, least_tps, time_limit_s, gap=0.0)
    return math.ceil(result.mip_dual_bound - 1e-6)


class _Program:
    """Where servers go and what flows: one binary variable per server and first block, as in Helix (ASPLOS 2025).

    Args:
        lengths: how many blocks each server holds.
        capacities: what each gives, in block tokens/s.
        num_blocks: of the model.
        enough_tps: more than this has to flow through no block.
    """

    def __init__(
        self, lengths: Sequence[int], capacities: Sequence[float], num_blocks: int, *, enough_tps: float = math.inf
    ):
        pairs = [(server, at) for server, length in enumerate(lengths) for at in range(num_blocks - length + 1)]
        self.starts = {pair: column for column, pair in enumerate(pairs)}
        num_servers = len(lengths)
        flow = len(pairs) + np.arange(num_servers * num_blocks).reshape(num_servers, num_blocks)
        self.throughput = len(pairs) + num_servers * num_blocks
        self.num_columns = self.throughput + 1
        self._entries: list[tuple[int, int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []
        for server, (length, capacity) in enumerate(zip(lengths, capacities, strict=True)):
            self._add([(self.starts[server, at], 1.0) for at in range(num_blocks - length + 1)], 1, 1)
            self._add([(int(column), 1.0) for column in flow[server]], -np.inf, capacity)
            for block in range(num_blocks):
                covering = range(max(0, block - length + 1), min(num_blocks - length, block) + 1)
                held = [(self.starts[server, at], -min(capacity, enough_tps)) for at in covering]
                self._add([(int(flow[server, block]), 1.0), *held], -np.inf, 0)
        for block in range(num_blocks):
            passing = [(int(flow[server, block]), 1.0) for server in range(num_servers)]
            self._add([*passing, (self.throughput, -1.0)], 0, 0)

    def solve(self, cost: NDArray[np.float64], least_tps: float, time_limit_s: float, *, gap: float) -> OptimizeResult:
        """The cheapest placement with at least such a throughput."""
        rows, columns, values = zip(*self._entries, strict=True)
        matrix = coo_array((values, (rows, columns)), shape=(len(self._low), self.num_columns)).tocsr()
        num_starts = len(self.starts)
        is_binary = np.arange(self.num_columns) < num_starts
        lower = np.zeros(self.num_columns)
        lower[self.throughput] = least_tps
        return milp(
            cost,
            constraints=LinearConstraint(matrix, self._low, self._high),
            integrality=is_binary.astype(int),
            bounds=Bounds(lower, np.where(is_binary, 1.0, np.inf)),
            options={"time_limit": time_limit_s, "mip_rel_gap": gap},
        )

    def _add(self, terms: list[tuple[int, float]], at_least: float, at_most: float) -> None:
        self._entries.extend((len(self._low), column, value) for column, value in terms)
        self._low.append(at_least)
        self._high.append(at_most)

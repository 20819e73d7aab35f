"""The throughput that given servers could give at best, by linear programming: what routes are judged by."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog
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

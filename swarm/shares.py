"""How much throughput each block of a model gets from the servers that hold it, shared out as fairly as can be.

A server may spend its capacity (block tokens/s) on any of its blocks, since sessions enter and leave at any of them.
The share of a block is what is left for it when all servers help the worst-off blocks first: the lexicographically
largest shares, whose smallest is the throughput of the swarm (its max-flow).

    capacity of each span ─► lowest share of all, and the set of blocks that has it
                                └─► gaps between those blocks, with the servers inside them: each the same again

The lowest share is the smallest quotient, over all sets of blocks, of the capacity that reaches the set and its size.
Servers that don't reach a set lie inside its gaps, so the best set for a guess of the quotient is found by dynamic
programming over gaps, and the guess improves until it stays (Dinkelbach); the first one is the best of all runs of
blocks, which are quickly looked through. Pure.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from swarm.types import BlockRange

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MAX_MEDIANS = 16.0
"""Nobody's capacity counts for more than so many times the median, whatever it claims."""
_ROUNDING = 1e-9
"""Shares that differ by this part of their mean are equal."""


def shares(spans: Sequence[BlockRange], capacities: Sequence[float], num_blocks: int) -> Floats:
    """The share of each block in tokens per second, 0 where nobody holds it."""
    starts = np.fromiter((span.start for span in spans), np.int64, len(spans))
    ends = np.fromiter((span.end for span in spans), np.int64, len(spans))
    return shares_of(starts, ends, np.asarray(capacities, dtype=np.float64), num_blocks)


def shares_of(starts: Ints, ends: Ints, capacities: Floats, num_blocks: int) -> Floats:
    """The same of spans whose first blocks and ends stand in arrays."""
    within = _capacity_within(starts, ends, capacities, num_blocks)
    result = np.zeros(num_blocks)
    ranges = [(0, num_blocks)]
    while ranges:
        start, end = ranges.pop()
        share, blocks = _lowest(within[start : end + 1, start : end + 1])
        result[start + blocks] = share
        ranges += _gaps(start + blocks, start, end)
    return result


def _capacity_within(starts: Ints, ends: Ints, capacities: Floats, num_blocks: int) -> Floats:
    """[start, end]: capacity of the servers whose whole span lies in blocks start:end."""
    exactly = np.zeros((num_blocks + 1, num_blocks + 1))
    np.add.at(exactly, (starts, ends), capacities)
    within: Floats = exactly[::-1].cumsum(axis=0)[::-1].cumsum(axis=1)
    return within


def _lowest(within: Floats) -> tuple[float, NDArray[np.int64]]:
    """The lowest share of a range of blocks, and the largest set of blocks that has it.

    Args:
        within: [start, end] as in `_capacity_within`, for this range alone.
    """
    total, num_blocks = float(within[0, -1]), len(within) - 1
    share, rounding = _lowest_of_runs(within), _ROUNDING * total / num_blocks
    while True:
        blocks = _best_set(within, share + rounding)
        unreached = sum(within[start, end] for start, end in _gaps(blocks, 0, num_blocks))
        quotient = max(0.0, float(total - unreached) / len(blocks))
        if quotient >= share - rounding:
            return quotient, blocks
        share = quotient


def _lowest_of_runs(within: Floats) -> float:
    """The same over sets of consecutive blocks alone: mostly the lowest share of all, and always a good first guess."""
    num_blocks = len(within) - 1
    reaching = within[0, -1] - within[0, :-1, None] - within[1:, -1]
    sizes = np.arange(1, num_blocks + 1) - np.arange(num_blocks)[:, None]
    quotients = np.divide(reaching, sizes, out=np.full_like(reaching, np.inf), where=sizes > 0)
    return max(0.0, float(quotients.min()))


def _best_set(within: Floats, share: float) -> NDArray[np.int64]:
    """The set of blocks with the largest `share` * size + capacity inside its gaps."""
    num_blocks = len(within) - 1
    best = np.zeros(num_blocks + 1)  # of sets whose last block is the one before this boundary
    previous = np.zeros(num_blocks + 1, dtype=np.int64)
    bonus = max(share, np.finfo(float).tiny)
    for boundary in range(1, num_blocks + 1):
        candidates = best[:boundary] + within[:boundary, boundary - 1]
        previous[boundary] = candidates.argmax()
        best[boundary] = candidates[previous[boundary]] + bonus
    boundary = 1 + int((best[1:] + within[1:, num_blocks]).argmax())
    blocks = []
    while boundary > 0:
        blocks.append(boundary - 1)
        boundary = int(previous[boundary])
    return np.array(blocks[::-1])


def _gaps(blocks: NDArray[np.int64], start: int, end: int) -> list[tuple[int, int]]:
    """The ranges of start:end between `blocks`."""
    edges = [start - 1, *map(int, blocks), end]
    return [(left + 1, right) for left, right in pairwise(edges) if left + 1 < right]

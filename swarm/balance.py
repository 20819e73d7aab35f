"""How often each server should run each block, so that random chains together load servers as far as these can carry.

    Holders, capacities ─► chances ─► loads ─► prices of servers ─┐
                              ▲                                   │
                              └───────────────────────────────────┘

A random chain walks from block to block. At each it stays with its server, or hops, which is rare, to another one, the
likelier the more capacity that has. Of all chains, those are rarer whose servers ask higher prices for their blocks;
what that makes of the chances follows from one walk forth and one back. Prices rise where a server would get more than
its capacity if the swarm carried all that it can, and fall, to nothing at last, where it would get less. So chains have
few hops, but as many more as it takes to load no server too much.

These are the dual steps of a flow of least cost, smoothed by entropy (a Schroedinger bridge with limited capacities),
with momentum that begins anew where it leads astray (O'Donoghue and Candes, Adaptive Restart, 2015). A round takes time
in proportion to the pairs of a server and a block of its span, whatever number of chains there is. Pure.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from swarm.shares import shares_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GOAL = 0.97
"""Chains should be able to carry this part of the largest flow ..."""
AIM = 0.985
"""... and prices are made for this part: all of it is reached too slowly."""
EVEN = 0.25
"""Where one block could carry much less than others, those are balanced for this part of the mean over all blocks."""
HOP_COST = 4.0
"""Of chains that are equal otherwise, those with one hop more are rarer by e to this power."""
MAX_ROUNDS = 200
"""What is best by then is used."""
STEP = 0.5
"""A server's chance is corrected by this power of what it has too much or too little ..."""
MAX_CORRECTION = 3.0
"""... whose logarithm is at most this."""
MAX_PRICE = 100.0
LEAST = 1e-9
"""No capacity counts for less than this part of the largest."""


class Holders:
    """Who holds each block.

    Args:
        first: the first block of each server.
        last: the block behind its last one.
        num_blocks: each of which is held by somebody.

    Attributes:
        servers: of all pairs of a block and one of its holders: by block, then by server.
        starts: where the pairs of each block begin, and where all end.
        previous: for each pair that of the same server and the block before; the number of pairs if there is none.
    """

    def __init__(self, first: Ints, last: Ints, num_blocks: int):
        of_blocks = [np.flatnonzero((first <= block) & (block < last)) for block in range(num_blocks)]
        self.first, self.last = first, last
        self.servers = np.concatenate(of_blocks)
        self.starts = np.r_[0, np.cumsum([len(servers) for servers in of_blocks])]
        self.previous: Ints = np.full(len(self.servers), len(self.servers))
        latest = np.zeros(len(first), dtype=np.int64)
        for block, (start, end) in enumerate(pairwise(self.starts)):
            servers = self.servers[start:end]
            goes_on = first[servers] < block
            self.previous[start:end][goes_on] = latest[servers[goes_on]]
            latest[servers] = np.arange(start, end)

    def per_block(self, values: Floats) -> Floats:
        """Sums over the pairs of each block."""
        sums: Floats = np.add.reduceat(values, self.starts[:-1])
        return sums

    def per_server(self, values: Floats) -> Floats:
        """Sums over the pairs of each server."""
        return np.bincount(self.servers, values, len(self.first)).astype(np.float64, copy=False)

    def to_pairs(self, of_block: Floats) -> Floats:
        """A number of each block, for all of its pairs."""
        values: Floats = np.repeat(of_block, np.diff(self.starts))
        return values

    def before(self, values: Floats) -> Floats:
        """For each pair the value of the same server and the block before, else 0."""
        found: Floats = np.append(values, 0.0)[self.previous]
        return found


def balanced_chances(holders: Holders, capacities: Floats) -> Floats:
    """For each pair of `holders` the part of all chains that should run the block on the server.

    Args:
        holders: of all blocks.
        capacities: of servers, in block tokens per second.
    """
    capacities = np.maximum(capacities, LEAST * capacities.max())
    shares = shares_of(holders.first, holders.last, capacities, len(holders.starts) - 1)
    flow = holders.to_pairs(AIM * np.minimum(shares, max(shares.min(), EVEN * shares.mean())))
    capacity = capacities[holders.servers]
    hops = np.exp(-HOP_COST) * capacity / holders.to_pairs(holders.per_block(capacity))
    prices = before = np.zeros(len(capacities))
    best: Floats = hops
    lowest, age = np.inf, 1.0
    for _ in range(MAX_ROUNDS):
        next_age = (1 + np.sqrt(1 + 4 * age**2)) / 2
        ahead = np.maximum(prices + (age - 1) / next_age * (prices - before), 0.0)
        chances = walk_chances(holders, np.exp(-ahead), hops)
        loads = holders.per_server(flow * chances) / capacities
        if loads.max() < lowest:
            best, lowest = chances, loads.max()
        if lowest <= AIM / GOAL:
            break
        change = np.log(np.maximum(loads, np.finfo(float).tiny)).clip(-MAX_CORRECTION, MAX_CORRECTION)
        corrected = (ahead + STEP * change / _mean_lengths(holders, chances)).clip(0.0, MAX_PRICE)
        goes_back = float(((ahead - corrected) * (corrected - prices)).sum()) > 0
        before, prices, age = prices, corrected, 1.0 if goes_back else next_age
    return best


def walk_chances(holders: Holders, stays: Floats, hops: Floats) -> Floats:
    """For each pair the part of all chains that run the block on the server.

    A chain's chance is in proportion to the product of `stays` over its blocks and of `hops` over its hops.

    Args:
        holders: of all blocks.
        stays: of each server.
        hops: of each pair.
    """
    stay, spans = stays[holders.servers], list(pairwise(holders.starts))
    hop = hops * stay
    forth = np.zeros(len(hop) + 1)  # its last place stands for pairs that do not exist
    for start, end in spans:
        arriving = forth[holders.previous[start:end]]
        arriving *= stay[start:end]
        arriving += hop[start:end]
        arriving /= arriving.sum()
        forth[start:end] = arriving
    back = np.ones(len(hop) + 1)
    for (start, end), (start_before, _) in zip(spans[:0:-1], spans[-2::-1], strict=True):
        leading = back[start:end]
        leading /= leading.max()
        back[start_before:start] = hop[start:end] @ leading
        back[holders.previous[start:end]] += stay[start:end] * leading
    chances: Floats = forth[:-1] * back[:-1]
    chances /= holders.to_pairs(holders.per_block(chances))
    return chances


def _mean_lengths(holders: Holders, chances: Floats) -> Floats:
    """How many blocks chains stay with each server, about."""
    arrivals = holders.per_server(np.maximum(chances - holders.before(chances), 0.0))
    return holders.per_server(chances) / np.maximum(arrivals, np.finfo(float).tiny)

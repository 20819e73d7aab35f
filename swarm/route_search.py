"""The search behind `swarm.routing`: the cheapest chain over a range of blocks, in arrays, for ten thousand servers.

    Spans: who may be entered where ─┐
    Costs: block_s, visit_s          ├─► cheapest ─► [(server, first block), ...]
    Ways: from, between, to          ─┘

A server's cost grows evenly with every block, so all that must be known of a server that a chain has entered is one
number, the *base*: what the chain would have cost had the server run every block from 0 on. Leaving at block b costs
base + b * block_s, wherever it was entered, and a cheaper entry just lowers the base. Two servers hand over where the
first one's span ends or the second one's begins, since any point between is a mixture of the two. What is left is to
choose who sends to whom: from the BEAM cheapest chains at each boundary to everybody who can go on. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from swarm.types import BlockRange

BEAM = 24
"""Chains kept at each boundary that end there, and as many that could end there."""
SHORTLIST = 96
"""Servers that a chain may enter at one boundary, besides those whose spans begin there."""
CELL_S = 0.02
"""The shortlist has somebody from every region of this size."""
TYPICAL_WAY_S = 0.01
"""What the shortlist takes for the way to a server."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Ways(Protocol):
    """One-way times between the parts of a chain."""

    def from_start(self, servers: Ints) -> Floats:
        """From where the range's inputs are to each server."""

    def between(self, senders: Ints, receivers: Ints) -> Floats:
        """[senders, receivers]."""

    def to_end(self, servers: Ints) -> Floats:
        """From each server to where the range's outputs are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What each server takes for a token."""

    block_s: Floats
    visit_s: Floats


class Spans:
    """Who serves what, by boundaries.

    Args:
        first: the first block of each server.
        last: the block behind its last one.
    """

    def __init__(self, first: Ints, last: Ints):
        self.first, self.last = first, last
        self.num_blocks = int(last.max()) if len(last) else 0
        blocks = range(self.num_blocks)
        self.starting = [np.flatnonzero(first == block) for block in blocks]
        self.ending = [np.flatnonzero(last == block) for block in blocks]
        self.around = [np.flatnonzero((first < block) & (block < last)) for block in blocks]

    @cached_property
    def covering(self) -> list[Ints]:
        """The servers that hold each block."""
        return [np.concatenate(parts) for parts in zip(self.starting, self.around, strict=True)]

    def missing(self, blocks: BlockRange) -> list[int]:
        """Blocks that nobody serves."""
        return [block for block in blocks if block >= self.num_blocks or not len(self.covering[block])]

    def shortlists(self, costs: Costs, position: Floats) -> list[Ints]:
        """The servers that a chain may enter at each boundary: all, or the most promising ones of each region."""
        cells = np.unique(np.floor(position / CELL_S), axis=0, return_inverse=True)[1].reshape(-1)
        return [self._shortlist(block, covering, costs, cells) for block, covering in enumerate(self.covering)]

    def _shortlist(self, block: int, covering: Ints, costs: Costs, cells: Ints) -> Ints:
        if len(covering) <= SHORTLIST:
            return covering
        starting, covering = self.starting[block], self.around[block]
        length = self.last[covering] - block
        per_block_s = (costs.visit_s[covering] + TYPICAL_WAY_S) / length + costs.block_s[covering]
        order = np.lexsort((per_block_s, cells[covering]))
        sorted_cells = cells[covering[order]]
        starts = np.flatnonzero(np.r_[True, sorted_cells[1:] != sorted_cells[:-1]])
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
        best = order[np.lexsort((per_block_s[order], rank))[:SHORTLIST]]
        return np.concatenate((starting, covering[best]))


def cheapest(
    spans: Spans, costs: Costs, ways: Ways, entries: Sequence[Ints], blocks: BlockRange
) -> tuple[float, list[tuple[int, int]]]:
    """The cheapest chain that is found.

    Args:
        spans: who serves what; every one of `blocks` is served by somebody.
        costs: of each server.
        ways: to, between and from servers.
        entries: whom a chain may enter at each boundary.
        blocks: to be covered.

    Returns:
        Its cost in seconds, and for each of its hops the server and the first block that it runs there.
    """
    chains = _Chains(len(spans.first), costs)
    first = spans.covering[blocks.start]
    chains.enter(first, ways.from_start(first) + chains.entry_s(first, blocks.start), None, blocks.start)
    for boundary in range(blocks.start + 1, blocks.end):
        # in this order: who is entered here hands nothing over here, as a mere relay where a direct way is slow
        chains.hand_over(boundary, spans.around[boundary], spans.starting[boundary], ways)
        chains.hand_over(boundary, spans.ending[boundary], entries[boundary], ways)
    last = spans.covering[blocks.end - 1]
    total_s = chains.base_s[last] + blocks.end * costs.block_s[last] + ways.to_end(last)
    winner = int(np.argmin(total_s))
    return float(total_s[winner]), chains.trace(int(chains.node[last[winner]]))


class _Chains:
    """All chains of a search: for each server its base and the node of its cheapest entry, and all nodes there were."""

    def __init__(self, num_servers: int, costs: Costs):
        self.base_s = np.full(num_servers, np.inf)
        self.node: Ints = np.full(num_servers, -1)
        self._costs = costs
        self._num_nodes = 0
        self._nodes: list[tuple[Ints, Ints, int]] = []
        """(servers, nodes of the hops before, boundary) of each lot of entries."""

    def hand_over(self, boundary: int, senders: Ints, receivers: Ints, ways: Ways) -> None:
        """Let the cheapest chains at `senders` go on at `receivers` where that is cheaper than what was known."""
        if not len(senders) or not len(receivers):
            return
        cost_s = self.base_s[senders] + boundary * self._costs.block_s[senders]
        if len(senders) > BEAM:
            best = np.argpartition(cost_s, BEAM)[:BEAM]
            senders, cost_s = senders[best], cost_s[best]
        entry_s = self.entry_s(receivers, boundary)
        is_worth_it = (cost_s.min() + entry_s < self.base_s[receivers]).nonzero()[0]
        if not len(is_worth_it):
            return
        receivers, entry_s = receivers[is_worth_it], entry_s[is_worth_it]
        arrival_s = ways.between(senders, receivers)
        arrival_s += cost_s[:, None]
        chosen = arrival_s.argmin(axis=0)
        entry_s += arrival_s[chosen, np.arange(len(receivers))]
        self.enter(receivers, entry_s, self.node[senders[chosen]], boundary)

    def enter(self, servers: Ints, base_s: Floats, nodes_before: Ints | None, boundary: int) -> None:
        """Chains arrive at `servers` and would give them these bases; each keeps the one that costs least."""
        is_better = (base_s < self.base_s[servers]).nonzero()[0]
        servers = servers[is_better]
        before: Ints = np.full(len(servers), -1) if nodes_before is None else nodes_before[is_better]
        self.base_s[servers] = base_s[is_better]
        self.node[servers] = np.arange(self._num_nodes, self._num_nodes + len(servers))
        self._num_nodes += len(servers)
        self._nodes.append((servers, before, boundary))

    def entry_s(self, servers: Ints, boundary: int) -> Floats:
        """What entering here adds to an arrival, to give the base."""
        entry_s: Floats = self._costs.visit_s[servers] - boundary * self._costs.block_s[servers]
        return entry_s

    def trace(self, node: int) -> list[tuple[int, int]]:
        """The hops that lead to a node: servers and where they were entered."""
        servers = np.concatenate([servers for servers, _, _ in self._nodes])
        before = np.concatenate([before for _, before, _ in self._nodes])
        boundaries = np.repeat([at for _, _, at in self._nodes], [len(servers) for servers, _, _ in self._nodes])
        hops = []
        while node >= 0:
            hops.append((int(servers[node]), int(boundaries[node])))
            node = int(before[node])
        return hops[::-1]

"""Chains for training: a random one for each number from 0 to 1, which together load servers as far as they can carry.

    spans, capacities ─► swarm.balance: chances ─► Flow ─ chain(0.618...) ─► servers, where they begin

The chances of servers at each block leave open who follows whom. A chain stays with its server for as long as these
allow: where the server's chance gets smaller, some leave it, for one whose chance gets larger. Think of a bar as wide
as the chance for each server, in the order of their numbers, and of a chain as a point in one. What a boundary cuts off
the bars of one block is added, in the same order, to the bars of the next. So servers hand over to others of about the
same number, and points that are spread evenly load servers evenly. Pure.
"""

from functools import cached_property
from itertools import pairwise

import numpy as np

from swarm.balance import Floats, Holders, Ints, balanced_chances

GOLDEN = (5**0.5 - 1) / 2
"""Steps of this length leave no large gap on a circle, however many were made."""
LEAST_CHANCE = 1e-200
"""Of a server that others leave no work, so that it is used when all others are not wanted."""


class EvenDraws:
    """Numbers from 0 to 1 that are spread evenly, those of a few draws, too: steps round a circle from a random place.

    Args:
        generator: for the place.
    """

    def __init__(self, generator: np.random.Generator):
        self._at = generator.random()

    def random(self) -> float:
        """The next one."""
        self._at = (self._at + GOLDEN) % 1.0
        return self._at


class Flow:
    """A chain for each number from 0 to 1.

    Args:
        holders: of all blocks.
        chances: for each of their pairs the part of all chains that run the block on the server.
    """

    def __init__(self, holders: Holders, chances: Floats):
        self.holders, self.chances = holders, chances

    @classmethod
    def balanced(cls, first: Ints, last: Ints, capacities: Floats, num_blocks: int) -> "Flow":
        """Chains that can carry nearly as much as all servers together, with few hops.

        Args:
            first: the first block of each server.
            last: the block behind its last one.
            capacities: in block tokens per second.
            num_blocks: each of which is held by somebody.
        """
        holders = Holders(first, last, num_blocks)
        return cls(holders, balanced_chances(holders, capacities))

    def avoiding(self, costs: Floats) -> "Flow":
        """The same, using some servers less, e times at a cost of 1, where others have their blocks."""
        holders = self.holders
        least = np.minimum.reduceat(costs[holders.servers], holders.starts[:-1])
        chances = np.maximum(self.chances, LEAST_CHANCE) * np.exp(holders.to_pairs(least) - costs[holders.servers])
        return Flow(holders, chances / holders.to_pairs(holders.per_block(chances)))

    def chain(self, at: float) -> list[tuple[int, int]]:
        """The hops of a chain: each one's server, and the first block that it runs there.

        Args:
            at: from 0 to below 1.
        """
        server, place = self._boundaries[0].enter(at)
        hops = [(server, 0)]
        for block, boundary in enumerate(self._boundaries[1:], start=1):
            server, place = boundary.cross(server, place)
            if server != hops[-1][0]:
                hops.append((server, block))
        return hops

    @cached_property
    def _boundaries(self) -> "list[_Boundary]":
        """Where each block begins."""
        parts = [slice(start, end) for start, end in pairwise(self.holders.starts)]
        bars = [(self.holders.servers[part], self.chances[part]) for part in parts]
        nobody = np.empty(0, dtype=np.int64), np.empty(0)
        return [_Boundary(before, after) for before, after in pairwise([nobody, *bars])]


class _Boundary:
    """Where chains go on between two blocks.

    Args:
        before: who runs the first one, ascending, and how often.
        after: the same of the second one.
    """

    def __init__(self, before: tuple[Ints, Floats], after: tuple[Ints, Floats]):
        self._servers = np.union1d(before[0], after[0])
        widths_before, widths = np.zeros((2, len(self._servers)))
        widths_before[np.searchsorted(self._servers, before[0])] = before[1]
        widths[np.searchsorted(self._servers, after[0])] = after[1]
        self._kept = np.minimum(widths_before, widths)
        self._cut = widths_before - self._kept
        self._cut_ends = self._cut.cumsum()
        added = widths - self._kept
        self._added_ends = (added if added.any() else widths).cumsum()

    def cross(self, server: int, place: float) -> tuple[int, float]:
        """Where a chain goes on that is at this place in the bar of a server of the first block."""
        index = int(np.searchsorted(self._servers, server))
        if place < self._kept[index] or self._cut[index] == 0.0:
            return server, place
        return self.enter(_start(self._cut_ends, index) + place - float(self._kept[index]))

    def enter(self, place: float) -> tuple[int, float]:
        """The server that gets this place of all that is added, and where it lies in that one's bar."""
        place = min(place, float(np.nextafter(self._added_ends[-1], 0.0)))
        index = int(np.searchsorted(self._added_ends, place, side="right"))
        return int(self._servers[index]), float(self._kept[index]) + place - _start(self._added_ends, index)


def _start(ends: Floats, index: int) -> float:
    """Where a part begins whose predecessor ends there."""
    return float(ends[index - 1]) if index else 0.0
